"""A conversation and the files that it is exported to and imported from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from ..errors import ConfigError
from ..pipeline import Message
from .strings import TEXTS, figures_line

__all__ = ["Conversation", "Turn", "from_json", "title_of", "to_json", "to_markdown"]

SCHEMA = 1
TITLE_LENGTH = 48
Role = Literal["user", "assistant"]
# What an answer's figures may be, by kind.
FIGURES: dict[type | tuple[type, ...], tuple[str, ...]] = {
    (int, float): ("ttft_ms", "tpot_ms", "total_ms", "tokens_per_s"),
    int: ("prompt_tokens", "new_tokens", "dropped", "context_length"),
    str: ("model", "device", "precision", "finish_reason"),
}


@dataclass
class Turn:
    """One message.

    Attributes:
        role: Who speaks.
        content: The text.
        figures: What an answer measured (see `backend.figures_of`); None where it is not known.
    """

    role: Role
    content: str
    figures: Mapping[str, Any] | None = None


@dataclass
class Conversation:
    """Turns, with the system prompt before them.

    Attributes:
        title: Its name; empty takes the first question's beginning.
        system: System prompt; empty leaves it out.
        turns: Questions and answers, oldest first.
    """

    title: str = ""
    system: str = ""
    turns: list[Turn] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The title, or what stands for it."""
        return self.title or title_of(self.turns[0].content if self.turns else "")

    def messages(self) -> list[Message]:
        """What the model is given."""
        head: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        return [*head, *({"role": turn.role, "content": turn.content} for turn in self.turns)]

    def question(self, text: str) -> None:
        """Add a question; one that was left without an answer is replaced."""
        self.drop_question()
        self.turns.append(Turn("user", text))

    def drop_question(self) -> None:
        """Take a last question without an answer away."""
        if self.turns and self.turns[-1].role == "user":
            self.turns.pop()

    def retry(self) -> bool:
        """Take the last answer away, so that its question can be answered again; False if there is none."""
        if self.turns and self.turns[-1].role == "assistant":
            self.turns.pop()
        return bool(self.turns)


def title_of(question: str) -> str:
    """A title from the first question."""
    line = " ".join(question.split())
    if not line:
        return TEXTS.untitled
    return line if len(line) <= TITLE_LENGTH else line[: TITLE_LENGTH - 1].rstrip() + "…"


def to_json(conversation: Conversation) -> str:
    """The conversation as a JSON file, figures included."""
    turns = [
        {"role": turn.role, "content": turn.content, **({"figures": turn.figures} if turn.figures else {})}
        for turn in conversation.turns
    ]
    fields = {"ov_afm_chat": SCHEMA, "title": conversation.title, "system": conversation.system, "messages": turns}
    return json.dumps(fields, indent=2, ensure_ascii=False) + "\n"


def to_markdown(conversation: Conversation) -> str:
    """The conversation as a Markdown document."""
    parts = [f"# {conversation.name}"]
    if conversation.system:
        parts.append("\n".join(f"> {line}" for line in conversation.system.splitlines()))
    for turn in conversation.turns:
        parts += [f"## {TEXTS.you if turn.role == 'user' else TEXTS.model}", turn.content.strip()]
        if turn.figures:
            parts.append(f"*{figures_line(turn.figures)}*")
    return "\n\n".join(parts) + "\n"


def from_json(text: str) -> Conversation:
    """Read an exported conversation, or a list of messages as OpenAI's API takes them.

    Raises:
        ConfigError: It is neither; says what was found where.
    """
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise ConfigError(
            f"this is no conversation: not JSON ({error}); export one with /save FILE.json or the chat's export"
        ) from error
    if isinstance(fields, list):
        fields = {"messages": fields}
    if not isinstance(fields, dict) or not isinstance(fields.get("messages"), list):
        raise ConfigError(f"this is no conversation: messages must be a list, found {type(fields).__name__}")
    schema = fields.get("ov_afm_chat", SCHEMA)
    if not isinstance(schema, int) or schema > SCHEMA:
        raise ConfigError(f"this conversation has layout {schema}, this ov_afm reads up to {SCHEMA}; upgrade it")
    found = Conversation(_text(fields, "title"), _text(fields, "system"))
    for number, message in enumerate(fields["messages"], 1):
        _take(found, message, number)
    return found


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name, "")
    if not isinstance(value, str):
        raise ConfigError(f"this is no conversation: {name} must be text, found {value!r}")
    return value


def _take(found: Conversation, message: Any, number: int) -> None:
    role = message.get("role") if isinstance(message, dict) else None
    content = message.get("content") if isinstance(message, dict) else None
    if role not in ("system", "user", "assistant") or not isinstance(content, str):
        raise ConfigError(f"message {number} needs a role (system, user or assistant) and a text as content")
    if role == "system" and number == 1:
        found.system = content
        return
    expected = "user" if len(found.turns) % 2 == 0 else "assistant"
    if role != expected:
        raise ConfigError(
            f"message {number} must be of role {expected}, found {role}: questions and answers take turns"
        )
    found.turns.append(Turn(cast("Role", role), content, _figures(message.get("figures"))))


def _figures(value: Any) -> Mapping[str, Any] | None:
    """Of what a file claims to have measured, what can be shown."""
    if not isinstance(value, dict):
        return None
    names = {name: kind for kind, names in FIGURES.items() for name in names}
    kept = {name: each for name, each in value.items() if isinstance(each, names.get(name, ()))}
    return {name: each for name, each in kept.items() if not isinstance(each, bool)} or None
