"""Where an answer ends: what generation configuration, tokenizer and chat template name, together."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import templates, tiny

from ov_afm.conversion import convert
from ov_afm.errors import SourceError
from ov_afm.runtime import stop_tokens
from ov_afm.runtime.chat_template import ChatTemplate
from ov_afm.runtime.detokenize import Detokenizer

END, TEXT = "<|im_end|>", "<|endoftext|>"
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Writes the tokenizer of a model directory; the end-of-text token of each is converted once."""
    made: dict[str, Path] = {}

    def converted(eos: str) -> Path:
        source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("model")
        tiny.write_tokenizer(source)
        (source / "chat_template.jinja").unlink()
        tiny.edit_json(source / "tokenizer_config.json", eos_token=eos)
        convert.write_tokenizer(source, output)
        return output

    def folder(template: str | None, generation: Any = None, eos: str = END) -> Path:
        if eos not in made:
            made[eos] = converted(eos)
        copy = Path(shutil.copytree(made[eos], tmp_path_factory.mktemp("copy") / "model"))
        if template is not None:
            (copy / "chat_template.jinja").write_text(template)
        if generation is not None:
            (copy / "generation_config.json").write_text(json.dumps(generation))
        return copy

    return folder


def found(folder: Path) -> dict[int, tuple[str, ...]]:
    return {token.id: token.named_by for token in stop_tokens.of_folder(folder)}


GENERATION, TOKENIZER, TEMPLATE = "generation_config", "tokenizer", "chat_template"


@pytest.mark.parametrize(
    ("template", "generation", "eos", "expected"),
    [
        (templates.PLAIN, {"eos_token_id": 2}, END, {2: (GENERATION, TOKENIZER, TEMPLATE)}),
        (templates.PLAIN, {"eos_token_id": 0}, END, {0: (GENERATION,), 2: (TOKENIZER, TEMPLATE)}),
        (templates.PLAIN, {"eos_token_id": [300, 0, 300]}, TEXT,
         {300: (GENERATION,), 0: (GENERATION, TOKENIZER), 2: (TEMPLATE,)}),
        (templates.TOOLS, {}, TEXT, {0: (TOKENIZER,), 2: (TEMPLATE,)}),
        (templates.PLAIN, None, TEXT, {0: (TOKENIZER,), 2: (TEMPLATE,)}),
        (templates.SPACED, None, END, {2: (TOKENIZER, TEMPLATE)}),
        (templates.ALPACA, {"eos_token_id": -1}, TEXT, {0: (TOKENIZER,)}),
        (templates.BROKEN, None, TEXT, {0: (TOKENIZER,)}),
        (None, {"eos_token_id": [2]}, TEXT, {2: (GENERATION,), 0: (TOKENIZER,)}),
        # The last turn has another end than those before it.
        (
            "{% for m in messages %}{{ m.content }}{{ '<|endoftext|>' if loop.last else '<|im_end|>' }}{% endfor %}",
            None,
            END,
            {2: (TOKENIZER, TEMPLATE), 0: (TEMPLATE,)},
        ),
        # No token of its own: the user's next turn ends the answer.
        ("{% for m in messages %}<|im_start|>{{ m.content }}\n{% endfor %}", None, TEXT,
         {0: (TOKENIZER,), 1: (TEMPLATE,)}),
        # The template does not show what the assistant said, or a token within its words only.
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}<|im_end|>{% endfor %}", None, TEXT,
         {0: (TOKENIZER,)}),
        ("{% for m in messages %}<|im_end|>{{ m.content }}.{% endfor %}", None, TEXT, {0: (TOKENIZER,)}),
    ],
)  # fmt: skip
def test_the_stop_tokens_are_all_that_a_model_names(
    make: Make, template: str | None, generation: Any, eos: str, expected: dict[int, tuple[str, ...]]
) -> None:
    assert found(make(template, generation, eos)) == expected


def test_what_the_generation_configuration_lacks_is_noted(make: Make) -> None:
    tokens = stop_tokens.of_folder(make(templates.PLAIN, {"eos_token_id": 0}))
    (note,) = stop_tokens.disagreements(tokens)
    assert note.startswith("<|im_end|> (2) is the tokenizer's end-of-text token and the end of a turn")


def test_tokens_are_shown_so_that_they_can_be_seen() -> None:
    assert [stop_tokens.shown(text) for text in ("<|im_end|>", " ", "a\n", "")] == ["<|im_end|>", "' '", r"'a\n'", "''"]


def test_an_added_token_that_is_not_special_ends_a_turn_too(make: Make) -> None:
    """As in GGUF files that mark `<|im_end|>` as a user's token. It is no part of the answer's text."""
    folder = make(None, eos=TEXT)
    fields = json.loads((folder / "tokenizer.json").read_text())
    piece = next(piece for piece, token in fields["model"]["vocab"].items() if token == 300)
    fields["added_tokens"].append({"id": 300, "content": piece, "special": False})
    (folder / "tokenizer.json").write_text(json.dumps(fields))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}" + piece + "{% endfor %}")
    tokenizer = stop_tokens.load_tokenizer(folder)
    tokens = stop_tokens.stop_tokens(folder, tokenizer, ChatTemplate.read(folder, tokenizer))
    assert {token.id for token in tokens} == {0, 300}
    text = Detokenizer(tokenizer, silent={token.id for token in tokens}).assembler()
    assert text.push(72) + text.push(300) + text.finish() == tokenizer.decode([72])


def test_without_tokenizer_files_the_tokenizer_s_ir_says_it(make: Make) -> None:
    """As in directories that hold what GenAI needs, and nothing else."""
    folder = make(templates.PLAIN, eos=TEXT)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    assert found(folder) == {0: (TOKENIZER,), 2: (TEMPLATE,)}


def test_a_tokenizer_that_cannot_be_loaded_is_one_line(make: Make) -> None:
    folder = make(None)
    (folder / "openvino_tokenizer.xml").write_text("no IR")
    with pytest.raises(SourceError) as caught:
        stop_tokens.of_folder(folder)
    assert caught.value.code == "tokenizer-unreadable"
    assert "\n" not in str(caught.value)
