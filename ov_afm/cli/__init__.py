"""`ov-afm VERB ...`: the table of commands; each verb's module is imported when it is chosen."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

__all__ = ["COMMANDS", "main"]

# verb → (module, one line for the help)
COMMANDS: dict[str, tuple[str, str]] = {
    "export": ("ov_afm.cli.export", "checkpoint → verified OpenVINO model directory"),
    "compress": ("ov_afm.cli.compress", "uncompressed model directory → INT8 or INT4"),
    "bench": ("ov_afm.cli.bench", "compare devices, precisions and engine options here"),
    "chat": ("ov_afm.cli.chat", "talk with a model, in the terminal or in a browser"),
    "devices": (
        "ov_afm.cli.devices",
        "devices of this machine, what they can run, and whether their answers are right",
    ),
    "evaluate": ("ov_afm.cli.evaluate", "what compression costs: KL divergence, agreement, perplexity"),
    "generate": ("ov_afm.cli.generate", "answer one prompt, streaming"),
    "info": ("ov_afm.cli.info", "recipe, sizes, checks and provenance of a model directory"),
    "kernels": ("ov_afm.cli.kernels", "pack a ReLU² model for the native CPU kernels"),
    "profile": ("ov_afm.cli.profile", "how many neurons a text leaves at zero, and what skipping them gains"),
    "prune": ("ov_afm.cli.prune", "checkpoint → smaller checkpoint, with what that cost"),
    "serve": ("ov_afm.cli.serve", "OpenAI-compatible server"),
    "synth": ("ov_afm.cli.synth", "write a synthetic checkpoint of a given geometry"),
    "tune": ("ov_afm.cli.tune", "search the recipe for a size or a fidelity"),
    "upload": ("ov_afm.cli.upload", "model directory → Hub"),
}


def usage() -> str:
    """The text of `ov-afm --help`."""
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {verb:<{width}}  {summary}" for verb, (_, summary) in COMMANDS.items())
    return (
        "usage: ov-afm VERB [options]\n\nArcee AFM on Intel CPU, GPU and NPU.\n\n"
        f"{rows}\n\nov-afm VERB --help shows a verb's options.\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit status."""
    from ..system import console

    console.any_encoding()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments:
        print(usage(), file=sys.stderr, end="")
        return 2
    verb = arguments[0]
    if verb in ("-h", "--help"):
        print(usage(), end="")
        return 0
    if verb == "--version":
        from importlib import metadata

        print(f"ov-afm {metadata.version('ov-afm')}")
        return 0
    if verb not in COMMANDS:
        print(f"ov-afm: error: no command {verb!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    status: int = importlib.import_module(COMMANDS[verb][0]).main(arguments[1:])
    return status
