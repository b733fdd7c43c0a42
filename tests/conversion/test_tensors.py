"""What is in memory is what the files say, whatever transformers does."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support import crafted

from ov_afm.conversion import tensors
from ov_afm.errors import ExportError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint to change."""
    folder = tmp_path / "source"
    crafted.checkpoint(folder)
    return folder


@pytest.mark.parametrize(
    ("said", "stored", "asked", "kind", "cast"),
    [
        ("float16", "float32", None, torch.float32, {}),
        ("float32", "bfloat16", None, torch.bfloat16, {}),
        (None, "float16", None, torch.float16, {}),
        ("bfloat16", "bfloat16", "float32", torch.float32, {"bfloat16 to float32": 11}),
        ("float32", "float32", "float16", torch.float16, {"float32 to float16": 11}),
    ],
    ids=["said-narrower", "said-wider", "not-said", "asked-wider", "asked-narrower"],
)
def test_type_in_memory_is_that_of_the_files_or_the_one_asked_for(
    tmp_path: Path, said: str | None, stored: str, asked: str | None, kind: Any, cast: dict[str, int]
) -> None:
    model = crafted.checkpoint(tmp_path / "source", dtype=stored)
    crafted.edit_config(tmp_path / "source", dtype=said)
    loaded = tensors.load(tmp_path / "source", asked)
    assert loaded.model.dtype == kind
    assert (loaded.cast, loaded.notes) == (cast, [])
    state = loaded.model.state_dict()
    assert all(torch.equal(value.to(kind), state[name]) for name, value in model.state_dict().items())


def test_other_values_than_those_of_the_files_are_found(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    genuine = AutoModelForCausalLM.from_pretrained
    other = source.parent / "other"
    crafted.checkpoint(other, seed=1)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda _, **options: genuine(other, **options))
    with pytest.raises(ExportError, match=r"^transformers loaded another lm_head.weight than the files of source hold"):
        tensors.load(source)


def test_one_wrong_value_in_a_row_that_is_sampled_is_found(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(tensors, "SAMPLE_BYTES", 4096)
    genuine = AutoModelForCausalLM.from_pretrained

    def load(*arguments: Any, **options: Any) -> Any:
        model = genuine(*arguments, **options)
        with torch.no_grad():
            # 128 rows of 128 bytes: every fourth is compared.
            model.model.layers[0].mlp.up_proj.weight[124, 0] += 1
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    with pytest.raises(ExportError) as caught:
        tensors.load(source)
    assert caught.value.code == "weights-differ"
    assert "model.layers.0.mlp.up_proj.weight" in str(caught.value)


def test_what_a_library_says_in_lines_is_one_line(source: Path) -> None:
    crafted.edit_config(source, hidden_act="no such activation")
    with pytest.raises(ExportError) as caught:
        tensors.load(source)
    assert caught.value.code == "checkpoint-unreadable"
    assert "\n" not in str(caught.value)


def test_head_of_its_own_is_no_embedding(source: Path) -> None:
    crafted.edit_config(source, tie_word_embeddings=True)
    loaded = tensors.load(source)
    assert loaded.model.config.tie_word_embeddings is False
    assert ["tie_word_embeddings" in note for note in loaded.notes] == [True]
    shutil.rmtree(source)
    crafted.checkpoint(source, tie_word_embeddings=True)
    loaded = tensors.load(source)
    assert (loaded.model.config.tie_word_embeddings, loaded.notes) == (True, [])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_frequencies_are_those_of_the_configuration(tmp_path: Path, dtype: Any) -> None:
    source = tmp_path / "source"
    crafted.checkpoint(source, rope_parameters={"rope_type": "default", "rope_theta": 1e6}, head_dim=64)
    frequencies = (1e6 ** -(torch.arange(32) / 32)).to(dtype)
    crafted.edit_tensors(source, {"model.layers.0.self_attn.rotary_emb.inv_freq": frequencies})
    assert tensors.load(source).notes == []
