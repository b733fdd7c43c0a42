"""`ov-afm upload`: a model directory goes to the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..conversion.upload import upload
from ..system import console
from .command import command, command_parser

__all__ = ["main"]


@command
def main(argv: Sequence[str] | None = None) -> int:
    """`ov-afm upload`."""
    options = command_parser("upload", "Send a model directory to the Hugging Face Hub.")
    options.add_argument("model_dir", type=Path, metavar="MODEL_DIR", help="directory that `ov-afm export` made")
    options.add_argument("repo_id", metavar="REPO_ID", help="repository, org/name; created if it does not exist")
    options.add_argument("--private", action="store_true", help="make the repository private, if it has to be created")
    revision = "branch to commit to, created if it does not exist (default: the main branch)"
    options.add_argument("--revision", help=revision)
    args = options.parse_args(argv)
    with console.Progress() as progress:
        address = upload(args.model_dir, args.repo_id, private=args.private, revision=args.revision, progress=progress)
    print(address)
    return 0
