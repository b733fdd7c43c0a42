"""The quantizer rounds as NNCF does; searched scales protect what matters."""

from __future__ import annotations

import numpy as np
import openvino
import pytest
import torch
from support.exact import EXACT

from ov_afm.quantization.quantizer import Quantizer, search_scales

INT4 = Quantizer(4, True, 64)


def test_search_protects_columns_that_matter() -> None:
    random = np.random.default_rng(0)
    weight = random.normal(0, 1, (128, 128)).astype(np.float32)
    activations = random.normal(0, 1, (512, 128)).astype(np.float32)
    activations[:, [5, 70]] *= 200
    scales, before, after = search_scales(weight, activations, INT4)
    assert after < 0.25 * before
    assert scales[5] > 4 * np.median(scales[:64])
    rounded = INT4.round_trip(torch.from_numpy((weight * scales).reshape(128, 2, 64))).reshape(128, 128).numpy()
    error = np.square((rounded / scales - weight) @ activations.T).sum()
    assert error == pytest.approx(after, rel=0.05)  # groups err independently, nearly


@pytest.mark.parametrize(("bits", "sym"), [(4, True), (4, False), (8, False)])
def test_rounding_is_nncfs(bits: int, sym: bool) -> None:
    import nncf
    from openvino import opset13 as ops

    weight = np.random.default_rng(0).normal(0, 1, (32, 64)).astype(np.float32)
    x = ops.parameter([1, 64], np.float32)
    graph = openvino.Model([ops.matmul(x, ops.constant(weight), False, True)], [x])
    mode = nncf.CompressWeightsMode[f"INT{bits}_{'SYM' if sym else 'ASYM'}"]
    options = {"group_size": 64, "all_layers": True} if bits == 4 else {}
    compressed = openvino.Core().compile_model(nncf.compress_weights(graph, mode=mode, **options), "CPU", EXACT)
    found = np.stack([compressed(row[None])[0][0] for row in np.eye(64, dtype=np.float32)], axis=1)
    expected = Quantizer(bits, sym, 64).round_trip(torch.from_numpy(weight)).numpy()
    # Scales are stored in fp16.
    assert np.abs(found - expected).max() < 2e-3 * np.abs(weight).max()
