"""From messages to tokens, safe against control tokens in a message.

A chat template marks turns with control tokens, so a user who can type them could pretend to be the
system. Control tokens inside messages are therefore replaced by marks before the template is rendered,
and spelled in ordinary tokens after it is tokenized. A prompt without any is tokenized in one piece,
as everywhere else.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import GenerationError, last_line

__all__ = ["Prompter", "control_tokens"]


def control_tokens(model_dir: Path) -> dict[str, int]:
    """Text and id of the tokens that a tokenizer recognizes as a whole in any text.

    Args:
        model_dir: A model directory; without `tokenizer.json` or `tokenizer_config.json` it has none.
    """
    decoder = _json(model_dir / "tokenizer_config.json").get("added_tokens_decoder", {})
    tokens = {entry["content"]: int(index) for index, entry in decoder.items()}
    for entry in _json(model_dir / "tokenizer.json").get("added_tokens", []):
        tokens[entry["content"]] = int(entry["id"])
    return {text: index for text, index in tokens.items() if len(text) > 1}


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


class Prompter:
    """Renders and tokenizes prompts of one model.

    Args:
        tokenizer: GenAI's tokenizer.
        model_dir: Its model directory.
    """

    def __init__(self, tokenizer: Any, model_dir: Path) -> None:
        self._tokenizer = tokenizer
        self._controls = control_tokens(model_dir)
        longest_first = sorted(self._controls, key=len, reverse=True)
        # Without control tokens, a pattern that matches nothing.
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self.template_knows_tools = "tools" in (tokenizer.chat_template or "")

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
        if not self._tokenizer.chat_template:
            raise GenerationError("this model has no chat template; use /v1/completions", code="no-chat-template")
        import openvino_genai

        hidden: list[str] = []
        nonce = secrets.token_hex(8)
        marked = self._hide([dict(message) for message in messages], nonce, hidden)
        options = self._hide(dict(template_options or {}), nonce, hidden)
        functions = self._hide([dict(tool) for tool in tools], nonce, hidden) if tools else None
        try:
            history = openvino_genai.ChatHistory(marked)
            render = self._tokenizer.apply_chat_template
            text = str(render(history, add_generation_prompt=True, tools=functions, extra_context=options))
        except (RuntimeError, TypeError, ValueError) as error:
            reason = re.sub(f"{nonce}x([0-9]+)x", lambda match: hidden[int(match[1])], last_line(error))
            raise GenerationError(f"the chat template cannot render these messages: {reason}") from error
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

    def _hide(self, value: Any, nonce: str, hidden: list[str]) -> Any:
        """The same structure with control tokens replaced by numbered marks."""
        if isinstance(value, str):

            def mark(match: re.Match[str]) -> str:
                hidden.append(match[0])
                return f"{nonce}x{len(hidden) - 1}x"

            return self._pattern.sub(mark, value)
        if isinstance(value, Mapping):
            return {self._hide(key, nonce, hidden): self._hide(each, nonce, hidden) for key, each in value.items()}
        if isinstance(value, list):
            return [self._hide(each, nonce, hidden) for each in value]
        return value

    def _spell(self, text: str) -> list[int]:
        """A control token's text in ordinary tokens."""
        for cut in range(1, len(text)):
            tokens = self.encode(text[:cut], special=False) + self.encode(text[cut:], special=False)
            if not set(tokens) & set(self._controls.values()):
                return tokens
        return []
