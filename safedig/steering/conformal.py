"""How high a gate must stand, so that benign images pass it untouched: a guarantee over calibrations.

The usual conformal quantile holds on average over calibrations, and half of these are worse. Here the share of fresh
benign images that a gate touches exceeds ε in no more than δ of all calibrations, whatever the heights' distribution.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from ..activations.pairs import benign
from ..activations.record import Activations, Image
from ..config import UsageError
from ..features import Dose, Features
from ..features.heights import Heights
from ..sae.model import SparseAutoencoder
from ..sites import Site


def least(epsilon: float, delta: float) -> int:
    """How many benign prompts it takes: of fewer not even the highest is high enough."""
    _check(epsilon, delta)
    return math.ceil(math.log(delta) / math.log1p(-epsilon))


def threshold(heights: Sequence[float], epsilon: float = 0.05, delta: float = 0.1) -> float:
    """The lowest of the heights that a share of more than ε of fresh ones exceeds with probability at most δ.

    One height a prompt, independent of one another and of what was learnt. Of n heights, the share above the k-th is
    distributed as Beta(n + 1 − k, k), or is less where heights are equal (Vovk 2012, proposition 2). A `UsageError`
    where there are fewer than `least(epsilon, delta)`.
    """
    from scipy.stats import beta

    n = len(heights)
    if n < least(epsilon, delta):
        raise UsageError(
            f"{n} benign prompts cannot vouch that at most {epsilon:.1%} are touched, with {1 - delta:.0%} confidence: "
            f"record at least {least(epsilon, delta)} of each kind, or loosen epsilon or delta."
        )
    rank = np.arange(1, n + 1)
    enough = beta.sf(epsilon, n + 1 - rank, rank) <= delta
    return sorted(heights)[int(enough.argmax())]


def calibrated(
    features: Mapping[Site, Features],
    saes: Mapping[Site, SparseAutoencoder],
    activations: Activations,
    *,
    epsilon: float = 0.05,
    delta: float = 0.1,
) -> dict[Site, Features]:
    """The same features with doses above 0, where the gate opens, on no more benign images than the guarantee says.

    `activations` are of benign prompts that nothing was learnt from. A prompt's height is that of its highest image and
    step, so that all tokens are to be recorded, in every step that the gate will see. Each kind of prompt ("benign",
    "near-miss") is vouched for by itself, and ε is shared evenly by all that may open a gate: at each site what single
    tokens say, and what pairs of features say.
    """
    kinds = {(row["id"], row["seed"]): row.get("kind") or "benign" for row in activations.prompts}
    plain = benign(activations.prompts)
    if not plain:
        raise UsageError("There is no benign prompt in the recording: record some, to set the thresholds by.")
    gates = sum(2 if one.dose is not None and len(one.dose.pairs) else 1 for one in features.values())
    found = {}
    for site, one in features.items():
        heights = Heights(saes[site], one.index, one.dose)
        for batch in activations.at(site):
            for image, rows in batch.images():
                if image in plain:
                    _check_whole(site, batch.token[rows])
                    heights.add(image, batch.x[rows])
        groups = _by_kind(heights.own, kinds)
        limits = {
            side: max(
                threshold(list(of.values()), epsilon / gates, delta) for of in _by_kind(heights_of, kinds).values()
            )
            for side, heights_of in (("own", heights.own), ("together", heights.together))
        }
        dose = (one.dose or Dose.of(torch.ones(len(one)))).lowered(**limits)
        facts = {"epsilon": epsilon, "delta": delta, "benign_prompts": {kind: len(of) for kind, of in groups.items()}}
        found[site] = replace(one, threshold=0.0, dose=dose, facts=one.facts | {"guarantee": facts})
    return found


def _check_whole(site: Site, token: Int[Tensor, " token"]) -> None:
    """A `UsageError` where only some tokens of an image were kept: the highest of those is too low for all."""
    mean, last = bool(token[0] < 0) and site.stream not in ("pooled", "temb"), int(token.max())
    if mean or last >= len(token):
        kept = "the mean of each image's tokens" if mean else f"{len(token)} of each image's tokens"
        raise UsageError(
            f"The recording of '{site}' keeps {kept}, and a gate set by those would open for more benign images than "
            "it should, since it sees every token: record the benign prompts with tokens='all'."
        )


def _by_kind(heights: Mapping[Image, float], kinds: Mapping[Image, str]) -> dict[str, dict[str, float]]:
    """The height of each prompt, however many images it has, by the kind of prompt."""
    groups: dict[str, dict[str, float]] = {}
    for image, height in heights.items():
        of = groups.setdefault(kinds[image], {})
        of[image[0]] = max(height, of.get(image[0], height))
    return groups


def _check(epsilon: float, delta: float) -> None:
    if not (0 < epsilon < 1 and 0 < delta < 1):
        raise UsageError(f"epsilon={epsilon}, delta={delta}: expected two shares between 0 and 1.")
