"""No telemetry and no advertising from the libraries, in everything that ov_afm starts.

OpenVINO sends a usage event from a forked process when it is imported (openvinotoolkit/openvino#20290 made that the
default), NNCF one for each compression. The only switch is a file in the user's home, so this module makes the import
of their telemetry package fail, which both provide for. It can go when `openvino-telemetry` reads an environment
variable.
"""

from __future__ import annotations

import os
import sys
from typing import Any, cast

__all__ = ["silence"]

ENVIRONMENT = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "DO_NOT_TRACK": "1",
}


def silence() -> None:
    """Switch telemetry off in this process and its children; to be called before OpenVINO is imported."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # None makes `import openvino_telemetry` fail, which openvino and nncf both provide for.
    cast("dict[str, Any]", sys.modules).setdefault("openvino_telemetry", None)
