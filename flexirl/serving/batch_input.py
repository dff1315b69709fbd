"""The lines of a batch's input file: found, checked, and read again one by one; the file is never whole in memory."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from flexirl.errors import UserError
from flexirl.serving.bodies import BODIES, read_json
from flexirl.serving.errors import ApiError
from flexirl.serving.store import Line

MOST_LINES = 50_000
LONGEST_LINE = 8 << 20  # bytes
MOST_ERRORS = 100  # reported of one file
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_NAME = 512  # characters of a custom_id


class Names:
    """The custom_ids of a file, however many: on disk, where memory is short, and gone with the process."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._database.execute("PRAGMA journal_mode=OFF")
        self._database.execute("CREATE TABLE names (name TEXT PRIMARY KEY) WITHOUT ROWID")
        self.count = 0

    def add(self, name: str) -> bool:
        """False if it is there already."""
        new = self._database.execute("INSERT OR IGNORE INTO names VALUES (?)", (name,)).rowcount > 0
        self.count += new
        return new

    def __contains__(self, name: str) -> bool:
        return self._database.execute("SELECT 1 FROM names WHERE name = ?", (name,)).fetchone() is not None


class BadInput(Exception):
    """A file that is no input of a batch; errors: as OpenAI lists them."""

    def __init__(self, errors: list[dict[str, Any]]) -> None:
        super().__init__(errors[0]["message"])
        self.errors = errors


def window_s(text: str) -> int:
    """Seconds of a completion window such as 24h, 90m or 30s; raises UserError for anything else."""
    match = re.fullmatch(r"([1-9]\d{0,6})([smhd])", text)
    if match is None:
        raise UserError(f"completion_window={text!r} is no time; write 24h, 90m or 30s.")
    return int(match[1]) * _UNITS_S[match[2]]


def check(path: Path, endpoint: str, most: int = MOST_LINES) -> Iterator[Line]:
    """The lines of a file, blank ones left out, all of them good; raises BadInput once all have been looked at.

    endpoint: what they have to be for; most: how many there may be.
    """
    errors: list[dict[str, Any]] = []
    names = Names()
    for number, offset, data in raw_lines(path):
        try:
            name = name_of(data, endpoint)
            if not names.add(name):
                raise _fault("duplicate_custom_id", f"custom_id {name!r} is there already; make each unique.",
                             "custom_id")  # fmt: skip
        except ApiError as error:
            errors.append(_listed(number, error))
            if len(errors) == MOST_ERRORS:
                break
            continue
        if names.count > most:
            fault = _fault("too_many_requests", f"The file has more than {most:,} requests; split it.")
            errors.append(_listed(number, fault))
            break
        if not errors:
            yield Line(number, offset, len(data), name)
    if names.count == 0 and not errors:
        errors.append(_listed(None, _fault("empty_file", "The file has no requests; write one JSON object a line.")))
    if errors:
        raise BadInput(errors)


def read(path: Path, line: Line) -> tuple[str, dict[str, Any]]:
    """Endpoint and body of a line that has been checked."""
    with open(path, "rb") as file:
        file.seek(line.offset)
        fields = read_json(file.read(line.length))
    return fields["url"], fields["body"]


def raw_lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Number, offset in bytes and content of each line that is not blank; one that is too long comes cut."""
    with open(path, "rb") as file:
        number = offset = 0
        while data := _read_line(file):
            number += 1
            begin = 3 if number == 1 and data.startswith(b"\xef\xbb\xbf") else 0
            if data.strip():
                yield number, offset + begin, data[begin:].rstrip(b"\r\n")
            offset = file.tell()


def _read_line(file: BinaryIO) -> bytes:
    data = rest = file.readline(LONGEST_LINE + 1)
    while rest and not rest.endswith(b"\n"):
        rest = file.readline(LONGEST_LINE + 1)
    return data


def name_of(data: bytes, endpoint: str | None) -> str:
    """The custom_id of a line; raises ApiError if it is no request to the endpoint, None for any that there is."""
    if len(data) > LONGEST_LINE:
        raise _fault("invalid_json_line", f"The line has more than {LONGEST_LINE:,} bytes.")
    try:
        fields = read_json(data)
    except ApiError as error:
        raise _fault("invalid_json_line", error.message.replace("The body", "The line")) from None
    if not isinstance(fields, dict):
        raise _fault("invalid_json_line", "The line is not a JSON object.")
    for name, kind in (("custom_id", str), ("method", str), ("url", str), ("body", dict)):
        if name not in fields:
            raise _fault("missing_required_parameter", f"{name} is missing.", name)
        if not isinstance(fields[name], kind):
            what = "a text" if kind is str else "an object"
            raise _fault("invalid_type", f"{name} is not {what}.", name)
    name = str(fields["custom_id"])
    if not 0 < len(name) <= _NAME or "\x00" in name:
        raise _fault("invalid_custom_id", f"custom_id has 1 to {_NAME} characters, none of them NUL.", "custom_id")
    if fields["method"] != "POST":
        raise _fault("invalid_method", f"method is {fields['method'][:20]!r}; it is POST.", "method")
    if fields["url"] not in BODIES or (endpoint is not None and fields["url"] != endpoint):
        right = endpoint or " or ".join(BODIES)
        raise _fault("mismatched_endpoint", f"url is {fields['url'][:80]!r}; here it is {right}.", "url")
    return name


def _fault(code: str, message: str, param: str | None = None) -> ApiError:
    return ApiError(400, message, code=code, param=param)


def _listed(number: int | None, error: ApiError) -> dict[str, Any]:
    return {"code": error.code, "line": number, "message": error.message, "param": error.param}
