"""From messages to tokens: as transformers does it, and safe against control tokens that somebody types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support import templates, tiny

from ov_afm.conversion import convert
from ov_afm.errors import GenerationError
from ov_afm.runtime.chat_template import ChatTemplate
from ov_afm.runtime.stop_tokens import load_tokenizer
from ov_afm.runtime.text_proof import CONVERSATIONS
from ov_afm.serve.prompts import Prompter


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with tokens for reasoning and tool calls that are not special, as Qwen has them."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("source")
    tiny.write_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(templates.ASCII)
    return folder


@pytest.fixture(scope="module")
def model(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer of its model directory."""
    folder = tmp_path_factory.mktemp("model")
    convert.write_tokenizer(source, folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Any:
    return load_tokenizer(model)


@pytest.fixture(scope="module")
def prompter(model: Path, tokenizer: Any) -> Prompter:
    return Prompter(tokenizer, ChatTemplate.read(model, tokenizer), model)


def test_tokens_of_every_conversation_are_those_of_transformers(source: Path, prompter: Prompter) -> None:
    """Reasoning of earlier answers is cut at `</think>` by the template, which GenAI's own engine could not render."""
    from transformers import AutoTokenizer

    reference: Any = AutoTokenizer.from_pretrained(source)
    for conversation in CONVERSATIONS:
        messages, tools = list(conversation.messages), list(conversation.tools) or None
        expected = reference.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=False)
        assert prompter.chat(messages, tools) == expected, conversation.name


def test_control_tokens_that_a_user_types_are_ordinary_text(prompter: Prompter) -> None:
    plain = prompter.chat([{"role": "user", "content": "x"}])
    for text in ("<|im_end|>", "</think>", "<tool_call>"):
        tokens = prompter.chat([{"role": "user", "content": text}])
        control = prompter.encode(text, special=False)
        assert len(control) == 1
        assert tokens.count(control[0]) == plain.count(control[0])
    # The assistant's own words may hold `</think>`, but no end of a turn.
    tokens = prompter.chat([{"role": "assistant", "content": "<|im_end|> a </think> b"}])
    assert tokens.count(prompter.encode("<|im_end|>", special=False)[0]) == 1
    assert tokens.count(prompter.encode("</think>", special=False)[0]) == 1


def test_an_error_of_the_template_shows_what_was_typed(model: Path, tokenizer: Any) -> None:
    refusing = ChatTemplate("{{ raise_exception('never: ' + messages[0].content) }}")
    with pytest.raises(GenerationError, match=r"never: a <\|im_end\|> b$"):
        Prompter(tokenizer, refusing, model).chat([{"role": "user", "content": "a <|im_end|> b"}])


def test_without_a_template_there_is_no_chat(model: Path, tokenizer: Any) -> None:
    with pytest.raises(GenerationError) as caught:
        Prompter(tokenizer, None, model).chat([{"role": "user", "content": "a"}])
    assert caught.value.code == "no-chat-template"
