"""Text files that a trace may be: whole, by lines, as CSV with columns read by name, as one JSON object a line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexirl.errors import UserError


def text_of(path: Path) -> str:
    """The whole file as text, unzipped; raises UserError where it cannot be read or has nothing in it."""
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is not a complete gzip file ({error}); copy or download it again.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file; a trace is UTF-8 text, gzipped if its name ends in .gz.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}).") from None
    if not text.strip():
        raise UserError(f"{path} is empty; a trace has a header line and at least one request.")
    return text


def lines_of(path: Path) -> list[str]:
    """The lines of a file. Only line feeds and carriage returns end one: JSON strings may hold other separators."""
    return [line.rstrip("\n") for line in io.StringIO(text_of(path), newline=None)]


def json_of(path: Path) -> Any:
    """The file as one JSON value; raises UserError where it is none."""
    text = text_of(path)
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{path} is not a JSON file ({error}).") from None


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """The JSON value of every line that is not blank, and its number from 1; raises UserError where one is none."""
    for line, text in enumerate(lines_of(path), start=1):
        if text.strip():
            try:
                yield line, json.loads(text)
            except ValueError as error:
                raise UserError(
                    f"{path}: line {line} is not JSON ({error}); each line should be one request."
                ) from None


def numbers_of(path: Path, place: str, record: Any, *names: str) -> tuple[float, ...]:
    """Numbers of one JSON object; raises UserError where one is missing or not a number."""
    found = []
    for name in names:
        value = record.get(name) if isinstance(record, dict) else None
        try:
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError
            found.append(float(value))
        except (TypeError, OverflowError):
            raise UserError(f"{path}: {place} has {name}={str(value)[:80]}; it should be a number.") from None
    return tuple(found)


class Csv:
    """A CSV file whose columns are read by name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines = lines_of(path)
        header = self.lines[0]
        # The likeliest of the signs that stand between columns.
        self.delimiter = max(",;\t", key=header.count)
        self.names = [name.strip() for name in next(csv.reader([header], delimiter=self.delimiter))]
        if not any(line.strip() for line in self.lines[1:]):
            raise UserError(f"{path} has a header line but no requests; a trace has at least one.")

    def require(self, *names: str) -> None:
        """Raises UserError unless every column is there."""
        for name in names:
            if name not in self.names:
                raise UserError(f"{self.path} has no column {name}; its columns are {', '.join(self.names)[:200]}.")

    def numbers(self, *names: str) -> list[NDArray[np.float64]]:
        """The columns as float64 arrays; raises UserError, naming line and value, where one is not a number."""
        self.require(*names)
        try:
            return self.plain_numbers(*names)
        except ValueError as error:
            self._blame([self.names.index(name) for name in names])
            raise UserError(f"{self.path} is not a valid CSV file ({error}).") from None

    def plain_numbers(self, *names: str) -> list[NDArray[np.float64]]:
        """The columns, which are there, as float64 arrays; raises ValueError where one is not a number."""
        at = [self.names.index(name) for name in names]
        table = np.loadtxt(
            self.lines, delimiter=self.delimiter, skiprows=1, usecols=at, ndmin=2, comments=None, quotechar='"'
        )
        return [table[:, i] for i in range(len(names))]

    def _blame(self, columns: Sequence[int]) -> None:
        """Finds the first bad value the slow way, for the sake of the message."""
        for line, row in self.rows():
            for column in columns:
                value = row[column] if column < len(row) else ""
                try:
                    float(value)
                except ValueError:
                    raise UserError(
                        f"{self.path}: line {line}, column {self.names[column]} is {value!r}; it should be a number."
                    ) from None

    def strings(self, name: str) -> list[tuple[int, str]]:
        """One column as text, with the numbers of the lines."""
        self.require(name)
        at = self.names.index(name)
        return [(line, row[at] if at < len(row) else "") for line, row in self.rows()]

    def rows(self) -> Iterator[tuple[int, list[str]]]:
        """The cells of every line that is not blank, and its number."""
        for line, text in enumerate(self.lines[1:], start=2):
            if text.strip():
                yield line, next(csv.reader([text], delimiter=self.delimiter))
