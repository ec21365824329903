"""How many images a comparison takes: normal approximation, two arms that share nothing, one image a prompt."""

import math
from typing import Any

from safedig.config import UsageError
from safedig.evaluation.beta_binomial import BetaBinomial

POWER, LEVEL = 0.8, 0.05  # chance to find a true difference; two-sided chance to find one that is not there


def per_arm(before: float, after: float, power: float = POWER, level: float = LEVEL) -> int:
    """Independent images each arm needs to tell these two rates apart (Fleiss, without continuity correction)."""
    if not (0 < before < 1 and 0 < after < 1) or before == after:
        raise UsageError(f"before={before}, after={after}: expected two different fractions between 0 and 1.")
    return math.ceil(_images(before, after, power, level))


def prompts_per_arm(before: float, after: float, images: int, icc: float, power: float = POWER) -> int:
    """The same in prompts of `images` images each, whose correlation is `icc`: add prompts before seeds."""
    per_arm(before, after, power)  # refuses what is no pair of rates
    return math.ceil(_images(before, after, power, LEVEL) * BetaBinomial(before, icc).variance_per_prompt(images))


def detectable(before: float, n: int, power: float = POWER, level: float = LEVEL) -> float | None:
    """The largest lower rate that n independent images an arm tell from `before`; None where not even 0 is."""
    from scipy.optimize import brentq

    if not 0 < before < 1 or n < 1:
        raise UsageError(f"before={before}, n={n}: expected a fraction between 0 and 1, and at least one image.")
    low, high = 1e-12, before * (1 - 1e-9)
    if _images(before, low, power, level) > n:
        return None
    after: Any = brentq(lambda after: _images(before, after, power, level) - n, low, high)
    return float(after)


def _images(before: float, after: float, power: float, level: float) -> float:
    from scipy.stats import norm

    mean = (before + after) / 2
    alone = norm.isf(level / 2) * math.sqrt(2 * mean * (1 - mean))
    apart = norm.ppf(power) * math.sqrt(before * (1 - before) + after * (1 - after))
    return float(((alone + apart) / (before - after)) ** 2)
