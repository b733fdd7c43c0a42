"""LoRA adapters: a fine-tune that is a small file beside the model.

LoRA adds B·A to a weight matrix, both of them thin, times a scale that PEFT keeps in
`adapter_config.json` and not in the weights. Here an adapter is read and checked before anything
is loaded: GenAI ignores that scale, and skips tensors whose names fit no layer with only a line on
standard error; PEFT ignores tensors that its configuration does not ask for. Then it is either given to the
engine, which computes it beside the model (`engine_config`), or added to the weights before they are exported
(`conversion.merge_adapters`).
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError, SourceError
from ..model_dir import manifest, tokenizer_files
from ..model_dir.geometry import Geometry
from ..model_dir.model_directory import ModelDirectory
from . import peft_config
from .peft_config import CONFIG, EMBEDDING, HEAD, PeftConfig

__all__ = [
    "CONFIG",
    "PREFIX",
    "WEIGHTS",
    "Adapter",
    "LowRank",
    "another_base",
    "check",
    "engine_config",
    "read",
    "read_all",
    "unused_files",
]

logger = logging.getLogger(__name__)

WEIGHTS, PICKLED = "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
# A module and what the adapter holds for it, as PEFT names tensors.
TENSOR = re.compile(
    re.escape(PREFIX)
    + r"(?P<module>.+?)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector|lora_velora_embed|token_adapter\.trainable_tokens_delta|base_layer\.weight"
    r"|base_layer\.bias|weight|bias)"
)
# Parts of names that PEFT writes in other places, or not at all.
MISPLACED = re.compile(r"(^|\.)(lora_|base_layer|token_adapter|modules_to_save|original_module)")
FLOATS = ("F64", "F32", "F16", "BF16")
MERGE = "run: ov-afm export MODEL --merge-adapter FILE"


@dataclass(frozen=True, slots=True)
class LowRank:
    """LoRA on one module.

    Attributes:
        rank: Rows of A, columns of B.
        inputs: Columns of A; tokens of an embedding.
        outputs: Rows of B.
        scale: Of B·A, the adapter's weight not included.
        embedding: The module is an embedding, whose weight is the transpose of B·A.
        dora: A magnitude comes with each row of the sum (with each column, in an embedding).
        bias: B has a bias.
    """

    rank: int
    inputs: int
    outputs: int
    scale: float
    embedding: bool = False
    dora: bool = False
    bias: bool = False


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter in PEFT's form, read and checked.

    Attributes:
        path: Its safetensors file.
        weight: How much of it is applied; 1 is what was trained.
        config: Its configuration.
        low_rank: LoRA by module.
        base: Tensors that replace parameters of the base model: parameter to name in the file.
        saved: Tensors of modules that were trained whole, in the same way.
        rows: Tokens whose rows come with the adapter, by module.
    """

    path: Path
    weight: float
    config: PeftConfig
    low_rank: Mapping[str, LowRank]
    base: Mapping[str, str] = field(default_factory=dict)
    saved: Mapping[str, str] = field(default_factory=dict)
    rows: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """As a manifest records it."""
        return {
            "name": self.path.parent.name,
            "sha256": manifest.sha256(self.path),
            "config_sha256": manifest.sha256(self.path.parent / CONFIG),
            "weight": self.weight,
        }

    @property
    def unties(self) -> bool:
        """Whether embedding and head, where they are one matrix, may become two."""
        changed = {*self.low_rank, *(name.rpartition(".")[0] for name in self.saved)}
        return bool(changed & {EMBEDDING, HEAD})

    @property
    def only_merged(self) -> str | None:
        """What an engine cannot compute beside the model; None if it can compute all of it."""
        replaced = next(iter((*self.saved, *self.base, *self.rows)), None)
        embedding = next((module for module, each in self.low_rank.items() if each.embedding), None)
        reasons = {
            f"replaces {replaced}": replaced is not None,
            f"changes the embedding {embedding}": embedding is not None,
            "uses DoRA": self.config.dora,
            f"starts from {self.config.start}, which changed the base model": self.config.start != "plain",
            "has biases": any(each.bias for each in self.low_rank.values()),
            "scales its modules differently": len({each.scale for each in self.low_rank.values()}) > 1,
        }
        return next((reason for reason, holds in reasons.items() if holds), None)


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
        ConfigError: The weight is no finite number, or not 1 for an adapter that replaces weights.
        SourceError: It is missing, damaged, or no LoRA that can be applied here.
    """
    path, share = (Path(given), weight) if weight is not None else _split(str(given))
    if not math.isfinite(share):
        raise ConfigError(f"the weight of an adapter is a finite number, found {share}", code="adapter-weight")
    path = _file(path)
    # The weights first: what they are is said before what their configuration lacks.
    tensors = _tensors(path)
    adapter = _sorted(path, share, peft_config.read(path.parent / CONFIG), tensors)
    if share != 1:
        _check_weight(adapter)
    return adapter


def _split(text: str) -> tuple[Path, float]:
    path, colon, tail = text.rpartition(":")
    # A drive letter has a colon too, and a name may hold one.
    if colon and not Path(text).exists():
        with contextlib.suppress(ValueError):
            return Path(path), float(tail)
    return Path(text), 1.0


def _file(path: Path) -> Path:
    folder = path if path.is_dir() else path.parent
    path = path / WEIGHTS if path.is_dir() else path
    if path.suffix in (".bin", ".pt", ".pth") or (not path.exists() and (folder / PICKLED).exists()):
        raise SourceError(
            f"{folder} has its adapter as a pickle ({path.name if path.exists() else PICKLED}), and loading a pickle "
            f'can run code; in its folder, write it as {WEIGHTS}: python -c "import torch, safetensors.torch as s; '
            f"s.save_file(torch.load('{PICKLED}', weights_only=True), '{WEIGHTS}')\"",
            code="adapter-pickled",
        )
    if not path.exists():
        raise SourceError(f"no such adapter: {path}; give PEFT's {WEIGHTS} or its folder", code="adapter-missing")
    return path


def _tensors(path: Path) -> dict[str, list[int]]:
    """Shapes of the tensors in a safetensors file, which is checked for its length too."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            types = {name: each.get_dtype() for name, each in slices.items()}
            shapes = {name: each.get_shape() for name, each in slices.items()}
    except (OSError, SafetensorError) as error:
        raise SourceError(
            f"{path} is damaged or no safetensors file ({error}); an adapter is PEFT's {WEIGHTS}: fetch it again",
            code="adapter-unreadable",
        ) from error
    for name, dtype in types.items():
        if dtype not in FLOATS:
            raise SourceError(
                f"{path}: {name} is stored as {dtype}; save the adapter as {', '.join(FLOATS)}", code="adapter-type"
            )
    return shapes


# -- What belongs to which module


def _sorted(path: Path, weight: float, config: PeftConfig, tensors: Mapping[str, list[int]]) -> Adapter:
    """Give each tensor its meaning.

    Raises:
        SourceError: One has none, which PEFT would ignore.
    """
    parts: dict[str, dict[str, list[int]]] = {}
    for name, shape in tensors.items():
        match = TENSOR.fullmatch(name)
        if match is None or MISPLACED.search(match["module"]):
            raise SourceError(
                f"{path} has {name!r}, which is no tensor of PEFT's LoRA; PEFT would ignore it, so take it out if it "
                "means nothing",
                code="adapter-tensor-unknown",
            )
        parts.setdefault(match["module"], {})[match["part"]] = shape
    low_rank: dict[str, LowRank] = {}
    base: dict[str, str] = {}
    saved: dict[str, str] = {}
    rows: dict[str, tuple[int, ...]] = {}
    for module, held in parts.items():
        if each := _low_rank(path, config, module, held):
            low_rank[module] = each
        if (delta := held.pop("token_adapter.trainable_tokens_delta", None)) is not None:
            rows[module] = _rows(path, config, module, delta)
        for part in held:
            inner = part.removeprefix("base_layer.")
            if (module in low_rank) != (inner != part):
                raise _ignored(path, f"{module}.{part}", f"{module} {'has' if module in low_rank else 'has no'} LoRA")
            whole = config.saves(module, tied=True)
            (saved if whole else base)[f"{module}.{inner}"] = f"{PREFIX}{module}.{part}"
    if not low_rank:
        raise SourceError(f"{path} has no lora_A and lora_B; an adapter is PEFT's {WEIGHTS}", code="adapter-empty")
    lacking = [name for name in config.tokens if not any(module.endswith(name) for module in rows)]
    if lacking and not (set(config.tokens.values()) == set(rows.values())):
        raise SourceError(
            f"{path} has no rows for the tokens of {lacking[0]}, which {CONFIG} says were trained; fetch it again",
            code="adapter-incomplete",
        )
    return Adapter(path, weight, config, low_rank, base, saved, rows)


def _ignored(path: Path, name: str, why: str) -> SourceError:
    return SourceError(
        f"{path} has {name}, which PEFT ignores, because by {CONFIG} {why}; correct the configuration, or take the "
        "tensor out",
        code="adapter-inconsistent",
    )


def _low_rank(path: Path, config: PeftConfig, module: str, held: dict[str, list[int]]) -> LowRank | None:
    """LoRA on a module, its parts taken out of `held`; None if there is none."""
    embedding = any(part.startswith("lora_embedding") for part in held)
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
    mine = {part: held.pop(part) for part in tuple(held) if part.startswith("lora_")}
    mine.pop("lora_velora_embed", None)  # for the backward pass
    if not mine:
        return None
    down, up = (mine.pop(name, []) for name in names)
    if len(down) != 2 or len(up) != 2 or down[0] != up[1]:
        raise SourceError(
            f"{path}: lora_A and lora_B of {module} do not fit each other, found {down} and {up}; fetch it again",
            code="adapter-incomplete",
        )
    if not config.adapts(module, tied=True):
        raise _ignored(path, f"LoRA of {module}", "it has none (target_modules, exclude_modules, layers_to_transform)")
    rank, inputs, outputs = down[0], down[1], up[0]
    if rank != config.rank_of(module):
        raise SourceError(
            f"{path}: {module} has rank {rank}, by {CONFIG} (r, rank_pattern) it is {config.rank_of(module)}, and the "
            "scale depends on it; correct the configuration",
            code="adapter-inconsistent",
        )
    dora, bias = mine.pop("lora_magnitude_vector", None), mine.pop("lora_B.bias", None)
    if mine or (dora is not None) != config.dora:
        what = f"{module}.{next(iter(mine))}" if mine else f"{'a' if dora else 'no'} lora_magnitude_vector of {module}"
        raise _ignored(path, what, f"use_dora is {str(config.dora).lower()}")
    for part in (dora, bias):
        if part is not None and part != [outputs]:
            raise SourceError(
                f"{path}: magnitude and bias of {module} have {outputs} values, found {part}; fetch it again",
                code="adapter-incomplete",
            )
    return LowRank(rank, inputs, outputs, config.scale_of(module), embedding, config.dora, bias is not None)


def _rows(path: Path, config: PeftConfig, module: str, shape: Sequence[int]) -> tuple[int, ...]:
    tokens = next((rows for name, rows in config.tokens.items() if module.endswith(name)), None)
    if tokens is None:
        raise _ignored(path, f"rows of {module}", "no tokens of it were trained (trainable_token_indices)")
    if len(shape) != 2 or len(tokens) != shape[0]:
        raise SourceError(
            f"{path} has {shape[0] if shape else 0} rows for {module}, {CONFIG} names {len(tokens)} tokens; fetch both "
            "again",
            code="adapter-inconsistent",
        )
    return tokens


def _check_weight(adapter: Adapter) -> None:
    """Refuse a weight for what is no sum."""
    # A copy of the base model's own weight, which PEFT keeps beside LoRA on embedding or head, is none of it.
    replaced = (name for name, tensor in adapter.base.items() if not tensor.endswith(".base_layer.weight"))
    what = next(iter((*adapter.saved, *adapter.rows, *replaced)), None)
    if what is None and not adapter.config.dora and adapter.config.start == "plain":
        return
    reason = f"it replaces {what}" if what else "DoRA, PiSSA and OLoRA are no sums"
    raise ConfigError(
        f"{adapter.path} can only be applied with weight 1, found {adapter.weight:g}: {reason}", code="adapter-weight"
    )


def another_base(adapter: Adapter, model: str) -> str | None:
    """A warning, if an adapter names another base model than the one it is applied to; None if not.

    Only a warning: a path of the machine that trained it, or a quantized copy, can be the same model.

    Args:
        adapter: The adapter.
        model: Hub id, or name of the folder or file.
    """
    if adapter.config.base is None or _plain_name(adapter.config.base) == _plain_name(model):
        return None
    return (
        f"the adapter {adapter.path.parent.name} was trained on {adapter.config.base!r}, and is applied to {model!r}; "
        "make sure that they are the same model"
    )


def unused_files(adapter: Adapter, folder: Path) -> list[str]:
    """What lies beside an adapter, differs from the base model, and is not applied with it: one note each.

    Args:
        adapter: The adapter.
        folder: The checkpoint or model directory that it is applied to.
    """
    beside, name = adapter.path.parent, adapter.path.parent.name
    notes = []
    templates = tokenizer_files.chat_templates(beside)
    if templates and templates != tokenizer_files.chat_templates(folder):
        notes.append(
            f"the adapter {name} brings another chat template, which is not used; if it was trained with that one, put "
            f"it into a copy of {folder.name}"
        )
    known = tokenizer_files.control_tokens(folder)
    if new := [token for token in tokenizer_files.control_tokens(beside) if token not in known]:
        notes.append(
            f"the adapter {name} brings a tokenizer with {len(new)} tokens that {folder.name} does not have, such as "
            f"{new[0]!r}; they are not added"
        )
    return notes


def _plain_name(name: str) -> str:
    """Last part of a Hub id or path, without what names a copy of the same model."""
    if cached := re.search(r"models--[^/\\]+?--([^/\\]+)", name):
        name = cached[1]
    last = re.split(r"[/\\]", name.rstrip("/\\"))[-1].lower()
    return re.sub(r"(-unsloth)?(-bnb-[48]bit)?(\.gguf)?$", "", last)


# -- Beside a model


def check(adapter: Adapter, model: ModelDirectory) -> None:
    """Make sure that an engine can compute all of an adapter beside a model.

    Raises:
        SourceError: It was made for another model, its file lacks modules, or it can only be merged.
    """
    if reason := adapter.only_merged:
        hint = ""
        if adapter.base and not adapter.saved and all(name.removesuffix(".weight") == HEAD for name in adapter.base):
            hint = ", or save the adapter again with save_pretrained(FOLDER, save_embedding_layers=False)"
        raise SourceError(
            f"{adapter.path} {reason}, which works only merged; {MERGE}{hint}", code="adapter-only-merged"
        )
    graph = model.xml.read_text(encoding="utf-8")
    expected = _linear_shapes(model.geometry)
    for module, each in adapter.low_rank.items():
        if f".{module}/" not in graph:
            raise SourceError(
                f"{adapter.path} changes {module}, which {model.path.name} does not have; it was made for another "
                "model",
                code="adapter-of-another-model",
            )
        shape = expected.get(module.rpartition(".")[2])
        if shape is not None and shape != (each.inputs, each.outputs):
            raise SourceError(
                f"{adapter.path}: {module} has {each.inputs} inputs and {each.outputs} outputs, in {model.path.name} "
                f"they are {shape[0]} and {shape[1]}; it was made for another model",
                code="adapter-of-another-model",
            )
    names = rf"__module\.((?:model\.layers\.\d+\.\w+\.\w+_proj)|{HEAD})/"
    check_complete(adapter, set(re.findall(names, graph)), tied=bool(model.config.get("tie_word_embeddings")))


def check_complete(adapter: Adapter, modules: Iterable[str], *, tied: bool) -> None:
    """Make sure that every module that an adapter's configuration targets is in its file.

    Args:
        adapter: The adapter.
        modules: Linear layers and embeddings of the model.
        tied: Its embedding and head are one matrix.

    Raises:
        SourceError: One is not.
    """
    adapted = {module for module in modules if adapter.config.adapts(module, tied=tied)}
    if lacking := sorted(adapted - adapter.low_rank.keys()):
        raise SourceError(
            f"{adapter.path} lacks {lacking[0]} ({len(lacking)} of {len(adapted)} modules that {CONFIG} targets); "
            "fetch it again, or name them in exclude_modules if they were not trained",
            code="adapter-incomplete",
        )
    if extra := sorted(adapter.low_rank.keys() - adapted):
        raise _ignored(adapter.path, f"LoRA of {extra[0]}", "it has none in a model whose embedding is not its head")


def _linear_shapes(geometry: Geometry) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of a decoder's linear layers, by name."""
    hidden, inner = geometry.hidden, geometry.intermediate
    queries, keys = geometry.heads * geometry.head_dim, geometry.kv_heads * geometry.head_dim
    attention = {"q_proj": (hidden, queries), "k_proj": (hidden, keys), "v_proj": (hidden, keys)}
    mlp = {"gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden)}
    return {**attention, "o_proj": (queries, hidden), **mlp, HEAD: (hidden, geometry.vocab)}


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
        base = another_base(adapter, str(model.manifest.source.get("id", model.path.name))) if model.manifest else None
        for warning in filter(None, (base, *unused_files(adapter, model.path))):
            logger.warning(warning)
        scale = next(iter(adapter.low_rank.values())).scale
        config.add(openvino_genai.Adapter(adapter.path), scale * adapter.weight)
    return config
