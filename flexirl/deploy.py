"""Program: puts a policy in charge of a running server: `python -m flexirl.deploy CHECKPOINT --url URL`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> None:
    """Does what the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="flexirl deploy", description="Puts a policy in charge of a running server, without a pause."
    )
    parser.add_argument("policy", nargs="?", help="an .onnx file, or the name of a rule; none: says what is in charge")
    parser.add_argument("--back", action="store_true", help="goes back to the policy before")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server (http://127.0.0.1:8000)")
    parser.add_argument("--key-file", type=Path, help="a file with an admin key")
    options = parser.parse_args(arguments)
    import httpx

    from flexirl.errors import UserError
    from flexirl.serving.tenants import read_key

    try:
        key = read_key(options.key_file)
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        with httpx.Client(base_url=options.url, headers=headers, timeout=30) as client:
            if options.back:
                answer = client.post("/admin/policy", json={"back": True})
            elif options.policy is None:
                answer = client.get("/admin/policy")
            elif options.policy.endswith(".onnx"):
                kind = {"content-type": "application/octet-stream"}
                answer = client.post("/admin/policy", content=Path(options.policy).read_bytes(), headers=kind)
            else:
                answer = client.post("/admin/policy", json={"name": options.policy})
        body = answer.json()
        if not answer.is_success:
            raise ValueError(body["error"]["message"])
    except (UserError, OSError, httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    before = f", {body['previous']} before" if body["previous"] else ""
    print(f"{body['policy']} is in charge{before}")


if __name__ == "__main__":
    main()
