"""Narrowing: what does nothing costs nothing, and the refit earns its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.random_arcee import random_ids, random_model

from ov_afm.pruning.width import narrow


def loss_against(model: Any, expected: Any, ids: Any) -> float:
    with torch.no_grad():
        found = model(ids, use_cache=False).logits.log_softmax(-1)
    return float((expected.exp() * (expected - found)).sum(-1).mean())


def test_refit_beats_no_refit_on_text_that_it_has_not_seen() -> None:
    unseen = torch.tensor(random_ids(8))
    with torch.no_grad():
        expected = random_model()(unseen, use_cache=False).logits.log_softmax(-1)
    losses = {}
    for refit in (True, False):
        model = random_model()
        calibration_ids = torch.randint(3, 512, (24, 64), generator=torch.Generator().manual_seed(9)).tolist()
        narrow(model, calibration_ids, intermediate=64, refit=refit)
        losses[refit] = loss_against(model, expected, unseen)
    assert losses[True] < 0.9 * losses[False]


def test_neurons_that_never_fire_cost_nothing_to_prune() -> None:
    model, ids = random_model(), random_ids(2)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, ::2] = 0
        expected = model(torch.tensor(ids), use_cache=False).logits
        kept = narrow(model, ids, intermediate=64, refit=False)
        found = model(torch.tensor(ids), use_cache=False).logits
    assert kept.neurons == pytest.approx([1, 1])
    assert torch.allclose(found, expected, atol=1e-4)
    assert model.config.intermediate_size == 64


def test_keeping_all_heads_changes_nothing() -> None:
    model, ids = random_model(), random_ids(4)
    with torch.no_grad():
        expected = model(torch.tensor(ids), use_cache=False).logits
        kept = narrow(model, ids, kv_heads=2)
        found = model(torch.tensor(ids), use_cache=False).logits
    assert kept.kv_heads == [[0, 1], [0, 1]]
    assert kept.attention == pytest.approx([1, 1])
    assert not kept.neurons
    assert torch.allclose(found, expected, atol=1e-4)


def test_heads_that_do_nothing_cost_nothing_to_prune() -> None:
    model, ids = random_model(), random_ids(2)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[:, :32] = 0  # the two query heads of KV head 0
        expected = model(torch.tensor(ids), use_cache=False).logits
        kept = narrow(model, ids, kv_heads=1, refit=False)
        found = model(torch.tensor(ids), use_cache=False).logits
    assert kept.kv_heads == [[1], [1]]
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.slow
def test_refit_of_heads_beats_no_refit_on_text_that_it_has_not_seen() -> None:
    def related() -> Any:
        """A model whose second KV head looks about where the first looks, and reads about the same there."""
        model = random_model()
        with torch.no_grad():
            for layer in model.model.layers:
                attention = layer.self_attn
                for matrix, rows in ((attention.q_proj, 32), (attention.k_proj, 16), (attention.v_proj, 16)):
                    matrix.weight[rows:] = 0.2 * matrix.weight[rows:] + 0.8 * matrix.weight[:rows]
        return model

    unseen = torch.tensor(random_ids(8))
    with torch.no_grad():
        expected = related()(unseen, use_cache=False).logits.log_softmax(-1)
    losses = {}
    for refit in (True, False):
        model = related()
        ids = torch.randint(3, 512, (24, 64), generator=torch.Generator().manual_seed(9)).tolist()
        narrow(model, ids, kv_heads=1, refit=refit)
        losses[refit] = loss_against(model, expected, unseen)
    assert losses[True] < 0.9 * losses[False]


def test_fewer_heads_and_neurons_load_with_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, ids = random_model(), random_ids(4)
    narrow(model, ids, intermediate=64, kv_heads=1)
    with torch.no_grad():
        expected = model(torch.tensor(ids), use_cache=False).logits
    model.save_pretrained(tmp_path / "small")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    assert (again.config.num_attention_heads, again.config.num_key_value_heads) == (2, 1)
    assert again.config.head_dim == 16
    with torch.no_grad():
        found = again(torch.tensor(ids)).logits
    assert torch.allclose(found, expected, atol=1e-4)
