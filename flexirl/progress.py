"""How far long work is: a bar on a terminal, and a line every few seconds where there is none."""

from __future__ import annotations

import sys
import time
from threading import Event, Thread
from typing import Any

from tqdm import tqdm

LINE_EVERY_S = 5.0
_LINES: dict[str, Any] = {
    "delay": LINE_EVERY_S, "mininterval": LINE_EVERY_S, "maxinterval": LINE_EVERY_S, "ncols": 100, "ascii": True,
    "leave": False,
}  # fmt: skip


class _Lines(tqdm):
    """A bar that writes a line at a time, for files that keep what is written."""

    monitor_interval = 0  # tqdm's own thread looks only after work that has sped up

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._ended = Event()
        if not self.disable:
            Thread(target=self._tell, daemon=True).start()

    def _tell(self) -> None:
        """Work that takes long between two updates is shown too."""
        while not self._ended.wait(self.maxinterval):
            if time.time() - self.last_print_t >= self.maxinterval:
                self.last_print_t = time.time()
                self.refresh()

    def close(self) -> None:
        """Called by tqdm at the end of the `with`."""
        if hasattr(self, "_ended"):
            self._ended.set()
        super().close()

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Writes how far the work is; called by tqdm whenever it would draw the bar anew."""
        if msg != "":  # which is how tqdm wipes its bar
            print(msg or self, file=self.fp, flush=True)


def progress_bar(total: int, unit: str, shown: bool = True, **options: Any) -> tqdm[Any]:
    """A `tqdm` of so much work, for a `with`; shown=False says nothing; options: of tqdm."""
    kind: type[tqdm[Any]]
    kind, settings = (tqdm, {}) if sys.stderr.isatty() else (_Lines, _LINES)
    return kind(total=total, unit=unit, disable=not shown, **(options | settings))
