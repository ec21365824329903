"""safedig train: autoencoders for the sites of a recording; an interrupted training goes on with the same command."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from safedig.activations import processes
from safedig.activations.address import StoreError
from safedig.activations.store import open_store
from safedig.activations.stream import Activations
from safedig.config import UsageError
from safedig.figures import save, training_curves
from safedig.pipelines import fingerprint
from safedig.progress import say
from safedig.recipes import Recipe, Training
from safedig.sae.checkpoint import sae_folder, save_sae
from safedig.sae.held_out import split
from safedig.sae.model import SparseAutoencoder
from safedig.sae.options import SAEOptions
from safedig.sae.splice import loss_recovered
from safedig.sae.train import train
from safedig.sites import Site
from safedig.verbs import Options

FIGURE = "training.png"
_SHOWN = ("fvu", "cosine", "l0", "dead")


def run(recipe: Recipe, options: Options) -> dict[str, Any]:
    """Train what the recipe's [sae] and [train] say on the recorded store, measure it, and write the SAE folders."""
    asked, device = recipe.train or Training(), _device(recipe)
    activations = _recorded(recipe, options)
    pipe = _pipeline(recipe, activations) if asked.spliced else None
    rest, aside = split(activations, asked.held_out, recipe.seed)
    out, runs = options.out or Path("sae_checkpoints"), _runs(recipe.sae, asked)
    place = out / Path(recipe.model).name
    say(f"{len(rest.prompts)} images to train on, {len(aside.prompts)} held out; runs at each site: {len(runs)}")
    trained = train(rest, None, runs, held_out=aside, checkpoints=place / "unfinished", device=device)
    result = {"model": recipe.model, "fingerprint": activations.model, "recipe_sha": recipe.sha}
    if not processes.Share.of_this_process().first:
        return result
    written = []
    for site, saes in trained.items():
        for one, sae in zip(runs, saes, strict=True):
            image = _image(pipe, recipe, {site: sae}, aside.prompts[: asked.spliced])
            sae = replace(sae, metadata=sae.metadata | image | {"recipe_sha": recipe.sha})
            folder = _folder(out, recipe, site, activations, one if len(runs) > 1 else None)
            save_sae(sae, folder)
            written.append(_result(site, folder, sae))
    curves = {f"{one['site']} ×{one['options']['expansion']} k {one['options']['k']}": one["curve"] for one in written}
    say(f"The curves are {save(training_curves(curves), place / FIGURE)}.")
    return result | {"saes": [{name: one[name] for name in one if name != "curve"} for one in written]}


def table(result: dict[str, Any]) -> str:
    """The same for people."""
    width = max(len(sae["site"]) for sae in result["saes"])
    lines = [
        f"{result['model']}: measured on prompts that were held out",
        "",
        f"{'site':{width}} {'width':>7} {'FVU':>8} {'cosine':>8} {'L0':>7} {'dead':>7} {'predicted':>10} "
        f"{'v error':>8} {'recovered':>10}",
    ]
    for sae in result["saes"]:
        image = sae.get("image") or {"velocity_error": float("nan"), "recovered": float("nan")}
        lines.append(
            f"{sae['site']:{width}} {sae['d_sae']:>7,} {sae['fvu']:>8.4f} {sae['cosine']:>8.4f} {sae['l0']:>7.1f} "
            f"{sae['dead']:>7.1%} {sae['doctor']['dead_predicted']:>10.1%} {image['velocity_error']:>8.4f} "
            f"{image['recovered']:>10.1%}"
        )
    streams = {
        sae["stream"]: [one for one in result["saes"] if one["stream"] == sae["stream"]] for sae in result["saes"]
    }
    lines += ["", "FVU by stream and σ"]
    for stream, members in streams.items():
        levels = dict.fromkeys(sigma for sae in members for sigma in sae["sigmas"])
        for sigma in levels:
            there = [sae["sigmas"][sigma]["fvu"] for sae in members if sigma in sae["sigmas"]]
            lines.append(f"  {stream:8} {sigma:>8}  {', '.join(f'{fvu:.4f}' for fvu in there)}")
    return "\n".join([*lines, "", *(f"written: {sae['folder']}" for sae in result["saes"])])


def _device(recipe: Recipe) -> str:
    return str(processes.device()) if recipe.device == "auto" else recipe.device or "cpu"


def _recorded(recipe: Recipe, options: Options) -> Activations:
    """What `safedig record` has kept; it is named where that is missing."""
    place = options.store or str(Path("runs") / f"record-{Path(recipe.model).name}")
    try:
        return open_store(place)
    except StoreError as error:
        raise UsageError(
            f"There is nothing to train on at '{place}' ({error}) Run `safedig record` with the same recipe first, or "
            "give the place of a recording with --store."
        ) from error


def _runs(sae: SAEOptions, asked: Training) -> list[SAEOptions]:
    pairs = product(asked.expansions or (sae.expansion,), asked.ks or (sae.k,))
    return [replace(sae, expansion=expansion, k=k) for expansion, k in pairs]


def _image(pipe: Any, recipe: Recipe, saes: Mapping[Site, SparseAutoencoder], rows: list[Any]) -> dict[str, Any]:
    """How much of the velocity the reconstruction keeps, under `image`; nothing where the model was not loaded."""
    if pipe is None:
        return {}
    (recovered,) = loss_recovered(pipe, saes, rows, drawing=recipe.drawing_of(pipe)).values()
    return {"image": recovered}


def _pipeline(recipe: Recipe, activations: Activations) -> Any:
    pipe = recipe.pipeline()
    given = fingerprint(pipe)
    if given != activations.model:
        raise UsageError(
            f"The recording is of the model {activations.model[:12]}… and '{recipe.model}' is {given[:12]}…: "
            "give --store of a recording of this one, or train.spliced=0 to train without it."
        )
    return pipe


def _folder(out: Path, recipe: Recipe, site: Site, activations: Activations, one: SAEOptions | None) -> Path:
    """The contract's place; where several runs are made of one site, each is named by its width and k."""
    risks: Sequence[str] = sorted({str(row["risk"]) for row in activations.prompts if row.get("risk")}) or ["benign"]
    folder = sae_folder(out, recipe.model, site, risks)
    return folder if one is None else folder.with_name(f"{folder.name}.x{one.expansion}.k{one.k}")


def _result(site: Site, folder: Path, sae: SparseAutoencoder) -> dict[str, Any]:
    told = sae.metadata
    kept = (*_SHOWN, "rows", "sigmas", "stream", "measured_on", "image", "doctor", "data", "options", "curve")
    facts = {"site": str(site), "folder": str(folder), "d_in": sae.d_in, "d_sae": sae.d_sae}
    return facts | {name: told[name] for name in kept if name in told}
