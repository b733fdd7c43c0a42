"""`ov-afm synth`: a synthetic checkpoint of a given geometry."""

from __future__ import annotations

from collections.abc import Sequence

from ..conversion.synthetic import GEOMETRIES, synth
from .command import command, command_parser

__all__ = ["main"]


@command
def main(argv: Sequence[str] | None = None) -> int:
    """`ov-afm synth`."""
    options = command_parser("synth", "Write a synthetic Arcee checkpoint: real geometry, random weights.")
    options.add_argument("--geometry", required=True, choices=list(GEOMETRIES), help="which model's shape")
    options.add_argument("--output", "-o", required=True, metavar="DIR", help="new checkpoint folder")
    options.add_argument("--layers", type=int, help="number of layers instead of the geometry's")
    options.add_argument("--seed", type=int, default=0, help="of the random weights")
    options.add_argument("--force", action="store_true", help="replace an older checkpoint of prune or synth")
    args = options.parse_args(argv)
    print(synth(args.geometry, args.output, layers=args.layers, seed=args.seed, force=args.force))
    return 0
