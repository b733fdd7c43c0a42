"""Options that several commands share: sampling, loading a model, and `KEY=VALUE`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..pipeline import Pipeline, PromptCache, Use
from ..runtime.sampling import Params
from ..system import console
from ..system.json_text import parse
from .command import given


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
            properties[key] = parse(value)
        except ValueError:
            properties[key] = value
    return properties


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `Params`; what is not given stays out, so that the model decides it."""
    group = parser.add_argument_group("sampling", "what is not given comes from the model's generation_config.json")
    add = partial(group.add_argument, default=argparse.SUPPRESS)
    add("--max-new-tokens", type=int, metavar="N", help="most tokens to generate")
    add("--temperature", type=float, metavar="T", help="0 is greedy")
    add("--top-k", type=int, metavar="K", help="keep the K most probable tokens; 0 keeps all")
    add("--top-p", type=float, metavar="P", help="keep tokens up to this total probability")
    add("--min-p", type=float, metavar="P", help="drop tokens below this share of the best one")
    add("--repetition-penalty", type=float, metavar="R", help="above 1 makes repetition less likely")
    add("--seed", type=int, metavar="N", help="where the random numbers begin (default: anew each time)")
    add("--stop", action="append", metavar="TEXT", help="end the answer at this string; may be given again")
    add("--greedy", action="store_true", help="always the most probable token")


def sampling(arguments: argparse.Namespace) -> Params:
    """The `Params` that the sampling options ask for."""
    return Params(**given(Params, arguments))


def add_load_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where and how a model is loaded."""
    group = parser.add_argument_group("loading")
    add = partial(group.add_argument, default=argparse.SUPPRESS)
    add("--device", default="CPU", help="CPU, GPU, GPU.1, NPU, AUTO, or NPU-EMULATED")
    lora = "LoRA adapter in PEFT's form, file or folder; may be given again"
    add("--adapter", action="append", metavar="FILE[:WEIGHT]", help=lora)
    lookup = "draft tokens from the prompt: faster where answers quote it"
    add("--prompt-lookup", action="store_true", default=False, help=lookup)
    add("--draft-model", metavar="DIR", help="model directory of a small drafting model")
    drafts = "tokens drafted at a time (default: as many as pay with --prompt-lookup, 5 by a draft model)"
    add("--num-assistant-tokens", type=int, default=None, metavar="N", help=drafts)
    add("--kv-cache", choices=("u8", "f16", "f32"), help="precision of the KV cache, CPU and GPU")
    add("--threads", type=int, metavar="N", help="CPU threads")
    lock = "keep the weights in memory, whatever else wants it (CPU, Linux)"
    add("--lock-memory", action="store_true", help=lock)
    prefixes = "compute every prompt from its beginning"
    add("--no-prefix-caching", dest="prefix_caching", action="store_false", help=prefixes)
    keep = "keep computed prompts in this folder, for later runs too (CPU)"
    add("--prompt-cache", type=Path, metavar="DIR", help=keep)
    add("--prompt-cache-gb", type=float, metavar="GB", help="bound of that folder (default: 10)")
    blob = "NPU: file of the compiled model, written the first time, then read instead of compiling"
    add("--npu-blob", dest="blob", metavar="FILE", help=blob)
    room = "longest prompt to make room for: NPU reserves it, elsewhere it counts for memory"
    add("--prompt-tokens", type=int, metavar="N", help=room)
    properties = "OpenVINO property, e.g. MAX_PROMPT_LEN=2048; may be given again"
    add("--ov-config", action="append", metavar="KEY=VALUE", help=properties)


def pipeline_options(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The keyword arguments of `Pipeline` that the loading options ask for, the device left out."""
    try:
        properties = ov_properties(getattr(arguments, "ov_config", []))
    except ConfigError as error:
        parser.error(str(error))
    return {
        "prompt_lookup": arguments.prompt_lookup,
        "draft_model": getattr(arguments, "draft_model", None),
        "adapters": getattr(arguments, "adapter", ()),
        "num_assistant_tokens": arguments.num_assistant_tokens,
        "prompt_cache": prompt_cache(arguments),
        "use": Use(**given(Use, arguments)),
        **properties,
    }


def prompt_cache(arguments: argparse.Namespace) -> PromptCache | None:
    """What `--prompt-cache` and `--prompt-cache-gb` ask for.

    Raises:
        ConfigError: There is a bound without a folder, or it keeps nothing.
    """
    asked = vars(arguments)
    bound = {"limit_gb": asked["prompt_cache_gb"]} if "prompt_cache_gb" in asked else {}
    if "prompt_cache" in asked:
        return PromptCache(asked["prompt_cache"].resolve(), **bound)
    if bound:
        raise ConfigError("--prompt-cache-gb is the bound of --prompt-cache DIR; give both", code="prompt-cache-option")
    return None


def load(model: str, arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> Pipeline:
    """The pipeline that the loading options ask for, and its notes on standard error."""
    options = pipeline_options(arguments, parser)
    with console.load_display() as on_phase:
        pipeline = Pipeline(model, arguments.device, on_phase=on_phase, **options)
    if pipeline.manifest is None:
        console.note(f"note: {model} has no ov_afm.json, so its files were not checked")
    if pipeline.emulated:
        console.note(f"note: {pipeline.device_note}")
    elif arguments.device.upper() != pipeline.device:
        console.note(f"note: running on {pipeline.device}: {pipeline.device_note}")
    return pipeline
