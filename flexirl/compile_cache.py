"""Where compiled functions are kept between runs: one folder per installation, without what has become stale.

Numba takes a cached function for stale when the time of its own file changes, which a comment does and a change in a
function that it calls does not. Here it is stale when the code changes, comments and docstrings apart, of its own file
or of any file of the package that this one imports, however indirectly.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
from collections.abc import Collection, Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numba
from numba.core.caching import CacheImpl, _CacheLocator

PACKAGE = Path(__file__).resolve().parent
_STAMP = 12  # characters of a stamp in the names of files
_DEFINITIONS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class Source(NamedTuple):
    """A file: when it was read (ns) and its size (bytes), a hash of its code, the package's modules it imports.

    later: those that it imports elsewhere than at its top, when a function is called or a condition holds.
    """

    time_ns: int
    size: int
    digest: str
    imports: list[str]
    later: list[str]


def folder() -> Path:
    """Where this installation's compiled functions lie: below NUMBA_CACHE_DIR if that is set, else the user's cache."""
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "flexirl"
    place = hashlib.sha256(str(PACKAGE).encode()).hexdigest()[:12]
    return Path(numba.config.CACHE_DIR or home) / place  # type: ignore[attr-defined]


def read_source(path: Path, package: Path = PACKAGE) -> Source:
    """Reads and parses a file of the package."""
    stat = path.stat()
    tree = ast.parse(path.read_bytes())
    imports = _imports(tree.body, package)
    later = sorted(set(_imports(ast.walk(tree), package)) - set(imports))
    for part in ast.walk(tree):
        if isinstance(part, _DEFINITIONS) and ast.get_docstring(part, clean=False) is not None:
            del part.body[0]
    digest = hashlib.sha256(ast.dump(tree).encode()).hexdigest()
    return Source(stat.st_mtime_ns, stat.st_size, digest, imports, later)


def _imports(nodes: Iterable[ast.AST], package: Path) -> list[str]:
    """What these statements import of the package; names that are no modules among them."""
    found: list[str] = []
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == package.name:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] == package.name]
    return found


class Sources:
    """The package's files; what was read of those that have not changed is remembered in a file."""

    def __init__(self, remembered: Path, package: Path = PACKAGE) -> None:
        self._remembered = remembered
        self._package = package
        self.changed = False  # a file was read anew, so compiled functions may have become stale
        self._known: dict[str, Source] = {}
        self._fresh: dict[str, Source] = {}
        self._no_modules: set[str] = set()  # names that were looked for
        try:
            document = json.loads(remembered.read_text())
            self._known = {name: Source(*fields) for name, fields in document.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            pass  # none yet, or half a file: it is written anew

    def stamp(self, *names: str, later: bool = False, without: Collection[str] = ()) -> str:
        """A hash of the code of modules (dotted, with the package's name) and of all they import of the package.

        later: also what they import when they run; compiled code takes in only what is there at its definition.
        without: modules that are left out, with what they alone import.
        """
        parts = [
            f"{name} {self._fresh[name].digest}" for name in sorted(self.modules(*names, later=later, without=without))
        ]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def modules(self, *names: str, later: bool = False, without: Collection[str] = ()) -> set[str]:
        """The modules that `stamp` goes by."""
        seen: set[str] = set()
        open_ = list(names)
        while open_:
            name = open_.pop()
            if name not in seen and name not in without and (source := self._read(name)) is not None:
                seen.add(name)
                open_ += source.imports + (source.later if later else [])
        return seen

    def _read(self, module: str) -> Source | None:
        """The file of a module or package; None for names that are neither."""
        if module in self._fresh:
            return self._fresh[module]
        if module in self._no_modules:
            return None
        place = self._package.parent / module.replace(".", "/")
        path = place / "__init__.py" if place.is_dir() else place.with_name(f"{place.name}.py")
        if not path.is_file():
            self._no_modules.add(module)
            return None
        stat, known = path.stat(), self._known.get(module)
        if known is not None and (known.time_ns, known.size) == (stat.st_mtime_ns, stat.st_size):
            self._fresh[module] = known
        else:
            self._fresh[module] = read_source(path, self._package)
            self.changed = True
            self._remember()
        return self._fresh[module]

    def _remember(self) -> None:
        self._known |= self._fresh
        try:
            self._remembered.parent.mkdir(parents=True, exist_ok=True)
            partly = self._remembered.with_suffix(f".{os.getpid()}")
            partly.write_text(json.dumps(self._known))
            partly.replace(self._remembered)
        except OSError:
            pass  # it is only slower without


_cleared: set[str] = set()  # modules of which nothing stale is left


@cache
def _stamp(module: str) -> str:
    """That of a module's compiled functions: files that have been imported do not change any more."""
    return sources().stamp(module)


@cache
def sources() -> Sources:
    """Those of this installation."""
    return Sources(folder() / "sources.json")


class Locator(_CacheLocator):
    """Numba's question where the compiled form of a function lies and whether it is stale, answered for the package."""

    def __init__(self, path: str) -> None:
        self._py_file = path  # Numba asks for it by this name
        inside = Path(path).resolve().relative_to(PACKAGE).with_suffix("")
        self._module = ".".join((PACKAGE.name, *inside.parts))

    def get_cache_path(self) -> str:
        """One folder for all."""
        return str(folder())

    def get_source_stamp(self) -> str:
        """See `Sources.stamp`."""
        return _stamp(self._module)

    def get_disambiguator(self) -> str:
        """Functions of one name in files of one name lie in different modules; their lines may change.

        The stamp is part of it, since Numba opens an index before it looks whether that is stale, and what lies in a
        stale one may be of classes that are gone.
        """
        return f"{self._module}-{self.get_source_stamp()[:_STAMP]}"

    def drop_stale(self) -> None:
        """Removes what was compiled from other code of the same module."""
        for path in folder().glob(f"*-{self._module}-{'?' * _STAMP}.py*"):
            if f"-{self.get_disambiguator()}." not in path.name:
                path.unlink(missing_ok=True)

    @classmethod
    def from_function(cls, py_func: Any, py_file: str) -> Locator | None:
        """None for functions of others, and where the folder cannot be written."""
        if not Path(py_file).resolve().is_relative_to(PACKAGE):
            return None
        locator = cls(py_file)
        try:
            locator.ensure_cache_path()
            locator.get_source_stamp()  # now it is known whether anything changed
            if sources().changed and locator._module not in _cleared:
                _cleared.add(locator._module)
                locator.drop_stale()
        except OSError:
            return None
        return locator


def install() -> None:
    """Makes Numba ask here first; called before any compiled function is defined."""
    if Locator not in CacheImpl._locator_classes:
        CacheImpl._locator_classes.insert(0, Locator)  # type: ignore[arg-type]
