"""`ov-afm generate`: one prompt, one answer, streamed to standard output.

The answer alone goes to standard output; figures and notes go to standard error.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..errors import GenerationError
from ..pipeline import Completion, Message, Pipeline
from ..runtime.sampling import Params
from ..system import console
from ..system.interrupt import leave_at_once
from .command import command, command_parser
from .options import add_load_options, add_sampling_options, load, sampling

__all__ = ["main"]


def figures(completion: Completion, pipeline: Pipeline) -> str:
    """One line on what an answer cost."""
    metrics = completion.metrics
    rate = metrics.tokens_per_s
    device = "emulated NPU" if pipeline.emulated else pipeline.device
    tokens = f"{metrics.new_tokens} tokens" + (f" at {rate:.1f} tokens/s" if rate else "")
    begin = f"prompt {metrics.prompt_tokens} tokens, first token after {metrics.ttft_ms / 1000:.2f} s"
    return f"{device}, {begin}, {tokens}, finish: {completion.finish_reason}"


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
    if not text:
        # The model need not be loaded to say so.
        raise GenerationError("the prompt has 0 tokens; give it some text", code="prompt-empty")
    prompt: str | list[Message] = text
    if system is not None:
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
