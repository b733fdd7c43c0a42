"""Random quantized matrices for the tests of packing and kernels."""

from __future__ import annotations

import numpy as np

from ov_afm.kernels.layout import CHANNEL_WISE, Quantized


def random_weights(
    rng: np.random.Generator, outputs: int, inputs: int, bits: int = 4, group: int = 32, asym: bool = False
) -> Quantized:
    groups = 1 if group == CHANNEL_WISE else inputs // group
    return Quantized(
        codes=rng.integers(0, 1 << bits, (outputs, inputs), np.uint8),
        scales=(rng.random((outputs, groups)) * 0.02 + 0.001).astype(np.float16),
        zeros=rng.integers(0, 1 << bits, (outputs, groups), np.uint8) if asym else None,
        bits=bits,
        group=group,
    )
