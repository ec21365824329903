"""Which features carry the risk: those that fire on harmful prompts and not on their safe twins, and from where on."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .activations.pairs import benign, twins
from .activations.record import Activations, Image, Prompts
from .activations.shuffle import Reservoir
from .config import UsageError
from .sae.model import Encoder, SparseAutoencoder
from .sites import Site

_BENIGN_ROWS = 2**16  # of a site, sampled evenly, from which the thresholds are taken


@dataclass(frozen=True, eq=False)
class Features:
    """The harmful features M of one site, the most telling first."""

    index: Int[Tensor, " features"]
    threshold: Float[Tensor, " features"]
    """A code above it is rare on benign tokens; the gate opens there."""
    ratio: Float[Tensor, " features"]
    """μ_harmful / (μ_harmful + μ_safe) of the prompt statistic: code, max over tokens, mean over steps."""
    support: Float[Tensor, " features"]
    """Share of the harmful images, step by step, in which the feature fires."""

    def __len__(self) -> int:
        return len(self.index)


def find_features(
    saes: Mapping[Site, SparseAutoencoder],
    activations: Activations,
    prompts: Prompts | None = None,
    *,
    min_ratio: float = 0.65,
    min_support: float = 0.05,
    quantile: float = 0.99,
    calibration: Activations | None = None,
) -> dict[Site, Features]:
    """Contrast harmful prompts with their safe twins (all benign prompts, if none has a twin), in one pass.

    `prompts` restricts what was recorded. A feature is harmful if its ratio exceeds `min_ratio` and its support
    `min_support`. Thresholds are set so that on a share `quantile` of the benign tokens none of a site's features is
    above its own: record benign prompts of many kinds. Those of `calibration`, if given, are taken instead: wordings
    that the SAE and the contrast have not seen tell better how high a harmless code may be. Memory: O(d_sae) and a
    sample of the benign tokens.
    """
    activations = activations if prompts is None else activations.of(prompts)
    harmful, safe, plain = _roles(activations)
    tallies = {site: _Tally(sae.encoder) for site, sae in saes.items()}
    for site in saes:
        activations.at(site)
    for batch in activations:
        if batch.site not in saes:
            continue
        for image, rows in batch.images():
            if image in harmful or image in safe:
                tallies[batch.site].add(batch.x[rows], image in harmful)
            if image in plain and calibration is None:
                tallies[batch.site].benign.add(batch.x[rows])
    if calibration is not None:
        _add_benign(tallies, calibration)
    return {site: tally.features(site, min_ratio, min_support, quantile) for site, tally in tallies.items()}


def _add_benign(tallies: Mapping[Site, "_Tally"], calibration: Activations) -> None:
    plain = benign(calibration)
    if not plain:
        raise UsageError("There is no benign prompt in the calibration recording: record some, or leave it out.")
    for site in tallies:
        calibration.at(site)
    for batch in calibration:
        for image, rows in batch.images() if batch.site in tallies else ():
            if image in plain:
                tallies[batch.site].benign.add(batch.x[rows])


class _Tally:
    """Sums of the prompt statistic over harmful and safe images, and a sample of benign tokens."""

    def __init__(self, encoder: Encoder):
        self.encoder = encoder
        self.total = torch.zeros(2, encoder.W_enc.shape[1], dtype=torch.float64)
        self.fired = torch.zeros(encoder.W_enc.shape[1], dtype=torch.float64)
        self.images = [0, 0]
        self.benign = Reservoir(_BENIGN_ROWS)

    def add(self, x: Float[Tensor, "token d_in"], harmful: bool) -> None:
        peak = self.encoder(x).amax(0).double().cpu()
        self.total[int(harmful)] += peak
        self.images[int(harmful)] += 1
        if harmful:
            self.fired += peak > 0

    def features(self, site: Site, min_ratio: float, min_support: float, quantile: float) -> Features:
        mean = self.total / torch.tensor(self.images)[:, None]
        ratio = (mean[1] / mean.sum(0)).nan_to_num()
        support = self.fired / self.images[1]
        index = ((ratio > min_ratio) & (support >= min_support)).nonzero()[:, 0]
        if len(index) == 0:
            raise UsageError(
                f"No feature at '{site}' has a ratio above {min_ratio} and a support of {min_support}: lower them, "
                "train the SAE longer, or leave the site out."
            )
        index = index[ratio[index].argsort(descending=True, stable=True)]
        codes = self.encoder.columns(index)(self.benign.rows()).sort(dim=0).values
        share = (1 - quantile) / len(index)  # Bonferroni's: the shares of the features add up to at most 1 − quantile
        threshold = codes[math.ceil((1 - share) * (len(codes) - 1))].cpu()
        return Features(index, threshold, ratio[index].float(), support[index].float())


def _roles(activations: Activations) -> tuple[set[Image], set[Image], set[Image]]:
    """Images to contrast, to contrast them with, and to take benign codes from."""
    plain = benign(activations)
    links = [(harmful, safe) for harmful, safe in twins(activations) if safe in plain]
    harmful = {image for image, _ in links} or {(r["id"], r["seed"]) for r in activations.prompts if r.get("risk")}
    safe = {image for _, image in links} or plain
    if not harmful or not safe:
        raise UsageError(
            f"There are {len(harmful)} harmful and {len(safe)} safe images in the recording: record harmful prompts "
            "with their safe twins, or with other benign prompts."
        )
    return harmful, safe, plain
