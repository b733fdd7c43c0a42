"""Chat templates: where they are kept, and what they render."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from support import crafted, templates, tiny
from support.crafted import Case, Crafted

from ov_afm.runtime.chat_template import ChatTemplate
from ov_afm.runtime.text_proof import CONVERSATIONS

Make = Callable[[Path], Crafted]


def named(**texts: str) -> list[dict[str, str]]:
    """Templates by name, as tokenizer_config.json has them."""
    return [{"name": name, "template": text} for name, text in texts.items()]


def renders(plain: str, with_tools: str | None = None) -> Callable[[Path], None]:
    """Checks that transformers renders these templates to the bytes that the export gives."""

    def check(output: Path) -> None:
        from transformers import AutoTokenizer

        ours, reference = ChatTemplate.read(output), AutoTokenizer.from_pretrained(output)
        assert ours is not None
        for conversation in CONVERSATIONS:
            tools = list(conversation.tools) or None
            text = with_tools if tools and with_tools else plain
            messages = [dict(message) for message in conversation.messages]
            expected = reference.apply_chat_template(messages, tools=tools, chat_template=text, tokenize=False)
            assert ours.render(messages, tools=tools, open_turn=False) == expected
            # Who loads the directory with transformers gets the same.
            assert reference.apply_chat_template(messages, tools=tools, tokenize=False) == expected

    return check


def kept_in(file: str, template: Any, check: Callable[[Path], None] | None = None) -> Make:
    """A checkpoint whose template is in this file alone."""

    def make(folder: Path) -> Crafted:
        model = crafted.checkpoint(folder)
        (folder / "chat_template.jinja").unlink()
        if file.endswith(".jinja"):
            (folder / file).write_text(template)
        else:
            if not (folder / file).exists():
                (folder / file).write_text("{}")
            tiny.edit_json(folder / file, chat_template=template)
        return Crafted(model, check=check)

    return make


NAMED = named(default=templates.PLAIN, tool_use=templates.TOOLS)
CASES = [
    Case(
        "processor-file",
        "in `chat_template.json` alone",
        "exact",
        "transformers reads this file for processors only; the model directory has `chat_template.jinja`",
        kept_in("chat_template.json", templates.TOOLS, renders(templates.TOOLS)),
    ),
    Case(
        "named",
        "named templates in `tokenizer_config.json`, with a `default` and one for tools",
        "exact",
        "each is used for what it is for, as in transformers",
        kept_in("tokenizer_config.json", NAMED, renders(templates.PLAIN, templates.TOOLS)),
    ),
    Case(
        "named-one",
        "one named template, and no `default`",
        "converted with a note",
        "there is no other choice",
        kept_in("tokenizer_config.json", named(chat=templates.TOOLS), renders(templates.TOOLS)),
        says=("'chat' is used for conversations",),
    ),
    Case(
        "named-several",
        "several named templates, and no `default`",
        "refused",
        "name one of them `default`",
        kept_in("tokenizer_config.json", named(chat=templates.PLAIN, story=templates.TOOLS)),
        code="chat-template-ambiguous",
        says=("'chat', 'story'", "tokenizer_config.json"),
    ),
    Case(
        "broken",
        "a template that no conversation can be rendered with",
        "refused",
        "nothing could be compared; correct it, or take it out",
        kept_in("chat_template.jinja", templates.BROKEN),
        code="chat-template-unusable",
        says=("has no attribute 'nothing'",),
    ),
    Case(
        "beyond-genai",
        "`tojson(ensure_ascii=False)` and more that OpenVINO GenAI's own engine lacks",
        "converted with a note",
        "ov_afm renders with jinja2 everywhere, as transformers does; the note is for programs that use GenAI's engine",
        kept_in("chat_template.jinja", templates.ASCII, renders(templates.ASCII)),
        says=("tool call", "Unknown argument ensure_ascii"),
    ),
]
