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

OF_THE_TINY_WORLD = frozenset({"synonyms", "paraphrases"})
"""Those that know no other words than the tiny world's."""

WITHOUT_WEIGHTS = frozenset(
    {"seed search", "synonyms", "paraphrases", "transferred", "harm late in σ", "harm early in σ"}
)
"""Those of an attacker who asks and looks at pictures; all others are handed the model, steering and all."""

__all__ = ["ATTACKS", "OF_THE_TINY_WORLD", "WITHOUT_WEIGHTS", "Attack", "Candidate", "Outcome", "Victim", "attacked"]
