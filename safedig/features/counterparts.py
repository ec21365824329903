"""What stands in a safe twin where a token of a harmful prompt stands: known tokens that an edit looks up.

Tokens that harm leaves alone are among them, each its own counterpart, so that a harmless token finds one of those.
Harm that only two things make together is kept apart: there a harmless thing has to go, which elsewhere may stay.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import embedding_bag

from ..activations.record import Activations, Prompts
from ..activations.shuffle import Reservoir
from ..config import UsageError
from ..sae.model import SparseAutoencoder
from ..sites import Site
from .features import Features
from .heights import codes
from .labelled import Labelled, check_both, labelled


@dataclass(frozen=True, eq=False)
class Known:
    """Tokens, and what harm has added to each."""

    tokens: Float[Tensor, "known d_in"]
    delta: Float[Tensor, "known d_in"]
    """a(harmful) − a(safe twin); 0 for a token that is harmless."""

    def harmful(self) -> "Known":
        """Those that harm has added something to."""
        changed = self.delta.any(1)
        return Known(self.tokens[changed], self.delta[changed])

    def harm(self, a: Float[Tensor, "token d_in"], nearest: int) -> Float[Tensor, "token d_in"]:
        """The mean of what harm has added to the known tokens nearest to each. Cost O(token · known · d_in)."""
        if not len(a) or not len(self.tokens):
            return torch.zeros_like(a)
        k = min(nearest, len(self.tokens))
        near = torch.cdist(a, self.tokens).topk(k, dim=1, largest=False, sorted=False).indices
        return embedding_bag(near, self.delta, mode="mean")

    def distance(self, a: Float[Tensor, "token d_in"]) -> Float[Tensor, " token"]:
        """From each token to the known one that is nearest; infinite where none is known."""
        return torch.cdist(a, self.tokens).amin(1) if len(self.tokens) else torch.full_like(a[:, 0], math.inf)


@dataclass(frozen=True, eq=False)
class Counterparts:
    """The known tokens of one site."""

    alone: Known
    """Of prompts in which a single token tells of harm, and of benign prompts."""
    together: Known
    """Of prompts in which only several do."""
    radius: Float[Tensor, ""] | None = None
    """A token farther than this from every known one is unknown; None takes them all for known."""

    def harm(
        self,
        a: Float[Tensor, "token d_in"],
        alone: Bool[Tensor, " token"],
        together: Bool[Tensor, " token"],
        nearest: int,
    ) -> Float[Tensor, "token d_in"]:
        """What harm has added to each token; of its image a single token tells, or only several do.

        Where neither does, and the gate was opened elsewhere, it is looked up among all that are known.
        """
        found, neither = torch.zeros_like(a), ~(alone | together)
        for known, which in ((self.alone, alone), (self.together, together)):
            found[which] = known.harm(a[which], nearest)
        if neither.any():
            found[neither] = self.all().harm(a[neither], nearest)
        return found

    def all(self) -> Known:
        """Of both sorts of prompts."""
        parts = [known for known in (self.alone, self.together) if len(known.tokens)]
        return Known(torch.cat([known.tokens for known in parts]), torch.cat([known.delta for known in parts]))

    def unknown(self, a: Float[Tensor, "token d_in"]) -> Bool[Tensor, " token"]:
        """The tokens that are like none of the known ones."""
        far = self.distance(a)
        return torch.zeros_like(far, dtype=torch.bool) if self.radius is None else far > self.radius

    def distance(self, a: Float[Tensor, "token d_in"]) -> Float[Tensor, " token"]:
        """From each token to the nearest of them all."""
        return self.alone.distance(a).minimum(self.together.distance(a))


def fit_counterparts(
    saes: Mapping[Site, SparseAutoencoder],
    activations: Activations,
    features: Mapping[Site, Features],
    prompts: Prompts | None = None,
    *,
    quiet: Activations | None = None,
    within: float = 0.9,
    size: int = 4096,
    seed: int = 0,
) -> dict[Site, Counterparts]:
    """From harmful prompts with safe twins and benign prompts, in one pass; `features` are calibrated.

    At most `size` tokens of each sort are kept, a uniform sample: changed by harm or not, of either sort of prompt.
    Text is aligned word for word (activations/alignment.py). With `quiet`, benign prompts that nothing was learnt from,
    a token is unknown that lies farther from all kept ones than a share `within` of theirs; else none is. Memory:
    32 · d_in · size bytes a site.
    """
    if size < 1 or not 0 < within <= 1:
        raise UsageError(
            f"size={size}, within={within}: expected at least 1 known token, and a share above 0, up to 1."
        )
    activations = activations if prompts is None else activations.of(prompts)
    check_both(activations)
    found = {site: _fitted(saes[site], activations.at(site), one, size, seed) for site, one in features.items()}
    if quiet is None:
        return found
    return {site: replace(one, radius=_radius(one, quiet.at(site), within)) for site, one in found.items()}


def _fitted(sae: SparseAutoencoder, activations: Activations, features: Features, size: int, seed: int) -> Counterparts:
    read, dose = codes(sae, features.index), features.dose
    kept = {(alone, harm): Reservoir(size, seed) for alone in (True, False) for harm in (True, False)}
    for one in labelled(activations):
        heard = not one.risk or dose is None or bool(dose.alone(read(one.x)[None]))
        rows = torch.cat([one.x, one.delta], dim=1)
        kept[heard, True].add(rows[one.harmful])
        kept[heard, False].add(_harmless(rows, one))
    return Counterparts(_known(kept, True), _known(kept, False))


def _radius(known: Counterparts, quiet: Activations, within: float) -> Float[Tensor, ""]:
    far = [known.distance(batch.x.float().cpu()).numpy() for batch in quiet]
    if not far:
        raise UsageError("There is no token in the recording of quiet prompts, by which known tokens are told.")
    return torch.tensor(np.quantile(np.concatenate(far), within), dtype=torch.float32)  # torch's takes 2²⁴ at most


def _harmless(rows: Float[Tensor, "token two_d_in"], one: Labelled) -> Float[Tensor, "harmless two_d_in"]:
    x, _ = rows[one.harmless].chunk(2, dim=1)
    return torch.cat([x, torch.zeros_like(x)], dim=1)


def _known(kept: Mapping[tuple[bool, bool], Reservoir], alone: bool) -> Known:
    parts = [reservoir.rows() for (heard, _), reservoir in kept.items() if heard == alone and reservoir.seen]
    if not parts:
        return Known(torch.zeros(0, 1), torch.zeros(0, 1))
    tokens, delta = torch.cat(parts).chunk(2, dim=1)
    return Known(tokens.contiguous(), delta.contiguous())
