"""`ov-afm export`: a checkpoint becomes a verified OpenVINO model directory."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..export import export
from ..model_dir import ovms
from ..model_dir.text_encoder import TASKS
from ..presets import DEFAULT_MODEL
from ..system import console
from .command import command, command_parser, given
from .info import report
from .recipe_options import add_recipe_arguments, recipe_from_arguments

__all__ = ["main"]

KERNELS = {"auto": None, "relu2": True, "none": False}


@command
def main(argv: Sequence[str] | None = None) -> int:
    """`ov-afm export`."""
    args = _parser().parse_args(argv)
    if args.ovms is not None:
        # Before the long work.
        ovms.read_config(Path(args.ovms))
    chosen = {"recipe": recipe_from_arguments(args), "kernels": KERNELS[args.kernels]}
    result = export(**given(export, args) | chosen)
    if result.log is None:
        console.note(f"{result.path} is this export already; nothing was done (replace it with --force)")
    if args.ovms is not None:
        served = ovms.add(result.path, Path(args.ovms), device=args.device or "CPU", replace=args.force)
        console.note(f"OpenVINO Model Server: ovms --config_path {served.parent / ovms.CONFIG} --rest_port 8000")
    report(result, as_json=args.json)
    return 0


def _parser() -> argparse.ArgumentParser:
    options = command_parser("export", "Export a model to a verified OpenVINO model directory.")
    options.add_argument("model", nargs="?", default=DEFAULT_MODEL, help="Hub id, folder, .gguf file or embedded name")
    options.add_argument("--output", "-o", metavar="DIR", help="new model directory (default: ./NAME-RECIPE)")
    options.add_argument("--revision", help="commit, tag or branch of a Hub repository")
    add_recipe_arguments(options)
    add = options.add_argument
    task = "what the model is for (feature-extraction: embeddings; text-classification: a reranker)"
    add("--task", choices=TASKS, default=TASKS[0], help=task)
    add("--no-verify", dest="verify", action="store_false", help="leave out the comparison with the source")
    golden = "record answers for the self-test of other devices (default: up to 1 B parameters, or with --device)"
    add("--golden", action=argparse.BooleanOptionalAction, help=golden)
    kernels = "pack the model for the native CPU kernels too (auto: a ReLU² model, for the CPU, where zeros pay)"
    add("--kernels", choices=list(KERNELS), default="auto", help=kernels)
    add("--force", action="store_true", help="replace an older model directory")
    add("--work-dir", metavar="DIR", help="folder for the uncompressed IR (default: beside the output)")
    add("--allow-pickle", action="store_true", help="accept pickled weights (they can run code)")
    add("--trust-remote-code", action="store_true", help="run Python code of the checkpoint")
    adapters = "LoRA adapter in PEFT's form to merge before the export; may be given again"
    add("--merge-adapter", dest="adapters", action="append", default=[], metavar="FILE[:WEIGHT]", help=adapters)
    add("--ovms", metavar="DIR", help="add the model to this repository of OpenVINO Model Server too")
    add("--json", action="store_true", help="print the manifest")
    return options
