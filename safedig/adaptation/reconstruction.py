"""The decoder that reconstructs the target's activations, and what is said about it. One pass, one site."""

import time
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..activations.record import Batch
from ..activations.shuffle import Reservoir
from ..config import UsageError
from ..features import Features
from ..progress import say
from ..sae.model import Decoder, SparseAutoencoder
from .codes import encoded, joined
from .report import moved, quality
from .solve import FEWEST, HeldOut, Mixture, Solution, solve
from .statistics import Statistics

_MEASURED = 4096  # rows of a domain that are held in memory to measure on
_HALF = 2  # rows at least, for one alone has no variance


@dataclass(frozen=True)
class Ridge:
    """How strongly the source holds the new decoder."""

    share: float = 0.2
    """Weight of the source's rows among all rows."""
    pseudo_count: float = 10.0
    """Each feature's source row weighs as much as this many rows in which the feature fires."""
    least_gain: float = 0.01
    """The share of FVU that the target must gain beyond what the source gains from the very same decoder."""

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise UsageError(f"share={self.share}: give the source a share of the weight from 0 to below 1.")
        if not self.pseudo_count >= 0:
            raise UsageError(f"pseudo_count={self.pseudo_count}: give a number of rows from 0 on.")


class Domain:
    """The rows of one domain at one site: sums over those that are fitted, a sample of those that are held out."""

    def __init__(self, sae: SparseAutoencoder, held_out: set[str], centre: Float[Tensor, " d_in"] | None = None):
        self.sae, self.held_out = sae, held_out
        self.statistics = Statistics(sae.decoder.b_dec.float(), sae.d_sae)
        self.centre = centre
        self.skipped = 0
        self._measured = Reservoir(_MEASURED)

    def add(self, batch: Batch) -> None:
        if batch.x.shape[1] != self.sae.d_in:
            raise UsageError(
                f"'{batch.site}' was recorded with d_in={batch.x.shape[1]}, its SAE reads d_in={self.sae.d_in}: "
                "give the SAE of the model and site that was recorded."
            )
        fine = batch.x.isfinite().all(1)
        aside = torch.tensor([name in self.held_out for name in batch.prompt_ids])
        self.skipped += int((~fine).sum())
        if not self.held_out or aside.any():
            self._measured.add(batch.x[fine & aside if self.held_out else fine].float())
        x = batch.x[fine & ~aside]
        for part, z in encoded(self.sae, x if self.centre is None else x.float() - self.centre.to(x.device)):
            self.statistics.update(part, z)

    def measured(self) -> Float[Tensor, "rows d_in"]:
        """Half of the rows that are held out; all, where nothing could be or too few are for halves."""
        return self._rows(1)

    def stopping(self) -> HeldOut | None:
        """The other half, as the encoder reads them."""
        if not self.held_out:
            return None
        x = self._rows(0)
        parts = list(encoded(self.sae, x if self.centre is None else x - self.centre))
        return HeldOut(torch.cat([part for part, _ in parts]), joined([z for _, z in parts])) if parts else None

    def _rows(self, half: int) -> Float[Tensor, "rows d_in"]:
        x = self._measured.rows()
        return x[half::2] if self.held_out and len(x) >= 2 * _HALF else x

    def check(self, name: str) -> None:
        """Before anything is solved: there must be rows, and hardly any that are no numbers."""
        rows = self.statistics.rows
        if rows == 0:
            raise UsageError(f"The {name} of {self.sae.metadata.get('site', 'a site')} has no rows: record some first.")
        if self.skipped > 0.01 * rows:
            raise UsageError(
                f"{self.skipped} of the {name}'s {rows + self.skipped} rows hold NaN or infinity, more than 1 %: load "
                "the model in bfloat16 or float32 and record anew."
            )


@dataclass
class Refit:
    """One site's SAE and its two domains, from which the new decoder is solved."""

    sae: SparseAutoencoder
    target: Domain
    source: Domain | None
    ridge: Ridge
    features: Features | None = None
    fine_tuned: SparseAutoencoder | None = None
    started: float = field(default_factory=time.perf_counter)

    def finished(self) -> SparseAutoencoder:
        """The SAE beside its new decoder; beside its own, where the target gains no more than the source does."""
        self.target.check("target")
        if self.source is not None:
            self.source.check("source")
        source = None if self.source is None else self.source.statistics
        mixture = Mixture(self.target.statistics, source, self.ridge.share)
        solution = solve(mixture, self.sae.decoder, self.ridge.pseudo_count, self.target.stopping())
        adapted = _uncentred(solution.decoder, self.target.centre)
        bias_only = _uncentred(
            replace(self.sae.decoder, b_dec=mixture.bias(self.sae.decoder.W_dec)), self.target.centre
        )
        tables = self._tables({"zero_shot": self.sae.decoder, "bias_only": bias_only, "adapted": adapted})
        gains = {name: _gain(table) for name, table in tables.items()}
        beyond = gains["target"] - gains.get("source", 0.0)
        keeps = self.source is not None and not min(beyond, gains["target"]) >= self.ridge.least_gain  # nor if NaN
        if keeps:
            say(
                f"{self.sae.metadata.get('site', 'A site')}: the source's decoder stays, as the target gains "
                f"{gains['target']:.2%} of FVU from another and the source {gains['source']:.2%}."
            )
        report = {"gain": gains, "kept": keeps, "domains": tables} | self._facts(solution, adapted)
        decoder = self.sae.decoder if keeps else adapted
        return self.sae.with_decoder(decoder, objective="reconstruction", adaptation=report)

    def _tables(self, decoders: dict[str, Decoder]) -> dict[str, Any]:
        """Domain by domain, the quality beside each decoder; the fine-tuned SAE has an encoder of its own."""
        tables = {}
        for name, domain in (("target", self.target), ("source", self.source)):
            if domain is not None:
                x = domain.measured()
                tables[name] = quality(self.sae, decoders, x)
                if self.fine_tuned is not None:
                    tables[name] |= quality(self.fine_tuned, {"fine_tuned": self.fine_tuned.decoder}, x)
        return tables

    def _facts(self, solution: Solution, adapted: Decoder) -> dict[str, Any]:
        count = self.target.statistics.count
        silent, centre = count == 0, self.target.centre
        facts = {
            "rows": {"target": self.target.statistics.rows},
            "skipped_rows": self.target.skipped,
            "held_out": bool(self.target.held_out),
            "share": self.ridge.share,
            "pseudo_count": self.ridge.pseudo_count,
            "solver": solution.solver,
            "iterations": solution.iterations,
            "movement": moved(self.sae.decoder, adapted),
            "silent": silent.nonzero()[:, 0].tolist(),
            "rare": int(((count > 0) & (count < FEWEST)).sum()),
            "codes_equal": centre is None,
            "centre_norm": 0.0 if centre is None else centre.norm().item(),
            "seconds": time.perf_counter() - self.started,
        }
        if self.source is not None:
            facts["rows"]["source"] = self.source.statistics.rows
        if self.features is not None:
            facts["silent_harmful"] = _among(self.features, silent)
        return facts


def _among(features: Features, silent: Bool[Tensor, " d_sae"]) -> list[int]:
    return features.index[silent.cpu()[features.index]].tolist()


def _uncentred(decoder: Decoder, centre: Float[Tensor, " d_in"] | None) -> Decoder:
    """From rows whose mean was aligned back to raw ones."""
    if centre is None:
        return decoder
    return replace(decoder, b_dec=decoder.b_dec + centre, centre=centre)


def _gain(table: dict[str, dict[str, float]]) -> float:
    """The share of FVU that the new decoder takes away."""
    return 1 - table["adapted"]["fvu"] / table["zero_shot"]["fvu"]
