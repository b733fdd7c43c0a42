"""Settings of programs that use a server of ours: printed by `ov-afm serve --for NAME`, and the pages of docs/clients.

Both come from one text for each program, so they cannot say different things.
"""

from __future__ import annotations

from dataclasses import dataclass
from string import Template

from ..errors import ConfigError

__all__ = ["CLIENTS", "Client", "Endpoint", "check", "page", "settings"]

# What programs send that insist on a key, where the server asks for none.
ANY_KEY = "none"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a server is, and what it offers.

    Attributes:
        url: Its address, without `/v1`.
        model: Name of the model that writes text.
        context: Tokens that its prompt and answer may have together.
        key: Key that clients must send; empty where none is needed.
        embeddings: Name of a model for embeddings; empty where there is none.
        reranker: Name of a model for reranking; likewise.
    """

    url: str
    model: str
    context: int
    key: str = ""
    embeddings: str = ""
    reranker: str = ""


@dataclass(frozen=True, slots=True)
class Client:
    """A program, and what it needs.

    Attributes:
        title: Its name for people.
        api: Which routes it uses.
        context: Least context that it can work with, and why.
        tools: It does nothing useful without tools.
        steps: What to write where; `$url`, `$key`, `$model`, `$context` and the like stand for the server's.
        tried: What was tried with it, and what was not.
        alias: Names that it asks for, all of which shall mean the served model.
        truncate: It sends texts for embedding that are longer than most models read.
        retrieval: What to add where there is a model for embeddings.
        reranking: What to add where there is one for reranking.
    """

    title: str
    api: str
    context: tuple[int, str]
    tools: bool
    steps: str
    tried: str
    alias: str = ""
    truncate: bool = False
    retrieval: str = ""
    reranking: str = ""


CODEX = Client(
    title="Codex CLI",
    api="OpenAI's Responses API (`POST /v1/responses`)",
    context=(16_384, "its first request has 5,500 tokens, and files and outputs of commands follow"),
    tools=True,
    steps="""In `~/.codex/config.toml`:

```toml
model = "$model"
model_context_window = $context
model_provider = "ov-afm"
web_search = "disabled"

[model_providers.ov-afm]
name = "ov-afm"
base_url = "$url/v1"
wire_api = "responses"
env_key = "OV_AFM_API_KEY"
```

Then:

```sh
export OV_AFM_API_KEY=$key
codex exec "What does this project do?"
```
""",
    tried="Codex CLI 0.171 from npm (`@openai/codex`): see [responses.md](../responses.md#codex).",
)
CLAUDE_CODE = Client(
    title="Claude Code",
    api="Anthropic's Messages API (`POST /v1/messages`)",
    context=(32_768, "its first request has 21,000 tokens"),
    tools=True,
    alias="claude-*",
    steps="""Claude Code asks for several models of its own names; the alias gives it this one for all of them.

```sh
export ANTHROPIC_BASE_URL=$url
export ANTHROPIC_AUTH_TOKEN=$key
export ANTHROPIC_MODEL=$model
export CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC=1
claude -p "What does this project do?"
```
""",
    tried=(
        "Claude Code 2.1.197 from npm (`@anthropic-ai/claude-code`): see "
        "[anthropic-ollama.md](../anthropic-ollama.md#claude-code)."
    ),
)
OPEN_WEBUI = Client(
    title="Open WebUI",
    api="OpenAI's API (`/v1/models`, `/v1/chat/completions`, `/v1/embeddings`, `/v1/rerank`); Ollama's is there too",
    context=(4_096, "documents that are found are put into the prompt"),
    tools=False,
    truncate=True,
    steps="""Open WebUI keeps these settings once it was started; later they are changed under Admin Panel, Settings.

```sh
export OPENAI_API_BASE_URL=$url/v1
export OPENAI_API_KEY=$key
export ENABLE_OLLAMA_API=false
open-webui serve --port 8080
```
""",
    retrieval="""For chats with documents, before `open-webui serve`:

```sh
export RAG_EMBEDDING_ENGINE=openai
export RAG_OPENAI_API_BASE_URL=$url/v1
export RAG_OPENAI_API_KEY=$key
export RAG_EMBEDDING_MODEL=$embeddings
```
""",
    reranking="""For better hits, a reranker too:

```sh
export ENABLE_RAG_HYBRID_SEARCH=true
export RAG_RERANKING_ENGINE=external
export RAG_EXTERNAL_RERANKER_URL=$url/v1/rerank
export RAG_EXTERNAL_RERANKER_API_KEY=$key
export RAG_RERANKING_MODEL=$reranker
```
""",
    tried=(
        "Open WebUI 0.12.4 from PyPI listed the models and chatted with SmolLM2-135M; a document that was uploaded was "
        "embedded by all-MiniLM-L6-v2 here, found by a question, and given to a (random) reranker here."
    ),
)
CONTINUE = Client(
    title="Continue",
    api="OpenAI's API (`/v1/chat/completions`, `/v1/embeddings`)",
    context=(8_192, "its agent sends tools and files"),
    tools=True,
    steps="""In `~/.continue/config.yaml`:

```yaml
name: ov-afm
version: 1.0.0
schema: v1
models:
  - name: $model
    provider: openai
    model: $model
    apiBase: $url/v1
    apiKey: $key
    roles: [chat, edit, apply]
    capabilities: [tool_use]
    defaultCompletionOptions:
      contextLength: $context
```

In a terminal: `cn -p "What does this project do?"`
""",
    retrieval="""Further down, under `models:`, for its index of the code:

```yaml
  - name: $embeddings
    provider: openai
    model: $embeddings
    apiBase: $url/v1
    apiKey: $key
    roles: [embed]
```
""",
    tried="Its command line 1.5.47 from npm (`@continuedev/cli`): `cn -p` asked SmolLM2-135M and printed its answer.",
)
VSCODE = Client(
    title="VS Code (GitHub Copilot Chat)",
    api="OpenAI's API as a Custom Endpoint, or Ollama's (`/api/version`, `/api/tags`, `/api/show`, `/v1`)",
    context=(16_384, "its agent sends tools and files"),
    tools=True,
    steps="""Run `Chat: Manage Language Models`, add a model of the provider Custom Endpoint, and in the file that opens
(`chatLanguageModels.json`):

```json
[
  {
    "name": "ov-afm",
    "vendor": "customendpoint",
    "apiKey": "$key",
    "apiType": "chat-completions",
    "models": [
      {
        "id": "$model",
        "name": "$model",
        "url": "$url/v1/chat/completions",
        "toolCalling": true,
        "vision": false,
        "maxInputTokens": $input,
        "maxOutputTokens": $output
      }
    ]
  }
]
```

Or choose the provider Ollama, with the address `$url`; it finds the models itself.
""",
    tried=(
        "VS Code is in no package registry, so it was not tried here: the settings are those that its documents and "
        "test plans name. The routes of Ollama's API that it asks are tested with Ollama's official client."
    ),
)
CLIENTS = {
    "codex": CODEX,
    "claude-code": CLAUDE_CODE,
    "open-webui": OPEN_WEBUI,
    "continue": CONTINUE,
    "vscode": VSCODE,
}
# The server of the pages.
EXAMPLE = Endpoint("http://127.0.0.1:8000", "afm", 65_536, "", "embedder", "reranker")


def check(name: str, endpoint: Endpoint, *, tools: bool) -> None:
    """Refuse a model that a program cannot work with.

    Args:
        name: The program, by its name in `CLIENTS`.
        endpoint: The server.
        tools: Whether the model can be offered tools.

    Raises:
        ConfigError: The context is too short, or there are no tools.
    """
    client = CLIENTS[name]
    least, why = client.context
    if endpoint.context < least:
        raise ConfigError(
            f"{client.title} needs a context of {least} tokens ({why}), and {endpoint.model} has {endpoint.context}; "
            "serve a model with a longer one",
            code="client-context",
        )
    if client.tools and not tools:
        raise ConfigError(
            f"{client.title} needs tools, and {endpoint.model} has no chat template to offer them in; serve another",
            code="client-tools",
        )


def _options(client: Client, model: str) -> list[str]:
    """What a server is started with for a program."""
    alias = [f"--alias '{client.alias}={model}'"] if client.alias else []
    return [*alias, *(["--truncate"] if client.truncate else [])]


def settings(name: str, endpoint: Endpoint) -> str:
    """What to write where, so that a program uses a server."""
    client = CLIENTS[name]
    parts = [client.steps]
    if endpoint.embeddings:
        parts.append(client.retrieval)
    if endpoint.reranker:
        parts.append(client.reranking)
    return "\n".join(_filled(part, endpoint) for part in parts if part)


def page(name: str) -> str:
    """The page of a program in docs/clients."""
    client, least = CLIENTS[name], CLIENTS[name].context
    more = client.retrieval and f" --model {EXAMPLE.embeddings}=EMBEDDING_DIR"
    more += client.reranking and f" --model {EXAMPLE.reranker}=RERANKER_DIR"
    start = " ".join([f"ov-afm serve --model {EXAMPLE.model}=MODEL_DIR{more}", f"--for {name}"])
    added = _options(client, EXAMPLE.model)
    adds = f" `--for {name}` adds {' and '.join(f'`{each}`' for each in added)}." if added else ""
    needs = f"A context of {least[0]} tokens: {least[1]}." + (" A model that calls tools." if client.tools else "")
    return f"""# {client.title}

It uses {client.api}.

This page and what `ov-afm serve --for {name}` prints for your own server are made from one text, in
`ov_afm/serve/clients.py`.

**Needs.** {needs} `--for` refuses a model that cannot do it.

**Server.**

```sh
{start}
```
{adds and chr(10)}{adds.strip()}{adds and chr(10)}
**Settings.** {settings(name, EXAMPLE)}
**Tried.** {client.tried}
"""


def _filled(text: str, endpoint: Endpoint) -> str:
    output = min(4096, endpoint.context // 4)
    return Template(text).substitute(
        url=endpoint.url,
        key=endpoint.key or ANY_KEY,
        model=endpoint.model,
        context=endpoint.context,
        input=endpoint.context - output,
        output=output,
        embeddings=endpoint.embeddings,
        reranker=endpoint.reranker,
    )
