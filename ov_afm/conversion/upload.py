"""A model directory goes to the Hugging Face Hub.

Large files are sent first, one by one, and a single commit at the end makes them visible, so the
repository never shows half a model. The Hub knows large files by their sha256: after an interruption
the same command sends only what has not arrived.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import SourceError
from ..model_dir import manifest
from ..model_dir.model_directory import ModelDirectory
from ..system import console
from .hub import byte_progress, explained

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
        repo_id: `org/name`; created if it does not exist.
        private: Make the repository private, if it has to be created.
        revision: Branch to commit to, created if it does not exist; None is the main branch.
        progress: Where to show checking and sending.

    Returns:
        The repository's address.

    Raises:
        SourceError: The directory is not whole, nobody is logged in, or the Hub refuses or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token

    folder = Path(model_dir)
    if constants.is_offline_mode():
        raise SourceError("HF_HUB_OFFLINE is set, and an upload needs the Hub; unset it", code="hub-offline")
    files = _files(folder, progress)
    if not get_token():
        raise SourceError(
            f"nobody is logged in to {constants.ENDPOINT}; run: hf auth login (or set HF_TOKEN)", code="hub-no-login"
        )
    api = HfApi()
    with explained(repo_id, revision, otherwise=AGAIN):
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        additions = [CommitOperationAdd(name, str(folder / name)) for name in files]
        with byte_progress(progress, "uploading", sum(files.values())) as advance:
            for addition in additions:
                api.preupload_lfs_files(repo_id, additions=[addition], revision=revision)
                advance(files[addition.path_in_repo])
            message = f"Model exported with ov_afm {manifest.installed_versions()['ov_afm']}"
            api.create_commit(repo_id, additions, commit_message=message, revision=revision)
    address = f"{constants.ENDPOINT}/{repo_id}"
    return address if revision is None else f"{address}/tree/{revision}"


def _files(folder: Path, progress: console.Progress | None) -> dict[str, int]:
    """Name and size of what is sent, checked against the manifest."""
    total = sum(path.stat().st_size for path in manifest.files_of(folder))
    with byte_progress(progress, "checking sha256", total) as advance:
        contents = ModelDirectory.open(folder, hashes=True, any_task=True, on_bytes=advance).manifest
    if contents is None:
        shown = [path for path in manifest.files_of(folder) if not path.name.startswith(".")]
        names = [path.relative_to(folder).as_posix() for path in shown]
    else:
        names = [*contents.files, manifest.FILE_NAME, "README.md"]
    if not (folder / "README.md").exists():
        console.note(f"{folder} has no README.md; the repository will have no model card")
    return {name: (folder / name).stat().st_size for name in names if (folder / name).exists()}
