"""The command `flexirl`: says what there is, runs it, names what there is not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import flexirl
from flexirl.__main__ import PROGRAMS

PACKAGE = Path(flexirl.__file__).parent


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "flexirl", *words], capture_output=True, text=True, check=False)


def test_alone_it_says_what_there_is() -> None:
    ran = command()
    assert ran.returncode == 0 and all(name in ran.stdout for name in PROGRAMS)


def test_that_takes_no_library_that_is_slow_to_import() -> None:
    code = "import sys, flexirl.__main__ as command; sys.argv[1:] = []; command.main(); print(sorted(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"'torch'", "'numba'", "'hydra'", "'matplotlib'", "'scipy'"} & set(
        ran.stdout.split("[")[-1][:-2].split(", ")
    )


def test_every_program_is_named() -> None:
    programs = {path.stem for path in PACKAGE.glob("*.py") if '__name__ == "__main__"' in path.read_text()}
    assert programs - {"__main__"} == {name.replace("-", "_") for name in PROGRAMS}


def test_it_runs_the_program_with_the_rest_of_the_line() -> None:
    ran = command("pretrained", "--help")
    assert ran.returncode == 0 and "--output" in ran.stdout


def test_another_name_gets_a_sentence() -> None:
    ran = command("trian")
    assert ran.returncode == 2 and "'trian'; did you mean train?" in ran.stderr
