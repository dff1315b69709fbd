"""Compiled code is cached by the code that it may take in: no more, no less."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from flexirl.compile_cache import Sources, read_source

HELPER = '''"""A module."""
def helper(x):
    """Adds one."""
    return x + 1  # one
'''


def package(folder: Path) -> Path:
    """A package `toy` of four modules: a imports b, b imports c, d nothing."""
    toy = folder / "toy"
    toy.mkdir(parents=True)
    (toy / "__init__.py").write_text("")
    (toy / "a.py").write_text("from toy.b import middle\n")
    (toy / "b.py").write_text("from toy import c\n\n\ndef middle(x):\n    return c.helper(x)\n")
    (toy / "c.py").write_text(HELPER)
    (toy / "d.py").write_text("def alone(x):\n    return x\n")
    return toy


def stamps(toy: Path) -> dict[str, str]:
    """The stamp of each module, as a new process would have it."""
    sources = Sources(toy.parent / "sources.json", toy)
    return {name: sources.stamp(f"toy.{name}") for name in "abcd"}


def changed(toy: Path, old: str, new: str) -> set[str]:
    """The modules that are stale once `old` reads `new` in c."""
    before = stamps(toy)
    text = (toy / "c.py").read_text()
    assert old in text
    (toy / "c.py").write_text(text.replace(old, new))
    return {name for name, stamp in stamps(toy).items() if stamp != before[name]}


def test_code_makes_stale_all_that_takes_it_in(tmp_path: Path) -> None:
    assert changed(package(tmp_path), "x + 1", "x + 2") == {"a", "b", "c"}


def test_comments_docstrings_and_lines_change_nothing(tmp_path: Path) -> None:
    toy = package(tmp_path)
    assert changed(toy, "# one", "# one, and why") == set()
    assert changed(toy, "Adds one.", "Adds one to x.") == set()
    assert changed(toy, '"""A module."""\n', '"""A module."""\n\n\n') == set()


def test_a_file_that_did_not_change_is_not_read_again(tmp_path: Path) -> None:
    toy = package(tmp_path)
    assert stamps(toy) == stamps(toy)
    source = read_source(toy / "c.py", toy)
    (toy.parent / "sources.json").write_text(json.dumps({"toy.c": [*source[:2], "kept", [], []]}))
    assert Sources(toy.parent / "sources.json", toy)._read("toy.c").digest == "kept"  # type: ignore[union-attr]


def test_what_is_imported_later_and_packages_count_where_asked(tmp_path: Path) -> None:
    toy = package(tmp_path)
    (toy / "deep").mkdir()
    (toy / "deep" / "__init__.py").write_text("from toy.deep import e\n")
    (toy / "deep" / "e.py").write_text("import toy.c\n")
    (toy / "d.py").write_text("import toy.a\n\n\ndef alone():\n    from toy.deep import e\n\n    return e\n")
    sources = Sources(tmp_path / "sources.json", toy)
    now = {"toy.d", "toy.a", "toy.b", "toy", "toy.c"}
    assert sources.modules("toy.d") == now
    assert sources.modules("toy.d", later=True) == now | {"toy.deep", "toy.deep.e"}
    assert sources.modules("toy.d", later=True, without=("toy.b", "toy.deep.e")) == {"toy.d", "toy.a", "toy.deep"}
    assert sources.stamp("toy.d") != sources.stamp("toy.d", later=True)


def test_half_a_memory_is_none(tmp_path: Path) -> None:
    toy = package(tmp_path)
    before = stamps(toy)
    (tmp_path / "sources.json").write_text('{"toy.c": [1, 2')
    assert stamps(toy) == before


def test_a_new_process_compiles_nothing_again_and_leaves_no_file_more(tmp_path: Path) -> None:
    """The package's own functions, under a cache folder of their own."""
    code = (
        f"import os; os.environ['NUMBA_CACHE_DIR'] = {str(tmp_path)!r}\n"
        "import numpy as np\n"
        "from flexirl.runtime.live.iteration import uniform\n"
        "uniform(np.uint64(3), 1); print(sum(uniform.stats.cache_hits.values()))"
    )

    def run() -> tuple[int, list[str]]:
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return int(ran.stdout), sorted(path.name for path in tmp_path.rglob("*.nb*"))

    hits, files = run()
    assert hits == 0 and files
    assert run() == (1, files)
