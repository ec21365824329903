"""Give an encoder a new decoder; the encoder is the same object and cannot change.

`fit_contrast` is the objective that Repel reads: rows w_j for the harmful features M such that Σ_M z_j·w_j predicts
Δ = h(harmful) − h(safe twin), token by token, and 0 on benign tokens.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from .activations.pairs import Pairing, benign
from .activations.record import Activations, Prompts
from .config import UsageError
from .features import Features
from .sae.model import Decoder, SparseAutoencoder
from .sites import Site


def fit_contrast(
    saes: Mapping[Site, SparseAutoencoder],
    activations: Activations,
    features: Mapping[Site, Features],
    prompts: Prompts | None = None,
    *,
    ridge: float = 1e-2,
) -> dict[Site, SparseAutoencoder]:
    """The same encoders with contrast decoders: rows outside M and `b_dec` are 0. One pass, solved in closed form.

    `ridge` is in units of the mean square of a code, so that its effect does not depend on scale or sample size.
    """
    activations = activations if prompts is None else activations.of(prompts)
    fits = {site: _Ridge(saes[site], found) for site, found in features.items()}
    for site in fits:
        activations.at(site)
    harmless, pairing = benign(activations), Pairing(activations)
    for batch in activations:
        if batch.site not in fits:
            continue
        for image, rows in batch.images():
            if image in harmless:
                fits[batch.site].add(batch.x[rows], None)
        for pair in pairing.add(batch):
            fits[batch.site].add(pair.harmful, pair.harmful.double() - pair.safe.double())
    return {site: fit.solve(site, ridge) for site, fit in fits.items()}


class _Ridge:
    """Sums ZᵀZ and ZᵀΔ over tokens, in float64; W = (ZᵀZ + λI)⁻¹ ZᵀΔ."""

    def __init__(self, sae: SparseAutoencoder, features: Features):
        self.sae, self.index = sae, features.index
        self.encoder = sae.encoder.columns(features.index)
        self.gram = torch.zeros(len(features), len(features), dtype=torch.float64)
        self.moment = torch.zeros(len(features), sae.d_in, dtype=torch.float64)
        self.pairs = 0

    def add(self, x: Float[Tensor, "token d_in"], delta: Float[Tensor, "token d_in"] | None) -> None:
        z = self.encoder(x).cpu().double()
        self.gram += z.T @ z
        if delta is not None:
            self.moment += z.T @ delta.cpu()
            self.pairs += 1

    def solve(self, site: Site, ridge: float) -> SparseAutoencoder:
        if self.pairs == 0:
            raise UsageError(f"At '{site}' no harmful prompt was recorded with its safe twin: record both.")
        penalty = ridge * self.gram.trace() / len(self.gram)
        if penalty <= 0:
            raise UsageError(f"At '{site}' no harmful feature fires, or ridge={ridge} is not positive: find them anew.")
        rows = torch.linalg.solve(self.gram + penalty * torch.eye(len(self.gram), dtype=torch.float64), self.moment)
        W_dec = torch.zeros_like(self.sae.decoder.W_dec)
        W_dec[self.index] = rows.to(W_dec)
        decoder = Decoder(W_dec, torch.zeros_like(self.sae.decoder.b_dec))
        return self.sae.with_decoder(decoder, objective="contrast", ridge=ridge, pairs=self.pairs)
