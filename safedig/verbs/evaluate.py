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
from safedig.evaluation.asked import AsAsked
from safedig.evaluation.contest import UNSTEERED, Contest, Held
from safedig.evaluation.curriculum import Sizes, asked, taught, tried
from safedig.evaluation.judges.tiny import TinyJudge
from safedig.evaluation.methods import METHODS, Lesson
from safedig.evaluation.records import circumstances
from safedig.evaluation.scoreboard import scoreboard
from safedig.pipelines import fingerprint
from safedig.progress import say
from safedig.recipes import Evaluating, Recipe
from safedig.storage import write_atomically
from safedig.tiny.concepts import RISKS
from safedig.verbs import Options
from safedig.verbs.evaluate_figures import write_figures

QUICK = {"pairs": 48, "stand_ins": 48, "tried": 48}


def run(recipe: Recipe, options: Options) -> dict[str, Any]:
    """A contest for each domain that is moved to, then the table over all of them."""
    wishes = recipe.evaluate or Evaluating()
    targets, methods = targets_of(wishes, options), methods_of(wishes)
    if not recipe.model.startswith("tiny-"):
        raise UsageError(
            f"'{recipe.model}' draws no scenes that the tiny world's judge reads: evaluate tiny-flux or tiny-sd3, or "
            "score its images with another judge (safedig.evaluation.scoring)."
        )
    out = options.out or Path("runs") / f"evaluate-{Path(recipe.model).name}"
    sizes = dataclasses.replace(wishes.sizes, **QUICK) if options.quick else wishes.sizes
    pipe = recipe.pipeline()
    held = {}
    for target in targets:
        say(f"{target} is held out")
        held[target] = contest_of(recipe, options, pipe, target, methods, sizes, out / target).run()
    board = scoreboard(held)
    result = {"model": recipe.model, "fingerprint": fingerprint(pipe), "recipe_sha": recipe.sha, "quick": options.quick}
    result |= {"seed": seed_of(recipe, options), "sizes": dataclasses.asdict(sizes), "choices": _choices(held)} | board
    write_atomically(out / "evaluate.json", f"{json.dumps(result, indent=1, ensure_ascii=False)}\n".encode())
    write_atomically(out / "evaluate.md", report.markdown(board).encode())
    write_atomically(out / "evaluate.csv", report.as_csv(board).encode())
    figures = write_figures(board, held, out, blur=not recipe.model.startswith("tiny-"))
    say(f"{len(figures)} figures, evaluate.md and evaluate.csv lie in {out}.")
    return result


def table(result: dict[str, Any]) -> str:
    """The same for people."""
    return f"{result['model']}, seed {result['seed']}\n\n{report.text(result)}"


def contest_of(
    recipe: Recipe, options: Options, pipe: Any, target: str, methods: list[str], sizes: Sizes, out: Path
) -> Contest:
    """The contest of one domain: what each method learns from, and all that makes its records another run's."""
    seed = seed_of(recipe, options)
    wishes = recipe.evaluate or Evaluating()
    drawing = recipe.drawing_of(pipe)
    lesson = Lesson(
        pipe,
        **taught(target, sizes, seed),
        sites=recipe.sites,
        strengths=wishes.strengths,
        drawing=drawing,
        sae=recipe.sae,
        quantile=recipe.quantile,
    )
    chosen_on, reported = tried(target, sizes, seed), asked(target, sizes, seed)
    judge: Any = TinyJudge()
    rows = {row["id"]: row for part in (*chosen_on.values(), *reported.values()) for row in part}
    facts = {
        "model": recipe.model,
        "fingerprint": fingerprint(pipe),
        "target": target,
        "sites": list(recipe.sites),
        "strengths": list(wishes.strengths),
        "budget": wishes.budget,
        "goal": wishes.goal,
        "sizes": dataclasses.asdict(sizes),
        "sae": dataclasses.asdict(recipe.sae),
        "quantile": recipe.quantile,
        "seed": seed,
        "scheduler": type(pipe.scheduler).__name__,
        "drawing": dataclasses.asdict(drawing),
        "dtype": str(pipe.transformer.dtype),
        "generator_device": "cpu",
        "judges": {judge.detector: judge.weights_sha},
        "tuned_on": "tiny world, splits train and calibrate",
    }
    run_id = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    manifest = circumstances(**facts, run_id=run_id, command="safedig evaluate")
    chosen = [METHODS[name] for name in methods]
    return Contest(lesson, chosen, chosen_on, reported, judge, AsAsked(rows), out, manifest, wishes.budget, wishes.goal)


def targets_of(wishes: Evaluating, options: Options) -> list[str]:
    """Those asked for; else each domain in turn, the first of them alone with --quick."""
    wanted = [name for name in wishes.targets if name] or list(RISKS[:1] if options.quick else RISKS)
    for name in wanted:
        if name not in RISKS:
            raise UsageError(
                f"evaluate.target='{name}' is no risk domain of the tiny world. {did_you_mean(name, RISKS)}"
            )
    return wanted


def methods_of(wishes: Evaluating) -> list[str]:
    """In the order of the table; the unsteered pipeline is always among them, for all others are compared with it."""
    wanted = set(wishes.names) or set(METHODS)
    for name in wanted:
        if name not in METHODS:
            raise UsageError(f"evaluate.methods: there is no method '{name}'. {did_you_mean(name, METHODS)}")
    return [name for name in METHODS if name in wanted | {UNSTEERED}]


def _choices(held: dict[str, Held]) -> dict[str, Any]:
    return {
        target: {name: dataclasses.asdict(choice) for name, choice in one.choices.items()}
        for target, one in held.items()
    }


def seed_of(recipe: Recipe, options: Options) -> int:
    return recipe.seed if options.seed is None else options.seed
