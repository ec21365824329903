"""Training-free safety: while a pipeline draws, x̂0 is moved away from a set of images that are not to be drawn."""

from .calibrate import fit_thresholds
from .kernels import Exact, Semantic, Tempered
from .negation import NegationSet
from .safe_denoiser import SafeDenoiser
from .threshold import SafeDensity, Thresholds

__all__ = [
    "Exact",
    "NegationSet",
    "SafeDenoiser",
    "SafeDensity",
    "Semantic",
    "Tempered",
    "Thresholds",
    "fit_thresholds",
]
