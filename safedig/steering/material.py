"""What edits at one site are made from: decoder rows of the harmful features, prototypes, or the whole dictionary."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..config import UsageError
from ..features import Counterparts, Dose, Features
from ..features.heights import columns
from ..sae.checkpoint import encoder_sha256
from ..sae.model import SparseAutoencoder, ThresholdEncoder
from ..sites import Site
from .bank import Bank
from .tensors import equal


@dataclass(frozen=True, eq=False)
class Whole:
    """All d_sae features: what the published formula of Blend needs, at full cost a token."""

    encoder: ThresholdEncoder
    W_dec: Float[Tensor, "d_sae d_in"]


@dataclass(frozen=True, eq=False)
class Material:
    """Beside the directions there is only what the site's edits read."""

    directions: Float[Tensor, "features d_in"]
    """Rows of the contrast decoder: Σ_M z_j·w_j is what harm has added."""
    reconstruction: Float[Tensor, "features d_in"] | None = None
    """Rows of the decoder that reconstructs."""
    bias: Float[Tensor, " d_in"] | None = None
    """Its b_dec."""
    bank: Bank | None = None
    counterparts: Counterparts | None = None
    """Known tokens, and what harm has added to each."""
    whole: Whole | None = None
    dose: Dose | None = None
    """What the gate reads; the sum of the codes unless given."""

    @classmethod
    def of(
        cls,
        site: Site,
        sae: SparseAutoencoder,
        features: Features,
        needs: Iterable[str],
        reconstruction: SparseAutoencoder | None = None,
        counterparts: Counterparts | None = None,
    ) -> "Material":
        """`needs` are names of these fields, "values" for prototypes with the activations they stand for, or "radius"
        for counterparts that tell unknown tokens."""
        directions, wanted = sae.decoder.W_dec[features.index], set(needs)
        known = counterparts if "counterparts" in wanted else None
        if "counterparts" in wanted and known is None:
            raise UsageError(
                f"Replace looks up counterparts at '{site}' and there are none: give those of fit_counterparts."
            )
        if "radius" in wanted and (known is None or known.radius is None):
            raise UsageError(
                f"Replace is to repel unknown tokens at '{site}', and the counterparts there take all for known: give "
                "fit_counterparts benign prompts as quiet=."
            )
        if wanted <= {"counterparts", "radius"}:
            return cls(directions, counterparts=known, dose=features.dose)
        other = _reconstructing(site, sae, reconstruction)
        bank = None
        if wanted & {"bank", "values"}:
            if features.prototypes is None or len(features.prototypes) == 0:
                raise UsageError(
                    f"The features of '{site}' have no safe prototypes, which Blend and Replace need: find them with "
                    "prototypes=256."
                )
            bank = Bank.of(other, features, values="values" in wanted)
        everything = torch.arange(other.d_sae, device=features.index.device)
        return cls(
            directions,
            other.decoder.W_dec[features.index] if "reconstruction" in wanted else None,
            other.decoder.b_dec if "bias" in wanted else None,
            bank,
            known,
            Whole(columns(other, everything), other.decoder.W_dec) if "whole" in wanted else None,
            features.dose,
        )


def _reconstructing(site: Site, sae: SparseAutoencoder, given: SparseAutoencoder | None) -> SparseAutoencoder:
    """The autoencoder that reconstructs, proved to read the same codes."""
    if given is None:
        if sae.metadata.get("objective") == "contrast":
            raise UsageError(
                f"Blend, Replace and the paper's forms read a decoder that reconstructs, and that of '{site}' was "
                "fitted to the contrast: give the SAEs of train or adapt as reconstruction=."
            )
        return sae
    same = given.encoder is sae.encoder or encoder_sha256(given.encoder) == encoder_sha256(sae.encoder)
    if not same or not equal(given.decoder.centre, sae.decoder.centre):
        why = "was adapted with align_mean=True" if same else "has another encoder"
        raise UsageError(
            f"The SAE that reconstructs at '{site}' {why}, and would read other codes: adapt both decoders from one "
            "SAE, with align_mean=False."
        )
    return given
