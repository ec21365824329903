"""Attacks on a pipeline with something on it, one a file: what each knows, what it may change, what it spends."""

from .ablation import OneSiteOff
from .adaptive import Adaptive
from .attack import Attack, Candidate, Outcome, attacked
from .embeddings import EmbeddingSearch
from .seeds import SeedSearch
from .switching import Switching
from .tokens import TokenSearch
from .transferred import Transferred
from .victim import Victim
from .wordings import Paraphrases, Synonyms

_ALL: tuple[Attack, ...] = (
    SeedSearch(),
    Synonyms(),
    Paraphrases(),
    Transferred(),
    TokenSearch(),
    EmbeddingSearch(),
    Switching("late"),
    Switching("early"),
    OneSiteOff(),
    Adaptive(),
)
ATTACKS: dict[str, Attack] = {one.name: one for one in _ALL}
"""By name, in the order of the table."""

__all__ = ["ATTACKS", "Attack", "Candidate", "Outcome", "Victim", "attacked"]
