"""Names for what people choose: compression recipes, sampling values, model geometries.

A recipe is everything `nncf.compress_weights` is told, under the names that `optimum-cli export
openvino` uses. The named ones are starting points; `Recipe` is validated when it is made, so a
recipe that exists can be run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from .errors import ConfigError

__all__ = [
    "DEFAULT_MODEL",
    "EMBEDDED_MODEL",
    "GEOMETRIES",
    "KINDS",
    "RECIPES",
    "SAMPLING",
    "TABLES",
    "Geometry",
    "Recipe",
    "Sampling",
]

DEFAULT_MODEL = "arcee-ai/AFM-4.5B"
EMBEDDED_MODEL = "smollm2-135m-instruct"

WeightFormat = Literal["fp32", "fp16", "int8", "int4"]
BackupPrecision = Literal["none", "int8_sym", "int8_asym"]
Equalise = Literal["none", "fp16", "full"]
Rounding = Literal["nearest", "fitted"]
# Kinds of matrices that may have a format of their own; `attention` is q, k, v and o.
TABLES = ("embedding", "head")
KINDS = (*TABLES, "attention", "up", "gate", "down")
KIND_FORMATS = ("int4", "int8")
CHANNEL_WISE = -1


@dataclass(frozen=True, slots=True)
class Recipe:
    """How weights are stored.

    Attributes:
        name: Name shown to people; `custom` for a recipe made from flags.
        weight_format: Primary storage type of the weights.
        sym: Symmetric quantization (no zero point). Integer formats only.
        group_size: Weights that share one scale along the input dimension; -1 is one scale a row.
        ratio: Share of the 4-bit candidates that become 4-bit, 0 to 1; the rest take the backup precision.
        backup_precision: Format of what a 4-bit recipe leaves out (embedding, head, `1 - ratio`).
        all_layers: Embedding and head take the primary format too.
        kinds: Kinds of matrices (`KINDS`) with a format of their own, as pairs: `int4` is the 4-bit format of the
            recipe, `int8` its backup precision. `ratio` chooses among the others. Kept in the order of `KINDS`.
        group_size_fallback: What to do with a layer whose input dimension `group_size` does not divide:
            `error`, or `adjust` (largest divisor that fits, recorded) or `ignore` (stays uncompressed, recorded).
        awq: Activation-aware scaling of weights (needs calibration data, and a pattern NNCF knows).
        scale_estimation: Fit scales to activations (needs calibration data).
        gptq: GPTQ rounding (needs calibration data).
        equalise: Exact rescaling of weights before they are quantized (needs calibration data): `fp16` only keeps
            relu² within fp16's range, `full` also moves range to where rounding costs least; see `equalise`.
        rounding: `fitted` gives NNCF's matrices codes that are fitted layer by layer to calibration data; see `fitted`.
        dataset: Calibration data: files, `packaged`, `self`, or names that NNCF/Optimum know, with weights; see
            `calibration`. None where no algorithm reads any.
        num_samples: Calibration samples taken from the dataset.
    """

    name: str = "custom"
    weight_format: WeightFormat = "int8"
    sym: bool = False
    group_size: int = CHANNEL_WISE
    ratio: float = 1.0
    backup_precision: BackupPrecision = "int8_asym"
    all_layers: bool = False
    kinds: tuple[tuple[str, str], ...] = ()
    group_size_fallback: Literal["error", "adjust", "ignore"] = "adjust"
    awq: bool = False
    scale_estimation: bool = False
    gptq: bool = False
    equalise: Equalise = "none"
    rounding: Rounding = "nearest"
    dataset: str | None = None
    num_samples: int = 128

    def __post_init__(self) -> None:
        """Refuse values that no engine could run.

        Raises:
            ConfigError: A field is out of range, or two fields contradict each other.
        """
        if self.weight_format not in get_args(WeightFormat):
            raise ConfigError(
                f"weight format {self.weight_format!r} is unknown; choose one of {', '.join(get_args(WeightFormat))}"
            )
        if self.backup_precision not in get_args(BackupPrecision):
            known = ", ".join(get_args(BackupPrecision))
            raise ConfigError(f"backup precision {self.backup_precision!r} is unknown; choose one of {known}")
        if self.equalise not in get_args(Equalise):
            raise ConfigError(
                f"equalisation {self.equalise!r} is unknown; choose one of {', '.join(get_args(Equalise))}"
            )
        if self.rounding not in get_args(Rounding):
            raise ConfigError(f"rounding {self.rounding!r} is unknown; choose one of {', '.join(get_args(Rounding))}")
        if self.rounding == "fitted":
            others = {"--awq": self.awq, "--scale-estimation": self.scale_estimation, "--gptq": self.gptq}
            wrong = [flag for flag, used in others.items() if used]
            if wrong:
                raise ConfigError(f"fitted rounding takes the place of {', '.join(wrong)}; choose one")
            if self.bits > 8:
                raise ConfigError(f"fitted rounding is for int8 and int4, found {self.weight_format}")
        if self.equalise == "full" and self.bits > 8:
            raise ConfigError(
                f"equalisation 'full' prepares for int8 and int4, found {self.weight_format}; choose fp16 or none"
            )
        if not 0.0 <= self.ratio <= 1.0:
            raise ConfigError(f"ratio must lie between 0 and 1, found {self.ratio}")
        if self.group_size != CHANNEL_WISE and (self.group_size < 16 or self.group_size % 16):
            raise ConfigError(f"group size must be -1 (one scale a row) or a multiple of 16, found {self.group_size}")
        if self.num_samples < 1:
            raise ConfigError(f"number of calibration samples must be at least 1, found {self.num_samples}")
        if self.weight_format != "int4":
            four_bit_only = {
                "--group-size": self.group_size != CHANNEL_WISE,
                "--ratio": self.ratio != 1.0,
                "--all-layers": self.all_layers,
                "--kind": bool(self.kinds),
                "--awq": self.awq,
                "--scale-estimation": self.scale_estimation,
                "--gptq": self.gptq,
            }
            wrong = [flag for flag, used in four_bit_only.items() if used]
            if wrong:
                raise ConfigError(f"{', '.join(wrong)} only applies to int4, found weight format {self.weight_format}")
        self._check_kinds()

    def _check_kinds(self) -> None:
        for kind, stored in self.kinds:
            if kind not in KINDS:
                raise ConfigError(f"kind of matrices {kind!r} is unknown; choose one of {', '.join(KINDS)}")
            if stored not in KIND_FORMATS:
                raise ConfigError(
                    f"format {stored!r} of kind {kind} is unknown; choose one of {', '.join(KIND_FORMATS)}"
                )
            if stored == "int8" and self.backup_precision == "none":
                raise ConfigError(f"{kind}=int8 takes the backup precision, found none; choose int8_sym or int8_asym")
            if kind in TABLES and self.all_layers:
                raise ConfigError(
                    f"--all-layers has a format for embedding and head already, found {kind}={stored}; choose one"
                )
        if len(dict(self.kinds)) < len(self.kinds):
            raise ConfigError(
                f"a kind of matrices has one format, found {' '.join('='.join(pair) for pair in self.kinds)}"
            )
        ordered = tuple(sorted(self.kinds, key=lambda pair: KINDS.index(pair[0])))
        object.__setattr__(self, "kinds", ordered)

    def in_backup(self, kind: str) -> bool:
        """Whether an int4 recipe keeps a kind of matrices out of its 4 bits, whatever `ratio` chooses."""
        by_rule = kind in TABLES and not self.all_layers
        return dict(self.kinds).get(kind, "int8" if by_rule else "int4") == "int8"

    @property
    def needs_data(self) -> bool:
        """Whether an algorithm in the recipe reads calibration data."""
        searched = self.equalise != "none" or self.rounding == "fitted"
        return self.awq or self.scale_estimation or self.gptq or searched

    @property
    def bits(self) -> int:
        """Bits of the primary weight format."""
        return {"fp32": 32, "fp16": 16, "int8": 8, "int4": 4}[self.weight_format]

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON values."""
        return {**asdict(self), "kinds": dict(self.kinds)}

    def recorded(self) -> dict[str, Any]:
        """All fields as the manifest keeps them: calibration data by name, without a path of this machine."""
        return {**self.to_dict(), "dataset": None if self.dataset is None else Path(self.dataset).name}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Recipe:
        """The recipe of a manifest; keys that a newer ov_afm added are ignored."""
        known = {key: value for key, value in fields.items() if key in cls.__dataclass_fields__}
        return cls(**{**known, "kinds": tuple(dict(known.get("kinds", ())).items())})


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("fp32", weight_format="fp32"),
        Recipe("fp16", weight_format="fp16"),
        Recipe("int8", weight_format="int8"),
        Recipe("int4", weight_format="int4", sym=True, group_size=128),
        Recipe("int8-quality", weight_format="int8", equalise="full", rounding="fitted", num_samples=32),
        Recipe(
            "int4-quality",
            weight_format="int4",
            sym=True,
            group_size=64,
            equalise="fp16",
            rounding="fitted",
            num_samples=32,
        ),
        Recipe("int4-npu", weight_format="int4", sym=True, backup_precision="int8_sym"),
        Recipe("int4-npu-g128", weight_format="int4", sym=True, group_size=128, backup_precision="int8_sym"),
    )
}


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling values that a model's makers recommend; written to its `generation_config.json`."""

    temperature: float = 0.5
    top_k: int = 50
    top_p: float = 0.95
    repetition_penalty: float = 1.1


# https://huggingface.co/arcee-ai/AFM-4.5B (model card, "How to use")
SAMPLING: dict[str, Sampling] = {"arcee": Sampling()}


@dataclass(frozen=True, slots=True)
class Geometry:
    """Shape of an Arcee model, enough to write a synthetic checkpoint of it.

    Attributes:
        hidden: Width of the residual stream.
        layers: Decoder layers.
        heads: Query heads.
        kv_heads: Key/value heads.
        head_dim: Width of one head.
        intermediate: Neurons of the ReLU² MLP.
        vocab: Rows of the embedding and of the (untied) head.
        max_positions: Context length in tokens.
        rope_original: Context before YaRN, in tokens.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    max_positions: int
    rope_original: int

    @property
    def parameters(self) -> int:
        """Number of weights, norms included."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        layer = attention + 2 * self.hidden * self.intermediate + 2 * self.hidden
        return self.layers * layer + 2 * self.vocab * self.hidden + self.hidden


GEOMETRIES: dict[str, Geometry] = {
    "afm-4.5b": Geometry(2560, 36, 20, 4, 128, 18432, 128_256, 65_536, 4_096),
    "afm-1b": Geometry(1536, 24, 12, 4, 128, 9216, 49_152, 65_536, 4_096),
    "small": Geometry(512, 8, 8, 2, 64, 2048, 4_096, 8_192, 512),
    "tiny": Geometry(128, 2, 4, 2, 32, 256, 1_024, 2_560, 128),
}
