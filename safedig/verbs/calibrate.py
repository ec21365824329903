"""safedig calibrate: one dose–response run that finds edit, strength, σ, gates and sites at a budget of lost prompts.

The same command goes on with a run that was stopped, and finds a finished one done.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from safedig.calibration_figures import doses_and_front
from safedig.config import UsageError
from safedig.evaluation.bank import bank_of
from safedig.evaluation.dose_response import Outcome, choose, outcome
from safedig.figures import save
from safedig.progress import say, track
from safedig.recipes import Recipe
from safedig.recipes.calibrating import Calibrating
from safedig.steering import bundle
from safedig.steering.setting import Setting, grid, set_to, site_sets
from safedig.steering.steering import Steering
from safedig.storage import write_atomically
from safedig.verbs import Options
from safedig.verbs.calibrate_bench import Bench
from safedig.verbs.calibrate_table import row, table, told
from safedig.verbs.judges import jury_of
from safedig.verbs.quick import lowered

__all__ = ["run", "table"]

BUNDLE = "steering"  # folder
QUICK = {"harmful": 32, "benign": 64, "quiet": 280}  # prompts, at most
QUICK_STEPS = 1000  # of SAE training, at most


def run(recipe: Recipe, options: Options) -> dict[str, Any]:
    """Measure every setting that is not measured yet, and choose; the rates, nested as in the contract."""
    out = options.folder(f"runs/calibrate-{Path(recipe.model).name}")
    bank, looks = bank_of(options.prompts, options.seed), jury_of(recipe, options)
    recipe = replace(recipe, seed=options.seed_of(recipe))
    recipe, wishes = _quick(recipe, options) if options.quick else _whole(recipe)
    bench = Bench(recipe, wishes.sites or recipe.sites, wishes.prompts, recipe.pipeline(), out, bank, looks)
    say(f"{len(bench.asked.harmful)} harmful and {len(bench.asked.benign)} benign prompts, first unsteered …")
    unsteered = bench.response.unsteered()
    settings = _settings(wishes, bench.sites, options)
    cells = [cell for one in track(settings, "Settings") if (cell := bench.measured(one)) is not None]
    if not cells:
        raise UsageError("No setting could be tried: give more calibrate.prompts.quiet, or larger calibrate.epsilons.")
    plain, outcomes = outcome(unsteered, unsteered), [outcome(unsteered, cell) for cell in cells]
    choice = choose(plain, outcomes, wishes.budget)
    result = {"model": recipe.model, "fingerprint": bench.model, "recipe_sha": recipe.sha, "seed": recipe.seed}
    result |= {"quick": options.quick, "split": "calibrate", "budget": wishes.budget, "judge": bench.judge}
    result |= told(plain, outcomes, choice, wishes.budget) | {"identical": sum(cell.identical for cell in cells)}
    picture = save(doses_and_front(recipe.model, plain, outcomes, choice, wishes.budget), out / "front.png")
    saved = _keep(bench, choice.best, result, out / BUNDLE)
    result |= {"figure": str(picture), "bundle": None if saved is None else str(saved)}
    write_atomically(out / "calibration.json", f"{json.dumps(result, indent=1, ensure_ascii=False)}\n".encode())
    say(f"calibration.json, {picture.name} and cells.jsonl lie in {out}.")
    return result


def _settings(wishes: Calibrating, sites: tuple[str, ...], options: Options) -> list[Setting]:
    """Every combination; with --quick in the first window unless they were given, and at all sites together."""
    windows, where = [(low, high) for low, high in wishes.sigmas], site_sets(sites)
    if options.quick and not options.by_hand("calibrate.sigmas"):
        windows = windows[:1]
    return grid(wishes.edits, wishes.doses, where[:1] if options.quick else where, windows, wishes.epsilons)


def _keep(bench: Bench, best: Outcome | None, result: dict[str, Any], folder: Path) -> Path | None:
    """The chosen steering as a bundle with its receipt; where none is chosen, none lies there any more."""
    base = None if best is None or best.setting is None else bench.base(best.setting)
    if best is None or best.setting is None or base is None:
        for name in (bundle.JSON, bundle.TENSORS, bundle.CARD):
            (folder / name).unlink(missing_ok=True)
        return None
    chosen = set_to(base.steering, best.setting.dose, best.setting.sigmas)
    names = ("recipe_sha", "seed", "quick", "split", "budget", "judge", "unsteered")
    receipt = row(best) | {name: result[name] for name in names} | {"chosen_among": len(result["cells"])}
    facts = {
        site: told_of | {"receipt": told_of["receipt"] | {"calibration": receipt}}
        for site, told_of in chosen.facts.items()
    }
    Steering.of_rules(chosen.model, chosen.rules, facts).save(folder)
    return folder


def _whole(recipe: Recipe) -> tuple[Recipe, Calibrating]:
    return recipe, recipe.calibrate or Calibrating()


def _quick(recipe: Recipe, options: Options) -> tuple[Recipe, Calibrating]:
    """Half the pairs to learn from, fewer prompts, every other dose."""
    _, wishes = _whole(recipe)
    counts = lowered(recipe.prompts, {"learn": max(2, recipe.prompts.learn // 2)}, options, "prompts.")
    sae = lowered(recipe.sae, {"steps": QUICK_STEPS}, options, "sae.")
    doses = wishes.doses if options.by_hand("calibrate.doses") else wishes.doses[::2]
    wishes = replace(wishes, doses=doses, prompts=lowered(wishes.prompts, QUICK, options, "calibrate.prompts."))
    return replace(recipe, prompts=counts, sae=sae), wishes
