"""ov_afm: what mlx-lm is to Apple silicon, for Arcee's AFM on Intel CPU, GPU and NPU.

Importing it is cheap: OpenVINO, torch and the rest are imported when work needs them.
"""

import warnings

from .compress import compress
from .evaluation.fidelity import evaluate
from .export import export
from .pipeline import Pipeline

__all__ = ["Pipeline", "__version__", "compress", "evaluate", "export"]
__version__ = "0.1.0"

# `python -m ov_afm.export` runs a module that this package has imported already, on purpose.
warnings.filterwarnings("ignore", message=".*found in sys.modules after import of package 'ov_afm'", module="runpy")
