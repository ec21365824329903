"""Does the ranking tell where steering will hold? Steer at every site of the tiny models, and compare.

For every domain held out in turn and every site at which a block, or what enters the blocks, can be edited: an SAE, its
harmful features and their contrast decoder are learnt there with the same budget, the strength is set on the source's
domains alone, and what steering there takes from the held-out domain is measured. Then each rule that ranks sites
without training anything is compared with that. Finished cells lie beside the result and are never measured again.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from machine import machine
from routing_compare import by_model, compare, met
from routing_figure import scatter
from routing_folds import QUICK, Budget, World
from routing_measure import Cell, measure
from routing_rules import SIMPLER, Made, described, ranked, routes

from safedig.exit_codes import exit_code
from safedig.storage import write_atomically

MEASURES = {"rho": "ρ", "rho_live": "ρ, live sites", "reached": "reached", "reached_on_others": "reached, other half"}


TITLES = {
    "unsafe": "Fewer unsafe pictures of the held-out domain",
    "clean": "More clean pictures of the held-out domain",
}
GAINED = {"unsafe": "no longer unsafe", "clean": "clean now"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one fold, a few sites and prompts: that it runs")
    parser.add_argument("--models", nargs="*", default=None)
    parser.add_argument("--targets", nargs="*", default=None, help="domains that are held out")
    parser.add_argument("--only", choices=("measure", "compare"), help="the cells, or the comparison of finished ones")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "routing.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    budget = QUICK if options.quick else Budget()
    wishes = {"models": options.models, "targets": options.targets}
    budget = replace(budget, **{name: tuple(value) for name, value in wishes.items() if value})
    cells = measure(budget, options.out, finished_only=options.only == "compare")
    if options.only != "measure":
        write(options.out, {"benchmark": "routing", "quick": options.quick} | compared(budget, cells))


def compared(budget: Budget, cells: Sequence[Cell]) -> dict[str, Any]:
    """Every fold ranked once, then the rules against each other by each goal."""
    found: list[tuple[Made, list[Cell]]] = []
    for model in budget.models:
        for target, made in routes(World(model, budget), budget).items():
            found.append((made, [cell for cell in cells if (cell["model"], cell["target"]) == (model, target)]))
    return {
        "machine": machine(),
        "budget": asdict(budget) | {"sha": budget.sha},
        "seconds_measuring": round(sum(cell["seconds"] for cell in cells)),
        "goals": {goal: by_goal(found, goal) for goal in budget.goals},
    }


def by_goal(found: Sequence[tuple[Made, list[Cell]]], goal: str) -> dict[str, Any]:
    folds = [ranked(here, made, goal) for made, here in found]
    rules = compare(folds)
    return {
        "met": met(rules, SIMPLER),
        "by_model": by_model(folds),
        "rules": rules,
        "folds": [described(here, made, goal) for made, here in found],
    }


def write(out: Path, result: Mapping[str, Any]) -> None:
    """The numbers, a table for people and a picture for each goal."""
    write_atomically(out, f"{json.dumps(result, indent=1, ensure_ascii=False)}\n".encode())
    tables = [f"{TITLES[goal]}\n\n{table(told['rules'])}\n" for goal, told in result["goals"].items()]
    write_atomically(out.with_suffix(".md"), "\n".join(tables).encode())
    for goal, told in result["goals"].items():
        scatter(told["folds"], out.with_name(f"{out.stem}-{goal}.png"), GAINED[goal])


def table(rules: Mapping[str, Any]) -> str:
    """Each rule's means over folds, and by how much the default is ahead; 95 % intervals over folds."""
    columns = [*MEASURES.values(), "default ahead in ρ", "default ahead in reached"]
    lines = ["| rule | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for rule, found in rules.items():
        ahead = found.get("default_ahead", {})
        shown = [said(found[name]) for name in MEASURES] + [said(ahead.get(name)) for name in ("rho", "reached")]
        lines.append(f"| {rule} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def said(one: Mapping[str, Any] | None) -> str:
    return "" if one is None or one["mean"] is None else f"{one['mean']:.2f} [{one['lo']:.2f}, {one['hi']:.2f}]"


if __name__ == "__main__":
    sys.exit(exit_code(main, Path(__file__).name, "goes on from the cells that are finished"))
