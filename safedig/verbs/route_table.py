"""What `safedig route` answers: the ranking in the order of its sites, as JSON and as lines for people."""

from pathlib import Path
from typing import Any

from safedig.recipes import Recipe
from safedig.routing.routed import Route, RoutedSite

_TERMS = ("source_auroc", "transfer", "linearity", "interchange")
_PICTURES, _VELOCITY = (
    ("freed", "lost"),
    ("removal", "harm"),
)  # of the causal check: with a judge of images, and without
_SAID = {
    _PICTURES: "freed, lost: of whole images drawn with that taken out here, those no longer unsafe, or as asked",
    _VELOCITY: "removal, harm: what taking out the mean of it does to the velocity of harmful prompts, of benign ones",
}
_PROBE = "source_auroc"
WITHOUT_TWINS = (
    "on the tiny worlds such a ranking has ρ = 0.54 and reaches 0.71 of the best site, with twins 0.75 and 0.90"
)


def told(ranking: Route, recipe: Recipe, file: Path, picture: Path) -> dict[str, Any]:
    """The whole of it, with what a router of probes alone would have chosen."""
    sites = [_told(one) for one in ranking.sites]
    checks = [ranking.options[name] for name in ("causal", "judged")]
    return {
        "model": ranking.model,
        "fingerprint": ranking.fingerprint,
        "recipe_sha": recipe.routed_sha,
        "contrast": ranking.options["contrast"],
        "source": list(ranking.source),
        "target": ", ".join(ranking.target),
        "chosen": [str(site) for site in ranking.chosen],
        "sites": sites,
        "probe_only": max(sites, key=lambda one: one["terms"][_PROBE]),
        "forwards": sum(check["forwards"] for check in checks if isinstance(check, dict)),
        "file": str(file),
        "figure": str(picture),
    }


def table(result: dict[str, Any]) -> str:
    """The same for people."""
    width = max(len(one["site"]) for one in result["sites"])
    target = result["target"] or "each domain of the source in turn"
    last = _PICTURES if any("freed" in one["terms"] for one in result["sites"]) else _VELOCITY
    lines = [f"{result['model']}: from {', '.join(result['source'])} to {target}", ""]
    lines += [
        f"{'':4} {'site':{width}} {'score':>6} {'[95 % interval]':>16}  {'source':>7} {'target':>7} {'linear':>7} "
        f"{'effect':>7} {last[0]:>8} {last[1]:>6}  {'σ':>11}  verdict"
    ]
    for one in result["sites"]:
        cells = [_number(one["terms"].get(name)) for name in (*_TERMS, *last)]
        low, high = one["sigmas"]
        star = "*" if one["site"] in result["chosen"] else " "
        lines.append(
            f"{one['rank']:>3}{star} {one['site']:{width}} {one['score']:6.3f} {one['lo']:8.3f}–{one['hi']:.3f}   "
            f"{cells[0]:>7} {cells[1]:>7} {cells[2]:>7} "
            f"{cells[3]:>7} {cells[4]:>8} {cells[5]:>6}  {low:5.2f}–{high:.2f}  "
            f"{one['verdict'].replace('_', ' ')}"
        )
    probe, first = result["probe_only"], result["sites"][0]
    lines += [
        "",
        "source, target: AUROC of a probe of the source; linear: R² of what harm adds to a token, told from the token; "
        f"effect: share of the twins' velocity that passes here; {_SAID[last]}; *: chosen together",
        f"A router of probes alone would choose {probe['site']} (AUROC {_number(probe['terms'].get(_PROBE))}): "
        f"its effect is {_number(probe['terms'].get('interchange'))}, it is {probe['verdict'].replace('_', ' ')} and "
        f"rank {probe['rank']} here; that of {first['site']} is {_number(first['terms'].get('interchange'))}.",
        f"The causal check called the model with {result['forwards']:,} rows."
        if result["forwards"]
        else f"Without safe twins nothing is tried on the model: {WITHOUT_TWINS}.",
        "",
        f"written: {result['file']}, {result['figure']}",
    ]
    return "\n".join(lines)


def _told(one: RoutedSite) -> dict[str, Any]:
    kept = ("operator", "sigmas", "score", "lo", "hi", "rank", "verdict", "terms")
    return {"site": str(one.site)} | {name: getattr(one, name) for name in kept}


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
