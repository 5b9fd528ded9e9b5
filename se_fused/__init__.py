"""Squeeze-and-Excitation as one fused operation for PyTorch."""

from . import backends, reference
from .backends import BackendUnavailable, Explanation, use_backend
from .factory import factory
from .modules import SqueezeExcite
from .ops import explain, squeeze_excite
from .options import HardSigmoid
from .replace import replace, restore
from .report import Report

__version__ = "0.1.0"
__all__ = [
    "BackendUnavailable",
    "Explanation",
    "HardSigmoid",
    "Report",
    "SqueezeExcite",
    "explain",
    "factory",
    "reference",
    "replace",
    "restore",
    "squeeze_excite",
    "use_backend",
]

backends.load()
