"""The exception tree: one base, so that a caller can catch everything that is the user's to mend.

A message says what was wrong, the value that was found, and what to run next. The command line
prints it as one line; anything that is not an `OVAFMError` is a bug and keeps its traceback.
"""

from __future__ import annotations

__all__ = [
    "CompressionError",
    "ConfigError",
    "DeviceError",
    "ExportError",
    "ExtensionError",
    "GenerationError",
    "OVAFMError",
    "SourceError",
    "last_line",
]


class OVAFMError(Exception):
    """Base of every error that ov_afm raises on purpose."""


class ConfigError(OVAFMError, ValueError):
    """An option or a configuration value is outside what is allowed."""


class SourceError(OVAFMError):
    """A model could not be found, fetched, read or trusted."""


class ExportError(OVAFMError):
    """A checkpoint could not be turned into a model directory."""


class CompressionError(OVAFMError):
    """Weights could not be compressed as the recipe asks."""


class DeviceError(OVAFMError):
    """A device is absent, cannot run the model, or died while trying."""


class GenerationError(OVAFMError):
    """A prompt or its sampling options cannot be run, or the engine failed while it ran."""


class ExtensionError(OVAFMError):
    """The native OpenVINO extension is missing or does not fit this runtime."""


def last_line(error: BaseException) -> str:
    """The last line of an OpenVINO error, which holds the reason; the lines before it name places in its source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in reversed(lines) if not line.startswith("Exception from")), type(error).__name__)
