"""Who may ask: API keys, kept as hashes, whose each is, and how much of it each may ask for.

A key is 32 random bytes, so its plain SHA-256 gives nothing away. Without any key, whoever reaches the server may do
everything; it then listens on this machine alone.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path

from flexirl.errors import UserError
from flexirl.serving.errors import ApiError

EVERYONE = "default"
KEYS = "keys.json"  # in the data folder of a server
_PREFIX = "fx-"


@dataclass(frozen=True)
class Tenant:
    """admin: may also change the policy and see everything; requests_per_minute, queued_tokens: limits, None for none;
    digest: of the key, empty where none is needed."""

    name: str
    digest: str = ""
    admin: bool = False
    requests_per_minute: int | None = None
    queued_tokens: int | None = None


class Tenants:
    """The tenants in a file of `add_key`; path: None or one that does not exist: everyone is one tenant."""

    def __init__(self, path: Path | None) -> None:
        given = [] if path is None or not path.exists() else _read(path)
        self.open = not given
        self._by_digest = {tenant.digest: tenant for tenant in given}
        self.all = tuple(given) or (Tenant(EVERYONE, admin=True),)
        self._asked: dict[str, deque[float]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Of all tenants."""
        return tuple(tenant.name for tenant in self.all)

    @property
    def queued_tokens(self) -> dict[str, int]:
        """Limits of open tokens, by tenant."""
        return {each.name: each.queued_tokens for each in self.all if each.queued_tokens is not None}

    def of(self, authorization: str | None) -> Tenant:
        """Whose an Authorization header is; raises ApiError if nobody's."""
        if self.open:
            return self.all[0]
        scheme, _, key = (authorization or "").partition(" ")
        tenant = self._by_digest.get(digest(key.strip())) if scheme.lower() == "bearer" else None
        if tenant is None:
            raise ApiError(401, "The API key is missing or wrong; send it as a bearer token.", code="invalid_api_key")
        return tenant

    def count(self, tenant: Tenant) -> None:
        """A request of a tenant's; raises ApiError if there were too many within a minute."""
        most = tenant.requests_per_minute
        if most is None:
            return
        asked, now_s = self._asked.setdefault(tenant.name, deque()), time.monotonic()
        while asked and asked[0] < now_s - 60.0:
            asked.popleft()
        if len(asked) >= most:
            raise ApiError(
                429, f"{tenant.name} has sent {most} requests within a minute, as many as are allowed.",
                code="rate_limit_exceeded", retry_after_s=max(1, round(asked[0] + 60.0 - now_s)),
            )  # fmt: skip
        asked.append(now_s)


def digest(key: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(key.encode(errors="replace")).hexdigest()


def add_key(
    path: Path,
    name: str,
    admin: bool = False,
    requests_per_minute: int | None = None,
    queued_tokens: int | None = None,
) -> str:
    """Adds a tenant to the file of keys, or gives one another key; the key, which is kept nowhere."""
    key = _PREFIX + secrets.token_urlsafe(32)
    new = Tenant(name, digest(key), admin, requests_per_minute, queued_tokens)
    others = [tenant for tenant in (_read(path) if path.exists() else []) if tenant.name != name]
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".new")
    aside.touch(mode=0o600)
    aside.write_text(json.dumps([asdict(tenant) for tenant in [*others, new]], indent=1))
    aside.replace(path)
    return key


def read_key(path: Path | str | None) -> str | None:
    """The key in a file of a client's, None for no file; raises UserError if it cannot be read."""
    if path is None:
        return None
    try:
        return Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The key file {path} cannot be read ({error}); give one with the key alone.") from None


def _read(path: Path) -> list[Tenant]:
    try:
        return [Tenant(**entry) for entry in json.loads(path.read_text())]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"The file of keys {path} cannot be read ({error}); make it anew with flexirl key.") from None
