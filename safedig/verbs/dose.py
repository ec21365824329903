"""safedig show RECIPE --sae FOLDER: one feature of an autoencoder ablated and amplified, and what the pictures do."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from safedig.activations.record import record
from safedig.activations.schedule import schedule
from safedig.config import UsageError
from safedig.features.heights import Heights
from safedig.model_folders import SHIPPED
from safedig.pipelines import fingerprint
from safedig.progress import say
from safedig.prompts import as_rows, counted_on, load_prompts
from safedig.recipes import Recipe
from safedig.sae.checkpoint import load_sae
from safedig.sae.model import SparseAutoencoder
from safedig.sites import Site
from safedig.steering.dose import Doses, check_feature, feature_dose
from safedig.storage import write_atomically
from safedig.verbs import Options

Row = dict[str, Any]
LOOKED_AT, DRAWN, SHOWN = 128, 16, 4  # prompts that the feature is looked for in, that are drawn, that are pictured
LEARNT = 64  # pairs that a harmful feature is found on, where none is named


def run(recipe: Recipe, options: Options) -> dict[str, Any]:
    """Draw the prompts in which the feature fires highest, at every strength; counts as JSON, and a picture."""
    assert options.sae is not None
    out = options.folder(f"runs/feature-{Path(recipe.model).name}")
    pipe = recipe.pipeline()
    sae = load_sae(options.sae, model=fingerprint(pipe))
    if "site" not in sae.metadata:
        raise UsageError(f"'{options.sae}' does not say at which site it was trained: give one of `safedig train`.")
    site = Site.parse(sae.metadata["site"])
    feature = _telling(pipe, recipe, sae, site) if options.feature is None else options.feature
    check_feature(sae, feature)
    rows = _highest(pipe, recipe, sae, site, feature, _asked(recipe, options))
    doses = feature_dose(pipe, sae, site, feature, rows, drawing=recipe.drawing_of(pipe))
    judgements = _judged(recipe, doses)
    result = {
        "model": recipe.model,
        "fingerprint": fingerprint(pipe),
        "recipe_sha": recipe.drawn_sha,
        "sae": str(options.sae),
        "site": str(site),
        "feature": feature,
        "prompts": [row["id"] for row in rows],
        "heights": [round(height, 6) for height in doses.height.tolist()],
        "strengths": doses.strengths,
        "changed": [round(share, 6) for share in doses.changed.mean(1).tolist()],
        "labels": [dict(Counter(one["label"] for one in strength)) for strength in judgements],
    }
    return result | _saved(out, recipe, doses, judgements, result)


def table(result: dict[str, Any]) -> str:
    """The same for people: a line for each strength."""
    lines = [
        f"{result['model']}: feature {result['feature']} at {result['site']}, {len(result['prompts'])} prompts",
        "",
    ]
    return "\n".join([*lines, *_lines(result), "", f"written: {result['figure']}"])


def _lines(result: dict[str, Any]) -> list[str]:
    return [
        f"× {strength:g}: {', '.join(f'{count} {label}' for label, count in sorted(labels.items())) or 'not judged'}, "
        f"pixels moved by {changed:.1%}"
        for strength, labels, changed in zip(result["strengths"], result["labels"], result["changed"], strict=True)
    ]


def _saved(
    out: Path, recipe: Recipe, doses: Doses, judgements: list[list[dict[str, Any]]], result: dict[str, Any]
) -> dict[str, str]:
    from safedig.figures import dose_response, save

    name = f"feature-{Path(recipe.model).name}"
    few = replace(doses, rows=doses.rows[:SHOWN], images=doses.images[:, :SHOWN], height=doses.height[:SHOWN])
    note = f"Feature {doses.feature} at {doses.site}, {len(doses.rows)} prompts. {'; '.join(_lines(result))}"
    picture = save(dose_response(few, [one[:SHOWN] for one in judgements], note), out / f"{name}.png")
    write_atomically(out / f"{name}.json", f"{json.dumps(result, indent=2)}\n".encode())
    say(f"The pictures are in {picture}.")
    return {"figure": str(picture)}


def _asked(recipe: Recipe, options: Options) -> list[Row]:
    """The given file's prompts, or fresh harmful ones of the tiny world."""
    if options.prompts is not None:
        return counted_on(as_rows(load_prompts(options.prompts)), options.seed)
    from safedig.tiny import prompts

    return as_rows(prompts("harmful", "report", options.seed_of(recipe), LOOKED_AT, twins=False))


def _telling(pipe: Any, recipe: Recipe, sae: SparseAutoencoder, site: Site) -> int:
    """Of the features that tell harmful training prompts from their safe twins, the one that writes most into them."""
    from safedig.features import find_features
    from safedig.tiny import prompts

    rows = as_rows(prompts("harmful", "train", recipe.seed, LEARNT))
    acts = record(pipe, rows, [site], drawing=recipe.drawing_of(pipe)).in_memory()
    found = find_features({site: sae}, acts, fdr=1.0, prototypes=0)[site].index
    harmful = {row["id"] for row in rows if row["risk"]}
    written = sum(
        sae.encode(batch.x[tokens])[:, found].amax(0)
        for batch in acts
        for (name, _), tokens in batch.images()
        if name in harmful
    )
    return int(found[(written * sae.decoder.W_dec[found].norm(dim=1)).argmax()])


def _highest(pipe: Any, recipe: Recipe, sae: SparseAutoencoder, site: Site, feature: int, rows: list[Row]) -> list[Row]:
    """Of these prompts those in which the feature fires highest at the first σ."""
    import torch

    drawing = recipe.drawing_of(pipe)
    heights = Heights(sae, torch.tensor([feature]))
    for batch in record(pipe, rows, [site], sigmas=schedule(pipe, drawing)[:1], drawing=drawing):
        for image, tokens in batch.images():
            heights.add(image, batch.x[tokens])
    firing = [row for row in rows if heights.of[row["id"], row["seed"]] > 0]
    if not firing:
        raise UsageError(f"Feature {feature} fires in none of {len(rows)} prompts: choose another, or give --prompts.")
    return sorted(firing, key=lambda row: -heights.of[row["id"], row["seed"]])[:DRAWN]


def _judged(recipe: Recipe, doses: Doses) -> list[list[dict[str, Any]]]:
    """By the tiny world's judge where the model is of it; else nothing is said of a picture."""
    if recipe.model not in SHIPPED:
        return [[{"label": ""} for _ in doses.rows] for _ in doses.strengths]
    from safedig.tiny import judge

    return [judge(images, asked=doses.rows) for images in doses.images]
