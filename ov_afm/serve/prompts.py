"""From messages to tokens, safe against control tokens in a message.

A chat template marks turns with control tokens, so a user who can type them could pretend to be the
system. Control tokens inside messages are therefore replaced by marks before the template is rendered,
and spelled in ordinary tokens after it is tokenized. A prompt without any is tokenized in one piece,
as everywhere else.

In the assistant's turns some stay as they are: the model wrote `</think>` itself, and templates cut earlier thoughts
there. None of them is a token that the template puts around a turn.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import GenerationError
from ..model_dir.tokenizer_files import control_tokens, special_tokens
from ..runtime.chat_template import ChatTemplate
from ..runtime.reasoning import KNOWN, reasoning_tags
from . import messages as pipe

__all__ = ["Prompter"]

Messages = list[dict[str, Any]]
# A conversation of plain words, for the tokens that a template puts around turns.
PLAIN = (
    {"role": "system", "content": "First"},
    {"role": "user", "content": "Second"},
    {"role": "assistant", "content": "Third"},
    {"role": "user", "content": "Fourth"},
)
# Tags that a model writes itself, whatever kind of tokens they are.
WRITTEN = {tag for tags in KNOWN for tag in tags} | {"<tool_call>", "</tool_call>"}
# Tokens at the end of a prompt that may hold the tag that thoughts begin with.
TAIL = 16
# As long as Mistral's templates want ids of calls.
SHORT_ID = 9


class Prompter:
    """Renders and tokenizes prompts of one model.

    Args:
        tokenizer: GenAI's tokenizer.
        template: The chat template; None where the model has none.
        model_dir: Its model directory.

    Attributes:
        reasoning: What the model's thoughts begin and end with; None where it has none.
    """

    def __init__(self, tokenizer: Any, template: ChatTemplate | None, model_dir: Path) -> None:
        self._tokenizer, self._template = tokenizer, template
        self._controls = control_tokens(model_dir)
        self.reasoning = reasoning_tags(template, self._controls)
        self._any = _any_of(self._controls)
        self._not_the_models = _any_of(self._controls.keys() - self._models_own(model_dir))

    def _models_own(self, model_dir: Path) -> set[str]:
        """Control tokens that the assistant's turns may hold: none that stands around turns."""
        special = set(control_tokens(model_dir, special=True))
        frame = set(special_tokens(model_dir).values())
        cuts: set[str] = set()
        if self._template is not None:
            rendered = list(_plain_renderings(self._template))
            frame |= {token for token in self._controls if any(token in text for text in rendered)}
            looked_for = self._template.cuts_at
            cuts = {token for token in special if any(token in text for text in looked_for)}
        own = (self._controls.keys() & WRITTEN) | set(self.reasoning or ())
        return ((self._controls.keys() - special | cuts) - frame) | own

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_options: Mapping[str, Any] | None = None,
        *,
        open_turn: bool = True,
        continues: bool = False,
    ) -> list[int]:
        """Tokens of a conversation.

        Args:
            messages: The messages as the template takes them.
            tools: Functions on offer.
            template_options: Further variables of the template.
            open_turn: End with the beginning of the answer's turn.
            continues: End with the last message's text, which the answer continues.

        Raises:
            GenerationError: There is no template, or it cannot render these messages.
        """
        if self._template is None:
            raise GenerationError("this model has no chat template; use /v1/completions", code="no-chat-template")
        plain = [dict(message) for message in messages]
        refusal: GenerationError | None = None
        for form in _forms(plain):
            try:
                return self._tokens(form, tools, template_options, open_turn=open_turn, continues=continues)
            except GenerationError as error:
                refusal = refusal or error
        assert refusal is not None
        raise refusal

    def _tokens(
        self,
        messages: Messages,
        tools: Sequence[Mapping[str, Any]] | None,
        template_options: Mapping[str, Any] | None,
        *,
        open_turn: bool,
        continues: bool,
    ) -> list[int]:
        assert self._template is not None
        hidden: list[str] = []
        nonce = secrets.token_hex(8)
        marked = [
            _hide(each, self._not_the_models if each.get("role") == "assistant" else self._any, nonce, hidden)
            for each in messages
        ]
        end = f"{nonce}end"
        if continues:
            # The blank shows whether the template trims the text.
            marked[-1]["content"] = f"{marked[-1]['content']}{end} "
        options = _hide(dict(template_options or {}), self._any, nonce, hidden)
        functions = _hide([dict(tool) for tool in tools], self._any, nonce, hidden) if tools else None
        try:
            text = self._template.render(marked, tools=functions, options=options, open_turn=open_turn)
        except GenerationError as error:
            shown = re.sub(f"{nonce}x([0-9]+)x", lambda match: hidden[int(match[1])], str(error)).replace(end, "")
            raise GenerationError(shown, code=error.code) from error
        if continues:
            text = _until(text, end)
        tokens: list[int] = []
        for piece in re.split(f"({nonce}x[0-9]+x)", text):
            if piece.startswith(nonce):
                tokens += self._spell(hidden[int(piece.split("x")[1])])
            elif piece:
                tokens += self.encode(piece, special=False)
        return tokens

    def thinks(self, prompt: pipe.Prompt, tokens: Sequence[int]) -> bool:
        """Whether a conversation's prompt ends within thoughts.

        Args:
            prompt: The prompt.
            tokens: Its tokens.
        """
        if self.reasoning is None or not isinstance(prompt, pipe.Chat):
            return False
        begin, end = self.reasoning
        if prompt.continues and begin in (last := str(prompt.messages[-1].get("content"))):
            return end not in last.rpartition(begin)[2]
        tail = self._tokenizer.decode(list(tokens[-TAIL:]), skip_special_tokens=False)
        return str(tail).rstrip().endswith(begin)

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


def _plain_renderings(template: ChatTemplate) -> Iterator[str]:
    """What a template makes of plain words; some refuse a message of the system."""
    for messages in (PLAIN, PLAIN[1:], PLAIN[1:3]):
        with contextlib.suppress(GenerationError):
            yield template.render(messages, open_turn=messages[-1]["role"] == "user")


def _until(text: str, end: str) -> str:
    """A rendered conversation up to a mark at the end of its last message.

    Raises:
        GenerationError: The template left the message out.
    """
    place = text.rfind(end)
    if place < 0:
        message = "the chat template leaves the last message out, so it cannot be continued"
        raise GenerationError(message, code="template-refuses")
    trims = not text[place + len(end) :].startswith(" ")
    return text[:place].rstrip() if trims else text[:place]


# -- Forms of a conversation that a template may take where it refuses the first


def _forms(messages: Messages) -> Iterator[Messages]:
    """The messages as they are, then in forms that more templates take."""
    yield messages
    strict = [_strict(message) for message in messages]
    if strict != messages:
        yield strict
    if any(message["role"] == "system" for message in messages):
        yield _without_system(strict)


def _strict(message: dict[str, Any]) -> dict[str, Any]:
    """A message with short ids and with objects as arguments: what Mistral's templates and Qwen3-Coder's insist on."""
    changed = dict(message)
    if "tool_call_id" in message:
        changed["tool_call_id"] = _short_id(message["tool_call_id"])
    if "tool_calls" in message:
        changed["tool_calls"] = [_strict_call(call) for call in message["tool_calls"]]
    return changed


def _strict_call(call: dict[str, Any]) -> dict[str, Any]:
    arguments = call["function"]["arguments"]
    if not isinstance(arguments, dict):
        arguments = {"arguments": arguments}
    return {**call, "id": _short_id(call.get("id", "")), "function": {**call["function"], "arguments": arguments}}


def _short_id(call_id: str) -> str:
    """An id of nine letters and digits that is always the same for the same id."""
    if len(call_id) == SHORT_ID and call_id.isalnum():
        return call_id
    return hashlib.sha256(call_id.encode()).hexdigest()[:SHORT_ID]


def _without_system(messages: Messages) -> Messages:
    """The same with what the system says in a user's message: the one before it, or else the one after it."""
    rest: Messages = []
    for message in messages:
        is_system = message["role"] == "system"
        last = rest[-1] if rest and rest[-1]["role"] == "user" else None
        if last is not None and (is_system or (message["role"] == "user" and "joined" in last)):
            content = "\n\n".join([last["content"], message["content"]])
            rest[-1] = {**message, "role": "user", "content": content, "joined": True}
        else:
            rest.append({**message, "role": "user", "joined": True} if is_system else message)
    return [{key: value for key, value in message.items() if key != "joined"} for message in rest]


# -- Hiding


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
