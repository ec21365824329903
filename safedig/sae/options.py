"""How an autoencoder is trained. An option that is None is left out of a recipe's TOML, and so out of its hash."""

from dataclasses import dataclass
from typing import Literal

from ..config import UsageError, check_numbers

Architecture = Literal["batchtopk", "topk", "jumprelu", "matryoshka"]
EncoderDtype = Literal["bfloat16", "int8"]


@dataclass(frozen=True)
class Limits:
    """What training does about values far out; what is measured, encoded and steered is never touched.

    Units are the site's root mean square about its mean. By Chebyshev's inequality a limit of c can concern no more
    than 1 / c² of what there is, so that a kind of token that makes up a hundredth of the rows is never lost.
    """

    max_norm: float = 10.0
    """Rows whose distance from the mean exceeds this many root mean squares are not trained on."""
    clip: float = 50.0
    """Values further from their mean than this are brought back to it."""

    def __post_init__(self) -> None:
        check_numbers(self, "sae.limits.", ("max_norm", "clip"), above=True)


@dataclass(frozen=True)
class SAEOptions:
    """How to train; the same for every site of one call."""

    expansion: int = 8
    """d_sae / d_in."""
    k: int = 20
    """Active features a row, on average; in every row for "topk"."""
    steps: int = 1000
    batch_size: int = 512
    lr: float = 1e-3
    """Adam's step size; falls linearly to 0 over the last fifth."""
    aux: float = 1 / 32
    """Weight of the loss that revives features which have not fired for a tenth of the run."""
    seed: int = 0
    buffer: int = 2**18
    """Rows of a site held in memory where there is no store: a uniform sample of the stream, d_in · 4 bytes each."""
    architecture: Architecture | None = None
    """BatchTopK unless given; "matryoshka" is BatchTopK with nested widths."""
    encoder_dtype: EncoderDtype | None = None
    """In what active codes are looked for on a CPU before they are scored in float32, which does both unless given.

    "bfloat16" pays on a processor with matrix units (AMX), "int8" on one with dot products of 8 bits (VNNI).
    """
    warm_up: int | None = None
    """Steps over which the step size rises to `lr`; none unless given."""
    limits: Limits | None = None
    """`Limits()` unless given."""

    def __post_init__(self) -> None:
        check_numbers(self, "sae.", ("expansion", "k", "steps", "batch_size", "buffer"), least=1)
        check_numbers(self, "sae.", ("aux", "seed", "warm_up"))
        check_numbers(self, "sae.", ("lr",), above=True)

    def d_sae(self, d_in: int) -> int:
        """The number of features at a site of this width; a `UsageError` where k of them cannot be active."""
        d_sae = self.expansion * d_in
        if not 0 < self.k <= d_sae:
            raise UsageError(f"k={self.k} of {d_sae} features: lower k or raise expansion.")
        return d_sae

    def rate(self, step: int) -> float:
        """The step size in units of `lr` at a step, counted from 0: up over `warm_up`, down over the last fifth."""
        rising = min(1.0, (step + 1) / (self.warm_up or 1))
        decay = self.steps // 5
        falling = min(1.0, 1 - (step - (self.steps - decay)) / decay) if decay else 1.0
        return rising * max(falling, 0.0)
