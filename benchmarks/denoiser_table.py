"""From the cells of the Safe Denoiser to its table: shares with intervals, falls, proportions and rates."""

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
from denoiser_measure import MEMORISED

from safedig.evaluation.intervals import rate

Cell = Mapping[str, Any]
DRAWS = 4000
AS_ARMS = ("report", "28 steps", "no prompt")


def summary(cells: Mapping[str, Cell]) -> dict[str, Any]:
    """What the table says of one model."""
    told: dict[str, Any] = {"fingerprint": cells["fingerprint"], "chosen": cells["chosen"], "arms": {}}
    for name, cell in cells.items():
        if isinstance(cell, Mapping) and "of" in cell and "clean" not in cell:
            told["arms"][name] = hazard_arm(cell)
    told["benign"] = benign(cells["benign"])
    told["memorised"] = memorised(cells[MEMORISED])
    told["naming"] = naming(cells["naming"])
    told["together"] = {name: together(cell) for name, cell in cells["together"].items()}
    return told


def hazard_arm(cell: Cell) -> dict[str, Any]:
    """The share of pictures with the hazard that is negated, over all hazards, and how it falls."""
    n, of = cell["n"], cell["of"]
    told: dict[str, Any] = {"pictures": n, "hazards": len(of)}
    for eye in ("", "_second"):
        before, after = (_counts(of, f"{when}{eye}", n) for when in ("before", "after"))
        told[f"either{eye}" if not eye else "second_check"] = {
            "before": rate(int(before.sum()), n * len(of)),
            "after": rate(int(after.sum()), n * len(of)),
            "fall": _fall(before, after),
        }
    if "labels" in cell:
        told["labels"] = {when: dict(Counter(labels)) for when, labels in cell["labels"].items()}
    if all("drawn" in one for one in of.values()):
        told |= _others(cell)
    return told


def _others(cell: Cell) -> dict[str, Any]:
    """What the other objects do, and what becomes of the pictures that showed the hazard."""
    n, of = cell["n"], cell["of"]
    before, after, became = Counter(), Counter(), Counter()
    changed = opened = 0
    for hazard, one in of.items():
        for at, (_, label, was, now) in one["drawn"].items():
            before.update(name for name in was if name not in (hazard, "unrecognised"))
            after.update(name for name in now if name not in (hazard, "unrecognised"))
            if int(at) in one["before"]:
                still = int(at) in one["after"]
                became["the hazard still" if still else f"{label}"] += 1
            else:
                opened += 1
                changed += was != now
        became["the hazard, gate closed"] += len([at for at in one["before"] if str(at) not in one["drawn"]])
    return {
        "gates_opened": rate(sum(len(one["drawn"]) for one in of.values()), n * len(of)),
        "without_the_hazard": {"opened": opened, "other_objects_named": changed},
        "became": dict(became),
        "others_in_opened": {name: [before[name], after[name]] for name in sorted({*before, *after})},
        "proportions": _proportions(cell),
    }


def _proportions(cell: Cell) -> dict[str, Any]:
    """The other objects of all pictures under each hazard's denoiser, against undenoised: where they differ most."""
    found = {}
    for hazard, one in cell["of"].items():
        before = Counter({name: k for name, k in cell["objects"].items() if name not in (hazard, "unrecognised")})
        after = Counter(before)
        for _, _, was, now in one["drawn"].values():
            after.subtract(name for name in was if name in before)
            after.update(name for name in now if name not in (hazard, "unrecognised"))
        found[hazard] = chi_square(before, after)
    worst = min(found, key=lambda hazard: found[hazard]["p"])
    return {"under": worst} | found[worst]


def chi_square(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, float]:
    """Whether two counts of objects have the same proportions."""
    from scipy.stats import chi2_contingency

    names = [name for name in {*before, *after} if before.get(name, 0) + after.get(name, 0) >= 10]
    if len(names) < 2:
        return {"chi2": 0.0, "dof": 0, "p": 1.0}
    counts = np.array([[when.get(name, 0) for name in sorted(names)] for when in (before, after)])
    result: Any = chi2_contingency(counts)
    return {"chi2": float(result.statistic), "dof": int(result.dof), "p": float(result.pvalue)}


def benign(cell: Cell) -> dict[str, Any]:
    """Drawn as asked, before, and after under each hazard's denoiser; the mean over hazards, and the worst."""
    n, before = cell["n"], len(cell["clean"])
    lost = {hazard: (before - len(one["clean"])) / n for hazard, one in cell["of"].items()}
    trials = n * len(lost)
    return {
        "before": rate(before, n),
        "after": rate(sum(len(one["clean"]) for one in cell["of"].values()), trials),
        "lost_points": 100 * sum(lost.values()) / len(lost),
        "worst_lost_points": 100 * max(lost.values()),
        "gates_opened": rate(sum(one["opened"] for one in cell["of"].values()), trials),
    }


def memorised(cell: Cell) -> dict[str, Any]:
    """The scene, and its objects before whatever: undenoised, with it negated, with it before every background."""
    return {"strength": cell["strength"]} | {
        when: {
            "reproduced": rate(len(cell[when]["reproduced"]), cell["n"]),
            "objects": rate(len(cell[when]["objects"]), cell["n"]),
            "rms_to_render": {"median": median(cell[when]["rms"]), "min": min(cell[when]["rms"])},
            "labels": dict(Counter(cell[when]["labels"])),
        }
        for when in ("before", "after", "every_background")
    }


def naming(cell: Cell) -> dict[str, Any]:
    pictures = cell["pictures"]
    return {
        "before": rate(sum(one[1] for one in pictures), cell["n"]),
        "after": rate(sum(one[2] for one in pictures), cell["n"]),
        "labels_after": dict(Counter(one[4] for one in pictures)),
    }


def together(cell: Cell) -> dict[str, Any]:
    """Which of the prompts that leave it open, and of those that name one, show a hazard; which benign are clean."""
    open_, named, calm = (cell[part] for part in ("report", "naming", "benign"))
    return {
        "strength": cell["own"],
        "underspecified": rate(len(open_["hazard"]), open_["n"]),
        "underspecified_second": rate(len(open_["second"]), open_["n"]),
        "naming": rate(len(named["hazard"]), named["n"]),
        "naming_clean": rate(len(named["clean"]), named["n"]),
        "benign": rate(len(calm["clean"]), calm["n"]),
    }


def _counts(of: Mapping[str, Cell], which: str, n: int) -> np.ndarray:
    """In how many of the hazards' runs each prompt shows the hazard: prompts are what is resampled."""
    found = np.zeros(n, dtype=np.int64)
    for one in of.values():
        found[one[which]] += 1
    return found


def _fall(before: np.ndarray, after: np.ndarray, seed: int = 0) -> dict[str, float]:
    """1 − after / before, with a bootstrap over prompts (95 %)."""
    total = before.sum()
    if not total:
        return {"share": 0.0, "lo": 0.0, "hi": 0.0}
    picked = np.random.default_rng(seed).multinomial(len(before), np.full(len(before), 1 / len(before)), size=DRAWS)
    sums = picked @ before
    falls = 1 - (picked @ after)[sums > 0] / sums[sums > 0]
    lo, hi = np.quantile(falls, [0.025, 0.975])
    return {"share": float(1 - after.sum() / total), "lo": float(lo), "hi": float(hi)}


def table(models: Mapping[str, Any]) -> str:
    """For people."""
    return "\n".join(line for model, told in models.items() for line in _of_model(model, told)) + "\n"


def _of_model(model: str, told: Mapping[str, Any]) -> list[str]:
    heads = ["arm", "hazard before", "after", "fall", "fall by the second check", "gates opened", "other objects, χ² p"]
    lines = [
        f"## {model}, strength {told['chosen']['strength']:g}, gate from β = {told['chosen']['floor']:g} on",
        "",
        _row(heads),
        "|---" * len(heads) + "|",
    ]
    for name, arm in told["arms"].items():
        one, other = arm["either"], arm["second_check"]
        opened = _percent(arm["gates_opened"]) if "gates_opened" in arm else "all"
        kept = f"{arm['proportions']['p']:.2f}" if "proportions" in arm else ""
        falls = [_share(one["fall"]), _share(other["fall"])]
        lines.append(_row([name, _percent(one["before"]), _percent(one["after"]), *falls, opened, kept]))
    calm, card, named = told["benign"], told["memorised"], told["naming"]
    return [
        *lines,
        "",
        f"Benign, drawn as asked: {_percent(calm['before'])}, then {_percent(calm['after'])} "
        f"({calm['lost_points']:.2f} points lost on average, {calm['worst_lost_points']:.2f} under the worst hazard).",
        f"Memorised scene reproduced (strength {card['strength']:g}): {_percent(card['before']['reproduced'])}, then "
        f"{_percent(card['after']['reproduced'])}; RMS to its render {card['before']['rms_to_render']['median']:.3f}, "
        f"then {card['after']['rms_to_render']['median']:.3f} (least {card['after']['rms_to_render']['min']:.3f}). "
        f"Its objects before whatever: {_percent(card['before']['objects'])}, then "
        f"{_percent(card['after']['objects'])}; "
        f"with it negated before every background {_percent(card['every_background']['objects'])}.",
        f"Prompts that name the hazard, drawn with it: {_percent(named['before'])}, then {_percent(named['after'])}.",
        "",
        *_side_by_side(told["together"]),
        "",
    ]


def _side_by_side(told: Mapping[str, Any]) -> list[str]:
    heads = ["away from all hazards at once", "left open: any hazard", "by the second check", "named: any hazard"]
    heads += ["named: clean", "benign, as asked"]
    columns = ("underspecified", "underspecified_second", "naming", "naming_clean", "benign")
    rows = [
        _row([f"{name}, × {one['strength']:g}" if one["strength"] else name, *(_percent(one[at]) for at in columns)])
        for name, one in told.items()
    ]
    return [_row(heads), "|---" * len(heads) + "|", *rows]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _percent(one: Mapping[str, Any]) -> str:
    return f"{100 * one['rate']:.2f} % ({one['k']}/{one['n']})"


def _share(one: Mapping[str, float]) -> str:
    return f"{100 * one['share']:.0f} % [{100 * one['lo']:.0f}, {100 * one['hi']:.0f}]"
