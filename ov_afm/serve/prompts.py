"""From messages to tokens, safe against control tokens in a message.

A chat template marks turns with control tokens, so a user who can type them could pretend to be the
system. Control tokens inside messages are therefore replaced by marks before the template is rendered,
and spelled in ordinary tokens after it is tokenized. A prompt without any is tokenized in one piece,
as everywhere else.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import GenerationError
from ..model_dir.tokenizer_files import control_tokens
from ..runtime.chat_template import ChatTemplate

__all__ = ["Prompter"]


class Prompter:
    """Renders and tokenizes prompts of one model.

    Args:
        tokenizer: GenAI's tokenizer.
        template: The chat template; None where the model has none.
        model_dir: Its model directory.
    """

    def __init__(self, tokenizer: Any, template: ChatTemplate | None, model_dir: Path) -> None:
        self._tokenizer, self._template = tokenizer, template
        self._controls = control_tokens(model_dir)
        self._any = _any_of(self._controls)
        # The assistant wrote tokens such as `</think>` itself, and templates cut its messages at them.
        self._special = _any_of(control_tokens(model_dir, special=True))
        self.template_knows_tools = template is not None and template.knows_tools

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Tokens of a conversation, the beginning of the answer's turn included.

        Raises:
            GenerationError: There is no template, or it cannot render these messages.
        """
        if self._template is None:
            raise GenerationError("this model has no chat template; use /v1/completions", code="no-chat-template")
        hidden: list[str] = []
        nonce = secrets.token_hex(8)
        marked = [
            _hide(dict(each), self._special if each.get("role") == "assistant" else self._any, nonce, hidden)
            for each in messages
        ]
        options = _hide(dict(template_options or {}), self._any, nonce, hidden)
        functions = _hide([dict(tool) for tool in tools], self._any, nonce, hidden) if tools else None
        try:
            text = self._template.render(marked, tools=functions, options=options)
        except GenerationError as error:
            shown = re.sub(f"{nonce}x([0-9]+)x", lambda match: hidden[int(match[1])], str(error))
            raise GenerationError(shown, code=error.code) from error
        tokens: list[int] = []
        for piece in re.split(f"({nonce}x[0-9]+x)", text):
            if piece.startswith(nonce):
                tokens += self._spell(hidden[int(piece.split("x")[1])])
            elif piece:
                tokens += self.encode(piece, special=False)
        return tokens

    def text(self, prompt: str, *, special: bool = True) -> list[int]:
        """Tokens of plain text; control tokens in it are recognized as such."""
        begin = self._tokenizer.get_bos_token()
        return self.encode(prompt, special=special and not (begin and prompt.startswith(begin)))

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Tokens of text, with or without the tokens that the tokenizer puts around it."""
        if not text:
            return []
        ids = self._tokenizer.encode(text, add_special_tokens=special).input_ids
        return [int(each) for each in ids.data.reshape(-1)]

    def _spell(self, text: str) -> list[int]:
        """A control token's text in ordinary tokens."""
        for cut in range(1, len(text)):
            tokens = self.encode(text[:cut], special=False) + self.encode(text[cut:], special=False)
            if not set(tokens) & set(self._controls.values()):
                return tokens
        return []


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """A pattern for any of these texts, longest first; without any, one that matches nothing."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def _hide(value: Any, pattern: re.Pattern[str], nonce: str, hidden: list[str]) -> Any:
    """The same structure with control tokens replaced by numbered marks."""
    if isinstance(value, str):

        def mark(match: re.Match[str]) -> str:
            hidden.append(match[0])
            return f"{nonce}x{len(hidden) - 1}x"

        return pattern.sub(mark, value)
    if isinstance(value, Mapping):
        return {_hide(key, pattern, nonce, hidden): _hide(each, pattern, nonce, hidden) for key, each in value.items()}
    if isinstance(value, list):
        return [_hide(each, pattern, nonce, hidden) for each in value]
    return value
