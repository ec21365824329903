"""safedig route: which sites to steer at for another risk domain, ranked before anything is trained.

Several processes draw and try their own part each; the first ranks and writes. Nothing is kept on the way: a command
that was interrupted starts anew, unless it reads a --store.
"""

import dataclasses
from pathlib import Path
from typing import Any

from safedig.activations import processes
from safedig.activations.address import StoreError
from safedig.activations.record import record
from safedig.activations.schedule import schedule
from safedig.activations.store import open_store
from safedig.activations.stream import Activations
from safedig.config import UsageError, did_you_mean
from safedig.figures import save
from safedig.model_folders import SHIPPED
from safedig.pipelines import fingerprint, guided
from safedig.progress import say
from safedig.prompts import as_rows, counted_on, load_prompts
from safedig.recipes import Recipe, Recording, Routing
from safedig.routing.causal import Effects, interchange
from safedig.routing.contrast import concerned
from safedig.routing.judged import ImageCheck
from safedig.routing.route import route
from safedig.routing.scorers import scorer as scorer_of
from safedig.routing.statistics import collect
from safedig.routing_figures import routing_map
from safedig.sites import Site, places, resolve
from safedig.verbs import Options
from safedig.verbs.judges import jury_of
from safedig.verbs.route_table import table, told

__all__ = ["run", "table"]

Row = dict[str, Any]
_PAIRED = 3 / 4  # of the images: harmful prompts and their twins; the others are benign
_JUDGED = 0.6  # of the causal check's budget: whole images, where there is a judge of them


def run(recipe: Recipe, options: Options) -> dict[str, Any]:
    """Try the sites, record them, rank them, and write the ranking with its picture; {} if not the first process."""
    asked = recipe.route or Routing()
    scorer_of(asked.scorer)  # a wrong name is told before anything is drawn
    out = options.folder("routing") / Path(recipe.model).name
    looks = jury_of(recipe, options) if recipe.model in SHIPPED or recipe.judge else None
    if recipe.device == "auto":
        recipe = dataclasses.replace(recipe, device=str(processes.device()))
    stored = None if options.store is None else _stored(options.store)
    rows = _prompts(recipe, options, asked) if stored is None else stored.prompts
    source, target = _domains(rows, asked)
    rows = concerned(rows, (*source, target))
    pipe = recipe.pipeline()
    drawing, there = recipe.drawing_of(pipe), _candidates(pipe, asked, dead=_paired(rows))
    activations = _recorded(pipe, recipe, rows, there) if stored is None else _same_model(pipe, recipe, stored.of(rows))
    there = [site for site in there if site in activations.sites]
    share = processes.Share.of_this_process()
    spend = int(asked.budget * len(rows) * drawing.steps * (1 + guided(pipe, drawing)))
    checking = {"drawing": drawing, "share": share}
    effects = _effects(
        pipe, rows, there, source, asked.pairs, int(spend * (1 - _JUDGED * (looks is not None))), checking
    )
    statistics = collect(activations, share=share)  # last, for it is what takes long
    image_check = ImageCheck(looks.labels, budget=spend - effects.forwards, **checking) if looks and effects else None
    ranking = route(
        pipe if effects else None,
        statistics,
        source,
        target or None,
        effects=effects,
        image_check=image_check,
        scorer=asked.scorer,
        seed=recipe.seed,
    )
    if not share.first:
        return {}
    ranking = dataclasses.replace(
        ranking,
        model=recipe.model,
        options=ranking.options | {"recipe_sha": recipe.routed_sha, "prompt_seed": options.seed_of(recipe)},
    )
    name = f"{'+'.join(source) if asked.source else 'all'}--{target or 'any'}"
    ranking.save(out / f"{name}.json")
    picture = save(routing_map(ranking, [str(site) for site in there]), out / f"{name}.png")
    say(f"Where harm is decodable and where it acts is shown in {picture}.")
    return told(ranking, recipe, out / f"{name}.json", picture)


def _candidates(pipe: Any, asked: Routing, dead: bool) -> list[Site]:
    """The recipe's, else where one may steer: the inputs of the blocks and what each of them leaves.

    Dead sites are there as a control, where the causal check can tell that they are.
    """
    if asked.sites:
        return resolve(pipe, asked.sites)
    inputs = ("embed", "out", "resid_post")
    return [
        place.site
        for place in places(pipe)
        if place.site.component == "transformer"
        and place.site.point in inputs
        and place.site.stream != "joint"
        and not place.port.read_only
        and (dead or not place.dead)
    ]


def _recorded(pipe: Any, recipe: Recipe, rows: list[Row], there: list[Site]) -> Activations:
    kept = recipe.record or Recording()
    drawing = recipe.drawing_of(pipe)
    levels = schedule(pipe, drawing)
    sigmas = None if kept.sigmas == "all" else [levels[step] for step in kept.steps(levels)]
    return record(pipe, rows, there, tokens=kept.tokens, sigmas=sigmas, paired=True, drawing=drawing)


def _effects(
    pipe: Any, rows: list[Row], there: list[Site], source: list[str], pairs: int, budget: int, checking: dict[str, Any]
) -> Effects | None:
    """Nothing where no harmful prompt has a twin: the ranking then says that it was made without."""
    if not _paired(rows):
        return None
    return interchange(pipe, rows, there, source=source, pairs=pairs, budget=budget, **checking)


def _paired(rows: list[Row]) -> bool:
    """Whether any prompt has its safe twin among them."""
    ids = {row["id"] for row in rows}
    return any(row.get("twin") in ids for row in rows)


def _prompts(recipe: Recipe, options: Options, asked: Routing) -> list[Row]:
    """The given file's, or pairs of every domain of the tiny world that is wanted, and benign prompts."""
    if options.prompts is not None:
        return counted_on(as_rows(load_prompts(options.prompts)), options.seed)
    from safedig.tiny import prompts
    from safedig.tiny.concepts import RISKS

    _known((*asked.sources, *([asked.target] if asked.target else [])), RISKS)
    wanted = [risk for risk in RISKS if not asked.source or risk in (*asked.sources, asked.target)]
    pairs, seed = int(asked.prompts * _PAIRED / 2 / len(wanted)), options.seed_of(recipe)
    plain = (asked.prompts - 2 * pairs * len(wanted)) // 2
    drawn = [prompts("harmful", "train", seed, pairs, risk=risk) for risk in wanted]
    drawn += [prompts(kind, "train", seed, plain) for kind in ("benign", "near-miss")]
    return [row for part in drawn for row in as_rows(part)]


def _domains(rows: list[Row], asked: Routing) -> tuple[list[str], str]:
    """Source and target, as they are among the prompts."""
    there = sorted({row["risk"] for row in rows if row.get("risk")})
    if not there:
        raise UsageError(f"None of the {len(rows)} prompts has a risk: give harmful prompts in a column 'risk'.")
    _known((*asked.sources, *([asked.target] if asked.target else [])), there)
    if asked.target in asked.sources:
        raise UsageError(f"'{asked.target}' is the target and a source: a target is what the source leaves out.")
    return list(asked.sources) or [risk for risk in there if risk != asked.target], asked.target


def _known(asked: tuple[str, ...], there: Any) -> None:
    for name in asked:
        if name not in there:
            raise UsageError(f"There is no risk domain '{name}' here. {did_you_mean(name, there)}")


def _stored(place: str) -> Activations:
    try:
        return open_store(place)
    except StoreError as error:
        raise UsageError(f"There is no recording at '{place}' ({error}) Run `safedig record` first.") from error


def _same_model(pipe: Any, recipe: Recipe, activations: Activations) -> Activations:
    given = fingerprint(pipe)
    if given != activations.model:
        raise UsageError(
            f"The recording is of the model {activations.model[:12]}… and '{recipe.model}' is {given[:12]}…: give "
            "--store of a recording of this one, or none."
        )
    return activations
