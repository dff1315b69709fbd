"""Deferred requests: files, and batches of the requests in them, as OpenAI defines both."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import FormData, UploadFile

from flexirl.errors import UserError
from flexirl.serving.batch_input import window_s
from flexirl.serving.bodies import CHAT, TEXT, described, of_validation, read_json
from flexirl.serving.errors import ApiError
from flexirl.serving.service import Service
from flexirl.serving.tenants import Tenant
from flexirl.serving.views import batch_object, file_object, page
from flexirl.text import is_text

router = APIRouter(prefix="/v1")
PURPOSES = ("batch", "assistants", "fine-tune", "vision", "user_data", "evals")
_EXPIRES = (3600, 30 * 86400)  # seconds, as OpenAI has it
_UPLOAD = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": list(PURPOSES)},
        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer", "minimum": _EXPIRES[0], "maximum": _EXPIRES[1]},
    },
}
_NAME = 255  # characters of a file's name


class ExpiresAfter(BaseModel):
    """When files of an output go."""

    model_config = ConfigDict(extra="forbid", strict=True)

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=_EXPIRES[0], le=_EXPIRES[1])]


class BatchBody(BaseModel):
    """What a batch is made of."""

    model_config = ConfigDict(extra="forbid", strict=True)

    input_file_id: Annotated[str, Field(max_length=64)]
    endpoint: Literal["/v1/chat/completions", "/v1/completions"]
    completion_window: Annotated[str, Field(max_length=32)]
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None = None
    output_expires_after: ExpiresAfter | None = None


assert set(BatchBody.model_fields["endpoint"].annotation.__args__) == {CHAT, TEXT}  # type: ignore[union-attr]


def _who(request: Request) -> tuple[Service, Tenant]:
    service: Service = request.app.state.service
    return service, service.tenants.of(request.headers.get("authorization"))


# --------------------------------------------------------------------------------------------------------- files


@router.post(
    "/files",
    openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _UPLOAD}}}},
)
async def upload(request: Request) -> dict[str, Any]:
    """Takes a file in; a form with `file`, `purpose`, and perhaps `expires_after[seconds]`."""
    service, tenant = _who(request)
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise ApiError(400, "A file is sent as multipart/form-data.", param="file")
    async with request.form(max_files=1, max_fields=16) as form:
        file, purpose = form.get("file"), form.get("purpose")
        if not isinstance(file, UploadFile):
            raise ApiError(400, "file is missing.", code="missing_required_parameter", param="file")
        if purpose not in PURPOSES:
            raise ApiError(400, f"purpose={str(purpose)[:40]!r} is none of {', '.join(PURPOSES)}.", param="purpose")
        name = (file.filename or "file").replace("\x00", "")[:_NAME]
        if not is_text(name):
            raise ApiError(400, "The file's name is not UTF-8.", param="file")
        row = await asyncio.to_thread(
            service.store.add_file, tenant.name, str(purpose), name, file.file, _expires_s(form), service.most_bytes
        )
    return file_object(row)


def _expires_s(form: FormData) -> int | None:
    given = form.get("expires_after[seconds]")
    if given is None:
        return None
    low, high = _EXPIRES
    if not isinstance(given, str) or not given.isascii() or not given.isdigit() or not low <= int(given[:9]) <= high:
        raise ApiError(400, f"expires_after.seconds is from {low} to {high}.", param="expires_after")
    if form.get("expires_after[anchor]", "created_at") != "created_at":
        raise ApiError(400, "expires_after.anchor is created_at.", param="expires_after")
    return int(given)


@router.get("/files")
def list_files(
    request: Request,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: Literal["batch", "batch_output", "assistants", "fine-tune", "vision", "user_data", "evals"] | None = None,
) -> Any:
    """A page of files."""
    service, tenant = _who(request)
    rows, more = service.store.list_files(tenant.name, after, limit, order == "desc", purpose)
    return page(rows, more, file_object)


@router.get("/files/{file_id}")
def file(request: Request, file_id: str) -> dict[str, Any]:
    """What there is to know of a file."""
    service, tenant = _who(request)
    return file_object(service.store.file(tenant.name, file_id))


@router.get("/files/{file_id}/content", response_class=FileResponse)
def content(request: Request, file_id: str) -> Response:
    """What is in it."""
    service, tenant = _who(request)
    row = service.store.file(tenant.name, file_id)
    return FileResponse(service.store.path(row["id"]), media_type="application/octet-stream")


@router.delete("/files/{file_id}")
def delete_file(request: Request, file_id: str) -> dict[str, Any]:
    """Forgets it."""
    service, tenant = _who(request)
    service.store.delete_file(tenant.name, file_id)
    return {"id": file_id, "object": "file", "deleted": True}


# ------------------------------------------------------------------------------------------------------- batches


@router.post("/batches", openapi_extra=described(BatchBody))
async def create_batch(request: Request) -> dict[str, Any]:
    """Has the requests of a file answered by and by."""
    service, tenant = _who(request)
    try:
        body = BatchBody.model_validate(read_json(await request.body()))
        seconds = window_s(body.completion_window)
    except ValidationError as error:
        raise of_validation(error) from None
    except UserError as error:
        raise ApiError(400, str(error), param="completion_window") from None
    if body.metadata is not None and len(body.metadata) > 16:
        raise ApiError(400, "metadata has 16 entries at most.", param="metadata")
    expires = body.output_expires_after
    row = await asyncio.to_thread(
        service.store.add_batch, tenant.name, body.input_file_id, body.endpoint, body.completion_window, seconds,
        body.metadata, None if expires is None else expires.seconds,
    )  # fmt: skip
    service.runner.wake()
    return batch_object(row)


@router.get("/batches")
def list_batches(request: Request, after: str | None = None, limit: Annotated[int, Query(ge=1, le=100)] = 20) -> Any:
    """A page of batches, the newest first."""
    service, tenant = _who(request)
    rows, more = service.store.list_batches(tenant.name, after, limit)
    return page(rows, more, batch_object)


@router.get("/batches/{batch_id}")
def batch(request: Request, batch_id: str) -> dict[str, Any]:
    """How far a batch has come."""
    service, tenant = _who(request)
    return batch_object(service.store.batch(tenant.name, batch_id))


@router.post("/batches/{batch_id}/cancel")
async def cancel_batch(request: Request, batch_id: str) -> dict[str, Any]:
    """Has no further line answered; what is answered is kept."""
    service, tenant = _who(request)
    row = await asyncio.to_thread(service.store.ask_to_cancel, tenant.name, batch_id)
    service.runner.wake()
    return batch_object(row)
