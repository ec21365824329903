"""safedig train: autoencoders for the sites of a recording; an interrupted training goes on with the same command."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from safedig import model_folders
from safedig.activations import processes
from safedig.activations.address import StoreError
from safedig.activations.store import open_store
from safedig.activations.stream import Activations
from safedig.config import UsageError
from safedig.figures import save, training_curves
from safedig.pipelines import fingerprint, load_pipeline
from safedig.progress import say
from safedig.recipes import Recipe, Training
from safedig.sae.checkpoint import sae_folder, save_sae
from safedig.sae.held_out import split
from safedig.sae.model import SparseAutoencoder
from safedig.sae.options import SAEOptions
from safedig.sae.resume import remove_checkpoints
from safedig.sae.splice import loss_recovered
from safedig.sae.train import train
from safedig.sites import Site, resolve
from safedig.skeleton import skeleton
from safedig.verbs import Options

FIGURE = "training.png"
_SHOWN = ("fvu", "cosine", "l0", "dead")


def run(recipe: Recipe, options: Options) -> dict[str, Any]:
    """Train what the recipe's [sae] and [train] say on the recorded store, measure it, and write the SAE folders."""
    out, asked, device = options.folder("sae_checkpoints"), recipe.train or Training(), _device(recipe)
    activations = _recorded(recipe, options)
    pipe = _pipeline(recipe, activations)
    activations = activations.at(*_sites(recipe, pipe))
    rest, aside = split(activations, asked.held_out, recipe.seed)
    runs, place = _runs(recipe.sae, asked), out / Path(recipe.model).name
    folders = _folders(out, recipe, activations, runs)
    unfinished = place / "unfinished"
    say(f"{len(rest.prompts)} images to train on, {len(aside.prompts)} held out; runs at each site: {len(runs)}")
    trained = train(rest, None, runs, held_out=aside, checkpoints=unfinished, keep_checkpoints=True, device=device)
    result = {"model": recipe.model, "fingerprint": activations.model, "recipe_sha": recipe.sha}
    if not processes.Share.of_this_process().first:
        return result
    saved = [_saved(site, *one, recipe) for site in trained for one in zip(folders[site], trained[site], strict=True)]
    written = [_measured(*one, pipe, recipe, aside.prompts[: asked.spliced]) for one in saved]
    curves = {f"{one['site']} ×{one['options']['expansion']} k {one['options']['k']}": one["curve"] for one in written}
    say(f"The curves are {save(training_curves(curves), place / FIGURE)}.")
    remove_checkpoints(unfinished, trained)  # until here the same command goes on without training again
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


def _sites(recipe: Recipe, pipe: Any) -> list[Site]:
    """Those that the recipe names. Where nothing tells what its patterns mean, they are names."""
    if pipe is None and model_folders.described(recipe.model) is None:
        return [Site.parse(name) for name in recipe.sites]
    return resolve(skeleton(recipe.model) if pipe is None else pipe, recipe.sites)


def _runs(sae: SAEOptions, asked: Training) -> list[SAEOptions]:
    pairs = product(asked.expansions or (sae.expansion,), asked.ks or (sae.k,))
    return [replace(sae, expansion=expansion, k=k) for expansion, k in pairs]


def _saved(site: Site, folder: Path, sae: SparseAutoencoder, recipe: Recipe) -> tuple[Site, Path, SparseAutoencoder]:
    """On disk, before anything that takes long or may fail."""
    sae = replace(sae, metadata=sae.metadata | {"recipe_sha": recipe.sha})
    save_sae(sae, folder)
    return site, folder, sae


def _measured(
    site: Site, folder: Path, sae: SparseAutoencoder, pipe: Any, recipe: Recipe, rows: list[Any]
) -> dict[str, Any]:
    """What is told of it, and written again with what the image keeps."""
    image = _image(pipe, recipe, {site: sae}, rows)
    if image:
        sae = replace(sae, metadata=sae.metadata | image)
        save_sae(sae, folder)
    return _result(site, folder, sae)


def _image(pipe: Any, recipe: Recipe, saes: Mapping[Site, SparseAutoencoder], rows: list[Any]) -> dict[str, Any]:
    """How much of the velocity the reconstruction keeps, under `image`; nothing where no images are asked for."""
    if not rows:
        return {}
    (recovered,) = loss_recovered(pipe, saes, rows, drawing=recipe.drawing_of(pipe)).values()
    return {"image": recovered}


def _pipeline(recipe: Recipe, activations: Activations) -> Any:
    """The model, proved to be the recorded one; `None` where it is not at hand and nothing is to be spliced."""
    splice = recipe.train is None or recipe.train.spliced > 0
    if not splice and model_folders.on_disk(recipe.model) is None and model_folders.is_hub_id(recipe.model):
        say(f"'{recipe.model}' is not on this disk: that the recording is of it is taken on trust.")
        return None
    pipe = recipe.pipeline() if splice else load_pipeline(recipe.model, dtype=recipe.dtype)
    given = fingerprint(pipe)
    if given != activations.model:
        raise UsageError(
            f"The recording is of the model {activations.model[:12]}… and '{recipe.model}' is {given[:12]}…: "
            "give --store of a recording of this one, or the recorded one with model=."
        )
    return pipe


def _folders(out: Path, recipe: Recipe, activations: Activations, runs: Sequence[SAEOptions]) -> dict[Site, list[Path]]:
    """The contract's places; where several runs are made of one site, each is named by its width and k."""
    risks: Sequence[str] = sorted({str(row["risk"]) for row in activations.prompts if row.get("risk")}) or ["benign"]
    endings = [f".x{one.expansion}.k{one.k}" for one in runs] if len(runs) > 1 else [""]
    folders = {site: sae_folder(out, recipe.model, site, risks) for site in activations.sites}
    return {site: [place.with_name(place.name + end) for end in endings] for site, place in folders.items()}


def _result(site: Site, folder: Path, sae: SparseAutoencoder) -> dict[str, Any]:
    told = sae.metadata
    kept = (*_SHOWN, "rows", "sigmas", "stream", "measured_on", "image", "doctor", "data", "options", "curve")
    facts = {"site": str(site), "folder": str(folder), "d_in": sae.d_in, "d_sae": sae.d_sae}
    return facts | {name: told[name] for name in kept if name in told}
