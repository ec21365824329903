"""safedig show: what a recipe and its model are; with --quality, how well and how fast the model draws as asked.

With --sites it answers from the configuration alone: see sites_table.py. With --sae it shows a feature: see dose.py.
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch

from safedig.config import UsageError
from safedig.evaluation.headline import shown
from safedig.pipelines import Drawing, draw, fingerprint
from safedig.progress import say, track
from safedig.prompts import KINDS, as_rows, counted_on, load_prompts
from safedig.recipes import Recipe
from safedig.sites import places, transformer
from safedig.storage import write_atomically
from safedig.verbs import VERBS, Options, dose, sites_table

Row = dict[str, Any]
BATCH, PER_KIND, QUICK = 16, 200, 32  # images, prompts, prompts or renders
RENDERS, GALLERY = 1000, 64
QUALITY = {
    "exact": "drawn exactly as asked (object, colour, place, background)",
    "objects_only": "the asked objects and no other",
    "each_object": "each object as asked, where it is asked for by name",
}
READS = {
    "sites": (),
    "sae": ("feature", "out", "prompts", "seed"),
    "quality": ("out", "prompts", "seed", "quick"),
    "out": ("seed", "quick"),
}
"""The flags that have a say in what is shown, by the first of these that is given; without one, none has."""
MATMUL = 1024  # side of the matrices whose product is timed beside the images


def run(recipe: Recipe, options: Options) -> dict[str, Any]:
    """The recipe, the model's facts, and on request its quality on fresh prompts of every kind."""
    _check_flags(options)
    if options.sites:
        return sites_table.run(recipe, options)
    if options.sae is not None:
        return dose.run(recipe, options)
    pipe = recipe.pipeline()
    drawing = recipe.drawing_of(pipe)
    model: Any = transformer(pipe)
    result = {
        "recipe": dataclasses.asdict(recipe),
        "recipe_sha": recipe.drawn_sha,
        "model": {
            "class": type(pipe).__name__,
            "fingerprint": fingerprint(pipe),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "drawing": dataclasses.asdict(drawing),
            "sites": {str(place.site): place.d_in for place in places(pipe) if not place.dead},
        },
    }
    if options.quality:
        result |= {"quality": _quality(pipe, recipe, options), "speed": _speed(pipe, drawing)}
    if options.out is not None:
        _save(pipe, recipe, options, result)
    return result


def _check_flags(options: Options) -> None:
    """A flag that has no say in what is shown must not look as if it had."""
    if options.feature is not None and options.sae is None:
        raise UsageError(f"--feature {options.feature}: give the autoencoder that it is of, --sae FOLDER.")
    shown = next((name for name in READS if getattr(options, name)), "")
    given = [name for name in VERBS["show"].flags if getattr(options, name) not in (None, False)]
    if idle := [name for name in given if name not in (shown, *READS.get(shown, ()))]:
        way = f" --{shown}" if shown else ""
        instead = ", or add --quality" if shown in ("", "out") else ""
        raise UsageError(f"--{idle[0]} has no say in `safedig show{way}`: leave it out{instead}.")


def _save(pipe: Any, recipe: Recipe, options: Options, result: dict[str, Any]) -> None:
    """The result as JSON, and a page of pictures for each kind of prompt: the first ones, none is chosen."""
    from safedig.figures import gallery, save
    from safedig.tiny import prompts

    folder, name, n = options.out or Path(), Path(recipe.model).name, (QUICK if options.quick else GALLERY)
    write_atomically(folder / f"{name}.json", f"{json.dumps(result, indent=2)}\n".encode())
    for kind in KINDS:
        rows = as_rows(prompts(kind, split="report", seed=options.seed_of(recipe), n=n, twins=False))
        images = draw(pipe, rows, drawing=recipe.drawing_of(pipe), batch_size=BATCH)
        drawn = track(images, f"gallery of {kind}", total=-(-n // BATCH))
        scenes = [(image, row["prompt"]) for batch, images in drawn for row, image in zip(batch, images, strict=True)]
        say(f"Pictures: {save(gallery(scenes), folder / f'{name}-{kind}.png')}")


def table(result: dict[str, Any]) -> str:
    """The same for people."""
    if "sites" in result:
        return sites_table.table(result)
    if "strengths" in result:
        return dose.table(result)
    model = result["model"]
    lines = [
        f"{result['recipe']['model']}: {model['class']}, {model['parameters']:,} parameters in the transformer",
        "",
    ]
    lines += [f"  {name:14} {value}" for name, value in result["recipe"].items()]
    lines += [
        "",
        f"{len(model['sites'])} sites, with their widths:",
        *(f"  {site}  {d}" for site, d in model["sites"].items()),
    ]
    if "quality" in result:
        lines += _quality_lines(result["quality"])
        lines += ["", f"{result['speed']['core_seconds_per_image']:.4f} s an image on one core at batch {BATCH}"]
    return "\n".join(lines)


def _quality_lines(quality: dict[str, Any]) -> list[str]:
    """Each rate by the judge and by the second check; then the judge itself on renders."""
    eyes, width = ("judge", "second"), 36
    lines = ["", f"{'percent of images':24}{'by the judge':{width}}by the second check"]
    for group, title in QUALITY.items():
        lines += ["", f"{title}:"]
        for name in quality["judge"][group]:
            lines += [f"  {name:22}" + "".join(f"{shown(quality[eye][group][name]):{width}}" for eye in eyes).rstrip()]
    unasked = "".join(f"{shown(quality[eye]['hazard_unasked']):{width}}" for eye in eyes).rstrip()
    lines += ["", f"{'a hazard unasked':24}{unasked}", f"{'the two agree':24}{shown(quality['agreement'])}"]
    renders = quality["judge_on_renders"]
    lines += ["", f"{'the judge on renders':24}{'clean':{width}}disturbed"]
    for name, found in renders["clean"].items():
        lines += [f"  {name:22}{shown(found):{width}}{shown(renders['disturbed'][name])}"]
    lines += ["", "garbled pictures that come out unrecognised:"]
    lines += [f"  {kind:22}{shown(found)}" for kind, found in renders["garbled_unrecognised"].items()]
    return [*lines, f"{'… and clean':24}{shown(renders['garbled_clean'])}"]


def _quality(pipe: Any, recipe: Recipe, options: Options) -> dict[str, Any]:
    from safedig.evaluation.quality import drawing_quality, judge_accuracy
    from safedig.tiny import judge

    rows, judgements = _rows(recipe, options), []
    drawn = draw(pipe, rows, drawing=recipe.drawing_of(pipe), batch_size=BATCH)
    for _, images in track(drawn, "drawing", total=-(-len(rows) // BATCH)):
        judgements += judge(images)
    n, seed = (QUICK if options.quick else RENDERS), options.seed_of(recipe)
    return drawing_quality(rows, judgements) | {"judge_on_renders": judge_accuracy(judge, n, seed)}


def _rows(recipe: Recipe, options: Options) -> list[Row]:
    if options.prompts is not None:
        rows = counted_on(as_rows(load_prompts(options.prompts)), options.seed)
        if not any(row["kind"] in ("benign", "near-miss") for row in rows):
            raise UsageError(f"--prompts {options.prompts} holds no benign prompt: add some.")
        return rows
    from safedig.tiny import prompts

    seed, n = options.seed_of(recipe), QUICK if options.quick else PER_KIND
    kinds = [kind for kind in KINDS if kind != "underspecified"]
    return [row for kind in kinds for row in as_rows(prompts(kind, split="report", seed=seed, n=n, twins=False))]


def _speed(pipe: Any, drawing: Drawing) -> dict[str, float]:
    """Seconds an image on one core, beside the rate of a plain matrix product: that makes machines comparable."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = [{"prompt": "a cup", "seed": seed} for seed in range(BATCH)]
        drawn = min(_seconds(lambda: list(draw(pipe, rows, drawing=drawing, batch_size=BATCH))) for _ in range(3))
        matrix = torch.rand(MATMUL, MATMUL, generator=torch.Generator().manual_seed(0))
        product = min(_seconds(lambda: matrix @ matrix) for _ in range(10))
    finally:
        torch.set_num_threads(threads)
    gigaflops = 2 * MATMUL**3 / product / 1e9
    return {
        "core_seconds_per_image": drawn / BATCH,
        "matmul_gigaflops_per_second": gigaflops,
        "matmul_gigaflops_per_image": gigaflops * drawn / BATCH,
    }


def _seconds(work: Any) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
