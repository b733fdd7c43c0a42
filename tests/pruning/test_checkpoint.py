"""Layers are ranked by what they do."""

from __future__ import annotations

import pytest
import torch
from support.random_arcee import random_ids, random_model

from ov_afm.pruning.checkpoint import block_influence


def test_layer_that_does_nothing_has_no_influence() -> None:
    model = random_model(num_hidden_layers=3)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight.zero_()
    influence = block_influence(model, random_ids(2))
    assert influence[1] == pytest.approx(0, abs=1e-5)
    assert min(influence[0], influence[2]) > 1e-3
