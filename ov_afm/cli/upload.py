"""A model directory goes to the Hugging Face Hub: `ov-afm upload MODEL_DIR REPO_ID`.

Large files are sent first, one by one, and a single commit at the end makes them visible, so the
repository never shows half a model. The Hub knows large files by their sha256: after an interruption
the same command sends only what has not arrived.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .. import __version__
from ..conversion.hub import progress_step
from ..conversion.hub_errors import explained
from ..errors import SourceError
from ..model_dir import manifest
from ..system import console
from .command import command
from .command import parser as command_parser

__all__ = ["upload"]

AGAIN = "run the same command again, what has arrived is not sent twice"


def upload(
    model_dir: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    progress: console.Progress | None = None,
) -> str:
    """Check a model directory and send it to the Hub, as one commit.

    Args:
        model_dir: The directory; every file that its manifest names is sent, with the manifest and the card.
        repo_id: `org/name`; made if it does not exist.
        private: Make the repository private, if it has to be made.
        revision: Branch to commit to, made if it does not exist; None is the main branch.
        progress: Where to show checking and sending.

    Returns:
        The repository's address.

    Raises:
        SourceError: The directory is not whole, nobody is logged in, or the Hub refuses or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token

    folder = Path(model_dir)
    if constants.is_offline_mode():
        raise SourceError("HF_HUB_OFFLINE is set, and an upload needs the Hub; unset it")
    files = _files(folder, progress)
    if not get_token():
        raise SourceError(f"nobody is logged in to {constants.ENDPOINT}; run: hf auth login (or set HF_TOKEN)")
    api = HfApi()
    with explained(repo_id, revision, otherwise=AGAIN):
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        additions = [CommitOperationAdd(name, str(folder / name)) for name in files]
        with progress_step(progress, "uploading", sum(files.values())) as advance:
            for addition in additions:
                with _unwrapped():
                    api.preupload_lfs_files(repo_id, additions=[addition], revision=revision)
                advance(files[addition.path_in_repo])
            message = f"Model exported with ov_afm {__version__}"
            api.create_commit(repo_id, additions, commit_message=message, revision=revision)
    address = f"{constants.ENDPOINT}/{repo_id}"
    return address if revision is None else f"{address}/tree/{revision}"


@contextmanager
def _unwrapped() -> Iterator[None]:
    """huggingface_hub hides what stopped an upload in a RuntimeError; bring it out."""
    import httpx

    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__cause__, httpx.HTTPError):
            raise error.__cause__ from None
        raise


def _files(folder: Path, progress: console.Progress | None) -> dict[str, int]:
    """Name and size of what is sent, checked against the manifest."""
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
    with progress_step(progress, "checking sha256", total) as advance:
        record = manifest.verify(folder, hashes=True, on_bytes=advance)
    if record is None:
        names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
        names = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
    else:
        names = [*record.files, manifest.FILE_NAME, "README.md"]
    if not (folder / "README.md").exists():
        console.note(f"{folder} has no README.md; the repository will have no model card")
    return {name: (folder / name).stat().st_size for name in names if (folder / name).exists()}


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("upload", "Send a model directory to the Hugging Face Hub.")
    parser.add_argument("model_dir", type=Path, metavar="MODEL_DIR", help="directory that `ov-afm export` made")
    parser.add_argument("repo_id", metavar="REPO_ID", help="repository, org/name; made if it does not exist")
    parser.add_argument("--private", action="store_true", help="make the repository private, if it has to be made")
    parser.add_argument("--revision", help="branch to commit to, made if it does not exist (default: the main branch)")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """`ov-afm upload`."""
    args = _parser().parse_args(argv)
    with console.Progress() as progress:
        address = upload(args.model_dir, args.repo_id, private=args.private, revision=args.revision, progress=progress)
    print(address)
    return 0


if __name__ == "__main__":
    from .upload import main as run

    sys.exit(run())
