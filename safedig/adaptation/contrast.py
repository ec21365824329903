"""The decoder that Repel reads: rows w_j for the harmful features M such that Σ_M z_j·w_j predicts what harm adds.

Δ = h(harmful) − h(safe twin), token by token (text is aligned, word for word), and 0 on benign tokens. Least squares of
|M| unknowns, in closed form.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from ..activations.pairs import Pair, Pairing, benign
from ..activations.record import Activations, Prompts
from ..config import UsageError
from ..features import Features
from ..features.heights import columns
from ..sae.model import Decoder, SparseAutoencoder
from ..sites import Site


def fit_contrast(
    saes: Mapping[Site, SparseAutoencoder],
    activations: Activations,
    features: Mapping[Site, Features],
    prompts: Prompts | None = None,
    *,
    replay: Activations | None = None,
    share: float = 0.2,
    ridge: float = 1e-2,
) -> dict[Site, SparseAutoencoder]:
    """The same encoders with contrast decoders: rows outside M and `b_dec` are 0. One pass, solved in closed form.

    `ridge` is in units of the mean square of a code, so that its effect does not depend on scale or sample size. The
    rows of `replay`, recorded in another domain, have a `share` of the weight. Cost O(rows · |M| · d_in).
    """
    activations = activations if prompts is None else activations.of(prompts)
    target = _gather(saes, activations, features)
    source = {} if replay is None or share == 0 else _gather(saes, replay, features)
    return {
        site: sums.solved(site, saes[site], features[site], ridge, source.get(site), share)
        for site, sums in target.items()
    }


def _gather(
    saes: Mapping[Site, SparseAutoencoder], activations: Activations, features: Mapping[Site, Features]
) -> dict[Site, "_Sums"]:
    sums = {site: _Sums(saes[site], found) for site, found in features.items()}
    for site in sums:
        activations.at(site)
    harmless, pairing = benign(activations.prompts), Pairing(activations)
    for batch in activations:
        if batch.site not in sums:
            continue
        for image, rows in batch.images():
            if image in harmless:
                sums[batch.site].add(batch.x[rows], None)
        for pair in map(Pair.aligned, pairing.add(batch)):
            sums[batch.site].add(pair.harmful, pair.harmful.double() - pair.safe.double())
    return sums


class _Sums:
    """ZᵀZ, ZᵀΔ and ‖Δ‖² over tokens, in float64; W = (ZᵀZ + λI)⁻¹ ZᵀΔ."""

    def __init__(self, sae: SparseAutoencoder, features: Features):
        self.encoder = columns(sae, features.index)
        self.gram = torch.zeros(len(features), len(features), dtype=torch.float64)
        self.moment = torch.zeros(len(features), sae.d_in, dtype=torch.float64)
        self.square = 0.0
        self.fired = torch.zeros(len(features), dtype=torch.bool)
        self.tokens = self.pairs = 0

    def add(self, x: Float[Tensor, "token d_in"], delta: Float[Tensor, "token d_in"] | None) -> None:
        z = self.encoder(x).cpu().double()
        self.gram += z.T @ z
        self.tokens += len(z)
        if delta is not None:
            self.moment += z.T @ delta.cpu()
            self.square += delta.square().sum().item()
            self.fired |= (z > 0).any(0)
            self.pairs += 1

    def with_replay(self, source: "_Sums | None", share: float) -> tuple[Tensor, Tensor, float]:
        """The sums of both domains; those of the source weighted to its share of all tokens."""
        weight = 0.0 if source is None or source.tokens == 0 else share / (1 - share) * self.tokens / source.tokens
        if source is None or weight == 0:
            return self.gram, self.moment, self.square
        return (
            self.gram + weight * source.gram,
            self.moment + weight * source.moment,
            self.square + weight * source.square,
        )

    def solved(
        self,
        site: Site,
        sae: SparseAutoencoder,
        features: Features,
        ridge: float,
        source: "_Sums | None",
        share: float,
    ) -> SparseAutoencoder:
        if self.pairs == 0:
            raise UsageError(f"At '{site}' no harmful prompt was recorded with its safe twin: record both.")
        gram, moment, square = self.with_replay(source, share)
        penalty = ridge * gram.trace() / len(gram)
        if penalty <= 0:
            raise UsageError(f"At '{site}' no harmful feature fires, or ridge={ridge} is not positive: find them anew.")
        rows = torch.linalg.solve(gram + penalty * torch.eye(len(gram), dtype=torch.float64), moment)
        W_dec = torch.zeros_like(sae.decoder.W_dec)
        W_dec[features.index] = rows.to(W_dec)
        before = sae.decoder.W_dec[features.index].cpu().double()
        report = {
            "unexplained": {
                name: _error(W, gram, moment, square) for name, W in (("zero_shot", before), ("adapted", rows))
            },
            "pairs": {"target": self.pairs} | ({} if source is None else {"source": source.pairs}),
            "silent_harmful": features.index[~self.fired].tolist(),
            "codes_equal": True,
        }
        decoder = Decoder(W_dec, torch.zeros_like(sae.decoder.b_dec), sae.decoder.centre)
        return sae.with_decoder(decoder, objective="contrast", ridge=ridge, pairs=self.pairs, adaptation=report)


def _error(
    W: Float[Tensor, "m d_in"], gram: Float[Tensor, "m m"], moment: Float[Tensor, "m d_in"], square: float
) -> float:
    """The share of ‖Δ‖² that Σ z_j·w_j leaves; what it adds to benign tokens counts against it."""
    left = square - 2 * (W * moment).sum().item() + (W * (gram @ W)).sum().item()
    return left / square if square > 0 else float("nan")
