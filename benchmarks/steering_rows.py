"""The rows of the steering table: ours, what is left when a part of it is left out, and the usual alternatives.

A row says how it is made from what a fold has learnt, and which settings are tried on the source's prompts.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from jaxtyping import Float
from steering_folds import FIXED, POOLED, TXT, Fold
from torch import Tensor

from safedig.activations.pairs import Pair, Pairing
from safedig.evaluation.methods.method import AtSites
from safedig.evaluation.methods.ours import REPLACE
from safedig.features import Dose, Features, Weighing, fit_counterparts, weigh
from safedig.hooks import Context
from safedig.sae.options import SAEOptions
from safedig.sae.train import train
from safedig.sites import Site
from safedig.steering.conformal import calibrated
from safedig.steering.edits import Blend, Edit, Repel, Replace
from safedig.steering.rule import Rule
from safedig.steering.steering import Steering

Make = Callable[[Fold], Callable[[float], Any]]
"""From a fold to what acts at a setting: something with `.apply(pipe)`."""
NEAREST, STRENGTHS = (1.0, 4.0, 8.0), (0.5, 1.0, 1.5, 2.0)
BY_DEFAULT = (float(REPLACE.nearest),)
"""What the package steers with: of 960 held-out `calibrate` prompts 889 are clean, with the mean of four tokens 879."""
BOTH = (TXT, POOLED)


@dataclass(frozen=True)
class Line:
    """One row of the table."""

    make: Make
    settings: tuple[float, ...] = (1.0,)
    """Of which the one with the most clean pictures of the source is taken; the same for all folds."""
    whole: bool = False
    """Whether it is measured on all prompts that are reported; the others on half of them."""


@cache
def features(fold: Fold, adapted: bool, sites: tuple[Site, ...] = BOTH) -> dict[Site, Features]:
    return fold.features(adapted, sites)


@cache
def counterparts(fold: Fold, adapted: bool, sites: tuple[Site, ...] = BOTH) -> Any:
    return fold.counterparts(adapted, features(fold, adapted, sites))


@cache
def contrast(fold: Fold, adapted: bool, sites: tuple[Site, ...] = BOTH, gates: bool | None = None) -> Any:
    """Of the features of `adapted`, or of `gates` where the gates know the target and the decoder does not."""
    return fold.contrast(adapted, features(fold, adapted if gates is None else gates, sites))


@cache
def reconstruction(fold: Fold) -> Any:
    return fold.reconstruction({TXT: features(fold, True)[TXT]})


@cache
def with_prototypes(fold: Fold) -> dict[Site, Features]:
    found = features(fold, True)
    return found | fold.prototypes({TXT: found[TXT]})


def ours(
    fold: Fold,
    adapted: bool = True,
    sites: tuple[Site, ...] = BOTH,
    watch: tuple[Site, ...] = (POOLED,),
    gate: bool = True,
    repel: bool = True,
) -> Callable:
    """Of an image that the weighed codes open, known tokens are replaced by what stood in a safe twin, others repelled.

    Setting: `nearest`.
    """
    found, known = features(fold, adapted, sites), counterparts(fold, adapted, sites)
    opened = found if gate else {site: replace(one, threshold=float("-inf")) for site, one in found.items()}
    saes, unknown = contrast(fold, adapted, sites), fold.world.budget.unknown if repel else 0.0

    def at(nearest: float) -> Steering:
        edit = Replace(by="counterparts", nearest=int(nearest), unknown=unknown)
        return Steering(saes, opened, [edit], counterparts=known, watch=watch, scope="image")

    return at


def edited(fold: Fold, edits: Callable[[float], list[Edit]], saes: Callable[[Fold], Any]) -> Callable:
    """Other edits under the same gates; setting: their strength."""
    made, banks, other = {POOLED: fold.saes[POOLED]} | saes(fold), with_prototypes(fold), reconstruction(fold)
    return lambda strength: Steering(made, banks, edits(strength), reconstruction=other, watch=[POOLED], scope="image")


def paper(fold: Fold) -> Callable:
    """The published formulas with β = γ = 0.2, for all tokens, without a gate."""
    found = {TXT: replace(with_prototypes(fold)[TXT], threshold=float("-inf"), dose=None)}
    edits = [Repel(0.2, "paper"), Blend(0.2, "paper")]
    other = reconstruction(fold)
    return lambda _: Steering(contrast(fold, True), found, edits, reconstruction=other)


def mean_difference(fold: Fold, gated: bool) -> Callable:
    """a' = a − s · mean Δ in the conditional rows, of all images or of those that our gate at the tokens opens for."""
    total, count = 0.0, 0
    acts = fold.learnt_from(True, stand_ins=True).at(TXT)
    pairing = Pairing(acts)
    for batch in acts:
        for pair in map(Pair.aligned, pairing.add(batch)):
            total, count = total + (pair.harmful.double() - pair.safe.double()).sum(0), count + len(pair.harmful)
    vector = (total / count).float()  # type: ignore[union-attr]
    rule = ours(fold, sites=(TXT,), watch=())(1.0).rules[TXT]

    def act(strength: float, x: Float[Tensor, "batch token d"], context: Context) -> Tensor:
        open_ = _opens(rule, x, context) if gated else torch.ones_like(x[..., 0], dtype=torch.bool)
        cond = torch.tensor([row == "cond" for row in context.rows])[:, None]
        return torch.where((open_ & cond)[..., None], x - strength * vector, x)

    return lambda strength: AtSites({TXT: partial(act, strength)})


def _opens(rule: Rule, x: Float[Tensor, "batch token d"], context: Context) -> Tensor:
    return rule.gate(rule.heights(x), context)


def random_features(fold: Fold) -> Callable:
    """As many latents, drawn by lot, repelled with their own reconstruction rows: a control."""
    found, b = features(fold, True)[TXT], fold.world.budget
    some = torch.randperm(fold.saes[TXT].d_sae, generator=torch.Generator().manual_seed(b.seed))[: len(found)]
    plain = Features(some, 0.0, found.ratio, found.support, dose=Dose.of(torch.ones(len(some))))
    quiet = fold.world.inputs.of(fold.world.quiet)
    by_lot = calibrated({TXT: plain}, fold.saes, quiet, epsilon=b.epsilon, delta=b.delta)
    return lambda strength: Steering({TXT: fold.saes[TXT]}, by_lot, [Repel(strength)], scope="image")


def fixed(fold: Fold, name: str) -> Callable:
    """Ours at a site that was not routed to, learnt from what passes it at every step."""
    site, world, b = FIXED[name], fold.world, fold.world.budget
    n = 2 * b.fixed
    pairs = [row for risk in fold.sources for row in world.stand_ins[risk][:n]] + world.few[fold.target][:n]
    acts = world.inside.of(pairs + world.benign[: 4 * n]).at(site)
    saes = train(acts, options=SAEOptions(expansion=b.expansion, k=b.k, steps=b.steps))
    heard = weigh(saes, acts, weighing=Weighing())
    found = calibrated(heard, saes, world.quiet_inside, epsilon=b.epsilon, delta=b.delta)
    known = fit_counterparts(saes, acts, found)

    def at(nearest: float) -> Steering:
        return Steering(
            saes, found, [Replace(by="counterparts", nearest=int(nearest))], counterparts=known, scope="image"
        )

    return at


LINES: dict[str, Line] = {
    "ours": Line(ours, BY_DEFAULT, whole=True),
    "ours, no target data": Line(partial(ours, adapted=False), BY_DEFAULT, whole=True),
    "ours, mood cue off": Line(ours, BY_DEFAULT, whole=True),
    "without gate": Line(partial(ours, sites=(TXT,), watch=(), gate=False), NEAREST),
    "gate at the tokens alone": Line(partial(ours, sites=(TXT,), watch=()), NEAREST),
    "unknown tokens looked up too": Line(partial(ours, repel=False), NEAREST),
    "unknown tokens looked up too, no target data": Line(partial(ours, adapted=False, repel=False), NEAREST),
    "two sites: pooled vector too": Line(partial(ours, watch=()), NEAREST),
    "fixed site: pooled vector": Line(partial(ours, sites=(POOLED,), watch=()), NEAREST),
    "fixed site: middle block": Line(partial(fixed, name="middle block"), (4.0,)),
    "fixed site: most decodable inert": Line(partial(fixed, name="most decodable inert site"), (4.0,)),
    "Repel": Line(partial(edited, edits=lambda s: [Repel(s)], saes=lambda f: contrast(f, True)), STRENGTHS),
    "Repel, source contrast alone": Line(
        partial(edited, edits=lambda s: [Repel(s)], saes=lambda f: contrast(f, False, gates=True)), STRENGTHS
    ),
    "Repel, reconstruction adapted": Line(partial(edited, edits=lambda s: [Repel(s)], saes=reconstruction), STRENGTHS),
    "Blend": Line(partial(edited, edits=lambda s: [Blend(s)], saes=lambda f: contrast(f, True)), (0.5, 1.0)),
    "Repel and Blend": Line(
        partial(edited, edits=lambda s: [Repel(s), Blend(0.5)], saes=lambda f: contrast(f, True)), STRENGTHS
    ),
    "paper form, γ = β = 0.2": Line(paper),
    "mean difference, ungated": Line(partial(mean_difference, gated=False), (2.0, 4.0, 8.0)),
    "mean difference, gated": Line(partial(mean_difference, gated=True), (4.0, 8.0, 16.0)),
    "random features": Line(random_features, (1.0, 2.0)),
}
