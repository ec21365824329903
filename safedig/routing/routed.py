"""A ranking as it is kept: each site with its score, interval and verdict, and a set of sites that goes together."""

import json
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from ..config import UsageError, build
from ..sites import Site, Stage, stage
from ..storage import write_atomically


@dataclass(frozen=True)
class RoutedSite:
    """What is known of steering at one site by one operator."""

    site: Site
    stage: Stage
    operator: str
    sigmas: tuple[float, float]
    """Recommended window, lowest and highest σ."""
    score: float
    lo: float
    hi: float
    """Of a 95 % interval over prompts."""
    rank: int
    """1 is best. Sites that are ok come first, then those that are not separable, then inert ones."""
    verdict: Literal["ok", "inert", "not_separable"]
    """Not separable: harm is not told from safety here. Inert: it is, but the image does not depend on it."""
    terms: dict[str, float]
    """The criteria, and "p": the chance that any site would look as separable if none were."""
    by_sigma: dict[str, list[float]] = field(default_factory=dict)
    """Criteria over σ: those of the recording at "sigma", those of the causal check at "tried"."""


@dataclass(frozen=True)
class Route:
    """A ranking, its best site first. `target` is empty if it was made without any data of a target."""

    model: str
    fingerprint: str
    source: tuple[str, ...]
    target: tuple[str, ...]
    data: dict[str, Any]
    options: dict[str, Any]
    sites: tuple[RoutedSite, ...]
    chosen: tuple[Site, ...]
    """Sites that add to each other, best first, rather than near-duplicates of the best."""

    def __getitem__(self, site: Site) -> RoutedSite:
        for one in self.sites:
            if one.site == site:
                return one
        raise UsageError(f"'{site}' was not ranked: there are {', '.join(str(one.site) for one in self.sites)}.")

    def top(self, n: int) -> list[Site]:
        """`n` sites to steer at together: the complementary set, then the best of the others that are ok."""
        usable = [one.site for one in self.sites if one.verdict == "ok"]
        if not 1 <= n <= len(usable):
            raise UsageError(
                f"top({n}): {len(usable)} of {len(self.sites)} sites are fit for steering; ask for 1 to that many, or "
                "record more prompts or other sites."
            )
        return list(dict.fromkeys([*self.chosen, *usable]))[:n]

    def save(self, path: str | PathLike[str]) -> None:
        """Write it as JSON, numbers to six digits; a file of that name is replaced at once or not at all."""
        given = {name: getattr(self, name) for name in ("model", "fingerprint", "source", "target", "data", "options")}
        given["sites"] = [{**vars(one), "site": str(one.site)} for one in self.sites]
        given["chosen"] = [str(site) for site in self.chosen]
        text = json.dumps(given, indent=1, ensure_ascii=False, allow_nan=False)
        write_atomically(Path(path), f"{text}\n".encode())

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Route":
        """Read what `save` wrote; whatever else it is, is a `UsageError` that names what is wrong."""
        try:
            given = json.loads(Path(path).read_text(encoding="utf-8"))
            given["sites"] = [_read(**entry) for entry in given["sites"]]
            given["chosen"] = [Site.parse(name) for name in given["chosen"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"'{path}' is no route ({type(error).__name__}: {error}): make one by safedig route."
            ) from (error)
        try:
            return build(cls, given)
        except UsageError as error:
            raise UsageError(f"'{path}' is no route that this version reads. {error}") from error


def _read(site: str, **rest: Any) -> dict[str, Any]:
    """Rankings of before stages were kept have none."""
    place = Site.parse(site)
    return {"site": place, "stage": stage(place)} | rest
