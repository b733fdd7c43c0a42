"""The exception tree: one base, so that a caller can catch everything that is the user's to mend.

A message says what was wrong, the value that was found, and what to run next. The command line
prints it as one line; anything that is not an `OVAFMError` is a bug and keeps its traceback.
"""

from __future__ import annotations

__all__ = [
    "CompressionError",
    "ConfigError",
    "DeviceError",
    "EngineLost",
    "ExportError",
    "ExtensionError",
    "GenerationError",
    "OVAFMError",
    "SourceError",
    "last_line",
]


class OVAFMError(Exception):
    """Base of every error that ov_afm raises on purpose.

    Args:
        message: One sentence for the user.
        code: What is wrong, as a stable word for programs and tests; the class's own if not given.

    Attributes:
        code: That word, such as `model-dir-missing`.
    """

    default_code = "error"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code or self.default_code


class ConfigError(OVAFMError, ValueError):
    """An option or a configuration value is outside what is allowed."""

    default_code = "config"


class SourceError(OVAFMError):
    """A model could not be found, fetched, read or trusted."""

    default_code = "source"


class ExportError(OVAFMError):
    """A checkpoint could not be turned into a model directory."""

    default_code = "export"


class CompressionError(OVAFMError):
    """Weights could not be compressed as the recipe asks."""

    default_code = "compression"


class DeviceError(OVAFMError):
    """A device is absent, cannot run the model, or died while trying."""

    default_code = "device"


class GenerationError(OVAFMError):
    """A prompt or its sampling options cannot be run, or the engine failed while it ran."""

    default_code = "generation"


class EngineLost(GenerationError):
    """The process that holds the model ended while it worked on a request, or is not running."""

    default_code = "engine-lost"


class ExtensionError(OVAFMError):
    """The native OpenVINO extension is missing or does not fit this runtime."""

    default_code = "extension"


def last_line(error: BaseException) -> str:
    """The last line of an OpenVINO error, which holds the reason; the lines before it name places in its source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in reversed(lines) if not line.startswith("Exception from")), type(error).__name__)
