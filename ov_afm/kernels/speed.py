"""How fast packed operations are on this CPU, beside the plugin's own compressed MatMul.

The first MLP of a model and the projections before it are cut out twice, of the plain IR and of the packed one, and run
in turn on the same activations. Before each run as much memory is read as a model's other layers would read, because in
a model each layer's weights come from memory, not from the cache.

What the packed MLP costs depends on how many neurons are active. Activations are random, and the MLP's threshold is set
for the measurement so that the share which a text leaves active is active here. Tokens of a text have more of their
active neurons in common than random ones, so for a few tokens together the packed MLP is rather better than its figure.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..model_dir.manifest import MODEL_BIN, MODEL_XML
from . import extension
from .graph import find_mlps, read_model, read_weights
from .pack import LINEAR, OPERATION, SEPARATOR

__all__ = ["TOKENS", "measure"]

# Tokens that run together: a chat's decoding, small batches, a piece of a prompt.
TOKENS = (1, 4, 16, 256)
ROUNDS = (3, 15)  # least and most runs of each
LIMIT_S = 0.8  # for one number of tokens
CLEAR = 1.15  # factor between the slowest run of one and the fastest of the other that ends the measurement
CACHE_BYTES = 1 << 28  # more than processors for a desk or a lap have
SAMPLE = (64, 1024)  # tokens and neurons that the threshold is found on

Run = Callable[[npt.NDArray[np.float32]], None]


def measure(
    plain: Path, packed: Path, properties: Mapping[str, Any], active: float
) -> tuple[dict[int, float], dict[int, float]]:
    """Milliseconds that one MLP and the projections before it take, plain and packed, by the tokens that run together.

    It takes a few seconds at most.

    Args:
        plain: Model directory.
        packed: Its folder with the packed model.
        properties: OpenVINO properties that both are compiled with.
        active: Share of neurons that a text leaves active, 0 to 1.

    Raises:
        ExtensionError: There is no native library that fits, or a model cannot be read.
    """
    library = extension.load()
    of_packed = read_model(packed / MODEL_XML, library).get_ordered_ops()
    ffn = next(node for node in of_packed if node.get_type_name() == OPERATION)
    linear = [node for node in of_packed if node.get_type_name() == LINEAR][:1]
    of_plain = read_model(plain / MODEL_XML)
    name = ffn.get_friendly_name()
    mlp = next(each for each in find_mlps(of_plain)[0] if each.down.get_friendly_name() == name)
    names = {name for node in linear for name in node.get_friendly_name().split(SEPARATOR)}
    projections = [node for node in of_plain.get_ops() if node.get_friendly_name() in names]

    random = np.random.default_rng(0)
    x = random.standard_normal((max(TOKENS), ffn.get_attributes()["hidden"]), np.float32)
    ffn.set_attribute("threshold", _threshold(read_weights(mlp.up), x, active))
    runs = [
        _compile([mlp.up, *projections], [mlp.down, *projections], x.shape[1], properties),
        _compile([ffn, *linear], [ffn, *linear], x.shape[1], properties, library),
    ]
    other_layers = np.ones(min((plain / MODEL_BIN).stat().st_size, CACHE_BYTES) // 8)
    plain_ms, packed_ms = dict.fromkeys(TOKENS, 0.0), dict.fromkeys(TOKENS, 0.0)
    for tokens in TOKENS:
        plain_ms[tokens], packed_ms[tokens] = _alternate(runs, x[None, :tokens], other_layers)
    return plain_ms, packed_ms


def _threshold(up: Any, x: npt.NDArray[np.float32], active: float) -> float:
    """The threshold that leaves a share of neurons active."""
    tokens, neurons = SAMPLE
    codes = up.codes[:neurons].astype(np.float32)
    scales = up.scales[:neurons].astype(np.float32)
    zeros = np.full_like(scales, up.symmetric_zero) if up.zeros is None else up.zeros[:neurons].astype(np.float32)
    group = codes.shape[1] // scales.shape[1]
    weights = (codes - zeros.repeat(group, 1)) * scales.repeat(group, 1)
    return float(np.quantile(x[:tokens] @ weights.T, 1.0 - active))


def _compile(
    first: Sequence[Any], last: Sequence[Any], features: int, properties: Mapping[str, Any], *extensions: Path
) -> Run:
    """A function that runs a part of a model, from the inputs of its first operations to the outputs of its last."""
    import openvino
    from openvino import opset13 as op

    x = op.parameter([1, -1, features], np.float32)
    for node in first:
        node.input(0).replace_source_output(x.output(0))
    part = openvino.Model([op.result(output) for node in last for output in node.outputs()], [x])
    core = openvino.Core()
    for library in extensions:
        core.add_extension(str(library))
    request = core.compile_model(part, "CPU", dict(properties)).create_infer_request()

    def run(activations: npt.NDArray[np.float32]) -> None:
        request.set_input_tensor(openvino.Tensor(activations, shared_memory=True))
        # Unlike `infer`, this copies no result.
        request.start_async()
        request.wait()

    return run


def _alternate(
    runs: Sequence[Run], x: npt.NDArray[np.float32], other_layers: npt.NDArray[np.float64]
) -> tuple[float, float]:
    """Median milliseconds of two functions that run in turn, until it is clear which is faster."""
    times: tuple[list[float], list[float]] = ([], [])
    x = np.ascontiguousarray(x)
    for run in runs:
        run(x)  # Memory is allocated and code is generated for each shape.
    least, most = ROUNDS
    end = time.perf_counter() + LIMIT_S
    while len(times[0]) < least or (len(times[0]) < most and not _clear(*times) and time.perf_counter() < end):
        for run, taken in zip(runs, times, strict=True):
            other_layers.sum()
            begin = time.perf_counter()
            run(x)
            taken.append((time.perf_counter() - begin) * 1000)
    return statistics.median(times[0]), statistics.median(times[1])


def _clear(one: Sequence[float], other: Sequence[float]) -> bool:
    return min(one) > CLEAR * max(other) or min(other) > CLEAR * max(one)
