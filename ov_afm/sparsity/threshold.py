"""Which neurons could be skipped at a small price: thresholds, layer by layer, from a share of energy to give up.

Skipping neurons that are not zero changes the answers. A neuron's energy is the square of what it gives to `down_proj`,
`relu(z)⁴`; the threshold of a layer is the largest below which the neurons have at most the given share of the layer's
energy on some text. What that costs is for `ov-afm evaluate --runtime-defaults` to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError, ExtensionError
from .graph import find_mlps, read_model
from .profile import compile_exact, run_window, tokens_of
from .select import MODEL

__all__ = ["TEXT", "thresholds"]

TEXT = Path(__file__).resolve().parent.parent / "texts" / "calibration.txt"
WINDOW = 64
# Of log2(z), from what float16 calls normal to what overflows its square.
EDGES = np.exp2(np.linspace(-14.0, 8.0, 4097))


def thresholds(model_dir: Path, share: float, text: Path = TEXT, *, max_tokens: int = 512) -> list[float]:
    """The threshold of each MLP, in the order of the graph.

    Args:
        model_dir: A model directory with ReLU² MLPs.
        share: Share of each layer's energy to give up, 0 to below 1; 0 is exact.
        text: UTF-8 text.
        max_tokens: Tokens of it to use.

    Raises:
        ConfigError: `share` is out of range, or the text cannot be read.
        ExtensionError: The model has no ReLU² MLP.
    """
    if not 0.0 <= share < 1.0:
        msg = f"the share of energy to give up must lie between 0 and 1, found {share}"
        raise ConfigError(msg)
    ids = tokens_of(model_dir, text)[:max_tokens]
    model = read_model(model_dir / MODEL)
    mlps, _ = find_mlps(model)
    if not mlps:
        msg = f"{model_dir} has no ReLU² MLP, so it has no neurons to skip"
        raise ExtensionError(msg)
    for mlp in mlps:
        model.add_outputs(mlp.up.output(0))
    request = compile_exact(model)
    energy = np.zeros((len(mlps), EDGES.size - 1))
    for start in range(0, len(ids), WINDOW):
        for layer, z in enumerate(run_window(request, ids[start : start + WINDOW], len(mlps))):
            energy[layer] += _energy(z)
    return [_threshold(row, share) for row in energy]


def _energy(z: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    positive = np.clip(z[z > 0], EDGES[0], EDGES[-1]).astype(np.float64)
    counts: npt.NDArray[np.float64] = np.histogram(positive, EDGES, weights=positive**4)[0]
    return counts


def _threshold(energy: Sequence[float] | npt.NDArray[Any], share: float) -> float:
    kept = np.cumsum(energy) <= share * np.sum(energy)
    # Bins that are given up whole; without any energy at all nothing is.
    below = int(kept.argmin()) if not kept.all() else 0
    return float(EDGES[below]) if share > 0 and below > 0 else 0.0
