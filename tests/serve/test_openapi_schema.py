"""Schemathesis generates requests from /openapi.json: no answer may be 500 or differ from what the schema says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support import serving


@pytest.mark.slow
def test_no_request_that_the_schema_allows_or_forbids_breaks_the_server(tiny_model: Path) -> None:
    with serving.server("--model", f"tiny={tiny_model}", "--cache-size-gb", "0.02") as server:
        pid = server.engine().pid
        done = subprocess.run(
            [
                *(Path(sys.executable).parent / "schemathesis", "run", f"{server.url}/openapi.json"),
                *("--phases", "examples,coverage,fuzzing", "--max-examples", "15", "--max-failures", "5"),
                *("--checks", "not_a_server_error,status_code_conformance,content_type_conformance"),
                *("--seed", "1", "--no-color", "--request-timeout", "120"),
            ],
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        assert server.engine().pid == pid
        assert server.chat().status_code == 200
