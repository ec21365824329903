"""`adapt`: the SAEs of a source domain beside decoders of a target domain. The encoders are the same objects."""

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..activations.record import Activations, Batch
from ..config import UsageError, did_you_mean
from ..features import Features
from ..sae.held_out import split
from ..sae.model import SparseAutoencoder
from ..sites import Site
from .contrast import fit_contrast
from .reconstruction import Domain, Refit, Ridge

Objective = Literal["reconstruction", "contrast"]
OBJECTIVES: tuple[Objective, ...] = ("reconstruction", "contrast")
_HELD_OUT = 1 / 8  # of the prompts: measured on, not fitted to


def adapt(
    saes: Mapping[Site, SparseAutoencoder],
    target: Activations,
    features: Mapping[Site, Features] | None = None,
    *,
    replay: Activations | None = None,
    objective: str = "reconstruction",
    share: float = 0.2,
    pseudo_count: float = 10.0,
    least_gain: float = 0.01,
    align_mean: bool = False,
    fine_tuned: Mapping[Site, SparseAutoencoder] | None = None,
) -> dict[Site, SparseAutoencoder]:
    """The same encoders with decoders refitted to the target; `metadata["adaptation"]` reports what that changed.

    "reconstruction", which Blend reads, refits the whole decoder in one pass by ridge regression towards the source's:
    `replay` is a recording of the source, whose rows have a `share` of the weight, and each row of the source's decoder
    weighs as much as `pseudo_count` rows in which its feature fires. "contrast", which Repel reads, refits the rows of
    `features` to what harm adds (see `fit_contrast`) and sets the others to 0.

    A decoder moves for the sake of the domain alone: with `replay`, it stays what it was unless held-out prompts of
    the target gain at least `least_gain` of their FVU, and as much beyond what the source's gain from the very same
    decoder. What both gain is unfinished training. Without `replay` the two cannot be told apart, and the decoder
    always moves. Half of the held-out rows are measured on; by the others conjugate gradients stop (solve.py).

    With `align_mean`, which needs `replay` and another pass, the encoder reads the target about the source's mean: the
    decoder then holds a `centre`, and the codes are no longer those of the source. SAEs of `fine_tune` are measured
    beside, if they are given. Cost: O(rows · d_in · d_sae) to encode, all else as in statistics.py and solve.py.
    """
    if objective not in OBJECTIVES:
        raise UsageError(f"objective='{objective}'. {did_you_mean(str(objective), OBJECTIVES)}")
    ridge = Ridge(share, pseudo_count, least_gain)
    for site in saes:
        for activations in (target, replay):
            if activations is not None:
                activations.at(site)
                _check_model(site, saes[site], activations)
    if objective == "contrast":
        if features is None:
            raise UsageError("The contrast is fitted to harmful features: give those of find_features.")
        chosen = {site: features[site] for site in saes if site in features}
        return fit_contrast(saes, target, chosen, replay=replay, share=share)
    if align_mean and replay is None:
        raise UsageError(
            "align_mean=True moves the target's mean to the source's: give replay=, a recording of the source."
        )
    fits = _fits(saes, target, replay, features or {}, ridge, fine_tuned or {}, align_mean)
    for name, activations in (("target", target), ("source", replay)):
        for batch in _passing(activations, list(saes)):
            domain = getattr(fits[batch.site], name)
            domain.add(batch)
    return {site: fits[site].finished() for site in saes}


def _fits(
    saes: Mapping[Site, SparseAutoencoder],
    target: Activations,
    replay: Activations | None,
    features: Mapping[Site, Features],
    ridge: Ridge,
    fine_tuned: Mapping[Site, SparseAutoencoder],
    align_mean: bool,
) -> dict[Site, Refit]:
    aside, old = _held_out(target), set() if replay is None else _held_out(replay)
    centres: dict[Site, Tensor] = {}
    if align_mean and replay is not None:
        here, there = _means(target, list(saes)), _means(replay, list(saes))
        centres = {site: (here[site] - there[site]).to(sae.decoder.b_dec) for site, sae in saes.items()}
    return {
        site: Refit(
            sae,
            Domain(sae, aside, centres.get(site)),
            None if replay is None else Domain(sae, old),
            ridge,
            features.get(site),
            fine_tuned.get(site),
        )
        for site, sae in saes.items()
    }


def _check_model(site: Site, sae: SparseAutoencoder, activations: Activations) -> None:
    trained = sae.metadata.get("model", activations.model)
    if trained != activations.model:
        raise UsageError(
            f"The SAE of '{site}' was trained on the model {trained[:12]}… and the recording is of "
            f"{activations.model[:12]}…: record the model that it was trained on."
        )


def _held_out(activations: Activations) -> set[str]:
    """Ids of prompts to measure on; none where there is but one prompt, which is then both fitted and measured."""
    if len({str(row.get("twin") or row["id"]) for row in activations.prompts}) < 2:
        return set()
    return {row["id"] for row in split(activations, _HELD_OUT)[1].prompts}


def _passing(activations: Activations | None, sites: list[Site]) -> Iterator[Batch]:
    """What passes these sites; a store is read one site after the other, a pipeline runs once for all."""
    if activations is None:
        return
    for stream in [activations.at(site) for site in sites] if activations.store else [activations]:
        yield from (batch for batch in stream if batch.site in sites)


def _means(activations: Activations, sites: list[Site]) -> dict[Site, Float[Tensor, " d_in"]]:
    totals: dict[Site, Tensor] = {}
    rows = dict.fromkeys(sites, 0)
    for batch in _passing(activations, sites):
        x = batch.x[batch.x.isfinite().all(1)]
        total = x.sum(0, dtype=torch.float64).cpu()
        totals[batch.site] = totals[batch.site] + total if batch.site in totals else total
        rows[batch.site] += len(x)
    for site in sites:
        if rows[site] == 0:
            raise UsageError(f"Nothing passed '{site}': the stream is empty. Record at least one prompt there.")
    return {site: totals[site] / rows[site] for site in sites}
