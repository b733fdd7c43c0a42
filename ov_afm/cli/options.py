"""Options that several commands share: sampling, loading a model, and `KEY=VALUE`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from ..errors import ConfigError
from ..pipeline import Pipeline, Use
from ..runtime.sampling import Params
from ..system import console

__all__ = [
    "add_load_options",
    "add_sampling_options",
    "key_values",
    "load",
    "ov_properties",
    "pipeline_options",
    "sampling",
]


def key_values(entries: Sequence[str], flag: str) -> dict[str, str]:
    """The `KEY=VALUE` arguments of a flag that may be repeated.

    Raises:
        ConfigError: An entry has another form, or two have the same key.
    """
    values: dict[str, str] = {}
    for entry in entries:
        key, _, value = entry.partition("=")
        if not (key and value):
            raise ConfigError(f"{flag} takes KEY=VALUE, found {entry!r}", code="key-value")
        if key in values:
            raise ConfigError(f"{flag} names {key!r} twice", code="key-twice")
        values[key] = value
    return values


def ov_properties(entries: Sequence[str]) -> dict[str, Any]:
    """The OpenVINO properties of `--ov-config`: JSON values, or text; a later entry overrides an earlier one.

    Raises:
        ConfigError: An entry is not `KEY=VALUE`.
    """
    properties: dict[str, Any] = {}
    for entry in entries:
        key, equals, value = entry.partition("=")
        if not (key and equals):
            raise ConfigError(f"--ov-config takes KEY=VALUE, found {entry!r}", code="key-value")
        try:
            properties[key] = json.loads(value)
        except ValueError:
            properties[key] = value
    return properties


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `Params`; what is not given stays out, so that the model decides it."""
    group = parser.add_argument_group("sampling", "what is not given comes from the model's generation_config.json")

    def add(flag: str, help: str, **kind: Any) -> None:
        group.add_argument(flag, help=help, default=argparse.SUPPRESS, **kind)

    add("--max-new-tokens", "most tokens to generate", type=int, metavar="N")
    add("--temperature", "0 is greedy", type=float, metavar="T")
    add("--top-k", "keep the K most probable tokens; 0 keeps all", type=int, metavar="K")
    add("--top-p", "keep tokens up to this total probability", type=float, metavar="P")
    add("--min-p", "drop tokens below this share of the best one", type=float, metavar="P")
    add("--repetition-penalty", "above 1 makes repetition less likely", type=float, metavar="R")
    add("--seed", "same seed, same answer", type=int, metavar="N")
    add("--stop", "end the answer at this string; may be given again", action="append", metavar="TEXT")
    add("--greedy", "always the most probable token", action="store_true")


def sampling(arguments: argparse.Namespace) -> Params:
    """The `Params` that the sampling options ask for."""
    given = vars(arguments)
    chosen = {field.name: given[field.name] for field in fields(Params) if field.name in given}
    if "stop" in chosen:
        chosen["stop"] = tuple(chosen["stop"])
    return Params(**chosen)


def add_load_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where and how a model is loaded."""
    group = parser.add_argument_group("loading")
    group.add_argument("--device", default="CPU", help="CPU, GPU, GPU.1, NPU, AUTO, or NPU-EMULATED")
    group.add_argument(
        "--adapter",
        action="append",
        default=argparse.SUPPRESS,
        metavar="FILE[:WEIGHT]",
        help="LoRA adapter in PEFT's form, file or folder; may be given again",
    )
    group.add_argument(
        "--prompt-lookup", action="store_true", help="draft tokens from the prompt: faster where answers quote it"
    )
    group.add_argument(
        "--draft-model", default=argparse.SUPPRESS, metavar="DIR", help="model directory of a small drafting model"
    )
    group.add_argument("--num-assistant-tokens", type=int, default=5, metavar="N", help="tokens drafted at a time")
    group.add_argument(
        "--kv-cache",
        choices=("u8", "f16", "f32"),
        default=argparse.SUPPRESS,
        help="precision of the KV cache, CPU and GPU",
    )
    group.add_argument("--threads", type=int, default=argparse.SUPPRESS, metavar="N", help="CPU threads")
    group.add_argument(
        "--no-prefix-caching",
        dest="prefix_caching",
        action="store_false",
        default=argparse.SUPPRESS,
        help="compute every prompt from its beginning",
    )
    group.add_argument(
        "--npu-blob",
        dest="blob",
        default=argparse.SUPPRESS,
        metavar="FILE",
        help="NPU: file of the compiled model, written the first time, then read instead of compiling",
    )
    group.add_argument(
        "--prompt-tokens",
        type=int,
        default=argparse.SUPPRESS,
        metavar="N",
        help="longest prompt to make room for: NPU reserves it, elsewhere it counts for memory",
    )
    group.add_argument(
        "--ov-config",
        action="append",
        default=argparse.SUPPRESS,
        metavar="KEY=VALUE",
        help="OpenVINO property, e.g. MAX_PROMPT_LEN=2048; may be given again",
    )


def pipeline_options(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The keyword arguments of `Pipeline` that the loading options ask for, the device left out."""
    try:
        properties = ov_properties(getattr(arguments, "ov_config", []))
    except ConfigError as error:
        parser.error(str(error))
    given = vars(arguments)
    return {
        "prompt_lookup": arguments.prompt_lookup,
        "draft_model": given.get("draft_model"),
        "adapters": given.get("adapter", ()),
        "num_assistant_tokens": arguments.num_assistant_tokens,
        "use": Use(**{field.name: given[field.name] for field in fields(Use) if field.name in given}),
        **properties,
    }


def load(model: str, arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> Pipeline:
    """The pipeline that the loading options ask for, and its notes on standard error."""
    options = pipeline_options(arguments, parser)
    with console.LoadDisplay() as on_phase:
        pipeline = Pipeline(model, arguments.device, on_phase=on_phase, **options)
    if pipeline.manifest is None:
        console.note(f"note: {model} has no ov_afm.json, so its files were not checked")
    if pipeline.emulated:
        console.note(f"note: {pipeline.device_note}")
    elif arguments.device.upper() != pipeline.device:
        console.note(f"note: running on {pipeline.device}: {pipeline.device_note}")
    return pipeline
