"""How far long work is: a bar on a terminal, and a line every few seconds where there is none."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

LINE_EVERY_S = 5.0
_LINES: dict[str, Any] = {
    "delay": LINE_EVERY_S, "mininterval": LINE_EVERY_S, "maxinterval": LINE_EVERY_S, "ncols": 100, "ascii": True,
    "leave": False,
}  # fmt: skip


class _Lines(tqdm):
    """A bar that writes a line at a time, for files that keep what is written."""

    monitor_interval = int(LINE_EVERY_S)  # work that takes long between two updates is shown too

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Writes how far the work is; called by tqdm whenever it would draw the bar anew."""
        if msg != "":  # which is how tqdm wipes its bar
            print(msg or self, file=self.fp, flush=True)


def progress_bar(total: int, unit: str, shown: bool = True, **options: Any) -> tqdm[Any]:
    """A `tqdm` of so much work, for a `with`; shown=False says nothing; options: of tqdm."""
    kind: type[tqdm[Any]]
    kind, settings = (tqdm, {}) if sys.stderr.isatty() else (_Lines, _LINES)
    return kind(total=total, unit=unit, disable=not shown, **(options | settings))
