"""Layers are ranked by what they do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import crafted
from support.random_arcee import random_ids, random_model

from ov_afm.errors import SourceError
from ov_afm.evaluation.logits import TorchModel
from ov_afm.pruning.checkpoint import block_influence, copy_texts, prune_checkpoint
from ov_afm.pruning.vocabulary import cut_checkpoint


def test_layer_that_does_nothing_has_no_influence() -> None:
    model = random_model(num_hidden_layers=3)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight.zero_()
    influence = block_influence(model, random_ids(2))
    assert influence[1] == pytest.approx(0, abs=1e-5)
    assert min(influence[0], influence[2]) > 1e-3


def test_texts_of_the_source_are_carried_byte_for_byte(tmp_path: Path) -> None:
    """Also those that transformers does not read, and in the place of those that it wrote itself."""
    source, output = tmp_path / "source", tmp_path / "output"
    (source / "additional_chat_templates").mkdir(parents=True)
    output.mkdir()
    texts = {
        "LICENSE": "terms",
        "generation_config.json": '{"do_sample": false, "temperature": 0.6}',
        "chat_template.json": '{"chat_template": "A"}',
        "additional_chat_templates/tool_use.jinja": "T\r\n",
    }
    for name, text in texts.items():
        (source / name).write_bytes(text.encode())
    (output / "generation_config.json").write_text("{}")
    copy_texts(source, output)
    found = {path.relative_to(output).as_posix(): path.read_bytes().decode() for path in output.rglob("*.*")}
    assert {**found, "LICENSE": (output / "LICENSE").read_text()} == texts


def test_checkpoint_of_another_model_is_neither_pruned_nor_a_reference(tmp_path: Path) -> None:
    source, output = tmp_path / "source", tmp_path / "output"
    crafted.checkpoint(source)
    crafted.edit_tensors(source, {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)})
    for use in (
        lambda: prune_checkpoint(source, output, None, dataset="", num_samples=1, refit=False),
        lambda: cut_checkpoint(source, output, range(9)),
        lambda: TorchModel(source),
    ):
        with pytest.raises(SourceError) as caught:
            use()
        assert caught.value.code == "tensors-unknown"
    assert not output.exists()
