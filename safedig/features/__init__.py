"""Which latents carry the risk: found by contrast, with the height that opens the gate and what stands in safety."""

from .features import Features, load_features, save_features
from .find import NoFeatureError, find_features
from .prototypes import Prototypes

__all__ = ["Features", "NoFeatureError", "Prototypes", "find_features", "load_features", "save_features"]
