"""A conversation and the files that it is exported to and imported from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import ConfigError
from ..pipeline import Message
from ..system.json_text import parse

__all__ = ["Conversation", "Turn", "context_line", "figures_line", "from_json", "title_of", "to_json", "to_markdown"]

SCHEMA = 1
TITLE_LENGTH = 48
# What is shown of the reasons for which an answer ends; others are its regular end.
ENDS = {"cancelled": "stopped", "length": "cut off at the longest answer"}
# Types of an answer's figures; a file may claim anything.
FIGURES: dict[str, Any] = {
    **dict.fromkeys(("ttft_ms", "tpot_ms", "total_ms", "tokens_per_s"), (int, float)),
    **dict.fromkeys(("prompt_tokens", "new_tokens", "dropped", "context_length"), int),
    **dict.fromkeys(("model", "device", "precision", "finish_reason"), str),
}


@dataclass
class Turn:
    """One message.

    Attributes:
        role: Who speaks.
        content: The text.
        figures: What an answer measured (see `backend.figures_of`); None where it is not known.
    """

    role: Literal["system", "user", "assistant"]
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
        """The title, or one made of the first question."""
        return self.title or title_of(self.turns[0].content if self.turns else "")

    def messages(self) -> list[Message]:
        """The conversation as the model takes it."""
        system = [Turn("system", self.system)] if self.system else []
        return [{"role": turn.role, "content": turn.content} for turn in (*system, *self.turns)]

    def question(self, text: str) -> None:
        """Add a question, in place of a last one that got no answer."""
        self.drop_question()
        self.turns.append(Turn("user", text))

    def drop_question(self) -> None:
        """Remove the last question if it has no answer."""
        if self.turns and self.turns[-1].role == "user":
            self.turns.pop()

    def retry(self) -> bool:
        """Remove the last answer, so that its question can be answered again; False if there is no question."""
        if self.turns and self.turns[-1].role == "assistant":
            self.turns.pop()
        return bool(self.turns)


def title_of(question: str) -> str:
    """A title from the first question."""
    line = " ".join(question.split())
    if not line:
        return "New conversation"
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
        parts += [f"## {'You' if turn.role == 'user' else 'Model'}", turn.content.strip()]
        if turn.figures:
            parts.append(f"*{figures_line(turn.figures)}*")
    return "\n\n".join(parts) + "\n"


def figures_line(figures: Mapping[str, Any]) -> str:
    """One line on what an answer cost; missing figures are left out."""
    parts = []
    if figures.get("ttft_ms") is not None:
        parts.append(f"first token {figures['ttft_ms'] / 1000:.2f} s")
    if figures.get("tokens_per_s"):
        parts.append(f"{figures['tokens_per_s']:.1f} tokens/s")
    if figures.get("new_tokens") is not None:
        parts.append(f"{figures['new_tokens']} tokens")
    parts += [str(figures[name]) for name in ("device", "precision") if figures.get(name)]
    if figures.get("finish_reason") in ENDS:
        parts.append(ENDS[figures["finish_reason"]])
    if figures.get("dropped"):
        parts.append(f"{figures['dropped']} oldest messages left out: the context is full")
    return " · ".join(parts)


def context_line(used: int, total: int | None) -> str:
    """How full the context is."""
    if not total:
        return f"context: {used:,} tokens used"
    share = f"{used / total:.0%}"
    return f"context: {used:,} of {total:,} tokens ({share}); when it is full the oldest turns are left out"


def from_json(text: str) -> Conversation:
    """Read an exported conversation, or a list of messages as OpenAI's API takes them.

    Raises:
        ConfigError: It is neither; the message names the place.
    """
    try:
        fields = parse(text)
    except ValueError as error:
        raise _refused(f"not JSON ({error}); export one with /save FILE.json or the chat's export") from error
    if isinstance(fields, list):
        fields = {"messages": fields}
    if not isinstance(fields, dict) or not isinstance(fields.get("messages"), list):
        raise _refused(f"messages must be a list, found {type(fields).__name__}")
    schema = fields.get("ov_afm_chat", SCHEMA)
    if not isinstance(schema, int) or schema > SCHEMA:
        raise ConfigError(
            f"this conversation has layout {schema}, this ov_afm reads up to {SCHEMA}; upgrade it",
            code="conversation-too-new",
        )
    for name in ("title", "system"):
        if not isinstance(fields.get(name, ""), str):
            raise _refused(f"{name} must be text, found {fields[name]!r}")
    conversation = Conversation(fields.get("title", ""), fields.get("system", ""))
    for number, message in enumerate(fields["messages"], 1):
        _add(conversation, message, number)
    return conversation


def _refused(reason: str) -> ConfigError:
    return ConfigError(f"this is not a conversation: {reason}", code="conversation-invalid")


def _add(conversation: Conversation, message: Any, number: int) -> None:
    role = message.get("role") if isinstance(message, dict) else None
    content = message.get("content") if isinstance(message, dict) else None
    if role not in ("system", "user", "assistant") or not isinstance(content, str):
        raise _refused(f"message {number} needs a role (system, user or assistant) and a text as content")
    if role == "system" and number == 1:
        conversation.system = content
        return
    expected = "user" if len(conversation.turns) % 2 == 0 else "assistant"
    if role != expected:
        raise _refused(f"message {number} must be of role {expected}, found {role}: questions and answers take turns")
    conversation.turns.append(Turn(role, content, _figures(message.get("figures"))))


def _figures(claimed: Any) -> Mapping[str, Any] | None:
    """Those figures of a file that can be shown."""
    if not isinstance(claimed, dict):
        return None
    return {
        name: value
        for name, value in claimed.items()
        if isinstance(value, FIGURES.get(name, ())) and not isinstance(value, bool)
    } or None
