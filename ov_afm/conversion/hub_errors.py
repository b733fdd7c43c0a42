"""What can go wrong with the Hugging Face Hub, in one line each."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import SourceError
from ..presets import EMBEDDED_MODEL

__all__ = ["explained", "reason"]


OTHER_SOURCES = f"name a folder or a .gguf file, or use the embedded model {EMBEDDED_MODEL}"


@contextmanager
def explained(repo: str, revision: str | None = None, *, otherwise: str = OTHER_SOURCES) -> Iterator[None]:
    """Turn what can go wrong with the Hub into one line each.

    Args:
        repo: `org/name`.
        revision: Branch, tag or commit that was asked for.
        otherwise: What to do if the Hub cannot be reached or cannot answer now.

    Raises:
        SourceError: Saying what happened and what to do.
    """
    import httpx
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    try:
        yield
    except errors.GatedRepoError as error:
        raise SourceError(
            f"{repo} is gated: accept its licence at {hub}/{repo}, then log in with: hf auth login"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise SourceError(
            f"{repo} has no revision {revision!r}; see {hub}/{repo}/commits/main for what it has"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise SourceError(
            f"{repo} is not on {hub}, or is private; check the spelling, or log in with: hf auth login"
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise SourceError(
            f"{repo} is not in the cache, and HF_HUB_OFFLINE forbids asking the Hub; unset it once, or name a folder"
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        advice = {
            401: "the token was not accepted, log in again with: hf auth login",
            403: "the token may not do this; make one that may at the Hub's settings, then: hf auth login",
            429: "too many requests; wait some minutes",
        }.get(status, "try again later")
        raise SourceError(f"{hub} answered {status} for {repo}; {advice}, or {otherwise}") from error
    except errors.HFValidationError as error:
        raise SourceError(f"{repo!r} is no Hub id ({reason(error)}); give org/name") from error
    except (httpx.TransportError, errors.LocalEntryNotFoundError) as error:
        raise SourceError(
            f"cannot reach {hub} ({reason(error)}); check the connection, set HF_ENDPOINT to a mirror, or {otherwise}"
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS):
            raise
        raise SourceError(
            f"cannot write to {constants.HF_HUB_CACHE} ({os.strerror(error.errno)}); set HF_HUB_CACHE to another folder"
        ) from error


def reason(error: Exception) -> str:
    """The first line of an exception, or its name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]
