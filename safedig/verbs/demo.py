"""safedig demo: from the shipped weights to the steered result, a table and a picture."""

import dataclasses
import hashlib
import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from safedig.config import UsageError
from safedig.evaluation.headline import headline, shown
from safedig.evaluation.intervals import Rate, clustered_rate
from safedig.evaluation.records import Record, Run, Score, circumstances, image_sha, prompt_sha, write_run
from safedig.figures import Pair, comparison, save
from safedig.pipelines import Drawing, draw, fingerprint
from safedig.progress import say, track
from safedig.prompts import as_rows, counted_on, load_prompts
from safedig.recipes import Recipe
from safedig.sites import resolve
from safedig.steering.setting import set_to
from safedig.storage import write_atomically
from safedig.verbs import Options
from safedig.verbs.quick import lowered

Row = dict[str, Any]
HARMFUL, BENIGN = ("harmful", "mixed"), ("benign", "near-miss")
BATCH = 16  # images
BUNDLE = "steering"  # folder
QUICK = 4  # times fewer prompts
QUICK_STEPS = 1000  # of SAE training, at most: recipes of released models ask for many more


@dataclass(frozen=True)
class Seen:
    """Images of some prompts and what the judge says of each."""

    rows: list[Row]
    images: Float[Tensor, "n 3 height width"]
    judgements: list[dict[str, Any]]


def run(recipe: Recipe, options: Options) -> dict[str, Any]:
    """Record, train one SAE a site, find the harmful features, steer, judge; the rates, nested as in the contract."""
    recipe = _quick(recipe, options) if options.quick else recipe
    out = options.folder(f"runs/demo-{Path(recipe.model).name}")
    pipe = recipe.pipeline()
    drawing = recipe.drawing_of(pipe)
    asked = {"source": _report(recipe, options, HARMFUL), "benign": _report(recipe, options, BENIGN)}
    steering = _learn(pipe, recipe)
    seen = {
        (role, method): _look(
            pipe, drawing, rows, steering if method == "steered" else None, f"{role} prompts, {method}"
        )
        for role, rows in asked.items()
        for method in ("unsteered", "steered")
    }
    made_from = {"model": recipe.model, "fingerprint": fingerprint(pipe), "recipe_sha": recipe.sha}
    result = made_from | {"seed": options.seed_of(recipe)} | _rates(seen)
    write_run(out, _as_run(pipe, recipe, result, seen, [str(site) for site in steering.rules]))
    steering.save(out / BUNDLE)
    write_atomically(out / "demo.json", f"{json.dumps(result, indent=2)}\n".encode())
    picture = save(_picture(recipe, result, seen), out / "demo.png")
    say(f"The picture is {picture}; the records, and the steering in {BUNDLE}/, lie beside it.")
    return result


def table(result: dict[str, Any]) -> str:
    """The rates, unsteered beside steered."""
    source = [
        (name, result["unsteered"][name], result["steered"][name])
        for name in ("not_clean", "unsafe", "unrecognised", "empty")
    ]
    benign = result["benign"]
    lines = [f"{result['model']}, seed {result['seed']}; percent of images, [95 % interval], counts", ""]
    lines += [f"{'harmful prompts':28}{'unsteered':30}steered"]
    lines += [f"  {name.replace('_', ' '):26}{shown(before):30}{shown(after)}" for name, before, after in source]
    lines += ["", f"{'benign prompts':28}{'unsteered':30}steered"]
    lines += [f"  {'drawn as asked':26}{shown(benign['unsteered']):30}{shown(benign['steered'])}"]
    lines += [f"  {'bit-identical':26}{'':30}{shown(benign['bit_identical'])}"]
    return "\n".join(lines)


def _learn(pipe: Any, recipe: Recipe) -> Any:
    """What to replace and where, from the split `train`; from what dose on, from the benign prompts of `calibrate`."""
    from safedig.verbs.learning import drawn, learn

    quiet = drawn("calibrate", dict.fromkeys(BENIGN, recipe.prompts.quiet), recipe.seed)
    learnt = learn(pipe, recipe, recipe.sites, quiet)
    return set_to(learnt.steering("replace", resolve(pipe, recipe.sites), 1 - recipe.quantile), recipe.strength)


def _report(recipe: Recipe, options: Options, kinds: tuple[str, ...]) -> list[Row]:
    """Prompts nobody has learnt from: the given file's, or fresh ones of the tiny world."""
    if options.prompts is None:
        from safedig.tiny import prompts

        n = recipe.prompts.report if kinds is HARMFUL else recipe.prompts.benign
        rows = as_rows(prompts(kinds[0], split="report", seed=options.seed_of(recipe), n=n, twins=False))
        return [row for row in rows if row["kind"] in kinds]
    rows = [row for row in as_rows(load_prompts(options.prompts)) if row["kind"] in kinds]
    if not rows:
        raise UsageError(f"--prompts {options.prompts} holds no prompt of kind {' or '.join(kinds)}: add some.")
    return counted_on(rows, options.seed)


def _look(pipe: Any, drawing: Drawing, rows: list[Row], steering: Any, description: str) -> Seen:
    from safedig.tiny import judge

    images, judgements = [], []
    with steering.apply(pipe) if steering is not None else nullcontext():
        drawn = draw(pipe, rows, drawing=drawing, batch_size=BATCH)
        for asked, batch in track(drawn, description, total=-(-len(rows) // BATCH)):
            images.append(batch)
            judgements += judge(batch, asked=asked)
    return Seen(rows, torch.cat(images), judgements)


def _rates(seen: dict[tuple[str, str], Seen]) -> dict[str, Any]:
    before, after = seen["benign", "unsteered"], seen["benign", "steered"]
    ids = [row["id"] for row in before.rows]
    same = [bool(torch.equal(one, other)) for one, other in zip(before.images, after.images, strict=True)]
    return {
        method: headline(seen["source", method].judgements, [row["id"] for row in seen["source", method].rows])
        for method in ("unsteered", "steered")
    } | {
        "benign": {
            "unsteered": _as_asked(before),
            "steered": _as_asked(after),
            "bit_identical": clustered_rate(same, ids),
        }
    }


def _as_asked(seen: Seen) -> Rate:
    return clustered_rate([one["label"] == "clean" for one in seen.judgements], [row["id"] for row in seen.rows])


def _picture(recipe: Recipe, result: dict[str, Any], seen: dict[tuple[str, str], Seen]) -> Any:
    """The first prompts of the report, as they come: none is chosen."""
    before, after = seen["source", "unsteered"], seen["source", "steered"]
    pairs = [
        Pair(row["prompt"], one, other, judged, judged_after)
        for row, one, other, judged, judged_after in zip(
            before.rows, before.images, after.images, before.judgements, after.judgements, strict=True
        )
    ][: recipe.prompts.shown]
    rates = (("unsteered", "not_clean"), ("steered", "not_clean"), ("steered", "unsafe"))
    counts = [f"{row} {name.replace('_', ' ')} {shown(result[row][name]).strip()}" for row, name in rates]
    return comparison(pairs, note=f"All {len(before.rows)} harmful prompts: " + " · ".join(counts))


def _as_run(
    pipe: Any, recipe: Recipe, result: dict[str, Any], seen: dict[tuple[str, str], Seen], sites: list[str]
) -> Run:
    facts = dataclasses.asdict(recipe) | {key: result[key] for key in ("fingerprint", "seed")}
    run_id = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    records, scores = [], {}
    for (role, method), one in seen.items():
        for row, image, judgement in zip(one.rows, one.images, one.judgements, strict=True):
            sha = image_sha(image)
            scores[sha] = Score(sha, "tiny.judge", scores=judgement)
            records.append(
                Record(
                    run_id=run_id,
                    method=method,
                    prompt_id=row["id"],
                    prompt_sha=prompt_sha(row["prompt"]),
                    seed=row["seed"],
                    image_sha=sha,
                    role=role,
                    domains=(row["risk"],) if row["risk"] else (),
                    operator="Replace" if method == "steered" else "",
                    strength=recipe.strength if method == "steered" else 0.0,
                    site=", ".join(sites) if method == "steered" else "",
                )
            )
    facts |= {
        "scheduler": type(pipe.scheduler).__name__,
        "drawing": dataclasses.asdict(recipe.drawing_of(pipe)),
        "dtype": str(pipe.transformer.dtype),
        "generator_device": "cpu",
        "tuned_on": "tiny world, split train",
        "command": "safedig demo",
    }
    manifest = circumstances(**facts)
    return Run(tuple(records), tuple(scores.values()), manifest)


def _quick(recipe: Recipe, options: Options) -> Recipe:
    counts = {name: max(1, count // QUICK) for name, count in dataclasses.asdict(recipe.prompts).items()}
    del counts["quiet"]  # with fewer prompts nothing would vouch for the gates
    prompts = lowered(recipe.prompts, counts | {"shown": 4}, options, "prompts.")
    sae = lowered(recipe.sae, {"steps": QUICK_STEPS}, options, "sae.")
    return dataclasses.replace(recipe, prompts=prompts, sae=sae)
