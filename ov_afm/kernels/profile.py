"""How many neurons of a ReLU² model are zero, or small, on a user's text, and what that is worth.

The share is counted where it matters, at the input of `down_proj`, layer by layer, with the plain model on CPU.

What a token costs is, above all, reading weights. With `a` the share of active neurons, and `m`, `u`, `d` the bytes of
all weights a token reads, of all `up` and of all `down` among them, the kernels need not read `(1 - a) d`:

    predicted speed-up = m / (m - (1 - a) d)

It is an upper bound of what skipping alone brings; stock OpenVINO's distance from the memory's bandwidth is not in it.

Neurons that are small but not zero can be skipped at a price: it changes the answers. A neuron's energy is the square
of what it gives to `down_proj`, `relu(z)⁴`; the threshold of a layer is the largest below which the neurons have at
most the given share of the layer's energy on some text. `ov-afm evaluate --runtime-defaults` measures what that costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError
from ..model_dir import manifest
from ..model_dir.inference import EXACT, decoder_inputs, input_names
from ..model_dir.model_directory import ModelDirectory
from .graph import read_mlps

__all__ = ["Limit", "Profile", "limits", "profile", "run_windows", "tokens_of"]

WINDOW = 256
LIMITS_WINDOW = 64  # tokens that `limits` runs together
# Of log2(z), from what float16 calls normal to what overflows its square.
EDGES = np.exp2(np.linspace(-14.0, 8.0, 4097))
PAYS = 1.05  # predicted speed-up from which the kernels are worth a second copy of the model


@dataclass(frozen=True)
class Profile:
    """Zeros of one model on one text.

    Attributes:
        zeros: Layer → share of exact zeros at the input of `down_proj`, 0 to 1.
        mean: Mean share, each layer weighted alike.
        tokens: Tokens of text that were run.
        text_sha256: Of the text file.
        weights_bytes: Weights that a decoded token reads: everything but the embedding table.
        down_bytes: Those of all `down_proj` among them.
        speedup: Predicted decoding speed, relative to reading all weights.
    """

    zeros: dict[str, float]
    mean: float
    tokens: int
    text_sha256: str
    weights_bytes: int
    down_bytes: int
    speedup: float

    @property
    def pays(self) -> bool:
        """Whether the kernels are predicted to be worth their disk space."""
        return self.speedup >= PAYS


@dataclass(frozen=True)
class Limit:
    """Which neurons of one MLP are skipped.

    Attributes:
        threshold: Neurons at or below it are skipped.
        active: Share of neurons above it on the text, 0 to 1.
    """

    threshold: float
    active: float


def profile(
    model_dir: Path,
    text: Path,
    *,
    max_tokens: int = 2048,
    window: int = WINDOW,
    on_tokens: Callable[[int], Any] | None = None,
) -> Profile:
    """Measure the zeros and write them to the manifest, if there is one.

    Args:
        model_dir: A model directory with ReLU² MLPs.
        text: UTF-8 text of the kind that the model will be used on.
        max_tokens: Stop after so many tokens.
        window: Tokens that are run together; each window starts anew.
        on_tokens: Called with the number of tokens after each window.

    Raises:
        ConfigError: The text cannot be read or has no tokens, or a number is out of range.
        ExtensionError: The model has no ReLU² MLP.
        SourceError: `model_dir` is no whole model directory.
    """
    for name, value in (("max_tokens", max_tokens), ("window", window)):
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, found {value}")
    directory = ModelDirectory.open(model_dir)
    ids = tokens_of(model_dir, text)[:max_tokens]
    model, names, sizes = _count_zeros(model_dir)
    zeros = np.zeros(len(names))
    for count, outputs in run_windows(model, ids, window, len(names)):
        zeros += np.array([float(share) for share in outputs]) * count
        if on_tokens:
            on_tokens(count)
    shares = zeros / len(ids)
    result = Profile(
        zeros={name: round(float(share), 4) for name, share in zip(names, shares, strict=True)},
        mean=round(float(shares.mean()), 4),
        tokens=len(ids),
        text_sha256=manifest.sha256(text),
        weights_bytes=sizes[0],
        down_bytes=sizes[1],
        speedup=round(sizes[0] / (sizes[0] - float(shares.mean()) * sizes[1]), 3),
    )
    if directory.manifest is not None:
        directory.manifest.sparsity["profile"] = asdict(result)
        manifest.write(model_dir, directory.manifest)
    return result


def tokens_of(model_dir: Path, text: Path) -> npt.NDArray[np.int64]:
    """Ids of a text.

    Raises:
        ConfigError: It cannot be read or has no tokens.
    """
    import openvino_genai

    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{text} cannot be read as UTF-8 text ({error}); give a text file with --text") from error
    encoded = openvino_genai.Tokenizer(model_dir).encode(content, add_special_tokens=False) if content else None
    ids = np.array(encoded.input_ids.data[0], np.int64) if encoded else np.empty(0, np.int64)
    if not ids.size:
        raise ConfigError(f"{text} is empty; give a text file with --text")
    return ids


def _count_zeros(model_dir: Path) -> tuple[Any, list[str], tuple[int, int]]:
    """The model with an output more for each MLP, its share of zeros; their names; bytes of (all, down) weights."""
    from openvino import opset13 as op

    model, mlps, _ = read_mlps(model_dir, "it has no zeros to use")
    for mlp in mlps:
        zero = op.convert(op.equal(mlp.down.input_value(0), np.float32(0)), "f32")
        share = op.reduce_mean(zero, np.array([0, 1, 2], np.int64), keep_dims=False)
        model.add_outputs(share.output(0))
    down = {constant.get_friendly_name() for mlp in mlps for constant in _constants_of(mlp.down)}
    sizes = {
        constant.get_friendly_name(): constant.get_byte_size()
        for node in model.get_ordered_ops()
        if node.get_type_name() == "MatMul"
        for constant in _constants_of(node)
    }
    return model, [mlp.name for mlp in mlps], (sum(sizes.values()), sum(sizes[name] for name in down))


def _constants_of(matmul: Any) -> list[Any]:
    """Weight, scale and zero point of a MatMul; nothing for one of two activations."""
    constants, todo = [], [matmul.input_value(1).get_node()]
    while todo:
        node = todo.pop()
        if node.get_type_name() == "Constant":
            constants.append(node)
        elif node.get_type_name() in ("Convert", "Reshape", "Multiply", "Subtract"):
            todo += [value.get_node() for value in node.input_values()]
        else:
            return []
    return constants


def run_windows(
    model: Any, ids: npt.NDArray[np.int64], window: int, outputs: int
) -> Iterator[tuple[int, list[npt.NDArray[Any]]]]:
    """Run a text in windows, each from an empty cache; yields the tokens of a window and its last `outputs` outputs.

    Zeros are exact: neither bf16 nor quantized activations round a neuron to zero.
    """
    import openvino

    compiled = openvino.Core().compile_model(model, "CPU", EXACT)
    request, names = compiled.create_infer_request(), input_names(compiled)
    for start in range(0, len(ids), window):
        part = ids[start : start + window]
        request.reset_state()
        results = request.infer(decoder_inputs(part, names))
        yield len(part), [results[len(results) - outputs + index] for index in range(outputs)]


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
    model, mlps, _ = read_mlps(model_dir, "it has no neurons to skip")
    for mlp in mlps:
        model.add_outputs(mlp.up.output(0))
    energy, counts = np.zeros((2, len(mlps), EDGES.size - 1))
    seen = np.zeros(len(mlps))
    for _, outputs in run_windows(model, ids, LIMITS_WINDOW, len(mlps)):
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
