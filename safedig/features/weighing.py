"""Which latents carry the risk and how much each says of it: a linear reading of the codes, learnt against safe tokens.

`find_features` asks of each latent by itself whether harm raises it. Here they are weighed together, so that a latent
that harmless words share with harm counts for little, and what only two of them say together is heard too.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..activations.record import Activations, Prompts
from ..config import UsageError
from ..sae.model import SparseAutoencoder
from ..sites import Site
from .dose import Dose
from .features import Features
from .heights import codes
from .labelled import Labelled, check_both, labelled
from .meeting import Peaks, members, with_pairs

CANDIDATES = 1024  # latents that are weighed together: their Gram matrix is kept
CALM = 3.0  # how much more the harmless tokens weigh than those of one mean risk domain: they are many and various


@dataclass(frozen=True)
class Weighing:
    """How the latents of a site are weighed."""

    size: int = 192
    """Latents that are kept for what single tokens say; those of pairs come on top."""
    ridge: float = 1.0
    """In units of the mean square of a code."""
    pair_ridge: float = 0.03
    """Of what pairs of latents say, in units of the mean variance; 0 asks single tokens only."""

    def __post_init__(self) -> None:
        if self.size < 1 or not self.ridge > 0 or not self.pair_ridge >= 0:
            raise UsageError(f"{self}: expected at least 1 latent, a ridge above 0, and one of pairs from 0 on.")


def weigh(
    saes: Mapping[Site, SparseAutoencoder],
    activations: Activations,
    prompts: Prompts | None = None,
    *,
    weighing: Weighing | None = None,
) -> dict[Site, Features]:
    """The harmful features of each site with their `dose`: about 1 on what harm changes, about 0 on what it does not.

    Harmful prompts need safe twins in the recording; benign prompts, near-misses above all, tell what is harmless. A
    few pairs of a target domain among them are enough for its words to be known; every risk domain weighs the same.
    No gate opens yet: `calibrated` sets the threshold from prompts of their own. Two passes, three where there are more
    than 1,024 latents; cost O(rows · d_in · d_sae) to encode, memory O(1024² + 1024 · images).
    """
    activations = activations if prompts is None else activations.of(prompts)
    check_both(activations)
    return {site: _weighed(sae, activations.at(site), weighing or Weighing()) for site, sae in saes.items()}


def _weighed(sae: SparseAutoencoder, activations: Activations, wanted: Weighing) -> Features:
    candidates = _candidates(sae, activations)
    read = codes(sae, candidates)
    gram = _Gram(len(candidates))
    for one in labelled(activations):
        gram.add(read(one.x), one)
    gram.check(activations.sites[0])
    kept, weights = gram.solved(wanted)
    peaks = Peaks()
    for one in labelled(activations):
        z = read(one.x)
        peaks.add(one.image, one.risk, z, (z[:, kept] @ weights).amax().item())
    harmful, peak = peaks.harmful(), peaks.highest()
    missed = peaks.missed() if wanted.pair_ridge else torch.zeros_like(harmful)
    met = members(peak, missed, harmful)
    index = torch.cat([kept, met[~torch.isin(met, kept)]])
    dose = Dose.of(torch.cat([weights, weights.new_zeros(len(index) - len(kept))]))
    at = torch.tensor([index.tolist().index(one) for one in met.tolist()], dtype=torch.long)
    dose = with_pairs(dose, at, peak[:, index], missed, harmful, wanted.pair_ridge)
    facts = {
        "weighing": asdict(wanted),
        "harmful": dict(Counter(risk for risk in peaks.risk.values() if risk)),
        "safe": int((~harmful).sum()),
        "heard_in_pairs": int(missed.sum()),
        "model": str(sae.metadata.get("model", "")),
    }
    fires = (peak[harmful][:, index] > 0).float().mean(0)
    return Features(candidates[index], math.inf, dose.weights.clone(), fires, facts=facts, dose=dose)


def _candidates(sae: SparseAutoencoder, activations: Activations) -> Int[Tensor, " candidates"]:
    """All latents of a small dictionary; of a large one those that tell harmful from harmless tokens best."""
    if sae.d_sae <= CANDIDATES:
        return torch.arange(sae.d_sae)
    total = torch.zeros(2, 2, sae.d_sae, dtype=torch.float64)  # harmful and harmless: sum, sum of squares
    count = torch.zeros(2, 1, dtype=torch.float64)
    for one in labelled(activations):
        z = sae.encode(one.x).cpu().double()
        for side, which in enumerate((one.harmful, one.harmless)):
            total[side] += torch.stack([z[which].sum(0), z[which].square().sum(0)])
            count[side] += which.sum()
    mean, square = (total / count[:, None].clamp(min=1)).unbind(1)
    spread = (square - mean.square()).clamp(min=0).sqrt().sum(0)
    apart = (mean[0] - mean[1]).abs() / spread.clamp(min=1e-12)
    return apart.topk(CANDIDATES).indices.sort().values


class _Gram:
    """ZᵀWZ and ZᵀWy with an intercept, in float64: y is 1 on changed tokens, each risk domain of weight 1, else 0."""

    def __init__(self, candidates: int):
        self._size = candidates + 1
        self._square: dict[str, Tensor] = {}
        self._count: Counter[str] = Counter()

    def add(self, z: Float[Tensor, "token candidates"], told: Labelled) -> None:
        """A harmful image counts for its domain by its changed tokens, and for safety by those that are not."""
        ones = torch.cat([z.cpu().double(), torch.ones(len(z), 1, dtype=torch.float64)], dim=1)
        for name, which in ((told.risk, told.harmful), ("", told.harmless)):
            rows = ones[which]
            self._square[name] = self._square.get(name, torch.zeros(self._size, self._size).double()) + rows.T @ rows
            self._count[name] += len(rows)

    def check(self, site: Site) -> None:
        """A `UsageError` where nothing at the site tells a domain's prompts from their twins."""
        if silent := sorted(name for name, rows in self._count.items() if name and not rows):
            raise UsageError(
                f"At '{site}' no token of a prompt of {', '.join(silent)} differs from its safe twin's: leave the site "
                "out, or record it where harm has come to."
            )

    def solved(self, wanted: Weighing) -> tuple[Int[Tensor, " features"], Float[Tensor, " features"]]:
        """The latents whose weights matter most, and their weights when only they are asked. The intercept is dropped:
        a threshold takes its place."""
        share = {name: (1.0 if name else CALM * (len(self._square) - 1)) / self._count[name] for name in self._square}
        gram = sum((share[name] * square for name, square in self._square.items()), torch.zeros(()))
        moment = sum((share[name] * square[:, -1] for name, square in self._square.items() if name), torch.zeros(()))
        every = torch.arange(self._size - 1)
        size = gram.diagonal()[:-1]
        first = _ridge(gram, moment, every, wanted.ridge)
        kept = (first.abs() * size.sqrt()).topk(min(wanted.size, len(every))).indices
        return kept, _ridge(gram, moment, kept, wanted.ridge).float()


def _ridge(
    gram: Float[Tensor, "n n"], moment: Float[Tensor, " n"], at: Int[Tensor, " features"], ridge: float
) -> Float[Tensor, " features"]:
    """The weights of these features beside an intercept, the last row, which is not penalised."""
    here = torch.cat([at, torch.tensor([len(gram) - 1])])
    own = gram[here][:, here]
    penalty = torch.full((len(here),), ridge * own.diagonal()[:-1].mean().clamp(min=1e-12).item()).double()
    penalty[-1] = 0.0
    return torch.linalg.solve(own + penalty.diag(), moment[here])[:-1]
