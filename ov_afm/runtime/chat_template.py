"""Chat templates: from messages to the text that a model was trained on.

A chat template is a Jinja program that comes with the model, and one wrong character in what it writes makes a model
worse without any error. So there is one renderer for everything here, and it is the one that transformers uses: jinja2,
in its sandbox, with the same settings, filters and functions (`utils/chat_template_utils.py` in
huggingface/transformers). openvino-genai has an engine of its own, which lacks parts of Jinja; export says where the
two differ.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import GenerationError, SourceError
from ..model_dir.tokenizer_files import SPECIAL_TOKENS, chat_templates, special_tokens, superseded_templates

__all__ = ["ChatTemplate", "choose", "notes"]

# Templates for one purpose, which no plain conversation is rendered with.
PURPOSES = ("tool_use", "rag")
# What every template may call, here and in jinja2.
FUNCTIONS = ("raise_exception", "strftime_now", "namespace", "range", "dict", "lipsum", "cycler", "joiner")
# A conversation that shows what a template makes of tools. Mistral's wants ids of nine characters.
_NAME, _ARGUMENT = "find_probe", "probed argument"
_TOOL = {"type": "function", "function": {"name": _NAME, "description": "Find.", "parameters": {"type": "object"}}}
_ASKS = {"role": "user", "content": "Hello"}
_CALL = {"id": "call00001", "type": "function", "function": {"name": _NAME, "arguments": {"word": _ARGUMENT}}}
_CALLS = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
_RESULT = {"role": "tool", "name": _NAME, "tool_call_id": "call00001", "content": "probed result"}


def choose(templates: Mapping[str, str], where: str) -> tuple[str, str | None]:
    """The name of the template for conversations, and a note if the model does not say which one it is.

    Raises:
        SourceError: There are several, and none is the default.
    """
    if "default" in templates:
        return "default", None
    candidates = [name for name in templates if name not in PURPOSES] or list(templates)
    if len(candidates) > 1:
        raise SourceError(
            f"the chat templates of {where} are {', '.join(map(repr, templates))}, and none is the default; "
            "name the one for conversations 'default' in tokenizer_config.json",
            code="chat-template-ambiguous",
        )
    return candidates[0], f"no chat template is named 'default'; {candidates[0]!r} is used for conversations"


def notes(folder: Path) -> list[str]:
    """What a source leaves open about its chat template, and what is done.

    Raises:
        SourceError: A file cannot be read, or it is not said which of several templates to use.
    """
    templates = chat_templates(folder)
    choice = choose(templates, folder.name)[1] if templates else None
    others = superseded_templates(folder)
    other = f"the chat template in {' and in '.join(others)} is another one; it is not used, as in transformers"
    return [*([choice] if choice else []), *([other] if others else [])]


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """The chat template of a model.

    Attributes:
        text: The template for conversations.
        tool_use: The template for conversations with tools, where the model has one of its own for them.
        special_tokens: Texts of the special tokens, by the names that the template has for them.
    """

    text: str
    tool_use: str | None = None
    special_tokens: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, tokenizer: Any = None) -> ChatTemplate | None:
        """The chat template of a folder; None where it has none.

        Args:
            folder: A model directory or a checkpoint.
            tokenizer: GenAI's tokenizer, which knows template and special tokens of a folder without tokenizer files.

        Raises:
            SourceError: A file cannot be read, or it is not said which of several templates to use.
        """
        templates, tokens = chat_templates(folder), special_tokens(folder)
        if tokenizer is not None and not templates and tokenizer.chat_template:
            templates = {"default": tokenizer.chat_template}
        if not templates:
            return None
        if tokenizer is not None and not tokens:
            known = {f"{name}_token": getattr(tokenizer, f"get_{name}_token")() for name in ("bos", "eos", "pad")}
            tokens = {name: text for name, text in known.items() if text}
        return cls(templates[choose(templates, str(folder))[0]], templates.get("tool_use"), tokens)

    @property
    def knows_tools(self) -> bool:
        """Whether tools are part of what it renders; some templates only mention the word."""
        return _NAME in self._probe(_ASKS, tools=[_TOOL]) and _NAME not in self._probe(_ASKS)

    @property
    def knows_calls(self) -> bool:
        """Whether calls and their results are part of what it renders."""
        text = self._probe(_ASKS, _CALLS, _RESULT, tools=[_TOOL])
        return all(word in text for word in (_ARGUMENT, _RESULT["content"]))

    def _probe(self, *messages: Mapping[str, Any], tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        """The text of a conversation; empty where it is refused."""
        try:
            return self.render(messages, tools=tools)
        except GenerationError:
            return ""

    @property
    def variables(self) -> frozenset[str]:
        """Variables that it reads, such as `enable_thinking`."""
        import jinja2.meta

        return frozenset(name for tree in self._trees() for name in jinja2.meta.find_undeclared_variables(tree))

    @property
    def cuts_at(self) -> frozenset[str]:
        """Texts that it compares with or looks for, such as the `</think>` that ends the thoughts of an answer."""
        from jinja2 import nodes

        kinds = (nodes.Call, nodes.Compare, nodes.Filter)
        places = (place for tree in self._trees() for place in tree.find_all(kinds))
        constants = (constant.value for place in places for constant in place.find_all(nodes.Const))
        return frozenset(value for value in constants if isinstance(value, str))

    def _trees(self) -> list[Any]:
        """Its syntax trees; none where it is no template."""
        import jinja2

        try:
            return [_parsed(text) for text in (self.text, self.tool_use) if text is not None]
        except jinja2.TemplateError:
            return []

    def text_for(self, tools: Sequence[Mapping[str, Any]] | None) -> str:
        """The template for a conversation with these tools."""
        return self.tool_use if tools and self.tool_use is not None else self.text

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        open_turn: bool = True,
        options: Mapping[str, Any] | None = None,
        now: datetime.datetime | None = None,
    ) -> str:
        """The text of a conversation.

        Args:
            messages: `{"role": ..., "content": ...}`, and what else the template takes.
            tools: Functions that the model may call, in OpenAI's form.
            open_turn: End with the beginning of the answer's turn.
            options: More variables of the template, such as `enable_thinking`.
            now: The time for templates that write a date; None is the present.

        Raises:
            GenerationError: The template refuses these messages, or fails; or a message holds what is no JSON value.
        """
        clock = {} if now is None else {"strftime_now": now.strftime}
        given = {"messages": list(messages), "tools": tools, "documents": None, "add_generation_prompt": open_turn}
        known = {**self.special_tokens, **clock, **(options or {})}
        if clash := (options or {}).keys() & {*given, *SPECIAL_TOKENS, *self.special_tokens, *FUNCTIONS}:
            raise GenerationError(
                f"the chat template cannot take {', '.join(sorted(clash))} as an option", code="template-refuses"
            )
        try:
            # What is no JSON value would be rendered as Python shows it.
            json.dumps([given, options])
            return str(_compiled(self.text_for(tools)).render({**known, **given}))
        except Exception as error:  # what fails in a template has whatever type its author met
            reason = str(error).strip() or type(error).__name__
            raise GenerationError(
                f"the chat template cannot render these messages: {' '.join(reason.split())}", code="template-refuses"
            ) from error


def _compiled(text: str) -> Any:
    """The template as jinja2 compiles it."""
    return _environment_and_template(text)[1]


def _parsed(text: str) -> Any:
    """The template as a syntax tree."""
    return _environment_and_template(text)[0].parse(text)


@functools.lru_cache(maxsize=8)
def _environment_and_template(text: str) -> tuple[Any, Any]:
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """The block that marks the assistant's words for training; it changes nothing in the text."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raiser(jinja2.TemplateError)
    environment.globals["strftime_now"] = _strftime_now
    return environment, environment.from_string(text)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the escapes for HTML that jinja2's own filter writes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _raiser(kind: type[Exception]) -> Callable[[str], None]:
    def raise_exception(message: str) -> None:
        raise kind(message)

    return raise_exception
