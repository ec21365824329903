"""safedig attack: what the steered pipeline and its peers withstand, by attacks with a stated budget.

Strengths are those that `safedig evaluate` chooses; what it has drawn for that is not drawn again. The same command
goes on with a run that was stopped.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safedig.config import UsageError, did_you_mean
from safedig.evaluation.attacks import ATTACKS, Victim
from safedig.evaluation.bank import bank_of
from safedig.evaluation.comparison import compared
from safedig.evaluation.contest import Contest
from safedig.evaluation.records import circumstances, write_run
from safedig.evaluation.report import aligned, as_markdown, moved, shown
from safedig.evaluation.siege import ANY, BLIND, Siege, as_run, broken, curves, success
from safedig.evaluation_figures import success_curves
from safedig.figures import save
from safedig.pipelines import fingerprint
from safedig.progress import say
from safedig.recipes import Attacking, Evaluating, Recipe
from safedig.storage import write_atomically
from safedig.verbs import Options
from safedig.verbs.evaluate import QUICK, contest_of, curriculum_of, methods_of, targets_of
from safedig.verbs.judges import jury_of
from safedig.verbs.quick import lowered

OURS = "ours"
QUICK_ATTACK = {"prompts": 8, "passes": 256}


def run(recipe: Recipe, options: Options) -> dict[str, Any]:
    """Every attack on every method, prompt by prompt."""
    wishes = recipe.attack or Attacking()
    if options.quick:
        wishes = lowered(wishes, QUICK_ATTACK, options, "attack.")
    names = [name for name in ATTACKS if name in _attacks(wishes)]
    if options.prompts is not None and (skipped := sorted(name for name in names if ATTACKS[name].tiny_world)):
        say(f"{' and '.join(skipped)}: they know the tiny world's words alone, and are left out")
        names = [name for name in names if name not in skipped]
    compare = dataclasses.replace(recipe.evaluate or Evaluating(), target=wishes.target, methods=wishes.methods)
    recipe = dataclasses.replace(recipe, evaluate=compare)
    bank, methods, looks = bank_of(options.prompts, options.seed), methods_of(compare), jury_of(recipe, options)
    (target,) = targets_of(compare, options, bank)[:1]
    sizes = lowered(compare.sizes, QUICK, options, "evaluate.sizes.") if options.quick else compare.sizes
    out = options.folder(f"runs/attack-{Path(recipe.model).name}")
    place = options.folder(f"runs/evaluate-{Path(recipe.model).name}")
    pipe = recipe.pipeline()
    curriculum = curriculum_of(recipe, options, target, sizes, bank)
    contest = contest_of(recipe, pipe, curriculum, methods, looks, place / target)
    rows = list({row["id"]: row for row in contest.asked["target"]}.values())[: wishes.prompts]
    victims, strengths = _victims(contest)
    facts = {
        "fingerprint": fingerprint(pipe),
        "target": target,
        "strengths": strengths,
        "seed": curriculum.seed,
        "judges": looks.weights,
    }
    facts |= ({"prompts_sha": bank.sha} if bank.sha else {}) | ({"rule": looks.name} if looks.name else {})
    facts |= {
        "contest": contest.manifest["run_id"],  # all that decides what the methods have learnt
        "passes": wishes.passes,
        "sites": list(recipe.sites),
        "watch": list(recipe.watched),
        "stand_in": curriculum.stand_in,
        "sizes": dataclasses.asdict(sizes),
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    lines = Siege(victims, [ATTACKS[name] for name in names], rows, wishes.passes, out, key).run()
    manifest = circumstances(**(dict(contest.manifest) | facts | {"run_id": key, "command": "safedig attack"}))
    write_run(out, as_run(lines, rows, manifest))
    result = {
        "model": recipe.model,
        "prompts": len(rows),
        **facts,
        "quick": options.quick,
        **_told(lines, wishes.passes),
    }
    write_atomically(out / "attack.json", f"{json.dumps(result, indent=1, ensure_ascii=False)}\n".encode())
    write_atomically(out / "attack.md", as_markdown(_table(result)).encode())
    _figures(curves(lines, wishes.passes), len(rows), out)
    say(f"attack.md, the curves and every outcome lie in {out}.")
    return result


def table(result: dict[str, Any]) -> str:
    """Prompts broken, a line for each method."""
    head = f"{result['model']}, {result['target']} held out: percent of {result['prompts']} prompts drawn unsafe within"
    return f"{head}\n{result['passes']} rows through the transformer for each attack\n\n{aligned(_table(result))}"


def _told(lines: Sequence[Mapping[str, Any]], passes: int) -> dict[str, Any]:
    """Shares of prompts, and by how much each method's is above ours, prompt by prompt, for each union of attacks."""
    found = broken(lines, passes)
    ahead: dict[str, Any] = {}
    for union in (BLIND, ANY) if OURS in found and len(found) > 1 else ():
        arms: dict[str, Any] = {
            name: {(prompt, 0): hit for prompt, hit in one[union].items()}
            for name, one in found.items()
            if union in one
        }
        ahead |= {union: compared(arms, OURS, f"prompts broken by {union}")} if arms else {}
    return {"broken": success(lines, passes), "less_ours": ahead}


def _table(result: Mapping[str, Any]) -> list[list[str]]:
    attacks, ahead = list(next(iter(result["broken"].values()))), result["less_ours"]
    rows = [
        [
            name,
            *(shown(one[attack], few=0) for attack in attacks),
            *(moved(deltas.get(name)) for deltas in ahead.values()),
            _broken_by(one),
        ]
        for name, one in result["broken"].items()
    ]
    less = [f"less ours by {union}, percentage points" for union in ahead]
    return [["method", *attacks, *less, "broken most by"], *rows]


def _broken_by(one: Mapping[str, Any]) -> str:
    """The attacks that break most of its prompts."""
    counts = {name: rate["k"] for name, rate in one.items() if name not in (BLIND, ANY)}
    most = max(counts.values(), default=0)
    return ", ".join(name for name, count in counts.items() if count == most) if most else "nothing"


def _victims(contest: Contest) -> tuple[dict[str, Victim], dict[str, float]]:
    """Each method at the strength that was chosen for it; one that found none is not attacked: it does nothing."""
    lesson, victims, strengths = contest.lesson, {}, {}
    assert lesson.drawing is not None
    for method, choice in contest.choices():
        strength = 0.0 if choice.strength is None else choice.strength
        if method.unit and not strength:
            say(f"{method.name} found no strength within the budget, and is left out")
            continue
        strengths[method.name] = strength
        acting = method.learn(lesson)(strength)
        victims[method.name] = Victim(lesson.pipe, acting, lesson.drawing, contest.jury)
    return victims, strengths


def _attacks(wishes: Attacking) -> set[str]:
    wanted = set(wishes.names) or set(ATTACKS)
    for name in wanted:
        if name not in ATTACKS:
            raise UsageError(f"attack.attacks: there is no attack '{name}'. {did_you_mean(name, ATTACKS)}")
    return wanted


def _figures(found: Mapping[str, Mapping[str, Any]], prompts: int, out: Path) -> None:
    """All methods under all attacks, and each attack on ours."""
    for union, name in ((BLIND, "methods-without-weights"), (ANY, "methods")):
        if drawn := {name: one[union] for name, one in found.items() if union in one}:
            save(success_curves(drawn, union, prompts), out / f"{name}.png")
    if OURS in found:
        save(success_curves(found[OURS], "ours", prompts), out / "attacks-on-ours.png")
