"""Program: makes an API key for a tenant of `flexirl serve`: `python -m flexirl.key NAME`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from flexirl.errors import UserError


def main(arguments: Sequence[str] | None = None) -> None:
    """Does what the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="flexirl key",
        description="Makes an API key for a tenant, or a new one in place of that before. It is shown once; a server "
        "that runs takes it up when it starts again.",
    )
    parser.add_argument("name", help="of the tenant")
    parser.add_argument("--admin", action="store_true", help="it may change the policy and see everything")
    parser.add_argument("--requests-per-minute", type=int, help="immediate requests at most")
    parser.add_argument("--queued-tokens", type=int, help="of its open immediate requests at most")
    parser.add_argument("--data-dir", type=Path, default=Path("flexirl-data"), help="of the server (flexirl-data)")
    options = parser.parse_args(arguments)
    try:
        from flexirl.serving.tenants import KEYS, add_key

        path = options.data_dir / KEYS
        print(add_key(path, options.name, options.admin, options.requests_per_minute, options.queued_tokens))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
