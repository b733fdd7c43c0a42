"""The tokenizer of a checkpoint is what its files say, whichever files there are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support import pieces, tiny

from ov_afm.conversion import source_tokenizer
from ov_afm.errors import SourceError

CASES = pieces.recorded()["texts"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pieces.write_model(tmp_path / "tokenizer.model")
    return tmp_path


def configure(folder: Path, **fields: Any) -> Any:
    (folder / "tokenizer_config.json").write_text("{}")
    tiny.edit_json(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizer", **fields)
    return source_tokenizer.load(folder)


def test_sentencepiece_alone_has_its_ids_and_special_tokens(folder: Path) -> None:
    tokenizer = source_tokenizer.load(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")
    for case in CASES:
        assert tokenizer(case["text"]).input_ids == [1, *case["llama_cpp"]]


def test_settings_of_the_configuration_hold(folder: Path) -> None:
    added = {"512": {"content": "<pad>", "special": True}}
    tokenizer = configure(folder, add_bos_token=False, pad_token="<pad>", added_tokens_decoder=added, chat_template="x")
    assert tokenizer("a<pad>").input_ids == [264, 512]
    assert (tokenizer.pad_token_id, tokenizer.chat_template) == (512, "x")
    assert configure(folder, add_eos_token=True)("a").input_ids == [1, 264, 2]
    # Without `legacy`, transformers puts no space after a control token.
    assert configure(folder, legacy=False)("a<|im_end|>b").tokens() == ["<s>", "▁a", "<|im_end|>", "b"]
    assert configure(folder, legacy=True)("a<|im_end|>b").tokens() == ["<s>", "▁a", "<|im_end|>", "▁b"]


def test_added_tokens_of_older_files_hold(folder: Path) -> None:
    (folder / "added_tokens.json").write_text('{"<pad>": 512}')
    assert configure(folder)("a<pad>").input_ids == [1, 264, 512]
    (folder / "added_tokens.json").write_text('{"<pad>": 600}')
    with pytest.raises(SourceError, match="'<pad>' of added_tokens.json has id 600, and 512 is the next one"):
        source_tokenizer.load(folder)


@pytest.mark.parametrize("kept", [0, 10, 1000, -1])
def test_file_that_is_cut_short_is_refused(folder: Path, kept: int) -> None:
    content = (folder / "tokenizer.model").read_bytes()
    (folder / "tokenizer.model").write_bytes(content[:kept])
    with pytest.raises(SourceError) as caught:
        source_tokenizer.load(folder)
    assert caught.value.code == "tokenizer-unsupported"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["LlamaTokenizerFast", "Qwen2Tokenizer", "GPT2Tokenizer", "PreTrainedTokenizerFast"])
def test_file_counts_and_not_the_class(tmp_path: Path, name: str) -> None:
    from tokenizers import Tokenizer

    tiny.write_tokenizer(tmp_path)
    tiny.edit_json(tmp_path / "tokenizer_config.json", tokenizer_class=name)
    tokenizer, declared = source_tokenizer.load(tmp_path), Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in tiny.TEXTS:
        assert tokenizer(text).input_ids == declared.encode(text).ids
    assert (tokenizer.eos_token, tokenizer.chat_template) == ("<|im_end|>", tiny.CHAT_TEMPLATE)
