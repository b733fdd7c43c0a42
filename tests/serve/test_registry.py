"""Several models behind one server."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import serving


@pytest.mark.slow
def test_models_are_loaded_on_first_use_and_unloaded_when_idle(tiny_model: Path) -> None:
    models = ("--model", f"org/one={tiny_model}", "--model", f"two={tiny_model}")
    with serving.server(*models, "--cache-size-gb", "0.02", "--idle-unload", "2") as server:
        assert [model["id"] for model in server.http.get("/v1/models").json()["data"]] == ["org/one", "two"]
        assert server.http.get("/v1/models/org/one").status_code == 200
        assert engines(server) == 0
        assert server.chat(model="org/one").json()["model"] == "org/one"
        assert engines(server) == 1
        assert server.chat(model="two").status_code == 200
        assert server.chat().json()["model"] == "org/one"
        assert server.chat(model=str(tiny_model)).status_code == 404
        server.wait(lambda: engines(server) == 0, 10, "not unloaded")
        assert server.http.get("/health").status_code == 200
        assert server.chat(model="two").status_code == 200


def engines(server: serving.Server) -> int:
    return int(server.metric("engine_ready"))
