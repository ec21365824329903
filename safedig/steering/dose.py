"""One feature of an autoencoder, ablated and amplified by degrees, and the pictures that come of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..activations.stream import Prompts
from ..config import UsageError
from ..hooks import Context, attach
from ..pipelines import Drawing, draw
from ..progress import track
from ..sae.model import SparseAutoencoder
from ..sites import Site, resolve

STRENGTHS = (0.0, 1.0, 2.0, 4.0, 8.0)


@dataclass(frozen=True, eq=False)
class Doses:
    """The same prompts and seeds at every strength: 0, the feature is ablated; 1, the picture as it is."""

    site: Site
    feature: int
    rows: list[dict[str, Any]]
    strengths: list[float]
    images: Float[Tensor, "strength prompt 3 height width"]
    height: Float[Tensor, " prompt"]
    """The feature's highest code in the picture as it is, over tokens and σ; 0 where it never fires."""

    @property
    def changed(self) -> Float[Tensor, "strength prompt"]:
        """Mean absolute difference of the pixels, of 0…1, to the picture as it is."""
        plain = self.images[self.strengths.index(1.0)]
        return (self.images - plain).abs().flatten(2).mean(2)


@torch.no_grad()
def feature_dose(
    pipe: Any,
    sae: SparseAutoencoder,
    site: Site | str,
    feature: int,
    prompts: Prompts,
    strengths: Sequence[float] = STRENGTHS,
    *,
    drawing: Drawing | None = None,
    batch_size: int = 16,
) -> Doses:
    """Draw the prompts with a' = a + (s − 1) · z_j · w_j at the site in every step, at each strength s.

    w_j is the feature's row of the decoder, z_j its code in the token. A token in which it does not fire keeps its
    bits, and so do unconditional rows. Strength 1 is drawn whether it is asked for or not.
    """
    (where,) = resolve(pipe, site)
    rows = [dict(row) for row in prompts]
    wanted = sorted({float(strength) for strength in strengths} | {1.0})
    check_feature(sae, feature)
    _check(sae, where, rows, wanted)
    drawing, drawn, heights = drawing or Drawing.of(pipe), [], []
    for strength in track(wanted, f"Feature {feature} at {where}"):
        dose = _Dose(sae, feature, strength)
        with attach(pipe, {where: dose}):
            for _, images in draw(pipe, rows, drawing=drawing, batch_size=batch_size):
                drawn.append(images.cpu())
                if strength == 1:
                    heights.append(dose.highest())
    images = torch.cat(drawn).unflatten(0, (len(wanted), len(rows)))
    return Doses(where, feature, rows, wanted, images, torch.cat(heights))


def check_feature(sae: SparseAutoencoder, feature: int) -> None:
    """A `UsageError` where the autoencoder has no such feature."""
    if not 0 <= feature < sae.d_sae:
        raise UsageError(f"feature={feature}: this autoencoder has the features 0 to {sae.d_sae - 1}.")


def _check(sae: SparseAutoencoder, site: Site, rows: Sequence[Any], strengths: Sequence[float]) -> None:
    if sae.metadata.get("site", str(site)) != str(site):
        raise UsageError(f"The autoencoder was trained at '{sae.metadata['site']}' and not at '{site}': give its site.")
    if not rows:
        raise UsageError("There are no prompts to draw: give at least one row with a prompt and a seed.")
    if not all(torch.tensor(strengths).isfinite()):
        raise UsageError(f"strengths={list(strengths)}: expected numbers, 0 to ablate, above 1 to amplify.")


@dataclass
class _Dose:
    """What is put on the site while all prompts are drawn at one strength; remembers the codes of the batch."""

    sae: SparseAutoencoder
    feature: int
    strength: float
    codes: Float[Tensor, " image"] | None = None

    def __call__(self, x: Float[Tensor, "batch token d"], context: Context) -> Float[Tensor, "batch token d"] | None:
        conditional = [at for at, row in enumerate(context.rows) if row == "cond"]
        if not conditional:
            return None
        a = x[conditional].to(self.sae.decoder.W_dec)
        z = self.sae.encode(a)[..., self.feature]
        if self.strength == 1:
            highest = z.amax(1).cpu()
            self.codes = highest if self.codes is None else torch.maximum(self.codes, highest)
            return None
        moved = a + (self.strength - 1) * z[..., None] * self.sae.decoder.W_dec[self.feature]
        new = x.clone()
        new[conditional] = torch.where(z[..., None] > 0, moved, a).to(x)
        return new

    def highest(self) -> Float[Tensor, " image"]:
        """The highest code of each image of the batch that was just drawn, which is forgotten."""
        assert self.codes is not None
        codes, self.codes = self.codes, None
        return codes
