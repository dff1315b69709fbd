"""Program: measures speeds, as ratios where there is a peer: `python -m flexirl.bench [live|kernels]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the bench that the first argument names: the live engine's, the kernels', or else the surrogate's."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    which = words.pop(0) if words and words[0] in ("live", "kernels") else "speed"
    # One bench needs no other's libraries, which take seconds to import.
    if which == "live":
        from flexirl.benches.live import main as bench
    elif which == "kernels":
        from flexirl.benches.kernels import main as bench
    else:
        from flexirl.benches.speed import main as bench
    bench(words)


if __name__ == "__main__":
    main()
