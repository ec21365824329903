"""Which latents carry the risk: found by contrast, with the height that opens the gate and what stands in safety."""

from .counterparts import Counterparts, fit_counterparts
from .dose import Dose
from .features import Features, load_features, save_features
from .find import NoFeatureError, find_features
from .prototypes import Prototypes
from .weighing import Weighing, weigh

__all__ = [
    "Counterparts",
    "Dose",
    "Features",
    "NoFeatureError",
    "Prototypes",
    "Weighing",
    "find_features",
    "fit_counterparts",
    "load_features",
    "save_features",
    "weigh",
]
