"""What a model directory makes of fixed texts and conversations, as digests.

Export compares tokenizer and chat template with those of the source, and then records what they gave. With that,
`ov-afm info --verify` can prove later, on another machine and with another release of the libraries, that the finished
directory still gives the same: the source is not needed.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import GenerationError, SourceError
from ..model_dir.model_directory import ModelDirectory
from .chat_template import ChatTemplate
from .stop_tokens import GENERATION_CONFIG, StopToken, load_tokenizer, stop_tokens

__all__ = ["CONVERSATIONS", "TEXTS", "Conversation", "Proof", "check", "of_template", "of_tokenizer"]

Message = Mapping[str, Any]
# For templates that write the date.
NOW = datetime.datetime(2026, 1, 2, 3, 4, 5)
TEXTS: tuple[str, ...] = (
    "Hello, world! It's a test, isn't it? They'll say we've won; I'd say he's right.",
    "def fib(n: int) -> int:\n\treturn n if n < 2 else fib(n - 1) + fib(n - 2)  # O(2^n)\n\n\nprint(fib(10))\n",
    'SELECT "name", COUNT(*) FROM users WHERE id >= 100 AND x != \'y\' GROUP BY 1;\r\n{"a": [1, 2.5e-3, null]}',
    "1234567890 3.14159 1,000,000 0x1F 2024-02-29 12:34:56 +49-30-123456",
    "x  1 2  3, v2.0  10%\n\n7 (  8 ) ½  ¾",
    "spaces:    four,  two, \ttab,\n\nblank line,\n   indented,   \n trailing ",
    "你好，世界。これは試験です。한국어 문장도 있습니다. Привет, мир! שלום مرحبا",
    "🙂👩‍👩‍👧‍👦🇫🇷 e\u0301 é ﬁ ½ ² ∑∫√ — “quoted” …",
    "ALLCAPS camelCase snake_case kebab-case https://example.org/a?b=c&d=e#f user@example.org",
    "a" * 40 + " " + "ab" * 20 + " !!!!!!!! ???? ....",
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": 'Wetter für eine Stadt: <now> & "later"',
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer", "enum": [1, 7]}},
            "required": ["city"],
        },
    },
}


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation that templates are tried on.

    Attributes:
        name: What is special about it, for people.
        messages: The messages.
        tools: Functions that the model may call.
    """

    name: str
    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


def _says(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _calls(content: str, **arguments: Any) -> Message:
    call = {"id": "call00001", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    return {"role": "assistant", "content": content, "tool_calls": [call]}


_RESULT = {"role": "tool", "name": "get_weather", "tool_call_id": "call00001", "content": '{"sky": "<b>blau</b> ü"}'}
_ASKS = _says("user", "Wie ist das Wetter in Zürich?")
CONVERSATIONS: tuple[Conversation, ...] = (
    Conversation("a question", (_says("user", "What is the capital of France?"),)),
    Conversation(
        "a system message",
        (
            _says("system", "You are terse.\nAnswer in one line."),
            _says("user", "  Zwei führende Leerzeichen, 你好, 🙂 and a tab\there  "),
        ),
    ),
    Conversation("an empty system message", (_says("system", ""), _says("user", "Hi"))),
    Conversation(
        "several turns",
        (
            _says("user", 'Write <b>bold</b> & "quotes" \'n {{ braces }} {% raw %}'),
            _says("assistant", "```python\nprint('hi')\n```\n"),
            _says("user", "Again."),
            _says("assistant", "  Once more.  "),
            _says("user", "Thanks."),
        ),
    ),
    Conversation("an empty question", (_says("user", ""),)),
    Conversation("an answer at the end", (_says("user", "Hi"), _says("assistant", "Hello there."))),
    Conversation(
        "an answer with its reasoning",
        (
            _says("user", "1 + 1?"),
            _says("assistant", "<think>\nOne and one.\n</think>\n\nTwo."),
            _says("user", "And 2 + 2?"),
            _says("assistant", "Four, </think> or so."),
        ),
    ),
    Conversation("tools", (_says("system", "Be brief."), _ASKS), (WEATHER,)),
    Conversation("tools without a system message", (_ASKS,), (WEATHER, WEATHER)),
    Conversation("a tool call", (_ASKS, _calls("", city="Zürich", days=7)), (WEATHER,)),
    Conversation(
        "a tool result",
        (_ASKS, _calls("Let me look.", city="Zürich"), _RESULT, _says("assistant", "Sunny."), _says("user", "Thanks.")),
        (WEATHER,),
    ),
    Conversation("a tool result at the end", (_ASKS, _calls("", city="Zürich"), _RESULT), (WEATHER,)),
)


@dataclass(frozen=True, slots=True)
class Proof:
    """Digests of what went in and of what came out.

    Attributes:
        inputs: Of the texts or conversations; another release of ov_afm may have others.
        outputs: Of the token ids and texts, or of the renderings.
    """

    inputs: str
    outputs: str

    def to_dict(self) -> dict[str, str]:
        """As the manifest holds it, in the check of the tokenizer or template."""
        return {"inputs_sha256": self.inputs, "outputs_sha256": self.outputs}


def of_tokenizer(tokenizer: Any) -> Proof:
    """Token ids of `TEXTS`, with and without the tokens that begin a text, and the texts back from them.

    Args:
        tokenizer: GenAI's tokenizer.
    """
    outputs = []
    for text in TEXTS:
        plain, special = (
            [int(each) for each in tokenizer.encode(text, add_special_tokens=added).input_ids.data[0]]
            for added in (False, True)
        )
        outputs.append([plain, special, tokenizer.decode(plain)])
    return Proof(_digest(TEXTS), _digest(outputs))


def of_template(template: ChatTemplate) -> Proof:
    """Renderings of `CONVERSATIONS`, with and without the beginning of an answer; what it refuses counts as that."""
    outputs: list[str | None] = []
    for conversation in CONVERSATIONS:
        for open_turn in (True, False):
            try:
                outputs.append(
                    template.render(
                        conversation.messages, tools=conversation.tools or None, open_turn=open_turn, now=NOW
                    )
                )
            except GenerationError:
                outputs.append(None)
    inputs = [[conversation.messages, conversation.tools] for conversation in CONVERSATIONS]
    return Proof(_digest([inputs, str(NOW)]), _digest(outputs))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


def check(model: ModelDirectory) -> dict[str, str]:
    """Compare tokenizer, chat template and stop tokens of a model directory with what was recorded at export.

    Returns:
        What came of each, in a few words.

    Raises:
        SourceError: Something differs, or the tokenizer cannot be loaded.
    """
    tokenizer = load_tokenizer(model.path)
    if model.text_encoder:
        return {"tokenizer": _compare(model, "tokenizer", of_tokenizer(tokenizer))}
    template = ChatTemplate.read(model.path, tokenizer)
    proofs = {"tokenizer": of_tokenizer(tokenizer), "chat_template": of_template(template) if template else None}
    results = {name: _compare(model, name, proof) for name, proof in proofs.items()}
    return {**results, "stop_tokens": _compare_stops(model, stop_tokens(model.path, tokenizer, template))}


def _compare(model: ModelDirectory, name: str, proof: Proof | None) -> str:
    recorded = model.checks.get(name, {})
    if "outputs_sha256" not in recorded:
        return f"nothing recorded to compare with ({recorded.get('skipped') or 'not verified at export'})"
    if proof is not None and recorded["inputs_sha256"] != proof.inputs:
        return "not compared: recorded by another release of ov_afm, with other texts"
    if proof is None or recorded["outputs_sha256"] != proof.outputs:
        found = "is gone" if proof is None else "does not give what it gave at export"
        raise SourceError(
            f"the {name.replace('_', ' ')} of {model.path} {found}; export the model again, or use the versions of "
            "OpenVINO that made it (ov-afm info)",
            code=f"{name.replace('_', '-')}-differs",
        )
    return "as recorded"


def _compare_stops(model: ModelDirectory, tokens: tuple[StopToken, ...]) -> str:
    recorded = (model.manifest.generation if model.manifest else {}).get("stop_tokens")
    if recorded is None:
        return "nothing recorded to compare with"
    before, now = {each["id"] for each in recorded}, {token.id for token in tokens}
    if before == now:
        return "as recorded"
    change = f"{', '.join(map(str, sorted(before)))} at export, {', '.join(map(str, sorted(now))) or 'none'} now"
    # What tokenizer and template name is in files that nobody edits; the rest is for people to change.
    fixed = {each["id"] for each in recorded if set(each["named_by"]) - {GENERATION_CONFIG}}
    if fixed == {token.id for token in tokens if set(token.named_by) - {GENERATION_CONFIG}}:
        return f"{change}, as generation_config.json says"
    raise SourceError(f"the stop tokens of {model.path} differ: {change}; export it again", code="stop-tokens-differ")
