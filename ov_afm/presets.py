"""Names for what people choose: compression recipes, sampling values, default models.

A recipe holds everything that decides how weights are stored, under the names that `optimum-cli export openvino` uses.
The named ones are starting points. A `Recipe` is validated when it is made, so a recipe that exists can be run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from .errors import ConfigError

__all__ = ["DEFAULT_MODEL", "EMBEDDED_MODEL", "KINDS", "RECIPES", "SAMPLING", "TABLES", "Recipe", "Sampling"]

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
        ratio: Share of the candidates for 4 bits that get them, 0 to 1; the rest take the backup precision.
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
            relu² within fp16's range, `full` also moves range to where rounding costs least; see
            `quantization.equalization`.
        rounding: `fitted` gives NNCF's matrices codes that are fitted layer by layer to calibration data; see
            `quantization.reconstruction`.
        dataset: Calibration data: files, `packaged`, `self`, or names of data sets on the Hub, with weights; see
            `quantization.calibration`. None where no algorithm reads any.
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
        for problem in self._problems():
            raise ConfigError(problem, code="recipe-invalid")
        ordered = tuple(sorted(self.kinds, key=lambda pair: KINDS.index(pair[0])))
        object.__setattr__(self, "kinds", ordered)

    def _problems(self) -> Iterator[str]:
        for what, value, choices in (
            ("weight format", self.weight_format, WeightFormat),
            ("backup precision", self.backup_precision, BackupPrecision),
            ("equalisation", self.equalise, Equalise),
            ("rounding", self.rounding, Rounding),
        ):
            if value not in get_args(choices):
                yield f"{what} {value!r} is unknown; choose one of {', '.join(get_args(choices))}"
        if not 0.0 <= self.ratio <= 1.0:
            yield f"ratio must lie between 0 and 1, found {self.ratio}"
        if self.group_size != CHANNEL_WISE and (self.group_size < 16 or self.group_size % 16):
            yield f"group size must be -1 (one scale a row) or a multiple of 16, found {self.group_size}"
        if self.num_samples < 1:
            yield f"number of calibration samples must be at least 1, found {self.num_samples}"
        yield from self._conflicts()
        for kind, stored in self.kinds:
            yield from self._problems_of_kind(kind, stored)
        if len(dict(self.kinds)) < len(self.kinds):
            yield f"a kind of matrices has one format, found {' '.join('='.join(pair) for pair in self.kinds)}"

    def _conflicts(self) -> Iterator[str]:
        fitters = {"--awq": self.awq, "--scale-estimation": self.scale_estimation, "--gptq": self.gptq}
        replaced = [flag for flag, used in fitters.items() if used]
        if self.rounding == "fitted" and replaced:
            yield f"fitted rounding takes the place of {', '.join(replaced)}; choose one"
        if self.rounding == "fitted" and self.bits > 8:
            yield f"fitted rounding is for int8 and int4, found {self.weight_format}"
        if self.equalise == "full" and self.bits > 8:
            yield f"equalisation 'full' prepares for int8 and int4, found {self.weight_format}; choose fp16 or none"
        four_bit_only = {
            "--group-size": self.group_size != CHANNEL_WISE,
            "--ratio": self.ratio != 1.0,
            "--all-layers": self.all_layers,
            "--kind": bool(self.kinds),
            **fitters,
        }
        flags = [flag for flag, used in four_bit_only.items() if used]
        if flags and self.weight_format != "int4":
            yield f"{', '.join(flags)} only applies to int4, found weight format {self.weight_format}"

    def _problems_of_kind(self, kind: str, stored: str) -> Iterator[str]:
        if kind not in KINDS:
            yield f"kind of matrices {kind!r} is unknown; choose one of {', '.join(KINDS)}"
        if stored not in KIND_FORMATS:
            yield f"format {stored!r} of kind {kind} is unknown; choose one of {', '.join(KIND_FORMATS)}"
        if stored == "int8" and self.backup_precision == "none":
            yield f"{kind}=int8 takes the backup precision, found none; choose int8_sym or int8_asym"
        if kind in TABLES and self.all_layers:
            yield f"--all-layers has a format for embedding and head already, found {kind}={stored}; choose one"

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
        own = {key: value for key, value in fields.items() if key in cls.__dataclass_fields__}
        return cls(**{**own, "kinds": tuple(dict(own.get("kinds", ())).items())})


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
