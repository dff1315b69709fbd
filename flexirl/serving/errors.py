"""What a client got wrong, or what the service cannot do now, in the shape that OpenAI's clients read."""

from __future__ import annotations

from typing import Any

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer with a status of 400 or more; the message is a sentence that names the value and the remedy.

    param: the field at fault; retry_after_s: when it may be worth another try, in seconds.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> dict[str, Any]:
        """The answer's JSON."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """The answer's headers, beside the usual ones."""
        return {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}

    @property
    def passes(self) -> bool:
        """True if the same request may well be answered later: the fault is the service's."""
        return self.status in (408, 429) or self.status >= 500


def not_found(what: str, name: str) -> ApiError:
    """There is no such thing, or it is somebody else's, which nobody is told."""
    return ApiError(404, f"No such {what}: {name}.", code="not_found", param="id")
