"""One renderer, the same text as transformers gives."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from support import templates, tiny

from ov_afm.errors import GenerationError, OVAFMError, SourceError
from ov_afm.runtime import chat_template
from ov_afm.runtime.chat_template import ChatTemplate
from ov_afm.runtime.text_proof import CONVERSATIONS, NOW

MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer without a chat template. Read-only."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.write_tokenizer(folder)
    (folder / "chat_template.jinja").unlink()
    return folder


@pytest.fixture
def folder(tokenizer_folder: Path, tmp_path: Path) -> Path:
    """A copy to put templates into."""
    for path in tokenizer_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def write(folder: Path, place: str, text: Any) -> None:
    """Put a template where models keep it."""
    if place.endswith(".jinja"):
        (folder / place).parent.mkdir(exist_ok=True)
        (folder / place).write_text(text, encoding="utf-8", newline="")
    else:
        path = folder / place
        fields = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**fields, "chat_template": text}))


def outcome(render: Any, *arguments: Any, **options: Any) -> str | None:
    try:
        return str(render(*arguments, **options))
    except Exception:
        return None


SPECIAL = (
    "{{ tools | tojson(indent=2) }}{{ {'ü': '<é>'} | tojson(separators=(',', ':'), sort_keys=True) }}\n"
    "  {%- generation %}\n{{ pad_token }}|{{ unk_token }}|{{ eos_token }}{% endgeneration %}\n"
    "   {% for m in messages %}{% if loop.index0 > 1 %}{% break %}{% endif %}{{ m.content | upper }}{% endfor %}\n"
)


@pytest.mark.parametrize(
    "text",
    [
        templates.PLAIN,
        templates.TOOLS,
        templates.ASCII,
        templates.ALPACA,
        templates.SPACED,
        templates.BROKEN,
        SPECIAL,
        "{% set x = [] %}{{ x.append(1) }}{{ x }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ missing }}|{{ messages[0]['missing'] }}|{{ messages[9] }}",
        "{% macro f(x) %}<{{ x }}>{% endmacro %}{% for m in messages %}{{ f(m.content) }}\n{% endfor %}\n",
    ],
    ids=lambda text: " ".join(text.split())[:30],
)
def test_every_conversation_is_rendered_or_refused_as_transformers_does(folder: Path, text: str) -> None:
    from transformers import AutoTokenizer

    write(folder, "chat_template.jinja", text)
    reference, ours = AutoTokenizer.from_pretrained(folder), ChatTemplate.read(folder)
    assert ours is not None
    for conversation in CONVERSATIONS:
        messages, tools = list(conversation.messages), list(conversation.tools) or None
        for opened in (True, False):
            options = {"tokenize": False, "add_generation_prompt": opened}
            expected = outcome(reference.apply_chat_template, messages, tools=tools, **options)
            assert outcome(ours.render, messages, tools=tools, open_turn=opened) == expected, conversation.name


def test_options_reach_the_template_and_cannot_replace_the_conversation(folder: Path) -> None:
    write(folder, "chat_template.jinja", "{{ enable_thinking }} {{ eos_token }} {{ messages | length }}")
    template = ChatTemplate.read(folder)
    assert template is not None
    assert template.render(MESSAGES, options={"enable_thinking": False}) == "False <|im_end|> 1"
    for name in ("messages", "add_generation_prompt", "eos_token", "unk_token", "raise_exception", "namespace"):
        with pytest.raises(GenerationError, match=name) as caught:
            template.render(MESSAGES, options={name: []})
        assert caught.value.code == "template-refuses"


@pytest.mark.parametrize(
    ("text", "tool_use", "tools", "calls"),
    [
        (templates.TOOLS, None, True, True),
        (templates.QWEN, None, True, True),
        (templates.MISTRAL, None, True, True),
        (templates.PLAIN, templates.TOOLS, True, True),
        (templates.PLAIN, None, False, False),
        (templates.MENTIONS, None, False, False),
        (templates.PLAIN + "{{ tools }}", None, True, False),
        (templates.PLAIN, "tools", False, False),
        ("{% tools", None, False, False),
    ],
)
def test_a_template_knows_tools_if_it_shows_them(text: str, tool_use: str | None, tools: bool, calls: bool) -> None:
    template = ChatTemplate(text, tool_use, {"bos_token": "<s>", "eos_token": "</s>"})
    assert (template.knows_tools, template.knows_calls) == (tools, calls)


def test_what_a_template_reads_and_looks_for() -> None:
    qwen = ChatTemplate(templates.QWEN)
    assert {"messages", "tools", "enable_thinking"} <= qwen.variables
    assert {"<think>", "</think>", "<tool_response>"} <= qwen.cuts_at
    assert "thinking" in ChatTemplate(templates.GRANITE).variables
    broken = ChatTemplate("{% if")
    assert broken.variables == broken.cuts_at == frozenset()


def test_a_failing_template_gives_one_line(folder: Path) -> None:
    write(folder, "chat_template.jinja", "{{ raise_exception('first\nsecond') }}")
    with pytest.raises(GenerationError, match=r"^the chat template cannot render these messages: first second$"):
        ChatTemplate.read(folder).render(MESSAGES)  # type: ignore[union-attr]


def test_the_time_can_be_given() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y %H:%M') }}")
    assert template.render([], now=NOW) == "02 Jan 2026 03:04"
    assert template.render([]).startswith(datetime.datetime.now().strftime("%d"))


def named(**texts: str) -> list[dict[str, str]]:
    return [{"name": name, "template": text} for name, text in texts.items()]


@pytest.mark.parametrize(
    ("places", "plain", "with_tools"),
    [
        ({"chat_template.jinja": "A"}, "A", "A"),
        ({"tokenizer_config.json": "B"}, "B", "B"),
        ({"chat_template.json": "C"}, "C", "C"),
        ({"chat_template.jinja": "A", "tokenizer_config.json": "B", "chat_template.json": "C"}, "A", "A"),
        ({"tokenizer_config.json": "B", "chat_template.json": "C"}, "B", "B"),
        ({"chat_template.jinja": "A", "additional_chat_templates/tool_use.jinja": "T"}, "A", "T"),
        ({"tokenizer_config.json": named(default="D", tool_use="T", rag="R")}, "D", "T"),
        ({"tokenizer_config.json": {"default": "D", "tool_use": "T"}}, "D", "T"),
        ({"tokenizer_config.json": named(chat="D", tool_use="T")}, "D", "T"),
        ({"tokenizer_config.json": named(tool_use="T")}, "T", "T"),
        ({"additional_chat_templates/chat.jinja": "A"}, "A", "A"),
    ],
    ids=str,
)
def test_the_template_is_found_wherever_it_is_kept(
    folder: Path, places: dict[str, Any], plain: str, with_tools: str
) -> None:
    for place, text in places.items():
        write(folder, place, text)
    template = ChatTemplate.read(folder)
    assert template is not None
    assert template.render(MESSAGES) == plain
    assert template.render(MESSAGES, tools=[{"type": "function"}]) == with_tools


def test_what_a_source_leaves_open_is_noted(folder: Path) -> None:
    write(folder, "tokenizer_config.json", named(chat="D", tool_use="T"))
    assert chat_template.notes(folder) == [
        "no chat template is named 'default'; 'chat' is used for conversations",
    ]
    write(folder, "chat_template.jinja", "A")
    (note,) = chat_template.notes(folder)
    assert note.startswith("the chat template in tokenizer_config.json is another one")
    write(folder, "tokenizer_config.json", "A")
    assert chat_template.notes(folder) == []


@pytest.mark.parametrize(
    ("declared", "code"),
    [
        (named(chat="A", other="B"), "chat-template-ambiguous"),
        (7, "chat-template-invalid"),
        (["A"], "chat-template-invalid"),
        ([{"name": "default"}], "chat-template-invalid"),
        (named(**{"../../x": "A"}), "chat-template-invalid"),
    ],
    ids=str,
)
def test_a_choice_that_cannot_be_made_is_refused(folder: Path, declared: Any, code: str) -> None:
    write(folder, "tokenizer_config.json", declared)
    with pytest.raises(SourceError) as caught:
        ChatTemplate.read(folder)
    assert caught.value.code == code
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_text_is_refused(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(OVAFMError) as caught:
        ChatTemplate.read(folder)
    assert caught.value.code == "chat-template-invalid"


def test_without_a_template_there_is_none(folder: Path) -> None:
    assert ChatTemplate.read(folder) is None
