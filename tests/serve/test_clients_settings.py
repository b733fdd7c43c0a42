"""`ov-afm serve --for NAME`: what it prints, what it refuses, and the pages of docs/clients that say the same."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from ov_afm.cli import main
from ov_afm.errors import ConfigError
from ov_afm.serve import clients
from ov_afm.serve.clients import CLIENTS, Endpoint

PAGES = Path(__file__).parents[2] / "docs" / "clients"
SERVER = Endpoint("http://127.0.0.1:8123", "my-model", 65_536, "secret", "my-embedder", "my-reranker")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def exports(text: str) -> dict[str, str]:
    return dict(re.findall(r"^export (\w+)=(.*)$", text, re.MULTILINE))


@pytest.mark.parametrize("name", CLIENTS)
def test_page_and_command_say_the_same(name: str) -> None:
    text = clients.page(name)
    path = PAGES / f"{name}.md"
    assert path.read_text(encoding="utf-8") == text, f"write clients.page({name!r}) to {path}"
    assert clients.settings(name, clients.EXAMPLE) in text


def test_every_page_is_of_a_client() -> None:
    assert {path.stem for path in PAGES.glob("*.md")} == {*CLIENTS, "README"}
    listed = (PAGES / "README.md").read_text(encoding="utf-8")
    assert all(f"({name}.md)" in listed for name in CLIENTS)


@pytest.mark.parametrize("name", CLIENTS)
def test_settings_name_the_server_its_key_and_its_model(name: str) -> None:
    text = clients.settings(name, SERVER)
    assert "$" not in text
    assert "http://127.0.0.1:8123" in text
    assert "secret" in text
    assert "my-model" in text or name == "open-webui"  # It lists models itself.


def test_settings_are_of_the_form_that_programs_read() -> None:
    import yaml

    if sys.version_info >= (3, 11):
        import tomllib

        (config,) = blocks(clients.settings("codex", SERVER), "toml")
        codex = tomllib.loads(config)
        provider = codex["model_providers"][codex["model_provider"]]
        assert (provider["base_url"], provider["wire_api"]) == ("http://127.0.0.1:8123/v1", "responses")
    (config,) = blocks(clients.settings("vscode", SERVER), "json")
    (endpoint,) = json.loads(config)
    (model,) = endpoint["models"]
    assert model["maxInputTokens"] + model["maxOutputTokens"] == 65_536
    first, second = blocks(clients.settings("continue", SERVER), "yaml")
    models = yaml.safe_load(first + second)["models"]
    assert [each["roles"] for each in models] == [["chat", "edit", "apply"], ["embed"]]
    variables = exports(clients.settings("open-webui", SERVER))
    assert variables["RAG_EMBEDDING_MODEL"] == "my-embedder"
    assert variables["RAG_EXTERNAL_RERANKER_URL"] == "http://127.0.0.1:8123/v1/rerank"
    assert exports(clients.settings("claude-code", SERVER))["ANTHROPIC_BASE_URL"] == "http://127.0.0.1:8123"


@pytest.mark.parametrize(
    ("context", "tools", "code"),
    [(2048, True, "client-context"), (65_536, False, "client-tools")],
    ids=["short", "dumb"],
)
def test_a_model_that_cannot_serve_the_program_is_refused(context: int, tools: bool, code: str) -> None:
    with pytest.raises(ConfigError) as raised:
        clients.check("codex", Endpoint("http://x", "m", context), tools=tools)
    assert raised.value.code == code


def test_command_refuses_a_short_context_and_an_unknown_port(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(tiny_model), "--for", "codex"]) == 1
    assert "needs a context of 16384 tokens" in capsys.readouterr().err
    assert main(["serve", str(tiny_model), "--for", "open-webui", "--port", "0"]) == 1
    assert "--port" in capsys.readouterr().err


def test_command_prints_settings_of_the_server_that_it_starts(tiny_model: Path, tmp_path: Path) -> None:
    from support.tiny import edit_json

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    model = tmp_path / "tiny"
    model.mkdir()
    for path in tiny_model.iterdir():
        # Without a manifest its configuration may be edited.
        if path.is_file() and path.name != "ov_afm.json":
            (model / path.name).write_bytes(path.read_bytes())
    edit_json(model / "config.json", max_position_embeddings=40_000)
    command = [sys.executable, "-m", "ov_afm", "serve", str(model), "--for", "claude-code", "--port", str(port)]
    process = subprocess.Popen([*command, "--cache-size-gb", "0.05"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        printed = ""
        while "\n```\n" not in printed and (line := process.stdout.readline()):
            printed += line
        variables = exports(printed)
        assert variables["ANTHROPIC_BASE_URL"] == f"http://127.0.0.1:{port}"
        headers: dict[str, Any] = {"x-api-key": variables["ANTHROPIC_AUTH_TOKEN"], "anthropic-version": "2023-06-01"}
        body = {"model": "claude-opus-4", "max_tokens": 4, "messages": [{"role": "user", "content": "Hi"}]}
        url = f"{variables['ANTHROPIC_BASE_URL']}/v1/messages"
        for _ in range(600):
            try:
                if (answer := httpx.post(url, json=body, headers=headers, timeout=60)).status_code == 200:
                    break
            except httpx.ConnectError:
                pass
            time.sleep(0.1)
        assert answer.status_code == 200, answer.text
    finally:
        process.terminate()
        process.wait(60)
