"""Rounding with feedback costs less than rounding to the nearest code, and stays on the grid."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ov_afm.quantization.gptq import inverse_root, round_with_feedback
from ov_afm.quantization.quantizer import Quantizer

FORMATS = [Quantizer(4, True, 32), Quantizer(4, False, 32), Quantizer(4, True), Quantizer(8, False), Quantizer(8, True)]
NAMES = ["int4-g32", "int4-asym-g32", "int4-rows", "int8-asym", "int8-sym"]


@pytest.mark.parametrize("quantizer", FORMATS, ids=NAMES)
def test_feedback_costs_less_than_rounding_to_nearest(quantizer: Quantizer) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(400, 24) @ torch.randn(24, 96) + 0.3 * torch.randn(400, 96)
    weight = torch.randn(48, 96)
    size = quantizer.group_of(96)
    nearest = quantizer.round_trip(weight.view(48, -1, size)).view(48, 96)
    found = round_with_feedback(weight, inverse_root(inputs.T @ inputs), quantizer)

    def error(rounded: Any) -> float:
        return float(((rounded - weight) @ inputs.T).square().sum())

    assert error(found.weight) < 0.4 * error(nearest)
    least = -(1 << quantizer.bits - 1) if quantizer.sym else 0
    assert found.codes.min() >= least
    assert found.codes.max() < least + (1 << quantizer.bits)
    assert torch.equal(found.codes, found.codes.round())
    assert torch.equal(found.scale, found.scale.half().float())


def test_weights_on_the_grid_stay_where_they_are() -> None:
    torch.manual_seed(0)
    codes = torch.randint(-7, 8, (16, 64)).float()
    codes[:, ::32] = -8
    weight = codes * 0.125
    found = round_with_feedback(weight, inverse_root(torch.eye(64)), FORMATS[0])
    assert torch.equal(found.weight, weight)


def test_root_is_of_the_inverse() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(200, 40)
    gram = inputs.T @ inputs
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(40)
    root = inverse_root(gram.clone())
    assert torch.equal(root, root.triu())
    assert torch.allclose(root.T @ root, torch.linalg.inv(damped), rtol=1e-3, atol=1e-7)
