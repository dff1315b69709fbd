"""For whoever runs the service: is it well, what is it doing, which policy decides."""

from __future__ import annotations

import asyncio
import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import BaseModel

from flexirl.errors import UserError
from flexirl.policies.deploy.learned import load_policy
from flexirl.policies.interface.policy import Policy
from flexirl.policies.registry import PRETRAINED, make_policy
from flexirl.policies.rules import rule_names
from flexirl.serving.bodies import described, read_json
from flexirl.serving.errors import ApiError
from flexirl.serving.local import LocalBackend
from flexirl.serving.service import Service

router = APIRouter()
_PAGE = Path(__file__).parent / "status.html"
POLICIES = (*rule_names(), PRETRAINED)  # by name; others are sent as files


class PolicyBody(BaseModel):
    """A rule by its name, or the policy before; a file is sent as it is."""

    name: str | None = None
    back: Literal[True] | None = None


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _admin(request: Request) -> Service:
    """The service, for whoever may do everything."""
    service = _service(request)
    if not service.tenants.of(request.headers.get("authorization")).admin:
        raise ApiError(403, "This takes an admin key.", code="forbidden")
    return service


@router.get("/health")
async def health(request: Request) -> Response:
    """200 if requests can be answered, 503 and why if not."""
    trouble = _service(request).backend.trouble
    return JSONResponse({"status": "ok" if trouble is None else "down", "trouble": trouble}, 503 if trouble else 200)


@router.get("/version")
async def show_version() -> dict[str, str]:
    """Of FlexiRL."""
    return {"version": version("flexirl")}


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """For Prometheus."""
    return Response(_service(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/status", response_class=HTMLResponse)
async def status_page() -> str:
    """A page that shows `/status.json` as it changes."""
    return _PAGE.read_text(encoding="utf-8")


@router.get("/status.json")
async def status(request: Request) -> dict[str, Any]:
    """What the service does just now."""
    service = _admin(request)
    rows = await asyncio.to_thread(service.store.open_batches)
    batches = [
        {"id": row["id"], "tenant": row["tenant"], "status": row["status"], "total": row["total"],
         "completed": row["completed"], "failed": row["failed"], "running": service.runner.running(row["id"]),
         "expires_at": row["expires_at"]}
        for row in rows
    ]  # fmt: skip
    return {
        "model": service.backend.models[0], "trouble": service.backend.trouble, "now": service.store.now(),
        "engine": service.backend.figures(), "served": service.metrics.summary(), "batches": batches,
        "lines_per_s": service.runner.lines_per_s,
    }  # fmt: skip


@router.get("/admin/policy")
async def policy(request: Request) -> dict[str, Any]:
    """Which one is in charge, and which there are."""
    backend = _local(_admin(request))
    before = backend.previous_policy
    return {"policy": backend.policy.name, "previous": before.name if before else None, "known": list(POLICIES)}


@router.post(
    "/admin/policy",
    openapi_extra=described(PolicyBody),
)
async def deploy(request: Request) -> dict[str, Any]:
    """Puts another policy in charge: an .onnx file as the body, or {"name": a rule} or {"back": true} as JSON."""
    service = _admin(request)
    backend, data = _local(service), await request.body()
    if request.headers.get("content-type", "").startswith("application/json"):
        chosen = _named(backend, read_json(data))
    else:
        chosen = await asyncio.to_thread(_sent, service.folder, data)
    backend.swap_policy(chosen)
    return await policy(request)


def _local(service: Service) -> LocalBackend:
    if not isinstance(service.backend, LocalBackend):
        raise ApiError(400, "The engine is another server's; deploy the policy there.")
    return service.backend


def _named(backend: LocalBackend, fields: Any) -> Policy:
    if fields == {"back": True}:
        if backend.previous_policy is None:
            raise ApiError(409, "There is no policy to go back to.")
        return backend.previous_policy
    if not isinstance(fields, dict) or set(fields) != {"name"} or fields["name"] not in POLICIES:
        raise ApiError(400, f'Send {{"name": ...}} with one of {", ".join(POLICIES)}, or {{"back": true}}.')
    return make_policy(fields["name"])


def _sent(folder: Path, data: bytes) -> Policy:
    """The policy in a file that was sent; raises ApiError if it does not fit this version."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{hashlib.sha256(data).hexdigest()[:16]}.onnx"
    path.write_bytes(data)
    try:
        return load_policy(path)
    except UserError as error:
        path.unlink()
        raise ApiError(400, str(error).replace(str(path), "The file")) from None
