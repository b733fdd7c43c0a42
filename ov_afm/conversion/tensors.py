"""A checkpoint in memory that is what its files say, tensor by tensor.

transformers drops a tensor that the architecture has no place for, makes up one that is absent, rounds to the type that
config.json names, and chooses among several files itself; a line in a log is all that it says. So the files are read
here too: before a model is loaded, their names and shapes must be those of the architecture; afterwards, the values in
memory must be theirs.
"""

from __future__ import annotations

import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ExportError, OVAFMError, SourceError
from .checkpoint import find_weights

__all__ = ["Loaded", "as_export_error", "load", "row_step"]

# Bytes of one tensor's rows that are compared; whole below it.
SAMPLE_BYTES = 4 << 20
# Older versions of transformers wrote the frequencies of the rotary embedding into each layer. They follow from
# config.json, so nothing is lost without them, if they are the ones that do.
FREQUENCIES = re.compile(r"(.*\.)?rotary_emb\.inv_freq")


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in memory.

    Attributes:
        model: Of transformers, in evaluation mode.
        stored: The type that most bytes of its files have, of torch.
        cast: How many tensors have another type in memory than in their file, by `float32 to bfloat16`.
        notes: What the user should know of the source.
    """

    model: Any
    stored: Any
    cast: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def load(
    checkpoint: Path,
    dtype: str | None = None,
    *,
    trust_remote_code: bool = False,
    kind: str = "AutoModelForCausalLM",
    unused: re.Pattern[str] | None = None,
    optional: re.Pattern[str] | None = None,
) -> Loaded:
    """Load a checkpoint, and compare what is in memory with what its files say.

    Args:
        checkpoint: Hugging Face checkpoint folder.
        dtype: Type of the weights in memory, as torch names it. None keeps the type in the files, or the one that most
            of their bytes have.
        trust_remote_code: Let transformers run the checkpoint's own code.
        kind: transformers' class that chooses the model's.
        unused: Tensors of the files that need no place in the model.
        optional: Tensors of the model that the files may lack.

    Raises:
        SourceError: The files hold other tensors than the architecture has.
        ExportError: transformers cannot read the checkpoint, or read something else than its files.
    """
    import torch
    import transformers

    chooser = getattr(transformers, kind)
    files = find_weights(checkpoint, allow_pickle=True)
    stored = _read(files)
    skeleton = _skeleton(checkpoint, chooser, trust_remote_code)
    places = _places(checkpoint.name, stored, skeleton, unused, optional)
    common = _common_type(stored)
    wanted = getattr(torch, dtype) if dtype else common
    with as_export_error(f"transformers cannot read {checkpoint.name}", "checkpoint-unreadable"):
        model = chooser.from_pretrained(
            checkpoint,
            dtype=wanted,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            use_safetensors=files[0].suffix == ".safetensors",
        ).eval()
    _check_frequencies(checkpoint.name, stored, model)
    _check_values(checkpoint.name, stored, places, model)
    cast = Counter((stored[name].dtype, wanted) for name in places if stored[name].dtype != wanted)
    notes = [*_untie(checkpoint.name, model), *([] if dtype else _rounded(cast))]
    return Loaded(model, common, {_change(*each): count for each, count in cast.items()}, notes)


@contextmanager
def as_export_error(problem: str, code: str) -> Iterator[None]:
    """Turn whatever a library raises into an ExportError of one line.

    Raises:
        ExportError: With the problem and what the library says.
    """
    try:
        yield
    except OVAFMError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ExportError(f"{problem}: {type(error).__name__}: {reason}", code=code) from error


def _read(files: Sequence[Path]) -> dict[str, Any]:
    """All tensors of weight files, mapped: a value is read when it is looked at."""
    import torch
    from safetensors import safe_open

    tensors: dict[str, Any] = {}
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                tensors.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118 - no mapping
            continue
        with as_export_error(f"{file} cannot be read as weights", "weights-damaged"):
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file) or None)
        if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
            raise SourceError(
                f"{file} holds something else than tensors by name; save the model's state_dict", code="weights-damaged"
            )
        tensors.update(content)
    return tensors


def _skeleton(checkpoint: Path, chooser: Any, trust_remote_code: bool) -> Any:
    """The model without values: the tensors that transformers wants."""
    import torch
    from transformers import AutoConfig

    trust = {"trust_remote_code": trust_remote_code}
    with as_export_error(f"transformers cannot read config.json of {checkpoint.name}", "checkpoint-unreadable"):
        config = AutoConfig.from_pretrained(checkpoint, local_files_only=True, **trust)
        with torch.device("meta"):
            return chooser.from_config(config, **trust)


# -- Before loading: names and shapes


def _places(
    where: str,
    stored: Mapping[str, Any],
    skeleton: Any,
    unused: re.Pattern[str] | None,
    optional: re.Pattern[str] | None,
) -> dict[str, str]:
    """Name in the model of each tensor in the files; exactly those of the model must be there.

    Raises:
        SourceError: One is left over, missing, or of another shape.
    """
    expected = {name: tuple(value.shape) for name, value in skeleton.state_dict().items()}
    prefix = f"{skeleton.base_model_prefix}."
    places: dict[str, str] = {}
    unknown = []
    for name in sorted(stored):
        # As transformers does: a file of the model without its head lacks the prefix.
        forms = (name, f"{prefix}{name}", name.removeprefix(prefix))
        place = next((form for form in forms if form in expected), None)
        if place is not None and place not in places.values():
            places[name] = place
        elif not FREQUENCIES.fullmatch(name) and not (unused and unused.fullmatch(name)):
            unknown.append(name)
    lacking = _missing(expected, places.values(), skeleton)
    missing = [name for name in lacking if not (optional and optional.fullmatch(name))]
    if unknown:
        raise _left_over(where, stored, unknown, missing, skeleton)
    if missing:
        hint = "fetch the checkpoint again"
        if missing[0] == "lm_head.weight":
            hint += ", or set tie_word_embeddings in config.json if the embedding is the head too"
        raise SourceError(
            f"{where} lacks {len(missing)} weights, the first is {missing[0]}; {hint}", code="weights-missing"
        )
    for name, place in places.items():
        if (shape := tuple(stored[name].shape)) != expected[place]:
            raise SourceError(
                f"{name} of {where} is {_size(shape)}, by config.json it would be {_size(expected[place])}; the "
                "configuration is that of another model, fetch it again",
                code="weights-misshapen",
            )
    return places


def _missing(expected: Mapping[str, Any], found: Iterable[str], skeleton: Any) -> list[str]:
    """Names that no file holds; one name is enough for a parameter that has several, as a tied head has."""
    parameters = {name: id(value) for name, value in skeleton.named_parameters(remove_duplicate=False)}
    covered = {parameters.get(name, name) for name in found}
    return [name for name in expected if parameters.get(name, name) not in covered]


def _left_over(
    where: str, stored: Mapping[str, Any], unknown: list[str], missing: list[str], skeleton: Any
) -> SourceError:
    first, config = unknown[0], skeleton.config
    layer = re.search(r"\.layers\.(\d+)\.", f".{first}")
    if layer and int(layer[1]) >= config.num_hidden_layers:
        hint = f"config.json says num_hidden_layers {config.num_hidden_layers}"
    elif first.endswith(".bias"):
        hint = "attention_bias and mlp_bias in config.json say where there are biases"
    else:
        hint = "architectures in config.json may be the wrong one"
    lacking = f", and lacks {len(missing)} that it has, the first is {missing[0]}" if missing else ""
    return SourceError(
        f"{where} holds {len(unknown)} tensors that {type(skeleton).__name__} by its config.json has no place for, "
        f"the first is {first} ({_size(tuple(stored[first].shape))}){lacking}; without them it would be another model: "
        f"{hint}",
        code="tensors-unknown",
    )


def _size(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "one value"


def _common_type(stored: Mapping[str, Any]) -> Any:
    """The type that most bytes have; float32 where that is a wider one."""
    import torch

    sizes: Counter[Any] = Counter()
    for value in stored.values():
        sizes[value.dtype] += value.nbytes
    kind = sizes.most_common(1)[0][0]
    return torch.float32 if kind == torch.float64 else kind


# -- After loading: values


def _check_frequencies(where: str, stored: Mapping[str, Any], model: Any) -> None:
    """Refuse frequencies of the rotary embedding that do not follow from config.json."""
    import torch

    for name, value in stored.items():
        if not FREQUENCIES.fullmatch(name):
            continue
        count = len(value)
        theta = model.config.rope_parameters["rope_theta"]
        plain = theta ** -(torch.arange(count) / count)
        # What a bfloat16 of them holds, and what the smallest step of a float16 does.
        if not any(
            len(each) == count and torch.allclose(value.float(), each.float(), rtol=2**-7, atol=2**-24)
            for each in (plain, model.model.rotary_emb.inv_freq)
        ):
            raise SourceError(
                f"{name} of {where} holds other frequencies than config.json gives (rope_theta {theta}); the "
                "configuration is that of another model, fetch it again",
                code="rope-differs",
            )


def row_step(value: Any) -> int:
    """Distance of the rows of a tensor that are compared: 1 for a small one."""
    return max(1, int(value.nbytes) // SAMPLE_BYTES)


def _check_values(where: str, stored: Mapping[str, Any], places: Mapping[str, str], model: Any) -> None:
    """Compare the values in memory with those in the files, rounded in the same way.

    Raises:
        ExportError: They differ, or a finite value is none any more.
    """
    import torch

    state = model.state_dict()
    for name, place in places.items():
        loaded, source = state[place], stored[name]
        step = row_step(source)
        rows = source[::step].to(loaded.dtype).contiguous()
        if not torch.equal(rows.view(torch.uint8), loaded[::step].contiguous().view(torch.uint8)):
            raise ExportError(
                f"transformers loaded another {place} than the files of {where} hold; please report this model",
                code="weights-differ",
            )
        narrowed = loaded.dtype == torch.float16 and source.dtype != torch.float16
        if narrowed and not torch.isfinite(loaded).all() and torch.isfinite(source).all():
            raise ExportError(
                f"{name} of {where} holds values beyond what float16 holds; use another recipe, such as fp32",
                code="weights-beyond-float16",
            )


def _untie(where: str, model: Any) -> list[str]:
    """Let the configuration say that the head is a matrix of its own, where it is one."""
    head = model.get_output_embeddings()
    shared = head is None or head.weight is model.get_input_embeddings().weight
    if shared or not model.config.tie_word_embeddings:
        return []
    model.config.tie_word_embeddings = False
    return [
        f"config.json of {where} says tie_word_embeddings, but its files hold a head of its own: that is used, and the "
        "result's config.json says so"
    ]


def _rounded(cast: Mapping[tuple[Any, Any], int]) -> list[str]:
    """What nobody asked for: values that lost digits because one type is used for all."""
    return [
        f"{count} tensors were rounded, {_change(source, kind)}: a model has one type in memory; --weight-format fp32 "
        "keeps all digits"
        for (source, kind), count in cast.items()
        if not _exact(source, kind)
    ]


def _exact(source: Any, kind: Any) -> bool:
    """Whether every value of one type is a value of the other."""
    import torch

    one, other = torch.finfo(source), torch.finfo(kind)
    return bool(one.max <= other.max and one.smallest_normal >= other.smallest_normal and one.eps >= other.eps)


def _change(source: Any, kind: Any) -> str:
    return f"{source} to {kind}".replace("torch.", "")
