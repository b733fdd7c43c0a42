"""`ov-afm profile`: how many neurons a text leaves at zero, and what skipping them gains."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ..kernels.profile import Profile, profile
from ..system import console
from .command import command, command_parser

__all__ = ["main"]


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Print the zeros of each layer and the predicted speed-up."""
    parser = command_parser("profile", "Measure the exact zeros of a ReLU² model on your text.")
    parser.add_argument("model_dir", type=Path, help="model directory")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text of the kind that the model is used for")
    parser.add_argument("--max-tokens", type=int, default=2048, help="stop after so many tokens")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    with console.Progress() as progress, progress.step("counting zeros", total=args.max_tokens) as advance:
        result = profile(args.model_dir, args.text, max_tokens=args.max_tokens, on_tokens=advance)
    print(json.dumps(asdict(result), indent=2) if args.json else _table(result))
    return 0


def _table(result: Profile) -> str:
    lines = [f"{name:<12} {share:6.1%} zeros" for name, share in result.zeros.items()]
    saved = result.mean * result.down_bytes
    lines.append(f"{'mean':<12} {result.mean:6.1%} zeros on {result.tokens} tokens")
    lines.append(
        f"a token reads {console.human_bytes(result.weights_bytes)} of weights; {console.human_bytes(saved)} of them "
        f"need not be read: predicted decoding speed {result.speedup:.2f}x"
    )
    return "\n".join(lines)
