"""What an autoencoder leaves out, as the image sees it: the error of the velocity with its reconstruction spliced in.

Every prompt is drawn three times side by side on the same latents: as it is, with the reconstruction at the site, and
with the site's mean. The two that are edited follow the first, so that all three are compared at the same x_σ. The mean
is that of all prompts at that step, taken beforehand, for conditional and unconditional rows apart.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from ..activations.record import Prompts
from ..config import UsageError
from ..hooks import Context, attach
from ..pipelines import Drawing, draw, fingerprint
from ..progress import track
from ..shadow import listen
from ..sites import Site, d_in, places
from .model import SparseAutoencoder

VELOCITY = Site.parse("velocity")
_VARIANTS = 3  # as it is, reconstructed, averaged away
_NOTHING = 1e-12  # of ‖v‖²: what rounding in float32 alone makes of an error


def loss_recovered(
    pipe: Any,
    saes: Mapping[Site, SparseAutoencoder],
    prompts: Prompts,
    *,
    drawing: Drawing | None = None,
    batch_size: int = 8,
) -> dict[Site, dict[str, Any]]:
    """For each site alone: `velocity_error` = ‖v' − v‖² / ‖v‖², and `recovered`, the share of the error that replacing
    the site by its mean over all prompts would make and the reconstruction does not; 1 is perfect, and of one prompt
    that is its own mean there is no share. Under `sigmas` for each σ. The size of the batches does not matter.

    Costs three drawings of each prompt a site, and one for all sites. The pipeline is afterwards as it was.
    """
    rows = [dict(row) for row in prompts]
    if not rows:
        raise UsageError("There are no prompts to draw: give at least one row with an id, a prompt and a seed.")
    _check(pipe, saes)
    drawing, found = drawing or Drawing.of(pipe), {}
    parts = [rows[at : at + batch_size] for at in range(0, len(rows), batch_size)]
    means = _means(pipe, saes, parts, drawing)
    for site, sae in saes.items():
        splicing = _Splicing(pipe, site, sae, means[site])
        for part in track(parts, f"Splicing in the SAE at {site}"):
            splicing.draw(part, drawing)
        found[site] = splicing.result()
    return found


@dataclass
class _Mean:
    """Of what passes one site: at each step, of each kind of row, over all tokens of all images."""

    sums: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    counts: dict[tuple[int, str], int] = field(default_factory=dict)

    def add(self, x: Float[Tensor, "batch token d"], context: Context) -> None:
        for kind in dict.fromkeys(context.rows):
            key, rows = (context.step, kind), x[[at for at, row in enumerate(context.rows) if row == kind]]
            self.sums[key] = self.sums.get(key, 0) + rows.double().sum((0, 1)).cpu()
            self.counts[key] = self.counts.get(key, 0) + rows.shape[0] * rows.shape[1]

    def of(self, context: Context) -> Float[Tensor, "batch 1 d"]:
        keys = [(context.step, kind) for kind in context.rows]
        return torch.stack([self.sums[key] / self.counts[key] for key in keys])[:, None]


def _means(
    pipe: Any, sites: Iterable[Site], parts: Sequence[list[dict[str, Any]]], drawing: Drawing
) -> dict[Site, _Mean]:
    """One pass over the images as they are, for all sites."""
    means = {site: _Mean() for site in sites}
    for part in track(parts, "Averaging what passes the sites"):
        with attach(pipe, {site: mean.add for site, mean in means.items()}):
            list(draw(pipe, part, drawing=drawing, batch_size=len(part), output_type="latent"))
    return means


@dataclass
class _Splicing:
    pipe: Any
    site: Site
    sae: SparseAutoencoder
    mean: _Mean
    errors: dict[float, Tensor] = field(default_factory=dict)
    """At each σ the sums of ‖v‖², ‖v' − v‖² of the reconstruction, and of the mean."""
    images: int = 0

    def draw(self, part: list[dict[str, Any]], drawing: Drawing) -> None:
        self.images = len(part)
        with ExitStack() as stack:
            functions = {self.site: self.splice, VELOCITY: self.compare}
            if self.site == VELOCITY:
                functions = {VELOCITY: lambda x, context: self.compare(self.splice(x, context), context)}
            stack.enter_context(attach(self.pipe, functions))
            stack.enter_context(listen(self.pipe.scheduler, "step", after=self.follow))
            rows = part * _VARIANTS
            list(draw(self.pipe, rows, drawing=drawing, batch_size=len(rows), output_type="latent"))

    def splice(self, x: Float[Tensor, "batch token d"], context: Context) -> Float[Tensor, "batch token d"]:
        variant = self._variants(context).to(x.device)
        if self.sae.decoder.W_dec.device != x.device:
            self.sae = self.sae.to(x.device)
        made = self.sae.decode(self.sae.encode(x)).to(x)
        mean = self.mean.of(context).to(x).expand_as(x)
        kinds = rearrange(variant, "batch -> batch 1 1")
        return torch.where(kinds == 1, made, torch.where(kinds == 2, mean, x))

    def compare(self, x: Float[Tensor, "batch token d"], context: Context) -> None:
        variant = self._variants(context).to(x.device)
        v = x.double()
        exact = v[variant == 0]
        sums = [exact, v[variant == 1] - exact, v[variant == 2] - exact]
        here = torch.stack([part.square().sum() for part in sums]).cpu()
        sigma = round(context.sigma, 3)
        self.errors[sigma] = self.errors.get(sigma, torch.zeros(_VARIANTS, dtype=torch.float64)) + here

    def follow(self, result: Any) -> None:
        """The step is done: all variants go on from where the unedited one is."""
        for variant in range(1, _VARIANTS):
            result[0][variant * self.images : (variant + 1) * self.images].copy_(result[0][: self.images])

    def result(self) -> dict[str, Any]:
        by_sigma = {f"{sigma:.3f}": _shares(sums) for sigma, sums in sorted(self.errors.items(), reverse=True)}
        return _shares(torch.stack(list(self.errors.values())).sum(0)) | {"sigmas": by_sigma}

    def _variants(self, context: Context) -> Tensor:
        """Which of the three each row is of; rows of one kind, conditional or not, come in the order of the images."""
        at = [context.rows[:row].count(context.rows[row]) for row in range(len(context.rows))]
        return torch.tensor(at) // self.images


def _shares(sums: Float[Tensor, " variants"]) -> dict[str, float]:
    exact, made, mean = sums.tolist()
    return {
        "velocity_error": made / exact if exact else float("nan"),
        "recovered": 1 - made / mean if mean > _NOTHING * exact else float("nan"),
    }


def _check(pipe: Any, saes: Mapping[Site, SparseAutoencoder]) -> None:
    there, model = {place.site for place in places(pipe)}, fingerprint(pipe)
    for site, sae in saes.items():
        known = sae.metadata.get("model", model)
        if known != model:
            raise UsageError(
                f"The SAE at '{site}' was trained on the model {known[:12]}… and the pipeline holds {model[:12]}…: "
                "load the pipeline that was recorded."
            )
        width = d_in(pipe, site) if site in there else sae.d_in
        if width != sae.d_in:
            raise UsageError(f"The SAE at '{site}' has d_in={sae.d_in} and passes there d_in={width}: give it its own.")
