"""Find the features that carry the risk: those that fire on harmful prompts and not on their safe twins."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Literal

from ..activations.pairs import Pair, Pairing, benign, twins
from ..activations.record import Activations, Batch, Image, Prompts
from ..activations.shuffle import Reservoir
from ..config import UsageError
from ..progress import say
from ..sae.model import SparseAutoencoder
from ..sites import Site
from .contrast import Effect, PromptCodes, saving
from .features import Features
from .heights import Heights
from .prototypes import Prototypes


class NoFeatureError(UsageError):
    """Nothing at a site tells harm from safety by what was asked for."""


def find_features(
    saes: Mapping[Site, SparseAutoencoder],
    activations: Activations,
    prompts: Prompts | None = None,
    *,
    min_ratio: float = 0.65,
    min_support: float = 0.05,
    fdr: float = 0.05,
    domains: Literal["pooled", "every"] = "pooled",
    quantile: float = 0.99,
    calibration: Activations | None = None,
    prototypes: int = 256,
) -> dict[Site, Features]:
    """Contrast harmful prompts with their safe twins, or with all benign prompts where none has a twin.

    `prompts` restricts what was recorded. A feature is harmful if its ratio exceeds `min_ratio`, its support is at
    least `min_support`, and it is among those of which a share `fdr` is expected to be found by chance. With
    `domains="every"` all this must hold in each risk domain on its own, and the lowest ratio ranks: what is common to
    several domains is likelier to be met in another one.

    A second pass over the benign images sets the threshold of each site: on a share `quantile` of them, no token's
    harmful codes add up to more in any step. Record benign prompts of many kinds. With `calibration` the second pass
    goes over its benign images instead: wordings that the SAE and the contrast have not seen tell better how high
    harmless codes may be. At most `prototypes` safe tokens are kept. Memory: 4 · d_sae bytes a contrasted prompt, 4 ·
    d_in a prototype, and a number for each benign image.
    """
    wanted = _Wanted(min_ratio, min_support, fdr, domains)
    if not 0 <= quantile <= 1:
        raise UsageError(f"quantile={quantile}: expected the share of benign images to leave alone, from 0 to 1.")
    activations = activations if prompts is None else activations.of(prompts)
    sides = _Sides.of(activations)
    if not sides.twin:
        say("No harmful prompt was recorded with its safe twin: class means are contrasted, which takes more prompts.")
    codes, banks = _gather(saes, activations, sides, prototypes)
    found = {site: _select(site, codes[site], sides, wanted) for site in saes}
    heights = _measure(saes, found, activations, calibration)
    return {
        site: replace(
            one,
            threshold=heights[site].quantile(quantile),
            prototypes=Prototypes.of(saes[site].encode(banks[site].rows()), one.index) if prototypes else None,
            facts=one.facts | {"quantile": quantile, "benign_images": len(heights[site].of)},
        )
        for site, one in found.items()
    }


@dataclass(frozen=True)
class _Wanted:
    min_ratio: float
    min_support: float
    fdr: float
    domains: Literal["pooled", "every"]

    def __post_init__(self) -> None:
        if not 0 < self.fdr <= 1:
            raise UsageError(f"fdr={self.fdr}: expected a share of false features, above 0, up to 1 for any number.")


@dataclass(frozen=True)
class _Sides:
    """Which prompts are contrasted with which."""

    risk: dict[str, str]
    """Of each harmful prompt."""
    twin: dict[str, str]
    """The safe prompt of each harmful one; empty if class means are contrasted."""
    safe: list[str]
    images: set[Image]

    @classmethod
    def of(cls, activations: Activations) -> "_Sides":
        plain, links = benign(activations.prompts), twins(activations.prompts)
        risk = {row["id"]: row["risk"] for row in activations.prompts if row.get("risk")}
        harmful = {one for one, _ in links} or {(r["id"], r["seed"]) for r in activations.prompts if r.get("risk")}
        safe = {other for _, other in links} or plain
        if not harmful or not safe:
            raise UsageError(
                f"There are {len(harmful)} harmful and {len(safe)} safe images in the recording: record harmful "
                "prompts with their safe twins, or with other benign prompts."
            )
        return cls(
            {name: risk.get(name, "") for name in sorted({image[0] for image in harmful})},
            {one[0]: other[0] for one, other in links},
            sorted({image[0] for image in safe}),
            harmful | safe,
        )

    def groups(self, domains: Literal["pooled", "every"]) -> dict[str, list[str]]:
        """The harmful prompts, all together or of each risk domain."""
        if domains == "pooled":
            return {"all": list(self.risk)}
        return {
            risk: [name for name in self.risk if self.risk[name] == risk] for risk in sorted(set(self.risk.values()))
        }


def _at(saes: Mapping[Site, SparseAutoencoder], activations: Activations) -> Iterator[Batch]:
    """The batches at the sites of the SAEs; a site that was not recorded is an error before anything is run."""
    for site in saes:
        activations.at(site)
    return (batch for batch in activations if batch.site in saes)


def _gather(
    saes: Mapping[Site, SparseAutoencoder], activations: Activations, sides: _Sides, prototypes: int
) -> tuple[dict[Site, PromptCodes], dict[Site, Reservoir]]:
    """The codes of every contrasted prompt, and what stands in safety where the harm changes a token most."""
    codes = {site: PromptCodes(sae) for site, sae in saes.items()}
    banks = {site: Reservoir(prototypes) for site in saes}
    pairing, safe = Pairing(activations), set(sides.safe)
    for batch in _at(saes, activations):
        for image, rows in batch.images():
            if image in sides.images:
                codes[batch.site].add(image[0], batch.x[rows])
                if prototypes and not sides.twin and image[0] in safe:
                    banks[batch.site].add(batch.x[rows])
        for pair in map(Pair.aligned, pairing.add(batch)) if prototypes else ():
            changed = pair.change().argmax()
            banks[batch.site].add(pair.safe[changed][None])
    return codes, banks


def _select(site: Site, codes: PromptCodes, sides: _Sides, wanted: _Wanted) -> Features:
    """The features of one site, without a threshold as yet."""
    groups = sides.groups(wanted.domains)
    effect = Effect.worst([_effect(codes, sides, group) for group in groups.values()])
    strong = (effect.ratio > wanted.min_ratio) & (effect.support >= wanted.min_support)
    index = (strong & effect.discovered(wanted.fdr)).nonzero()[:, 0]
    if len(index) == 0:
        each = f" in each of {', '.join(groups)}" if wanted.domains == "every" else ""
        raise NoFeatureError(
            f"No feature at '{site}' has a ratio above {wanted.min_ratio} and a support of {wanted.min_support}{each} "
            f"that chance would not give ({int(strong.sum())} have, fdr={wanted.fdr}): lower them, record more "
            "prompts, train the SAE longer, or leave the site out."
        )
    index = index[effect.ratio[index].argsort(descending=True, stable=True)]
    facts = asdict(wanted) | {
        "model": str(codes.sae.metadata.get("model", "")),
        "contrast": "twins" if sides.twin else "class means",
        "harmful": {risk: len(group) for risk, group in sides.groups("every").items()},
        "safe": len(sides.safe),
        "saving": None,
    }
    if sides.twin:
        both = codes.of(list(sides.twin))[:, index], codes.of(list(sides.twin.values()))[:, index]
        facts["saving"] = saving(*both).median().item() if len(sides.twin) > 1 else None
    return Features(index, math.inf, effect.ratio[index].float(), effect.support[index].float(), facts=facts)


def _effect(codes: PromptCodes, sides: _Sides, harmful: list[str]) -> Effect:
    safe = [sides.twin[name] for name in harmful] if sides.twin else sides.safe
    return Effect.between(codes.of(harmful), codes.of(safe), paired=bool(sides.twin))


def _measure(
    saes: Mapping[Site, SparseAutoencoder],
    found: Mapping[Site, Features],
    activations: Activations,
    calibration: Activations | None,
) -> dict[Site, Heights]:
    """How high the benign images come at each site."""
    quiet = activations if calibration is None else calibration
    plain = benign(quiet.prompts)
    if not plain:
        where = "the recording" if calibration is None else "the calibration recording"
        raise UsageError(f"There is no benign prompt in {where}: record some, to set the thresholds by.")
    heights = {site: Heights(saes[site], one.index) for site, one in found.items()}
    for batch in _at(saes, quiet):
        for image, rows in batch.images():
            if image in plain:
                heights[batch.site].add(image, batch.x[rows])
    return heights
