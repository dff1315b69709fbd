"""Whatever comes that the description of the interface allows: no answer is a 500."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import schemathesis
from hypothesis import HealthCheck, given, settings
from serving_toys import EchoBackend, make_service, serving

# A backend that answers at once; a case that generates bodies of this size takes a while to be thought of.
CASES = settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def test_nothing_ends_in_a_server_error(tmp_path: Path) -> None:
    with serving(make_service(EchoBackend(), tmp_path)) as url:
        description = schemathesis.openapi.from_url(f"{url}/openapi.json")
        tried = set()
        for found in description.get_all_operations():
            operation: Any = found.ok()

            @CASES
            @given(case=operation.as_strategy())
            def send(case: Any) -> None:
                answer = case.call()
                assert answer.status_code < 500, (case.as_curl_command(), answer.text)

            send()
            tried.add(operation.path)
        assert {"/v1/chat/completions", "/v1/completions", "/v1/files", "/v1/batches", "/metrics"} <= tried
        paths = description.raw_schema["paths"]
        body = paths["/v1/batches"]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert set(body["required"]) == {"input_file_id", "endpoint", "completion_window"}
