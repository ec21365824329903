"""safedig adapt: decoders for a target domain, beside the encoders that `safedig train` has made of a source domain."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safedig.activations.address import StoreError
from safedig.activations.store import open_store
from safedig.activations.stream import Activations
from safedig.adaptation import FineTuning, adapt, fine_tune, movement
from safedig.config import UsageError
from safedig.features import Features, find_features
from safedig.figures import decoder_movement, save
from safedig.progress import say
from safedig.recipes import Adapting, Recipe
from safedig.sae.checkpoint import load_sae, sae_folder, save_sae
from safedig.sae.model import SparseAutoencoder
from safedig.sites import Site
from safedig.verbs import Options

_ROWS = ("zero_shot", "bias_only", "adapted", "fine_tuned")


def run(recipe: Recipe, options: Options) -> dict[str, Any]:
    """Refit the decoders of the source's SAEs to the target's recording, and write them beside the source's."""
    asked, out, name = recipe.adapt or Adapting(), options.folder("sae_checkpoints"), Path(recipe.model).name
    source = _recorded(options.store or f"runs/record-{name}", "source", "give its place with --store")
    target = _recorded(asked.target or f"runs/record-{name}-target", "target", "give its place with adapt.target=PLACE")
    saes = _trained(out, recipe, source)
    features = find_features(saes, source) if "contrast" in asked.objectives else {}
    written, adapted = [], {}
    for objective in asked.objectives:
        adapted = _adapted(objective, saes, features, target, source, asked)
        for site, sae in adapted.items():
            folder = sae_folder(out, recipe.model, site, _risks(source), _risks(target), objective)
            save_sae(replace(sae, metadata=sae.metadata | {"recipe_sha": recipe.sha}), folder)
            written.append({"site": str(site), "objective": objective, "folder": str(folder)} | _told(sae))
        if objective == "reconstruction":
            _picture(out / name / f"movement-{'+'.join(_risks(target))}.png", saes, adapted, features)
    facts = {"model": recipe.model, "fingerprint": source.model, "recipe_sha": recipe.sha}
    return facts | {"source": _risks(source), "target": _risks(target), "decoders": written}


def table(result: dict[str, Any]) -> str:
    """The same for people."""
    width = max(len(one["site"]) for one in result["decoders"])
    lines = [f"{result['model']}: from {', '.join(result['source'])} to {', '.join(result['target'])}"]
    whole = [one for one in result["decoders"] if one["objective"] == "reconstruction"]
    if whole:
        lines += ["", "reconstruction: share of variance unexplained (FVU) and active features (L0), held-out prompts"]
        lines += [f"{'site':{width}}  {'domain':6}  " + "".join(f"{row.replace('_', ' '):>18}" for row in _ROWS)]
    for one in whole:
        for domain, rows in one["domains"].items():
            shown = [f"{rows[row]['fvu']:.4f} ({rows[row]['l0']:.1f})" if row in rows else "" for row in _ROWS]
            lines.append(f"{one['site']:{width}}  {domain:6}  " + "".join(f"{cell:>18}" for cell in shown))
    for one in whole:
        moved = one["movement"]
        turned = f"{moved['rows']:,} rows moved" + (
            f", by {moved['angle']['median']:.1f}° (median)" if moved["rows"] else ""
        )
        kept = (
            "; the source's decoder stays: the target gains no more from another than the source" if one["kept"] else ""
        )
        equal = "" if one["codes_equal"] else "; codes are not those of the source (mean aligned)"
        lines.append(f"{one['site']:{width}}  {turned}, {len(one['silent']):,} features silent{kept}{equal}")
    for one in result["decoders"]:
        if one["objective"] == "contrast":
            before, after = one["unexplained"]["zero_shot"], one["unexplained"]["adapted"]
            lines += [
                "",
                f"{one['site']:{width}}  contrast: {after:.3f} of ‖Δ‖² unexplained ({before:.3f} by the source's rows)",
            ]
    return "\n".join([*lines, "", *(f"written: {one['folder']}" for one in result["decoders"])])


def _adapted(
    objective: str,
    saes: Mapping[Site, SparseAutoencoder],
    features: Mapping[Site, Features],
    target: Activations,
    source: Activations,
    asked: Adapting,
) -> dict[Site, SparseAutoencoder]:
    tuned = None
    if objective == "reconstruction" and asked.fine_tune:
        tuned = fine_tune(saes, target, replay=source, options=FineTuning(steps=asked.fine_tune, share=asked.share))
    return adapt(
        saes,
        target,
        features or None,
        replay=source,
        objective=objective,
        share=asked.share,
        pseudo_count=asked.pseudo_count,
        align_mean=asked.align_mean and objective == "reconstruction",
        fine_tuned=tuned,
    )


def _recorded(place: str, role: str, otherwise: str) -> Activations:
    try:
        return open_store(place)
    except StoreError as error:
        raise UsageError(
            f"There is no recording of the {role} domain at '{place}' ({error}) Run `safedig record` with the same "
            f"recipe, the {role}'s --prompts and --out {place} first, or {otherwise}."
        ) from error


def _trained(out: Path, recipe: Recipe, source: Activations) -> dict[Site, SparseAutoencoder]:
    """The SAEs of the source's recording, proved to be of its model and sites."""
    folders = {site: sae_folder(out, recipe.model, site, _risks(source)) for site in source.sites}
    there = {site: folder for site, folder in folders.items() if folder.is_dir()}
    if not there:
        raise UsageError(
            f"There are no SAEs of this recording below '{out}' (looked for {next(iter(folders.values()))}): run "
            "`safedig train` with the same recipe and --store first, or give their root with --out."
        )
    for site in folders.keys() - there.keys():
        say(f"'{site}' has no SAE in '{folders[site]}': it is left out.")
    return {site: load_sae(folder, site=site, model=source.model) for site, folder in there.items()}


def _risks(activations: Activations) -> list[str]:
    return sorted({str(row["risk"]) for row in activations.prompts if row.get("risk")}) or ["benign"]


def _told(sae: SparseAutoencoder) -> dict[str, Any]:
    return dict(sae.metadata["adaptation"])


def _picture(
    path: Path,
    before: Mapping[Site, SparseAutoencoder],
    after: Mapping[Site, SparseAutoencoder],
    features: Mapping[Site, Features],
) -> None:
    changes = {str(site): movement(before[site].decoder, sae.decoder) for site, sae in after.items()}
    harmful = {str(site): found.index for site, found in features.items()}
    say(f"How the decoders moved is shown in {save(decoder_movement(changes, harmful), path)}.")
