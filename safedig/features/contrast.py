"""What sets the codes of harmful prompts apart from those of safe ones, and how sure that is; the door to `scipy`.

The statistic of a prompt is its code, max over tokens, mean over steps and seeds: a prompt counts once, however many
images were drawn of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..sae.model import SparseAutoencoder

_COLUMNS = 2048  # features tested at once: ranks are kept in float64


class PromptCodes:
    """Gathers the statistic of each prompt at one site. Memory: 4 · d_sae bytes a prompt."""

    def __init__(self, sae: SparseAutoencoder):
        self.sae = sae
        self._row: dict[str, int] = {}
        self._total: list[Tensor] = []
        self._count: list[int] = []

    def add(self, prompt: str, x: Float[Tensor, "token d_in"]) -> None:
        """The tokens of one image in one step."""
        peak = self.sae.encode(x).amax(0).cpu()
        row = self._row.setdefault(prompt, len(self._row))
        if row == len(self._total):
            self._total.append(torch.zeros_like(peak))
            self._count.append(0)
        self._total[row] += peak
        self._count[row] += 1

    def of(self, prompts: Sequence[str]) -> Float[Tensor, "prompt d_sae"]:
        rows = [self._row[name] for name in prompts]
        return torch.stack([self._total[row] / self._count[row] for row in rows])


@dataclass(frozen=True, eq=False)
class Effect:
    """What harm does to each feature of a site."""

    ratio: Float[Tensor, " d_sae"]
    """μ_harmful / (μ_harmful + μ_safe); 0 where it never fires."""
    support: Float[Tensor, " d_sae"]
    """Share of the harmful prompts in which it fires."""
    p: Float[Tensor, " d_sae"]
    """How likely a feature that harm does not raise would look as raised."""
    fires: Bool[Tensor, " d_sae"]
    """In any of the prompts; a feature that does not is not tested."""

    @classmethod
    def between(
        cls, harmful: Float[Tensor, "prompt d_sae"], safe: Float[Tensor, "other d_sae"], *, paired: bool
    ) -> "Effect":
        """Of harmful prompts and the twin of each (a sign test), or safe prompts of any number (Mann–Whitney's)."""
        raised = harmful.double().mean(0)
        ratio = (raised / (raised + safe.double().mean(0))).nan_to_num()
        p = _signs(harmful, safe) if paired else _ranks(harmful, safe)
        fires = (harmful > 0).any(0) | (safe > 0).any(0)
        return cls(ratio, (harmful > 0).double().mean(0), p, fires)

    @classmethod
    def worst(cls, effects: Sequence["Effect"]) -> "Effect":
        """The least that is true in every one of several domains: an intersection–union test needs no correction."""
        return cls(
            torch.stack([one.ratio for one in effects]).amin(0),
            torch.stack([one.support for one in effects]).amin(0),
            torch.stack([one.p for one in effects]).amax(0),
            torch.stack([one.fires for one in effects]).any(0),
        )

    def discovered(self, level: float) -> Bool[Tensor, " d_sae"]:
        """The features that harm raises, of which a share of at most `level` is expected to be false.

        Benjamini & Hochberg (1995); valid for features that are independent or fire together.
        """
        from scipy.stats import false_discovery_control

        found = torch.zeros_like(self.fires)
        if self.fires.any():
            found[self.fires] = torch.from_numpy(false_discovery_control(self.p[self.fires].numpy()) <= level)
        return found


def saving(harmful: Float[Tensor, "pair features"], safe: Float[Tensor, "pair features"]) -> Float[Tensor, " features"]:
    """How many times as many prompts class means need to know a difference as well as these pairs do."""
    apart = harmful.double().var(0) + safe.double().var(0)
    return apart / (harmful.double() - safe.double()).var(0).clamp(min=1e-12)


def _signs(harmful: Float[Tensor, "pair d_sae"], safe: Float[Tensor, "pair d_sae"]) -> Float[Tensor, " d_sae"]:
    """Exact at any number of pairs, which a feature of one rare concept needs: it fires in few of them."""
    from scipy.stats import binom

    up, down = (harmful > safe).sum(0), (harmful < safe).sum(0)
    return torch.from_numpy(binom.sf((up - 1).numpy(), (up + down).numpy(), 0.5))


def _ranks(harmful: Float[Tensor, "prompt d_sae"], safe: Float[Tensor, "other d_sae"]) -> Float[Tensor, " d_sae"]:
    from scipy.stats import mannwhitneyu

    columns = zip(harmful.split(_COLUMNS, dim=1), safe.split(_COLUMNS, dim=1), strict=True)
    parts = [
        torch.from_numpy(
            mannwhitneyu(
                one.double().numpy(), other.double().numpy(), alternative="greater", method="asymptotic"
            ).pvalue
        )
        for one, other in columns
    ]
    return torch.cat(parts).nan_to_num(nan=1.0)  # all values equal: nothing to tell apart
