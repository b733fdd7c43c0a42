"""Reasoning: what a client may ask of it, and thoughts read from an answer."""

from __future__ import annotations

from typing import Any, Literal

from ..runtime.detokenize import overlap
from .errors import APIError
from .messages import ModelInfo

__all__ = ["ReasoningReader", "template_options"]

# Efforts that a template which can only switch thinking on and off takes for off.
OFF = ("none", "minimal")
SWITCHES = ("enable_thinking", "thinking")
Kind = Literal["reasoning_content", "content"]


def template_options(effort: str | None, info: ModelInfo | None) -> dict[str, Any]:
    """The variables that tell a model's template how much to think.

    Args:
        effort: OpenAI's `reasoning_effort`.
        info: The model; None while it was never loaded, when no request is taken.

    Raises:
        APIError: The template has no such variable.
    """
    if effort is None or info is None:
        return {}
    options: dict[str, Any] = {name: effort not in OFF for name in SWITCHES if name in info.template_variables}
    if "reasoning_effort" in info.template_variables:
        options["reasoning_effort"] = effort
    if not options and not (effort == "none" and info.reasoning is None):
        message = "reasoning_effort is not available: the model's chat template has no variable for it; leave it out"
        raise APIError(message, "reasoning_effort", "unsupported_parameter")
    return options


class ReasoningReader:
    """Separates thoughts at the beginning of an answer from the rest, in a stream of pieces.

    Blanks around the thoughts are left out, because templates put their own there.

    Args:
        tags: What thoughts begin and end with; None where a model does not think.
        thinking: The prompt ends within thoughts.

    Attributes:
        thinking: The text read last is within thoughts.
    """

    def __init__(self, tags: tuple[str, str] | None, *, thinking: bool = False) -> None:
        self.thinking = thinking and tags is not None
        self._begin, self._end = tags or ("", "")
        # The begin tag may come, again if the prompt has it already.
        self._may_begin = tags is not None
        self._trims = self.thinking
        self._held = ""

    @property
    def undecided(self) -> bool:
        """Whether thoughts may begin with what was read."""
        return self._may_begin and not self.thinking

    def push(self, text: str) -> list[tuple[Kind, str]]:
        """Add text; returns what became certain, each with the field of a message that it belongs to."""
        self._held += text
        if self._may_begin and not self._begun():
            return []
        taken: list[tuple[Kind, str]] = []
        if self.thinking:
            taken = self._thoughts()
        if not self.thinking:
            if self._trims:
                self._held = self._held.lstrip()
            if self._held:
                taken.append(("content", self._held))
                self._held, self._trims = "", False
        return taken

    def finish(self, end: str) -> list[tuple[Kind, str]]:
        """The rest at the end of the answer; at its `length`, it may end within a tag, which is no text."""
        rest, self._held = self._held, ""
        if self.thinking:
            rest = rest.strip()
        if not rest or (end != "stop" and rest.strip() and (self._may_begin or self.thinking)):
            return []
        return [("reasoning_content" if self.thinking else "content", rest)]

    def _begun(self) -> bool:
        """Whether it is certain with what the answer begins; a begin tag is taken."""
        text = self._held.lstrip()
        if text.startswith(self._begin):
            self._held, self.thinking, self._trims = text[len(self._begin) :], True, True
        elif self._begin.startswith(text):
            return False
        self._may_begin = False
        return True

    def _thoughts(self) -> list[tuple[Kind, str]]:
        """Thoughts up to their end, or to what may become it."""
        if self._trims:
            self._held = self._held.lstrip()
        place = self._held.find(self._end)
        complete = place >= 0
        if not complete:
            place = len(self._held) - overlap(self._held, self._end)
        text = self._held[:place].rstrip()
        self._held = self._held[place + len(self._end) :] if complete else self._held[len(text) :]
        self._trims = complete or (self._trims and not text)
        self.thinking = not complete
        return [("reasoning_content", text)] if text else []
