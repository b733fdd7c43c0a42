"""`ov-afm kernels`: pack a ReLU² model for the native CPU kernels, and build these."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Sequence
from pathlib import Path

from ..conversion import pack_kernels
from ..kernels import extension, pack
from ..model_dir.model_directory import PACKED_FOLDER
from ..quantization.calibration import PACKAGED_TEXT
from ..runtime import kernel_choice
from ..system import console
from ..system.child_process import run_in_child
from .command import command, command_parser, given

__all__ = ["main"]


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("kernels", "Rewrite a model's ReLU² MLPs for the native CPU kernels.")
    parser.add_argument("model_dir", type=Path, nargs="?", help="model directory with int4 or int8 weights")
    add = parser.add_argument
    add("--activations", choices=sorted(pack.BITS), default="auto", help="width of quantized activations")
    add("--threshold", type=float, default=0.0, help="skip neurons at or below it; 0 is exact")
    share = "skip neurons that have at most this share of a layer's energy, by a threshold for each; 0 is exact"
    add("--drop-energy", type=float, default=0.0, metavar="SHARE", help=share)
    projections = "pack attention's matrices and the head too"
    add("--projections", action=argparse.BooleanOptionalAction, default=True, help=projections)
    compare = "only measure again whether packed or plain is faster on this machine"
    add("--compare", action="store_true", help=compare)
    add("--portable", action="store_true", help=f"remove {PACKED_FOLDER}/: only the plain model remains")
    add = parser.add_argument_group("native library", "without a model directory").add_argument
    add("--build", action="store_true", help="build the kernels for the installed OpenVINO")
    add("--check", action="store_true", help="show the kernels that run here; fails where there are none")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.build:
        console.note("building the ReLU² kernels ...")
        extension.build()
    if args.build or args.check:
        print(f"{extension.library()} ({extension.best_isa()} on this {platform.machine()} CPU)")
    if args.model_dir is None:
        if not (args.build or args.check):
            parser.error("a model directory is needed, or --build or --check")
    elif args.portable:
        if not pack.remove(args.model_dir):
            console.note(f"{args.model_dir} has no {PACKED_FOLDER}/; nothing was done")
    elif args.compare:
        with console.Progress() as progress, progress.step("comparing with the plain model"):
            print(run_in_child(kernel_choice.compare, args.model_dir))
    else:
        _pack(args)
    return 0


def _pack(args: argparse.Namespace) -> None:
    with console.Progress() as progress:
        with progress.step("packing weights") as advance:
            result = pack.transform(**given(pack.transform, args), text=PACKAGED_TEXT, on_layer=advance)
        comparison = pack_kernels.compare(args.model_dir, progress)
    for name, reason in result.refused.items():
        console.note(f"{name} stays as it is: {reason}")
    print(
        f"{result.path}: {len(result.replaced)} MLPs and {result.projections} projections for the kernels, "
        "weights verified bit for bit"
    )
    console.note(f"on this machine {comparison}")
    if result.active is not None:
        console.note(
            f"not exact: {result.active:.1%} of the neurons stay active; "
            "ov-afm evaluate --runtime-defaults measures what that costs"
        )
