"""Prepares a downloaded trace for training: NAME.csv.gz, its first part, and NAME.val.csv.gz, the part after that.

    python scripts/prepare_traces.py AzureLLMInferenceTrace_conv.csv TRACES/azure23_conv
    python scripts/prepare_traces.py ServeGen/data/language/m-large TRACES/servegen_m-large --train 9/14 --val 2/14

The source may be of any format that the readers know. What comes after the two parts is left for a last test.
"""

from __future__ import annotations

import argparse
import gzip
import io
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np

from flexirl.errors import UserError
from flexirl.workloads.readers import read_trace

# Columns of a trace by what the plain CSV calls them; the optional ones are written where they say anything.
COLUMNS = {"arrival_s": "arrival_s", "prompt_tokens": "prompt_tokens", "output_tokens": "output_tokens"}
OPTIONAL = {
    "num_images": "num_images",
    "image_tokens": "image_tokens",
    "client_id": "tenant",
    "prefix_hit_tokens": "prefix_tokens",
}


def prepare(source: Path, target: Path, train: Fraction, val: Fraction, format: str | None, seed: int) -> list[Path]:
    """Writes both parts beside each other; train and val are shares of the time from 0 to the last arrival.

    Raises UserError for a source that cannot be read, or shares that leave a part empty.
    """
    if not (train > 0 and val > 0 and train + val <= 1):
        raise UserError(f"--train {train} and --val {val} should be above 0 and together at most 1.")
    trace = read_trace(source, format, seed)
    columns = COLUMNS | {name: column for name, column in OPTIONAL.items() if trace.rows[column].any()}
    ends = [float(share) * trace.duration_s for share in (train, train + val)]
    first, second = np.searchsorted(trace.rows["arrival_s"], ends, side="right")
    written = []
    for suffix, part in ((".csv.gz", trace.rows[:first]), (".val.csv.gz", trace.rows[first:second])):
        if len(part) == 0:
            raise UserError(f"{source} has no request for {target.name}{suffix}; give its part a larger share.")
        text = io.StringIO()
        formats = ["%.9g" if name == "arrival_s" else "%d" for name in columns]
        table = np.column_stack([part[column].astype(float) for column in columns.values()])
        np.savetxt(text, table, formats, delimiter=",", header=",".join(columns), comments="")
        place = target.with_name(target.name + suffix)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(gzip.compress(text.getvalue().encode(), mtime=0))  # the same bytes every time
        written.append(place)
    return written


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a trace file, or a folder of ServeGen or of agent sessions")
    parser.add_argument("target", type=Path, help="folder and name of what is written, without .csv.gz")
    parser.add_argument("--train", type=Fraction, default=Fraction("0.6"), help="share of the time for training")
    parser.add_argument("--val", type=Fraction, default=Fraction("0.15"), help="share of the time for validation")
    parser.add_argument("--format", help="of the source; detected by default")
    parser.add_argument("--seed", type=int, default=0, help="of formats that are resampled")
    given = parser.parse_args()
    try:
        for path in prepare(given.source, given.target, given.train, given.val, given.format, given.seed):
            print(f"{path}: {len(read_trace(path))} requests")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
