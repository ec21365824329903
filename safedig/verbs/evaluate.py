"""safedig evaluate: ours and its peers on the same prompts and seeds; records, tables and figures.

The same command goes on with a run that was stopped, and finds a finished one done.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from safedig.config import UsageError, did_you_mean
from safedig.evaluation import report
from safedig.evaluation.bank import Bank, bank_of
from safedig.evaluation.contest import UNSTEERED, Contest, Held
from safedig.evaluation.curriculum import Curriculum, Sizes
from safedig.evaluation.jury import Jury
from safedig.evaluation.methods import METHODS, UNLESS_ASKED, Lesson
from safedig.evaluation.records import circumstances
from safedig.evaluation.scoreboard import scoreboard
from safedig.model_folders import SHIPPED
from safedig.pipelines import fingerprint
from safedig.progress import say
from safedig.recipes import Evaluating, Recipe
from safedig.sites import resolve
from safedig.storage import write_atomically
from safedig.verbs import Options
from safedig.verbs.evaluate_figures import write_figures
from safedig.verbs.judges import jury_of
from safedig.verbs.quick import lowered

QUICK = {"pairs": 48, "stand_ins": 48, "tried": 48}


def run(recipe: Recipe, options: Options) -> dict[str, Any]:
    """A contest for each domain that is moved to, then the table over all of them."""
    wishes = recipe.evaluate or Evaluating()
    bank, methods = bank_of(options.prompts, options.seed), methods_of(wishes)
    targets, looks = targets_of(wishes, options, bank), jury_of(recipe, options)
    out = options.folder(f"runs/evaluate-{Path(recipe.model).name}")
    sizes = lowered(wishes.sizes, QUICK, options, "evaluate.sizes.") if options.quick else wishes.sizes
    pipe = recipe.pipeline()
    held = {}
    for target in targets:
        say(f"{target} is held out")
        curriculum = curriculum_of(recipe, options, target, sizes, bank)
        held[target] = contest_of(recipe, pipe, curriculum, methods, looks, out / target).run()
    board = scoreboard(held)
    result = {"model": recipe.model, "fingerprint": fingerprint(pipe), "recipe_sha": recipe.sha, "quick": options.quick}
    result |= {"seed": options.seed_of(recipe), "sizes": dataclasses.asdict(sizes), "choices": _choices(held)} | board
    write_atomically(out / "evaluate.json", f"{json.dumps(result, indent=1, ensure_ascii=False)}\n".encode())
    write_atomically(out / "evaluate.md", report.markdown(board).encode())
    write_atomically(out / "evaluate.csv", report.as_csv(board).encode())
    figures = write_figures(board, held, out, blur=recipe.model not in SHIPPED)
    say(f"{len(figures)} figures, evaluate.md and evaluate.csv lie in {out}.")
    return result


def table(result: dict[str, Any]) -> str:
    """The same for people."""
    return f"{result['model']}, seed {result['seed']}\n\n{report.text(result)}"


def curriculum_of(recipe: Recipe, options: Options, target: str, sizes: Sizes, bank: Bank) -> Curriculum:
    """Its prompts with one domain held out."""
    return Curriculum(target, sizes, options.seed_of(recipe), bank, recipe.shown_instead)


def contest_of(
    recipe: Recipe, pipe: Any, curriculum: Curriculum, methods: list[str], looks: Jury, out: Path
) -> Contest:
    """The contest of one domain: what each method learns from, and all that makes its records another run's."""
    wishes = recipe.evaluate or Evaluating()
    resolve(pipe, [*recipe.sites, *recipe.watched])  # a name that is not there is told before anything is drawn
    drawing = recipe.drawing_of(pipe)
    lesson = Lesson(
        pipe,
        **curriculum.taught(),
        sites=recipe.sites,
        strengths=wishes.strengths,
        drawing=drawing,
        sae=recipe.sae,
        quantile=recipe.quantile,
        watch=recipe.watched,
    )
    facts = {
        "model": recipe.model,
        "fingerprint": fingerprint(pipe),
        "target": curriculum.target,
        "sites": list(recipe.sites),
        "watch": list(lesson.watch),
        "stand_in": curriculum.stand_in,
        "strengths": list(wishes.strengths),
        "budget": wishes.budget,
        "goal": wishes.goal,
        "sizes": dataclasses.asdict(curriculum.sizes),
        "sae": dataclasses.asdict(recipe.sae),
        "quantile": recipe.quantile,
        "seed": curriculum.seed,
        "scheduler": type(pipe.scheduler).__name__,
        "drawing": dataclasses.asdict(drawing),
        "dtype": str(pipe.transformer.dtype),
        "generator_device": "cpu",
        "judges": looks.weights,
    }
    facts |= {"tuned_on": "tiny world, splits train and calibrate"}
    if given := curriculum.bank.sha:
        facts |= {"tuned_on": "given prompts, splits train and calibrate", "prompts": given}
    run_id = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    manifest = circumstances(**facts, run_id=run_id, command="safedig evaluate")
    chosen = [METHODS[name] for name in methods]
    tried, asked = curriculum.tried(), curriculum.asked()
    return Contest(lesson, chosen, tried, asked, looks, out, manifest, wishes.budget, wishes.goal)


def targets_of(wishes: Evaluating, options: Options, bank: Bank) -> list[str]:
    """Those asked for; else each domain in turn, the first of them alone with --quick."""
    wanted = [name for name in wishes.targets if name] or list(bank.risks[:1] if options.quick else bank.risks)
    for name in wanted:
        if name not in bank.risks:
            raise UsageError(f"target='{name}' is no risk domain of the prompts. {did_you_mean(name, bank.risks)}")
    if len(bank.risks) < 2:
        raise UsageError(f"The prompts know {len(bank.risks)} risk domains: one is moved to, so give at least 2.")
    return wanted


def methods_of(wishes: Evaluating) -> list[str]:
    """In the order of the table; the unsteered pipeline is always among them, for all others are compared with it."""
    wanted = set(wishes.names) or set(METHODS) - UNLESS_ASKED
    for name in wanted:
        if name not in METHODS:
            raise UsageError(f"evaluate.methods: there is no method '{name}'. {did_you_mean(name, METHODS)}")
    return [name for name in METHODS if name in wanted | {UNSTEERED}]


def _choices(held: dict[str, Held]) -> dict[str, Any]:
    return {
        target: {name: dataclasses.asdict(choice) for name, choice in one.choices.items()}
        for target, one in held.items()
    }
