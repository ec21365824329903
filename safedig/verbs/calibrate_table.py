"""What a calibration has measured, as a nested result and as lines for people."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from safedig.evaluation.dose_response import Choice, Outcome, front_of
from safedig.evaluation.headline import shown
from safedig.evaluation.intervals import Rate

RATES = ("unsafe", "clean", "lost", "touched")
_FOOT = (
    "Percent of prompts, [95 % interval], counts. Unsafe, clean: of harmful prompts. Lost: benign ones that are drawn",
    "as asked unsteered and not steered; touched: whose gate opens. +: on the front of unsafe and lost; *: chosen.",
)


def told(plain: Outcome, outcomes: Sequence[Outcome], choice: Choice, budget: float) -> dict[str, Any]:
    """The unsteered model, every setting, and the choice."""
    front = front_of([plain, *outcomes])
    cells = [
        row(one) | {"within": one.within(budget), "front": one in front, "chosen": one is choice.best}
        for one in outcomes
    ]
    chosen, nearest = (None if one is None else row(one) for one in (choice.best, choice.nearest))
    unsteered = {name: getattr(plain, name) for name in ("unsafe", "clean")}
    return {"unsteered": unsteered, "cells": cells, "chosen": chosen, "nearest": nearest}


def row(one: Outcome) -> dict[str, Any]:
    """One setting and its rates, as JSON."""
    setting = {} if one.setting is None else dataclasses.asdict(one.setting)
    setting = {name: list(value) if isinstance(value, tuple) else value for name, value in setting.items()}
    return {"setting": setting} | {name: getattr(one, name) for name in RATES}


def table(result: dict[str, Any]) -> str:
    """The same for people: a line for each setting, ladder after ladder."""
    names = [_named(one["setting"], result["cells"]) for one in result["cells"]]
    width = max(map(len, names))
    plain = result["unsteered"]
    lines = [f"{result['model']}, seed {result['seed']}, split {result['split']}, prompts nothing was learnt from", ""]
    lines += [f"  {'':{width}} {'unsafe':>28} {'clean':>28} {'lost':>28} {'touched':>28}"]
    lines += [f"  {'unsteered':{width}} {_rate(plain['unsafe'])} {_rate(plain['clean'])}"]
    for name, one in zip(names, result["cells"], strict=True):
        mark = "*" if one["chosen"] else "+" if one["front"] else " "
        lines.append(f"{mark} {name:{width}} {' '.join(_rate(one[rate]) for rate in RATES)}")
    lines += ["", *_FOOT, _verdict(result)]
    lines += [f"Drawn behind closed gates, to see that they are left alone: {result['identical']}, all bit-identical."]
    return "\n".join([*lines, f"written: {result['figure']}" + (f", {result['bundle']}" if result["bundle"] else "")])


def _verdict(result: dict[str, Any]) -> str:
    budget, chosen, near = f"{result['budget']:.1%} of benign prompts", result["chosen"], result["nearest"]
    if chosen is not None:
        return (
            f"Chosen at a budget of {budget}: {_named(chosen['setting'])}. It is the best of {len(result['cells'])} on "
            "the prompts that chose it: what it comes to is to be measured on others."
        )
    if near is None:
        return f"No setting meets the budget of {budget}: none is safer than the unsteered model at all."
    why = [
        f"{near[name]['k']}/{near[name]['n']} {name}, where {limit:.1%} may be"
        for name, limit in (("lost", result["budget"]), ("touched", near["setting"]["epsilon"]))
        if near[name]["rate"] > limit
    ]
    return (
        f"No setting meets the budget of {budget}, and no bundle is written. The nearest is "
        f"{_named(near['setting'])}: {' and '.join(why)}; unsafe {shown(near['unsafe']).strip()}."
    )


def _named(setting: dict[str, Any], among: Sequence[dict[str, Any]] = ()) -> str:
    """By what differs; the sites where there are several sets of them."""
    low, high = setting["sigmas"]
    name = f"{setting['edit']} × {setting['dose']:g}, σ {low:g}–{high:g}, ε {setting['epsilon']:g}"
    several = not among or len({tuple(one["setting"]["sites"]) for one in among}) > 1
    return f"{name}, {' + '.join(setting['sites'])}" if several else name


def _rate(rate: Rate) -> str:
    return f"{shown(rate):>28}"
