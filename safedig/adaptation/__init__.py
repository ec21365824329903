"""Give an encoder a new decoder for a new domain; the encoder is the same object and cannot change."""

from .adapting import OBJECTIVES, adapt
from .contrast import fit_contrast
from .fine_tuning import FineTuning, fine_tune
from .report import Movement, movement

__all__ = ["OBJECTIVES", "FineTuning", "Movement", "adapt", "fine_tune", "fit_contrast", "movement"]
