"""`ov-afm generate`: one prompt, one answer, streamed to standard output.

The answer alone goes to standard output; figures and notes go to standard error.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from ..errors import GenerationError
from ..pipeline import Completion, Message, Pipeline, Use
from ..runtime.sampling import Params
from ..system import console
from ..system.interrupt import leave_at_once
from ..system.load_display import LoadDisplay
from .command import command
from .command import parser as command_parser

__all__ = ["add_load_options", "add_sampling_options", "figures", "load", "main", "pipeline_options", "sampling"]


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `Params`; what is not given stays out of the namespace and so with the bundle."""
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
    properties: dict[str, Any] = {}
    for entry in getattr(arguments, "ov_config", []):
        key, equals, value = entry.partition("=")
        if not (key and equals):
            parser.error(f"--ov-config takes KEY=VALUE, found {entry!r}")
        try:
            properties[key] = json.loads(value)
        except ValueError:
            properties[key] = value
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
    """The pipeline that the loading options ask for, with its notes said on standard error."""
    options = pipeline_options(arguments, parser)
    with LoadDisplay() as on_phase:
        pipeline = Pipeline(model, arguments.device, on_phase=on_phase, **options)
    if pipeline.manifest is None:
        console.note(f"note: {model} has no ov_afm.json, so its files were not checked")
    if pipeline.emulated:
        console.note(f"note: {pipeline.device_note}")
    elif arguments.device.upper() != pipeline.device:
        console.note(f"note: running on {pipeline.device}: {pipeline.device_note}")
    return pipeline


def figures(completion: Completion, pipeline: Pipeline) -> str:
    """One line on what an answer cost."""
    metrics = completion.metrics
    rate = metrics.tokens_per_s
    return ", ".join(
        [
            "emulated NPU" if pipeline.emulated else pipeline.device,
            f"prompt {metrics.prompt_tokens} tokens",
            f"first token after {metrics.ttft_ms / 1000:.2f} s",
            f"{metrics.new_tokens} tokens" + (f" at {rate:.1f} tokens/s" if rate else ""),
            f"finish: {completion.finish_reason}",
        ]
    )


def _read_prompt(given: str | None, raw: bool, parser: argparse.ArgumentParser) -> str:
    if given not in (None, "-"):
        return str(given)
    if given is None and sys.stdin.isatty():
        parser.error("a prompt is needed: give it as an argument, or pipe it in")
    data = sys.stdin.buffer.read()
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise GenerationError(
            f"the prompt on standard input is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}"
        ) from error
    # `echo hello |` means "hello"; with --raw every byte counts.
    return text if raw else text.removesuffix("\n").removesuffix("\r")


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("generate", "Answer one prompt, streaming to standard output.")
    parser.add_argument("model", metavar="MODEL_DIR", help="model directory made by ov-afm export")
    parser.add_argument("prompt", nargs="?", help="the prompt; - or nothing reads standard input")
    parser.add_argument("--system", default=argparse.SUPPRESS, metavar="TEXT", help="system message before the prompt")
    parser.add_argument("--raw", action="store_true", help="give the prompt to the model without its chat template")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of streamed text")
    parser.add_argument("--stats", action="store_true", help="figures on standard error even if it is no terminal")
    add_sampling_options(parser)
    add_load_options(parser)
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    system = getattr(arguments, "system", None)
    if arguments.raw and system is not None:
        parser.error("--system needs the chat template, which --raw leaves out")
    params = sampling(arguments)
    text = _read_prompt(arguments.prompt, arguments.raw, parser)
    prompt: str | list[Message] = text
    if text and system is not None:
        prompt = [{"role": "system", "content": system}, {"role": "user", "content": text}]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")
    with leave_at_once(), load(arguments.model, arguments, parser) as pipeline:
        completion = _answer(pipeline, prompt, params, raw=arguments.raw, show=not arguments.json)
        if arguments.json:
            print(json.dumps(_record(completion, pipeline), ensure_ascii=False))
        if arguments.stats or sys.stderr.isatty():
            console.note(figures(completion, pipeline))
    return 0


def _answer(pipeline: Pipeline, prompt: str | list[Message], params: Params, *, raw: bool, show: bool) -> Completion:
    pieces = []
    for delta in pipeline.stream(prompt, params, raw=raw):
        pieces.append(delta.text)
        if show:
            print(delta.text, end="", flush=True)
    if show:
        print(flush=True)
    assert delta.finish_reason is not None
    assert delta.metrics is not None
    return Completion("".join(pieces), delta.finish_reason, delta.metrics)


def _record(completion: Completion, pipeline: Pipeline) -> dict[str, Any]:
    return {
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "metrics": {**asdict(completion.metrics), "tokens_per_s": completion.metrics.tokens_per_s},
        "device": pipeline.device,
        "emulated": pipeline.emulated,
        "device_note": pipeline.device_note,
    }


if __name__ == "__main__":
    from .generate import main as run

    sys.exit(run())
