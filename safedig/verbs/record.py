"""safedig record: what passes a recipe's sites, on disk. The same command continues, repairs, or finds it done."""

import dataclasses
from pathlib import Path
from typing import Any

from safedig.activations import processes
from safedig.activations.address import Address
from safedig.activations.forecast import amount
from safedig.activations.record import record
from safedig.activations.schedule import schedule
from safedig.activations.stream import Activations
from safedig.prompts import as_rows, counted_on, load_prompts
from safedig.recipes import Recipe, Recording
from safedig.verbs import Options


def run(recipe: Recipe, options: Options) -> dict[str, Any]:
    """Draw the recipe's training prompts, or those of a file, and keep of them what its [record] says."""
    store = options.store or options.folder(f"runs/record-{Path(recipe.model).name}")
    Address(store)  # one that cannot be reached is told before the model is loaded
    if recipe.device == "auto":
        recipe = dataclasses.replace(recipe, device=str(processes.device()))  # each process has its own
    pipe, kept = recipe.pipeline(), recipe.record or Recording()
    drawing = recipe.drawing_of(pipe)
    levels = schedule(pipe, drawing)
    activations = record(
        pipe,
        _prompts(recipe, options),
        recipe.sites,
        tokens=kept.tokens,
        sigmas=None if kept.sigmas == "all" else [levels[step] for step in kept.steps(levels)],
        store=store,
        drawing=drawing,
    )
    return {"model": recipe.model, "recipe_sha": recipe.sha} | _result(activations)


def table(result: dict[str, Any]) -> str:
    """The same for people."""
    width = max(map(len, result["sites"]))
    lines = [f"{result['model']}: {result['images']:,} images recorded in {result['store']}", ""]
    lines += [f"{'site':{width}} {'rows':>12} {'width':>7}  precision"]
    lines += [
        f"{name:{width}} {site['rows']:>12,} {site['d_in']:>7,}  {site['dtype']}"
        for name, site in result["sites"].items()
    ]
    return "\n".join(
        [*lines, "", f"{amount(result['bytes'])} in {result['shards']:,} shards, proved by their checksums"]
    )


def _result(activations: Activations) -> dict[str, Any]:
    store = activations.store
    assert store is not None
    strips = {site: [shard.strips[str(site)] for shard in store.shards.values()] for site in activations.sites}
    return {
        "fingerprint": activations.model,
        "store": str(store.address),
        "identity": store.identity,
        "images": store.images,
        "tokens": store.facts["tokens"],
        "sites": {
            str(site): {"rows": sum(strip.rows for strip in all_), "d_in": all_[0].width, "dtype": all_[0].dtype}
            for site, all_ in strips.items()
        },
        "bytes": store.size,
        "shards": len(store.shards),
    }


def _prompts(recipe: Recipe, options: Options) -> list[dict[str, Any]]:
    """The given file's, or the tiny world's training prompts in the proportions of the demo, four images each."""
    if options.prompts is not None:
        return counted_on(as_rows(load_prompts(options.prompts)), options.seed)
    from safedig.tiny import prompts

    n = recipe.prompts.learn if recipe.record is None else recipe.record.prompts // 4
    kinds = {"harmful": n, "mixed": n // 2, "benign": n // 2, "near-miss": n // 2}
    return [
        row
        for kind, count in kinds.items()
        if count
        for row in as_rows(prompts(kind, split="train", seed=options.seed_of(recipe), n=count))
    ]
