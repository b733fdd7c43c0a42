"""LoRA adapters: a fine-tune that is a small file beside the model.

LoRA adds B·A to a weight matrix, both of them thin, times a scale that PEFT keeps in
`adapter_config.json` and not in the weights. Here an adapter is read and checked before anything
is loaded: GenAI ignores that scale, and skips tensors whose names fit no layer with only a line on
standard error. Then it is either given to the engine, which computes it beside the
model (`engine_config`), or added to the weights before they are exported (`merge`).
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError, SourceError
from ..model_dir import manifest
from ..model_dir.geometry import Geometry
from ..model_dir.model_directory import ModelDirectory

__all__ = ["Adapter", "check", "engine_config", "merge", "read", "read_all"]

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
PART = re.compile(re.escape(PREFIX) + r"(?P<module>.+)\.lora_(?P<part>[AB])\.weight")
# Features of PEFT beyond B·A on a linear layer, by the field of its configuration.
UNSUPPORTED = (
    "use_dora",
    "fan_in_fan_out",
    "lora_bias",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
)


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter in PEFT's form, read and checked.

    Attributes:
        path: Its safetensors file.
        weight: How much of it is applied; 1 is what was trained.
        scales: Scale of B·A by module, `weight` not included.
        shapes: (rank, inputs, outputs) by module.
        replaced: Modules whose whole weight comes with the adapter.
    """

    path: Path
    weight: float
    scales: Mapping[str, float]
    shapes: Mapping[str, tuple[int, int, int]]
    replaced: Sequence[str] = field(default=())

    def describe(self) -> dict[str, Any]:
        """As a manifest records it."""
        return {
            "name": self.path.parent.name,
            "sha256": manifest.sha256(self.path),
            "config_sha256": manifest.sha256(self.path.parent / CONFIG),
            "weight": self.weight,
        }


def read_all(given: Iterable[str | Path | Adapter]) -> tuple[Adapter, ...]:
    """Read adapters; each is a file, a folder, `FILE:WEIGHT`, or one that was read already.

    Raises:
        SourceError: One cannot be read or used.
    """
    return tuple(each if isinstance(each, Adapter) else read(each) for each in given)


def read(given: str | Path, weight: float | None = None) -> Adapter:
    """Read an adapter.

    Args:
        given: A safetensors file with its `adapter_config.json` beside it, the folder of both, or either
            with `:WEIGHT` at its end.
        weight: How much of it to apply; not read from `given` then.

    Raises:
        ConfigError: The weight is no finite number.
        SourceError: It is missing, damaged, or no LoRA that can be applied here.
    """
    path, share = (Path(given), weight) if weight is not None else _split(str(given))
    if not math.isfinite(share):
        raise ConfigError(f"the weight of an adapter is a finite number, found {share}")
    path = path / WEIGHTS if path.is_dir() else path
    if not path.exists():
        raise SourceError(f"no such adapter: {path}; give PEFT's {WEIGHTS} or its folder")
    shapes, replaced = _modules(path, _shapes(path))
    return Adapter(path, share, _scales(path, shapes), shapes, replaced)


def _split(text: str) -> tuple[Path, float]:
    path, colon, tail = text.rpartition(":")
    # A drive letter has a colon too, and a name may hold one.
    if colon and not Path(text).exists():
        with contextlib.suppress(ValueError):
            return Path(path), float(tail)
    return Path(text), 1.0


def _shapes(path: Path) -> dict[str, list[int]]:
    """Shapes of the tensors in a safetensors file, which is checked for its length too."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise SourceError(
            f"{path} is damaged or no safetensors file ({error}); an adapter is PEFT's {WEIGHTS}: fetch it again",
            code="adapter-unreadable",
        ) from error


def _modules(path: Path, tensors: Mapping[str, list[int]]) -> tuple[dict[str, tuple[int, int, int]], list[str]]:
    """(rank, inputs, outputs) of each adapted module, and the modules that are replaced."""
    parts: dict[str, dict[str, list[int]]] = {}
    replaced = []
    for name, shape in tensors.items():
        if match := PART.fullmatch(name):
            parts.setdefault(match["module"], {})[match["part"]] = shape
        elif name.startswith(PREFIX) and name.endswith(".weight") and ".lora_" not in name:
            replaced.append(name[len(PREFIX) : -len(".weight")])
        else:
            raise SourceError(
                f"{path} has {name!r}, which is not lora_A or lora_B of a linear layer; this cannot be applied"
            )
    shapes = {}
    for module, pair in parts.items():
        down, up = pair.get("A", []), pair.get("B", [])
        if len(down) != 2 or len(up) != 2 or down[0] != up[1]:
            raise SourceError(f"{path}: lora_A and lora_B of {module} do not fit each other, found {down} and {up}")
        shapes[module] = (down[0], down[1], up[0])
    if not shapes:
        raise SourceError(f"{path} has no lora_A and lora_B; an adapter is PEFT's {WEIGHTS}")
    return shapes, replaced


def _scales(path: Path, shapes: Mapping[str, tuple[int, int, int]]) -> dict[str, float]:
    """The scale of each module, from PEFT's configuration: alpha / rank, or alpha / √rank (rsLoRA)."""
    beside = path.parent / CONFIG
    try:
        config = json.loads(beside.read_text(encoding="utf-8"))
        patterns = dict(config.get("alpha_pattern") or {})
        alpha = float(config["lora_alpha"])
    except FileNotFoundError as error:
        raise SourceError(
            f"{beside} is missing, and with it the adapter's lora_alpha; put it beside the weights"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{beside} is not PEFT's configuration of a LoRA: {type(error).__name__} {error}") from error
    if str(config.get("peft_type", "LORA")).upper() != "LORA":
        raise SourceError(f"{beside} describes {config['peft_type']}; only LORA can be applied")
    beyond = [name for name in UNSUPPORTED if config.get(name)]
    if config.get("bias", "none") != "none":
        beyond.append("bias")
    if beyond:
        raise SourceError(f"{beside} uses {', '.join(beyond)}, which cannot be applied here; merge it with PEFT first")
    root = config.get("use_rslora", False)

    def scale(module: str) -> float:
        own = next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), alpha)
        rank = shapes[module][0]
        return float(own) / (math.sqrt(rank) if root else rank)

    return {module: scale(module) for module in shapes}


def check(adapter: Adapter, model: ModelDirectory) -> None:
    """Make sure that a model directory has every layer that an adapter changes.

    Raises:
        SourceError: It was made for another model.
    """
    graph = model.xml.read_text(encoding="utf-8")
    expected = _linear_shapes(model.geometry)
    for module, (_, inputs, outputs) in adapter.shapes.items():
        if f".{module}/" not in graph:
            raise SourceError(
                f"{adapter.path} changes {module}, which {model.path.name} does not have; it was made for another model"
            )
        shape = expected.get(module.rpartition(".")[2])
        if shape is not None and shape != (inputs, outputs):
            raise SourceError(
                f"{adapter.path}: {module} has {inputs} inputs and {outputs} outputs, in {model.path.name} they are "
                f"{shape[0]} and {shape[1]}; it was made for another model"
            )


def _linear_shapes(geometry: Geometry) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of a decoder's linear layers, by name."""
    hidden, inner = geometry.hidden, geometry.intermediate
    queries, keys = geometry.heads * geometry.head_dim, geometry.kv_heads * geometry.head_dim
    attention = {"q_proj": (hidden, queries), "k_proj": (hidden, keys), "v_proj": (hidden, keys)}
    mlp = {"gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden)}
    return {**attention, "o_proj": (queries, hidden), **mlp, "lm_head": (hidden, geometry.vocab)}


def engine_config(adapters: Sequence[Adapter], model: ModelDirectory) -> Any:
    """GenAI's configuration, for adapters that stay the same as long as the engine lives.

    As constants of the graph, because GenAI applies changing ones only in `generate`, which an engine
    that is driven step by step never calls (2026.4).

    Raises:
        SourceError: One does not fit the model, or can only be merged.
    """
    import openvino_genai

    config = openvino_genai.AdapterConfig(mode=openvino_genai.AdapterConfig.Mode.MODE_STATIC)
    for adapter in adapters:
        check(adapter, model)
        scales = set(adapter.scales.values())
        if adapter.replaced or len(scales) != 1:
            why = f"replaces {adapter.replaced[0]}" if adapter.replaced else "scales its modules differently"
            raise SourceError(
                f"{adapter.path} {why}, which works only merged; run: ov-afm export MODEL --merge-adapter FILE"
            )
        config.add(openvino_genai.Adapter(adapter.path), scales.pop() * adapter.weight)
    return config


def merge(model: Any, adapters: Sequence[Adapter]) -> None:
    """Add adapters to the weights of a transformers model, in float32, each sum rounded once.

    Raises:
        SourceError: One was made for another model.
    """
    import torch
    from safetensors import safe_open

    modules = dict(model.named_modules())
    shared = model.get_input_embeddings().weight
    with torch.no_grad():
        for adapter in adapters:
            with safe_open(adapter.path, "pt") as file:
                for name, (_, inputs, outputs) in adapter.shapes.items():
                    weight = _weight(modules, name, adapter, [outputs, inputs])
                    if weight is shared and name.endswith("lm_head"):
                        raise SourceError(
                            f"{adapter.path} changes lm_head, which is the embedding too here; it cannot be merged"
                        )
                    down, up = (file.get_tensor(f"{PREFIX}{name}.lora_{part}.weight").float() for part in "AB")
                    weight.copy_(weight.float() + adapter.scales[name] * adapter.weight * (up @ down))
                for name in adapter.replaced:
                    new = file.get_tensor(f"{PREFIX}{name}.weight")
                    _weight(modules, name, adapter, list(new.shape)).copy_(new)


def _weight(modules: Mapping[str, Any], name: str, adapter: Adapter, shape: list[int]) -> Any:
    weight = getattr(modules.get(name), "weight", None)
    if weight is None:
        raise SourceError(
            f"{adapter.path} changes {name}, which this model does not have; it was made for another model"
        )
    if list(weight.shape) != shape:
        raise SourceError(
            f"{adapter.path}: {name} has shape {shape}, and {list(weight.shape)} in this model; "
            "the adapter was made for another model"
        )
    return weight
