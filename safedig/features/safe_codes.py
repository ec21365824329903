"""Safe prototypes for features that were weighed: what the SAE reads in a twin where harm has changed a token most."""

from collections.abc import Mapping
from dataclasses import replace

from ..activations.pairs import Pair, Pairing
from ..activations.record import Activations, Prompts
from ..activations.shuffle import Reservoir
from ..config import UsageError
from ..sae.model import SparseAutoencoder
from ..sites import Site
from .features import Features
from .prototypes import Prototypes


def fit_prototypes(
    saes: Mapping[Site, SparseAutoencoder],
    activations: Activations,
    features: Mapping[Site, Features],
    prompts: Prompts | None = None,
    *,
    size: int = 256,
    seed: int = 0,
) -> dict[Site, Features]:
    """The same features with at most `size` prototypes, a uniform sample of those of harmful prompts' safe twins.

    Text is aligned word for word, as in `fit_counterparts`. A `UsageError` where no twin was recorded.
    """
    activations = activations if prompts is None else activations.of(prompts)
    banks = {site: Reservoir(size, seed) for site in features}
    pairing = Pairing(activations)
    for batch in activations:
        for pair in map(Pair.aligned, pairing.add(batch)) if batch.site in banks else ():
            banks[batch.site].add(pair.safe[pair.change().argmax()][None])
    for site, bank in banks.items():
        if not bank.seen:
            raise UsageError(f"At '{site}' no harmful prompt was recorded with its safe twin: record both.")
    return {
        site: replace(one, prototypes=Prototypes.of(saes[site].encode(banks[site].rows()), one.index))
        for site, one in features.items()
    }
