"""What an adapter's `adapter_config.json` says, field by field.

The file holds PEFT's `LoraConfig`: fields that shape the adapted model, and fields that mattered in training alone.
Each field is read here, known to change nothing, or refused by name, unknown ones too: a field that is ignored can be
a wrong model. Checked with PEFT 0.21.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from ..errors import SourceError
from ..system.json_text import parse

__all__ = ["CONFIG", "EMBEDDING", "HEAD", "PeftConfig", "read"]

CONFIG = "adapter_config.json"
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"

READ = frozenset(
    {
        *("alpha_pattern", "base_model_name_or_path", "ensure_weight_tying", "exclude_modules", "init_lora_weights"),
        *("layers_pattern", "layers_to_transform", "lora_alpha", "modules_to_save", "peft_type", "r", "rank_pattern"),
        *("target_modules", "trainable_token_indices", "use_dora", "use_rslora"),
    }
)
# Fields that do not change what a trained adapter computes on linear layers and embeddings, or whose effect is in the
# tensors (`bias`, `lora_bias`) or follows from `init_lora_weights` (`eva_config` and its like).
HARMLESS = frozenset(
    {
        *("auto_mapping", "bias", "corda_config", "eva_config", "fan_in_fan_out", "inference_mode", "loftq_config"),
        *("lora_bias", "lora_dropout", "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size"),
        *("revision", "runtime_config", "task_type", "velora_config"),
    }
)
MERGE_WITH_PEFT = "merge it with PEFT (merge_and_unload, save_pretrained) and export the result"
RUN_WITH_PEFT = "run it with PEFT"
# Known fields that change the result in a way that is not computed here, with the way out.
UNSUPPORTED = {
    "alora_invocation_tokens": f"aLoRA acts only after certain tokens, which no merge can express; {RUN_WITH_PEFT}",
    "arrow_config": f"Arrow chooses among adapters for each token, which no merge can express; {RUN_WITH_PEFT}",
    "kasa_config": f"KaSA takes singular values out of the base model; {MERGE_WITH_PEFT}",
    "layer_replication": f"the base model's layers are repeated, which PEFT itself merges wrongly; {RUN_WITH_PEFT}",
    "megatron_config": "Megatron's layers are not those of transformers; convert the adapter to transformers' names",
    "monteclora_config": f"its weights are drawn at random; {RUN_WITH_PEFT}",
    "target_parameters": f"parameters are adapted, not modules; {MERGE_WITH_PEFT}",
    "use_bdlora": f"its matrices are block-diagonal; {MERGE_WITH_PEFT}",
    "use_qalora": f"QALoRA belongs to a quantized base model; {RUN_WITH_PEFT}",
}
# Starts of training that leave the base model as it is.
PLAIN_STARTS = ("eva", "gaussian", "mica", "orthogonal")
CONVERT = (
    "give its trainer's save_pretrained the argument path_initial_model_for_weight_conversion, which makes it a plain "
    "LoRA, or export the model that PEFT merged where it was trained"
)

Number = TypeVar("Number", int, float)
Start = Literal["plain", "pissa", "olora"]


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """A LoRA's configuration.

    Attributes:
        path: The file.
        rank: Default rank; PEFT's `r`.
        ranks: Other ranks, by pattern of a module's name.
        alpha: Default numerator of the scale.
        alphas: Other ones, by pattern.
        root: Divide alpha by the root of the rank (rsLoRA), not by the rank.
        dora: Weights are split into magnitude and direction.
        start: How training began. `pissa` and `olora` take what A and B start with out of the base model.
        targets: Modules with LoRA: a pattern of whole names, or ends of names.
        excluded: Modules without, in the same way.
        layers: Layers with LoRA; None for all.
        layer_lists: Names of the lists that these layers are in; empty for any.
        saved: Ends of names of modules that come whole with the adapter.
        tokens: Rows that come with the adapter, by the end of the embedding's name.
        tied: Embedding and head stay the same matrix, if they are one in the base model.
        base: Name or path of the base model; None where it is not recorded.
    """

    path: Path
    rank: int
    ranks: Mapping[str, int]
    alpha: float
    alphas: Mapping[str, float]
    root: bool
    dora: bool
    start: Start
    targets: str | tuple[str, ...]
    excluded: str | tuple[str, ...]
    layers: tuple[int, ...] | None
    layer_lists: tuple[str, ...]
    saved: tuple[str, ...]
    tokens: Mapping[str, tuple[int, ...]]
    tied: bool
    base: str | None

    def rank_of(self, module: str) -> int:
        """The rank of a module's A and B."""
        return _by_pattern(self.ranks, module, self.rank)

    def scale_of(self, module: str) -> float:
        """What B·A of a module is multiplied with."""
        rank = self.rank_of(module)
        return _by_pattern(self.alphas, module, self.alpha) / (math.sqrt(rank) if self.root else rank)

    def saves(self, module: str, *, tied: bool) -> bool:
        """Whether a module comes whole with the adapter, by itself or in a larger one.

        Args:
            module: Its name.
            tied: Embedding and head are one matrix in the base model.
        """
        parts = module.split(".")
        names = [".".join(parts[: end + 1]) for end in range(len(parts))]
        return any(name.endswith(end) for name in (*names, *self._tied_with(module, tied)) for end in self.saved)

    def adapts(self, module: str, *, tied: bool) -> bool:
        """Whether a linear layer or an embedding has LoRA; arguments as `saves`.

        As `check_target_module_exists` and `_maybe_include_all_linear_layers` of `peft.tuners.tuners_utils` decide.
        """
        return any(map(self._targets, (module, *self._tied_with(module, tied))))

    def _tied_with(self, module: str, tied: bool) -> tuple[str, ...]:
        pair = (EMBEDDING, HEAD)
        return pair if self.tied and tied and module in pair else ()

    def _targets(self, module: str) -> bool:
        if _is_one_of(module, self.excluded) or any(
            re.match(rf"(^|.*\.){name}($|\..*)", module) for name in self.saved
        ):
            return False
        if isinstance(self.targets, str) and self.targets.lower() == "all-linear":
            return module not in (EMBEDDING, HEAD)
        if not _is_one_of(module, self.targets):
            return False
        if self.layers is None or isinstance(self.targets, str) or module in self.targets:
            return True
        patterns = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in self.layer_lists] or [r".*?\.[^.]*\.(\d+)\."]
        index = next(filter(None, (re.match(pattern, module) for pattern in patterns)), None)
        return index is not None and int(index[1]) in self.layers


def _by_pattern(values: Mapping[str, Number], module: str, default: Number) -> Number:
    """As `get_pattern_key` of `peft.utils.other`: the first pattern that the end of the name fits."""
    return next((value for key, value in values.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _is_one_of(module: str, names: str | tuple[str, ...]) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def read(path: Path) -> PeftConfig:
    """Read an `adapter_config.json`.

    Raises:
        SourceError: It is missing, no configuration of a LoRA, or asks for what is not computed here.
    """
    try:
        fields = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SourceError(
            f"{path} is missing, and with it the adapter's lora_alpha; put it beside the weights",
            code="adapter-config-missing",
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, error) from error
    if not isinstance(fields, dict) or "peft_type" not in fields:
        raise SourceError(
            f"{path} is not PEFT's configuration of a LoRA: it names no peft_type; convert the adapter to PEFT's form",
            code="adapter-config-unreadable",
        )
    if str(fields["peft_type"]).upper() != "LORA":
        raise SourceError(
            f"{path} describes {str(fields['peft_type'])[:40]!r}; only LORA can be applied; {MERGE_WITH_PEFT}, if PEFT "
            "can merge it",
            code="adapter-kind",
        )
    _refuse_unsupported(path, fields)
    try:
        config = _parse(path, fields)
        for pattern in _patterns(config):
            re.compile(pattern)
        if not math.isfinite(config.scale_of(EMBEDDING)):
            raise ValueError("lora_alpha is not finite")  # noqa: TRY301 - one message for all
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, re.error) as error:
        raise _unreadable(path, error) from error
    return config


def _patterns(config: PeftConfig) -> list[str]:
    """All that is matched with names of modules."""
    whole = [names for names in (config.targets, config.excluded) if isinstance(names, str)]
    return [*whole, *(f"({part})" for part in (*config.ranks, *config.alphas, *config.saved, *config.layer_lists))]


def _unreadable(path: Path, error: Exception) -> SourceError:
    return SourceError(
        f"{path} is not PEFT's configuration of a LoRA: {type(error).__name__} {error}; fetch it again",
        code="adapter-config-unreadable",
    )


def _refuse_unsupported(path: Path, fields: Mapping[str, Any]) -> None:
    for name, value in fields.items():
        if name in READ | HARMLESS or value in (None, False, "", [], {}):
            continue
        if name in UNSUPPORTED:
            raise SourceError(f"{path} uses {name}: {UNSUPPORTED[name]}", code="adapter-unsupported")
        raise SourceError(
            f"{path} has {name[:40]!r}: {str(value)[:40]!r}, which this version of ov_afm does not know; "
            f"{MERGE_WITH_PEFT}, or delete the field if it changes nothing after training",
            code="adapter-field-unknown",
        )


def _parse(path: Path, fields: Mapping[str, Any]) -> PeftConfig:
    layers = fields.get("layers_to_transform")
    base = fields.get("base_model_name_or_path")
    if fields.get("target_modules") is None:
        raise ValueError("target_modules is missing")
    ranks = {str(key): int(value) for key, value in dict(fields.get("rank_pattern") or {}).items()}
    rank = int(fields.get("r", 8))
    if min((rank, *ranks.values())) < 1:
        raise ValueError("a rank is below 1")
    return PeftConfig(
        path=path,
        rank=rank,
        ranks=ranks,
        alpha=float(fields["lora_alpha"]),
        alphas={str(key): float(value) for key, value in dict(fields.get("alpha_pattern") or {}).items()},
        root=bool(fields.get("use_rslora")),
        dora=bool(fields.get("use_dora")),
        start=_start(path, fields.get("init_lora_weights", True)),
        targets=_names(fields["target_modules"]),
        excluded=_names(fields.get("exclude_modules") or ()),
        layers=None if layers in (None, []) else tuple(map(int, layers if isinstance(layers, list) else [layers])),
        layer_lists=_list(fields.get("layers_pattern") or ()),
        saved=_list(fields.get("modules_to_save") or ()),
        tokens=_tokens(fields.get("trainable_token_indices")),
        tied=bool(fields.get("ensure_weight_tying")),
        base=base if isinstance(base, str) and base else None,
    )


def _start(path: Path, value: Any) -> Start:
    name = str(value).lower()
    if value in (None, True, False) or name in PLAIN_STARTS:
        return "plain"
    if name in ("pissa", "olora"):
        return cast(Start, name)
    reasons = {
        "pissa": "its start was drawn at random and cannot be computed again",
        "corda": "what it took out of the base model depends on data that is not in the adapter",
        "lora_ga": "what it took out of the base model depends on data that is not in the adapter",
        "loftq": "it was trained on a base model that LoftQ quantized",
    }
    reason = next((text for key, text in reasons.items() if name.startswith(key)), "this start is not known")
    raise SourceError(f"{path} has init_lora_weights: {value!r}, and {reason}; {CONVERT}", code="adapter-start")


def _names(value: Any) -> str | tuple[str, ...]:
    return value if isinstance(value, str) else _list(value)


def _list(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(map(str, value))


def _tokens(value: Any) -> dict[str, tuple[int, ...]]:
    by_module = value if isinstance(value, dict) else {EMBEDDING: value} if value else {}
    tokens = {str(name): tuple(map(int, rows)) for name, rows in by_module.items()}
    if any(len(set(rows)) < len(rows) or min(rows, default=0) < 0 for rows in tokens.values()):
        raise ValueError("trainable_token_indices has a token twice, or a negative one")
    return tokens
