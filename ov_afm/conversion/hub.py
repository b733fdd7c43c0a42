"""A repository of the Hugging Face Hub on this disk, in the cache that every Hugging Face tool shares.

Large files are fetched here rather than by `snapshot_download`, for two reasons. huggingface_hub drops a partial file
when its process ends, so a 9 GB download would start again after every Ctrl-C; here the next run resumes it. And
huggingface_hub compares lengths only, while a flipped bit in a weight merely gives a worse model; here no file enters
the cache before its sha256 is the Hub's.
"""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, SourceError
from ..model_dir import manifest
from ..model_dir.manifest import MODEL_XML
from ..model_dir.text_encoder import POOLING_FILE, TEXT_GENERATION
from ..model_dir.tokenizer_files import ADDITIONAL_TEMPLATES
from ..presets import EMBEDDED_MODEL
from ..system.console import Progress, human_bytes, note
from . import checkpoint

__all__ = ["Snapshot", "byte_progress", "explained", "fetch"]

TEXTS = (".json", ".txt", ".jinja", ".model", ".md")
BIG = 10_000_000  # bytes; smaller files are not worth a partial file
HTTP_ADVICE = {
    401: "the token was not accepted, log in again with: hf auth login",
    403: "the token may not do this; make one that may at the Hub's settings, then: hf auth login",
    429: "too many requests; wait some minutes",
}
OTHER_SOURCES = f"name a folder or a .gguf file, or use the embedded model {EMBEDDED_MODEL}"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One commit of a repository.

    Attributes:
        path: Folder with its files.
        commit: Full commit id.
        digests: sha256 of each large file, computed from this disk and equal to the Hub's.
    """

    path: Path
    commit: str
    digests: Mapping[str, str]


def fetch(
    repo: str,
    revision: str | None = None,
    *,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    task: str = TEXT_GENERATION,
    progress: Progress | None = None,
) -> Snapshot:
    """Download what a model needs of a repository, or find it in the cache.

    Args:
        repo: `org/name`.
        revision: Branch, tag or commit; None is the main branch.
        allow_pickle: Fetch `.bin` weights where there are no safetensors.
        trust_remote_code: Fetch the model's Python code too.
        task: What the model is for.
        progress: Where to show the download.

    Raises:
        SourceError: The repository cannot be reached, found, read or trusted; or there is no room for it.
        ConfigError: There is no folder for the cache.
    """
    import httpx
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import OfflineModeIsEnabled

    if constants.HF_HUB_CACHE.startswith("~"):
        raise ConfigError(
            "there is no home folder (HOME is not set) for the cache of the Hub; set HF_HOME to a folder that can be "
            "written",
            code="home-missing",
        )
    with explained(repo, revision):
        try:
            info = HfApi().model_info(repo, revision=revision, files_metadata=True)
        except (OfflineModeIsEnabled, httpx.TransportError) as error:
            return _from_cache(repo, revision, error, progress)
        commit = str(info.sha)
        files: dict[str, Any] = {sibling.rfilename: sibling for sibling in info.siblings or ()}
        names = _needed_files(repo, files, allow_pickle, trust_remote_code)
        if MODEL_XML not in names:
            _check_config(repo, commit, names, trust_remote_code, task)
        path = _download(repo, commit, [files[name] for name in names], progress)
        _remember(path, revision or constants.DEFAULT_REVISION)
        expected = {name: files[name].lfs.sha256 for name in names if files[name].lfs}
        return Snapshot(path, commit, _checked(repo, path, expected, progress))


def _remember(snapshot: Path, revision: str) -> None:
    """Note which commit a branch or tag was, so that the cache has it when the Hub cannot be reached."""
    if revision != snapshot.name:
        reference = snapshot.parent.parent / "refs" / revision
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(snapshot.name)


def _needed_files(repo: str, files: Mapping[str, Any], allow_pickle: bool, trust_remote_code: bool) -> list[str]:
    top = [name for name in files if "/" not in name]
    texts = [name for name in top if name.endswith(TEXTS) or checkpoint.LICENSE_NAMES.match(name)]
    texts += [name for name in files if name.startswith(f"{ADDITIONAL_TEMPLATES}/") and name.endswith(".jinja")]
    texts += [name for name in files if name == POOLING_FILE]
    if trust_remote_code:
        texts += [name for name in top if name.endswith(".py")]
    if MODEL_XML in top:
        return [*texts, *(name for name in top if name.startswith("openvino_") and name.endswith((".xml", ".bin")))]
    weights = [name for name in top if name.startswith("model") and name.endswith(".safetensors")]
    pickles = [name for name in top if name.startswith("pytorch_model") and name.endswith(".bin")]
    ggufs = [name for name in files if name.lower().endswith(".gguf")]
    if weights or (pickles and allow_pickle):
        return [*texts, *(weights or pickles)]
    if pickles:
        raise SourceError(
            f"{repo} has only pickled weights ({pickles[0]}), and loading a pickle runs whatever code is in it; "
            "use a safetensors repository, or add --allow-pickle if you trust its author",
            code="weights-pickled",
        )
    if ggufs:
        raise SourceError(
            f"{repo} holds GGUF files; fetch one and name it: hf download {repo} {_all_parts(ggufs[0])} --local-dir .",
            code="hub-gguf",
        )
    raise SourceError(
        f"{repo} holds no model: neither model.safetensors nor {MODEL_XML} is there", code="weights-missing"
    )


def _all_parts(name: str) -> str:
    """What `hf download` needs of a GGUF file: its name, or a pattern for all the parts that it was cut into."""
    pattern = re.sub(r"-\d{5}-of-(\d{5}\.gguf)$", r"-*-of-\1", name, flags=re.IGNORECASE)
    return name if pattern == name else f"--include '{pattern}'"


def _check_config(repo: str, commit: str, names: Sequence[str], trust_remote_code: bool, task: str) -> None:
    """Refuse a model by its configurations, before gigabytes are fetched."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        path = Path(hf_hub_download(repo, "config.json", revision=commit))
        config = checkpoint.read_json(path)
    except EntryNotFoundError as error:
        raise SourceError(
            f"{repo} is no checkpoint: config.json is missing; name a repository of a model", code="config-missing"
        ) from error
    checkpoint.check_config(config, repo, trust_remote_code=trust_remote_code, task=task)
    for name in checkpoint.QUANTIZATION_FILES.keys() & set(names):
        hf_hub_download(repo, name, revision=commit)
    checkpoint.check_quantization_files(path.parent, repo)


def _download(repo: str, commit: str, files: Sequence[Any], progress: Progress | None) -> Path:
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.file_download import repo_folder_name

    storage = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")
    snapshot = storage / "snapshots" / commit
    missing = [file for file in files if not (snapshot / file.rfilename).exists()]
    big = [file for file in missing if file.lfs and file.size >= BIG]
    for file in missing:
        if file not in big:
            hf_hub_download(repo, file.rfilename, revision=commit)
    if not big:
        return snapshot
    blobs = storage / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    partial = sum(part.stat().st_size for file in big if (part := _part(blobs, file)).exists())
    total, free = sum(file.size for file in big), shutil.disk_usage(blobs).free
    if total - partial > free:
        raise SourceError(
            f"{repo} needs {human_bytes(total - partial)} in {constants.HF_HUB_CACHE}, {human_bytes(free)} are free; "
            "free some space, or set HF_HUB_CACHE to a folder on a larger disk",
            code="disk-full",
        )
    with byte_progress(progress, "downloading", total) as advance:
        for file in big:
            _fetch_big(repo, commit, file, blobs, snapshot, advance)
    return snapshot


def _part(blobs: Path, file: Any) -> Path:
    return blobs / f"{file.lfs.sha256}.ov-afm.part"


def _fetch_big(repo: str, commit: str, file: Any, blobs: Path, snapshot: Path, advance: Callable[[int], None]) -> None:
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.file_download import are_symlinks_supported
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    blob, part = blobs / file.lfs.sha256, _part(blobs, file)
    locks = Path(constants.HF_HUB_CACHE) / ".locks" / blobs.parent.name
    locks.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(locks / f"{file.lfs.sha256}.lock"):
        if not blob.exists() and not (snapshot / file.rfilename).exists():
            _fill(repo, commit, file, part, advance)
            digest = manifest.sha256(part)
            if digest != file.lfs.sha256:
                part.unlink()
                raise _mismatch(repo, file.rfilename, digest, file.lfs.sha256)
            # Without symbolic links (Windows) the cache keeps the file itself in the snapshot.
            target = blob if are_symlinks_supported(constants.HF_HUB_CACHE) else snapshot / file.rfilename
            target.parent.mkdir(parents=True, exist_ok=True)
            part.replace(target)
    # Links the blob into the snapshot; it downloads nothing.
    hf_hub_download(repo, file.rfilename, revision=commit)


def _fill(repo: str, commit: str, file: Any, part: Path, advance: Callable[[int], None]) -> None:
    import httpx
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    with part.open("ab") as stream:
        have = stream.tell()
        if have > file.size:
            stream.truncate(have := 0)
        advance(have)
        try:
            http_get(
                hf_hub_url(repo, file.rfilename, revision=commit),
                stream,
                resume_size=have,
                headers=build_hf_headers(),
                expected_size=file.size,
                tqdm_class=_bar(advance),
            )
        except (httpx.TransportError, OSError) as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EACCES):
                raise
            stream.flush()
            raise SourceError(
                f"the download of {file.rfilename} broke off after {human_bytes(stream.tell())} of "
                f"{human_bytes(file.size)} ({_reason(error)}); run the same command again to resume it",
                code="download-broken",
            ) from error


def _bar(advance: Callable[[int], None]) -> type:
    """A stand-in for tqdm that passes the progress of `http_get` on."""

    class Bar(nullcontext["Bar"]):
        def __init__(self, **named: Any) -> None:
            super().__init__(self)

        def update(self, amount: float) -> None:
            advance(int(amount))

    return Bar


def byte_progress(
    progress: Progress | None, description: str, total: float | None = None
) -> AbstractContextManager[Callable[..., None]]:
    """A bar counted in bytes; without `progress` one that shows nothing."""
    if progress is None:
        return nullcontext(lambda *_, **__: None)
    return progress.step(description, total=total, unit="B")


def _checked(repo: str, path: Path, expected: Mapping[str, str | None], progress: Progress | None) -> Mapping[str, str]:
    total = sum((path / name).stat().st_size for name in expected)
    digests = {}
    with byte_progress(progress, "checking sha256", total) as advance:
        for name, digest in expected.items():
            digests[name] = manifest.sha256(path / name, advance)
            if digest is not None and digests[name] != digest:
                blob = (path / name).resolve()
                (path / name).unlink()
                blob.unlink(missing_ok=True)
                raise _mismatch(repo, name, digests[name], digest)
    return digests


def _mismatch(repo: str, name: str, digest: str, expected: str) -> SourceError:
    return SourceError(
        f"{name} of {repo} is damaged: sha256 {digest[:12]}… where the Hub says {expected[:12]}…; "
        "the bad copy was deleted, run the same command again",
        code="download-damaged",
    )


def _from_cache(repo: str, revision: str | None, error: Exception, progress: Progress | None) -> Snapshot:
    """The cached commit of a repository, when the Hub cannot be reached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        path = Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        raise error from None
    if not any(file.suffix in (".safetensors", ".bin") for file in path.iterdir()):
        raise error  # Another tool has cached only a part of it, such as the tokenizer.
    if not isinstance(error, OfflineModeIsEnabled):
        note(f"the Hub cannot be reached; using commit {path.name[:12]} of {repo} from the cache")
    # A blob is named by its sha256 where the file is large, by its git hash where it is not.
    names = {file.name: file.resolve().name for file in path.iterdir()}
    large = {name: blob for name, blob in names.items() if len(blob) == 64}
    return Snapshot(path, path.name, _checked(repo, path, large, progress))


# -- What can go wrong, in one line each


@contextmanager
def explained(repo: str, revision: str | None = None, *, otherwise: str = OTHER_SOURCES) -> Iterator[None]:
    """Turn what can go wrong with the Hub into one line each.

    Args:
        repo: `org/name`.
        revision: The requested branch, tag or commit.
        otherwise: What to do if the Hub cannot be reached or cannot answer now.

    Raises:
        SourceError: Saying what happened and what to do.
    """
    try:
        yield
    except SourceError:
        raise
    except Exception as error:
        explanation = _explanation(error, repo, revision, otherwise)
        if explanation is None:
            raise
        code, message = explanation
        raise SourceError(message, code=code) from error


def _explanation(error: Exception, repo: str, revision: str | None, otherwise: str) -> tuple[str, str] | None:
    """Code and message for an error of the Hub's client; None for any other."""
    import httpx
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    match error:
        case RuntimeError(__cause__=httpx.HTTPError() as cause):  # which hides what stopped an upload
            return _explanation(cause, repo, revision, otherwise)
        case errors.GatedRepoError():
            return "hub-gated", f"{repo} is gated: accept its licence at {hub}/{repo}, then log in with: hf auth login"
        case errors.RevisionNotFoundError():
            commits = f"{hub}/{repo}/commits/main"
            return "hub-revision-unknown", f"{repo} has no revision {revision!r}; its commits: {commits}"
        case errors.RepositoryNotFoundError():
            advice = "check the spelling, or log in with: hf auth login"
            return "hub-repository-unknown", f"{repo} is not on {hub}, or is private; {advice}"
        case errors.OfflineModeIsEnabled():
            advice = "unset it once, or name a folder"
            return "hub-offline", f"{repo} is not in the cache, and HF_HUB_OFFLINE forbids asking the Hub; {advice}"
        case errors.HfHubHTTPError():
            status = error.response.status_code
            advice = HTTP_ADVICE.get(status, "try again later")
            return "hub-refused", f"{hub} answered {status} for {repo}; {advice}, or {otherwise}"
        case errors.HFValidationError():
            return "hub-id-invalid", f"{repo!r} is no Hub id ({_reason(error)}); give org/name"
        case httpx.TransportError() | errors.LocalEntryNotFoundError():
            advice = f"check the connection, set HF_ENDPOINT to a mirror, or {otherwise}"
            return "hub-unreachable", f"cannot reach {hub} ({_reason(error)}); {advice}"
        case OSError(errno=errno.ENOSPC | errno.EACCES | errno.EROFS):
            problem = f"cannot write to {constants.HF_HUB_CACHE} ({error.strerror})"
            return "cache-unwritable", f"{problem}; set HF_HUB_CACHE to another folder"
    return None


def _reason(error: Exception) -> str:
    """The first line of an exception, or its name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]
