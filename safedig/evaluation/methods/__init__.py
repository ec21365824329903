"""Ours and its peers behind one protocol, one method a file: equations with their source, no one else's code."""

from . import away_from_images, clamp, mean_difference, paper_form
from .concept_sae import ConceptSae
from .contrast_repel import ContrastRepel
from .erasure import Leace
from .lesson import Lesson
from .method import Applied, Learnt, Method
from .negative_prompt import NegativePrompt
from .ours import Ours
from .prompt_filter import PromptFilter
from .replacement import Replacement
from .safe_latent_diffusion import SafeLatentDiffusion
from .safree import Safree
from .unsteered import Unsteered

_ALL: tuple[Method, ...] = (
    Unsteered(),
    PromptFilter(),
    NegativePrompt(),
    SafeLatentDiffusion(),
    Safree(),
    mean_difference.PLAIN,
    mean_difference.GATED,
    Leace(),
    ConceptSae(),
    clamp.CORRECT,
    clamp.PUBLISHED,
    Replacement(),
    paper_form.REPEL,
    paper_form.BLEND,
    ContrastRepel(),
    Ours(),
)
_RELATIVES: tuple[Method, ...] = (away_from_images.ALONE, away_from_images.TOGETHER)
METHODS: dict[str, Method] = {one.name: one for one in (*_ALL, *_RELATIVES)}
"""By name, in the order of the table."""
UNLESS_ASKED = frozenset(one.name for one in _RELATIVES)
"""Left out unless they are asked for: they learn from images, which a prompt that asks for harm defies."""

__all__ = ["METHODS", "UNLESS_ASKED", "Applied", "Learnt", "Lesson", "Method"]
