"""The conversion's own decisions: which tokenizer is converted, what a slice of a model is."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import tiny

from ov_afm.conversion import convert, tensors, verify
from ov_afm.errors import ExportError
from ov_afm.runtime.text_proof import TEXTS


@pytest.fixture
def digits_checkpoint(tmp_path: Path) -> Path:
    """A tokenizer that cuts digits out before the GPT-2 rule, as SmolLM2's does."""
    from tokenizers import Tokenizer, pre_tokenizers, trainers

    tiny.write_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    # With runs of spaces in the corpus, two spaces become a token: then it matters where text is cut.
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=specials, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["a    b    c   \n\n  d " * 20], trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tiny.edit_json(tmp_path / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    return tmp_path


def converted(checkpoint: Path, folder: Path) -> Path:
    folder.mkdir()
    convert.write_tokenizer(checkpoint, folder)
    return folder


def test_digits_after_spaces_have_the_source_s_tokens(digits_checkpoint: Path, tmp_path: Path) -> None:
    checks = verify.tokenizer_equal(digits_checkpoint, converted(digits_checkpoint, tmp_path / "model"))
    assert checks["tokenizer"]["equal"]
    assert checks["tokenizer"]["texts"] == len(TEXTS)


def test_the_proof_notices_the_stock_conversion_of_digits(
    digits_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "convertible", lambda tokenizer: tokenizer)
    model_dir = converted(digits_checkpoint, tmp_path / "model")
    with pytest.raises(ExportError) as caught:
        verify.tokenizer_equal(digits_checkpoint, model_dir)
    assert caught.value.code == "tokenizer-differs"


def test_the_source_s_tokenizer_files_are_copied_byte_for_byte(digits_checkpoint: Path, tmp_path: Path) -> None:
    model_dir = converted(digits_checkpoint, tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (model_dir / name).read_bytes() == (digits_checkpoint / name).read_bytes()


def test_a_slice_has_the_source_s_weights(tiny_checkpoint: Path) -> None:
    import torch

    model = tensors.load(tiny_checkpoint).model
    sliced = convert.slice_model(model, {"num_hidden_layers": 1, "intermediate_size": 96, "vocab_size": 100})
    weights = model.state_dict()
    assert sliced.config.num_hidden_layers == 1
    assert sliced.lm_head.weight.shape == (100, 64)
    assert sliced.model.layers[0].mlp.down_proj.weight.shape == (64, 96)
    assert len(sliced.state_dict()) < len(weights)
    for name, value in sliced.state_dict().items():
        assert torch.equal(value, weights[name][tuple(slice(0, size) for size in value.shape)])
