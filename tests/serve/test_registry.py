"""Several models behind one server."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import serving

from ov_afm.cli import serve
from ov_afm.serve.errors import APIError
from ov_afm.serve.messages import EngineSpec
from ov_afm.serve.registry import Limits, Models


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


def test_aliases_and_patterns_mean_models() -> None:
    specs = {"one": EngineSpec(Path("one")), "two": EngineSpec(Path("two"))}
    models = Models(specs, Limits(), {"claude-*": "one", "claude-small": "two", "gpt-?": "two"})
    meant = {name: models.resolve(name) for name in ("one", "two:latest", "claude-opus-9", "claude-small", "gpt-5")}
    assert meant == {"one": "one", "two:latest": "two", "claude-opus-9": "one", "claude-small": "two", "gpt-5": "two"}
    assert models.resolve("claude-small:latest") == "two"
    for unknown in ("gpt-50", "claude", "one:other", "Claude-x"):
        with pytest.raises(APIError) as raised:
            models.resolve(unknown)
        assert raised.value.status == 404


@pytest.mark.parametrize(
    ("alias", "reason"),
    [("claude-*=none", "no model"), ("a b=tiny", "found 'a b'"), ("tiny=tiny", "names a model already")],
)
def test_an_alias_that_means_nothing_is_refused(
    alias: str, reason: str, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert serve.main(["--model", f"tiny={tiny_model}", "--alias", alias]) == 1
    assert reason in capsys.readouterr().err
