"""Which neurons could be skipped at a small price: limits, layer by layer, from a share of energy to give up.

Skipping neurons that are not zero changes the answers. A neuron's energy is the square of what it gives to `down_proj`,
`relu(z)⁴`; the threshold of a layer is the largest below which the neurons have at most the given share of the layer's
energy on some text. `ov-afm evaluate --runtime-defaults` measures what that costs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError, ExtensionError
from ..model_dir.manifest import MODEL_XML
from .graph import find_mlps, read_model
from .profile import compile_exact, run_windows, tokens_of

__all__ = ["Limit", "limits"]

WINDOW = 64
# Of log2(z), from what float16 calls normal to what overflows its square.
EDGES = np.exp2(np.linspace(-14.0, 8.0, 4097))


@dataclass(frozen=True)
class Limit:
    """Of one MLP.

    Attributes:
        threshold: Neurons at or below it are skipped.
        active: Share of neurons above it on the text, 0 to 1.
    """

    threshold: float
    active: float


def limits(model_dir: Path, share: float, text: Path, *, max_tokens: int = 512) -> list[Limit]:
    """The limit of each MLP, in the order of the graph.

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
        raise ConfigError(f"the share of energy to give up must lie between 0 and 1, found {share}")
    ids = tokens_of(model_dir, text)[:max_tokens]
    model = read_model(model_dir / MODEL_XML)
    mlps, _ = find_mlps(model)
    if not mlps:
        raise ExtensionError(f"{model_dir} has no ReLU² MLP, so it has no neurons to skip")
    for mlp in mlps:
        model.add_outputs(mlp.up.output(0))
    energy, counts = np.zeros((2, len(mlps), EDGES.size - 1))
    seen = np.zeros(len(mlps))
    for _, outputs in run_windows(compile_exact(model), ids, WINDOW, len(mlps)):
        for layer, z in enumerate(outputs):
            positive = np.clip(z[z > 0], EDGES[0], EDGES[-1]).astype(np.float64)
            energy[layer] += np.histogram(positive, EDGES, weights=positive**4)[0]
            counts[layer] += np.histogram(positive, EDGES)[0]
            seen[layer] += z.size
    return [_limit(*each, share) for each in zip(energy, counts, seen, strict=True)]


def _limit(energy: npt.NDArray[Any], counts: npt.NDArray[Any], seen: float, share: float) -> Limit:
    given_up = np.cumsum(energy) <= share * energy.sum()
    # Bins that are given up whole; without any energy at all nothing is.
    below = int(given_up.argmin()) if share > 0 and not given_up.all() else 0
    return Limit(float(EDGES[below]) if below else 0.0, float(counts[below:].sum() / seen))
