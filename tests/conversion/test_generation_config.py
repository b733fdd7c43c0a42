"""The source's generation configuration in a model directory: as it is, with what it lacks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support import templates, tiny

from ov_afm.conversion import convert, generation_config
from ov_afm.errors import SourceError

RECOMMENDED = {"do_sample": True, "temperature": 0.5, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.1}
FILE = "generation_config.json"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer of a model directory; its end of text and of a turn is token 2. Read-only."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("model")
    tiny.write_tokenizer(source)
    convert.write_tokenizer(source, output)
    return output


def carried(tokenizer: Path, tmp_path: Path, fields: Any, **config: Any) -> tuple[str, dict[str, Any]]:
    """Text of the exported file, and what the manifest records."""
    source, output = tmp_path / "source", Path(shutil.copytree(tokenizer, tmp_path / "output"))
    source.mkdir()
    (source / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 512, **config}))
    if fields is not None:
        (source / FILE).write_text(fields if isinstance(fields, str) else json.dumps(fields))
    result = generation_config.carry(source, output)
    return (output / FILE).read_text(), result


AS_IT_IS = [
    # transformers reports both as invalid, and uses nothing of them.
    '{"do_sample":false,  "temperature": 0.6, "eos_token_id": [2, 5]}\n',
    '{"top_p": 0.9, "eos_token_id": 2, "custom": {"a": [1]}}',
    '{"eos_token_id": [2], "temperature": null}',
]


@pytest.mark.parametrize("text", AS_IT_IS)
def test_a_file_that_lacks_nothing_is_carried_byte_for_byte(tokenizer: Path, tmp_path: Path, text: str) -> None:
    found, recorded = carried(tokenizer, tmp_path, text)
    assert found == text
    assert recorded["added"] == {}


@pytest.mark.parametrize(
    ("fields", "config", "added"),
    [
        ({"eos_token_id": 2}, {"model_type": "arcee"}, RECOMMENDED),
        ({"eos_token_id": 2, "temperature": 0.7, "top_k": None}, {"model_type": "arcee"},
         {key: value for key, value in RECOMMENDED.items() if key != "temperature"}),
        # Greedy decoding is the author's choice.
        ({"eos_token_id": 2, "do_sample": False}, {"model_type": "arcee"}, {}),
        ({"eos_token_id": 2, "do_sample": True, "temperature": 0.0}, {"model_type": "arcee"}, {}),
        # Stop tokens that other places name come after the author's.
        ({"eos_token_id": 0}, {}, {"eos_token_id": [2]}),
        ({"eos_token_id": [5, 0]}, {}, {"eos_token_id": [2]}),
        ({"pad_token_id": 0}, {}, {"eos_token_id": 2}),
        (None, {}, {"eos_token_id": 2}),
        # Old checkpoints have it all in config.json.
        (None, {"eos_token_id": [2, 5], "temperature": 0.3, "do_sample": True},
         {"eos_token_id": [2, 5], "temperature": 0.3, "do_sample": True}),
        ({"bos_token_id": 0}, {"eos_token_id": [2, 5], "bos_token_id": 7, "temperature": 0.3},
         {"eos_token_id": [2, 5]}),
        (None, {"model_type": "arcee", "do_sample": False, "eos_token_id": 2}, {"do_sample": False, "eos_token_id": 2}),
    ],
)  # fmt: skip
def test_what_it_lacks_is_added_and_recorded(
    tokenizer: Path, tmp_path: Path, fields: Any, config: dict[str, Any], added: dict[str, Any]
) -> None:
    text, recorded = carried(tokenizer, tmp_path, fields, **config)
    assert recorded["added"] == added
    found, given = json.loads(text), fields or {}
    ends = [end for end in (given.get("eos_token_id"), added.get("eos_token_id")) if end is not None]
    flat = [each for end in ends for each in (end if isinstance(end, list) else [end])]
    expected = {**given, **added, "eos_token_id": flat if len(flat) > 1 else flat[0]}
    assert found == expected


def test_the_user_is_told_of_what_the_source_leaves_open(tokenizer: Path, tmp_path: Path) -> None:
    fields = {"eos_token_id": [0, 700], "num_beams": 4}
    notes = carried(tokenizer, tmp_path, fields)[1]["notes"]
    assert [note.partition(",")[0].partition(":")[0] for note in notes] == [
        "<|im_end|> (2) is the tokenizer's end-of-text token and the end of a turn in the chat template",
        "stop token 700 is beyond the vocabulary of 512; it never comes",
        "not used of the source's generation_config.json",
    ]
    assert "num_beams 4" in notes[2]


def test_a_model_without_any_end_is_noted(tokenizer: Path, tmp_path: Path) -> None:
    source = tmp_path / "tokenizer"
    tiny.write_tokenizer(source)
    tiny.edit_json(source / "tokenizer_config.json", eos_token=None)
    (source / "chat_template.jinja").write_text(templates.ALPACA)
    output = tmp_path / "converted"
    output.mkdir()
    convert.write_tokenizer(source, output)
    text, recorded = carried(output, tmp_path, None)
    assert json.loads(text) == {}
    assert recorded["stop_tokens"] == []
    assert "nothing names a token that ends an answer: answers run to their limit" in recorded["notes"]


def test_a_file_that_cannot_be_read_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError) as caught:
        carried(tokenizer, tmp_path, "{no json")
    assert caught.value.code == "generation-config-unreadable"
