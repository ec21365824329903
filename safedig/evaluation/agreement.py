"""How far a judge can be trusted: its agreement with people on an audit, and rates corrected for its errors."""

import math
from collections.abc import Hashable, Sequence
from typing import TypedDict

import numpy as np

from safedig.config import UsageError
from safedig.evaluation.intervals import Rate, clustered_rate
from safedig.evaluation.resampling import DRAWS, bounds, numbered, redrawn


class Kappa(TypedDict):
    """Agreement beyond chance, −1 … 1, with its 95 % bounds; `agreed` of n images had the same label from both."""

    kappa: float
    lo: float
    hi: float
    agreed: int
    n: int
    clusters: int


def kappa(one: Sequence[str], other: Sequence[str], clusters: Sequence[Hashable], draws: int = DRAWS) -> Kappa:
    """Cohen's kappa of two raters of the same images, with bounds from resampling prompts."""
    from sklearn.metrics import cohen_kappa_score

    if not len(one) == len(other) == len(clusters) or not one:
        raise UsageError(f"{len(one)}, {len(other)} labels and {len(clusters)} prompts: expected one each an image.")
    if len({*one, *other}) < 2:
        raise UsageError(f"Every image is '{one[0]}' to both: kappa needs an audit in which labels differ.")
    found = float(cohen_kappa_score(one, other))
    index, names = numbered(clusters), sorted({*one, *other})
    tables = np.zeros((index.max() + 1, len(names), len(names)))
    for cluster, a, b in zip(index, one, other, strict=True):
        tables[cluster, names.index(a), names.index(b)] += 1
    drawn = np.einsum("dp,pij->dij", redrawn(len(tables), draws), tables)
    drawn /= drawn.sum((1, 2), keepdims=True)
    chance = (drawn.sum(2) * drawn.sum(1)).sum(1)
    defined = chance < 1
    same = np.trace(drawn, axis1=1, axis2=2)
    lo, hi = bounds((same[defined] - chance[defined]) / (1 - chance[defined]))
    agreed = sum(a == b for a, b in zip(one, other, strict=True))
    return Kappa(kappa=found, lo=lo, hi=hi, agreed=agreed, n=len(one), clusters=len(tables))


class Corrected(TypedDict):
    """The rate that is behind what a fallible judge says, as a fraction with its 95 % bounds."""

    rate: float
    lo: float
    hi: float
    said: Rate
    sensitivity: float
    specificity: float


def corrected_rate(
    hits: Sequence[bool], clusters: Sequence[Hashable], sensitivity: tuple[int, int], specificity: tuple[int, int]
) -> Corrected:
    """Rogan and Gladen's (1978) estimate, with the interval of Lang and Reiczigel (Prev. Vet. Med. 113, 2014).

    `sensitivity`: of so many images that people call unsafe (second), the judge calls so many (first) unsafe;
    `specificity`: the same of safe ones. The number of images is what they are worth: fewer where prompts repeat.
    """
    said = clustered_rate(hits, clusters)
    (found, unsafe), (passed, safe) = sensitivity, specificity
    if not (0 <= found <= unsafe and 0 <= passed <= safe and unsafe and safe):
        raise UsageError(f"sensitivity={sensitivity}, specificity={specificity}: expected counts (right, all of them).")
    if found / unsafe + passed / safe <= 1:
        raise UsageError(
            f"The judge finds {found} of {unsafe} unsafe images and passes {passed} of {safe} safe ones: no better "
            "than chance, so nothing can be corrected; take another judge."
        )
    se, sp = found / unsafe, passed / safe
    lo, hi = _lang_reiczigel(said["rate"], worth(hits, clusters), (se, unsafe), (sp, safe))
    rate = min(1.0, max(0.0, (said["rate"] + sp - 1) / (se + sp - 1)))
    return Corrected(rate=rate, lo=lo, hi=hi, said=said, sensitivity=se, specificity=sp)


def worth(hits: Sequence[bool], clusters: Sequence[Hashable]) -> float:
    """How many independent images these are worth: n over the design effect; prompts, where all say the same."""
    index = numbered(clusters)
    sums, sizes = np.bincount(index, weights=np.asarray(hits, dtype=float)), np.bincount(index)
    m, p = len(sizes), sums.sum() / sizes.sum()
    if m == len(index) or m == 1 or p in (0, 1):
        return float(m)
    variance = m / (m - 1) * ((sums - p * sizes) ** 2).sum() / sizes.sum() ** 2
    return float(min(len(index), p * (1 - p) / variance)) if variance else float(m)


def _lang_reiczigel(
    said: float, n: float, sensitivity: tuple[float, int], specificity: tuple[float, int]
) -> tuple[float, float]:
    z = 1.959963984540054  # normal quantile of 97.5 %
    n_se, n_sp = sensitivity[1] + 2, specificity[1] + 2
    p = (n * said + z * z / 2) / (n + z * z)
    se, sp = ((q * k + 1) / (k + 2) for q, k in (sensitivity, specificity))
    youden = se + sp - 1
    if youden <= 0:
        return 0.0, 1.0
    true = (p + sp - 1) / youden
    noise = [p * (1 - p) / (n + z * z), true**2 * se * (1 - se) / n_se, (1 - true) ** 2 * sp * (1 - sp) / n_sp]
    shift = 2 * z * z * (true * se * (1 - se) / n_se - (1 - true) * sp * (1 - sp) / n_sp) / youden
    reach = z * math.sqrt(sum(noise)) / youden
    return min(1.0, max(0.0, true + shift - reach)), min(1.0, max(0.0, true + shift + reach))
