"""safedig generate: draw prompts steered or kept from images, unsteered beside it, and say what was done to each."""

import io
import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from safedig.config import UsageError
from safedig.denoiser import NegationSet, SafeDenoiser
from safedig.denoiser.applied import Told
from safedig.pipelines import Drawing, draw, fingerprint
from safedig.progress import say, track
from safedig.prompts import as_rows, counted_on, load_prompts
from safedig.recipes import Recipe
from safedig.steering.applied import Touch
from safedig.steering.steering import Steering
from safedig.storage import write_atomically
from safedig.verbs import Options

Row = dict[str, Any]
BATCH = 16  # images


def run(recipe: Recipe, options: Options) -> dict[str, Any]:
    """Draw steered, and unsteered from the same seeds if asked; every PNG is written as soon as it is drawn."""
    if options.bundle is None and options.negation is None:
        raise UsageError(
            "There is no steering: give --bundle, the folder of Steering.save or a Hub id, or --negation, a folder of "
            "images to stay away from."
        )
    out = options.folder(f"runs/generate-{Path(recipe.model).name}")
    rows, steering = asked(recipe, options), None if options.bundle is None else Steering.load(options.bundle)
    pipe = recipe.pipeline()
    drawing = recipe.drawing_of(pipe)
    acting = _Acting(steering, _denoiser(pipe, drawing, options.negation))
    images, after = [], []
    for number, (row, (image, done)) in enumerate(zip(rows, _drawn(pipe, drawing, rows, acting), strict=True)):
        path = _save(pipe, image, out / f"{number:03}-steered.png")
        images.append({"id": row["id"], "seed": row["seed"], "steered": path} | done)
        after += [image] if options.compare else []
    result = {"model": recipe.model, "fingerprint": fingerprint(pipe), "bundle": options.bundle, "images": images}
    if acting.denoiser is not None:
        result |= {"negation": str(options.negation), "negatives": len(acting.denoiser.negation)}
    if options.compare:
        before = [image for image, _ in _drawn(pipe, drawing, rows, None)]
        for number, (told, one, other) in enumerate(zip(images, before, after, strict=True)):
            told["unsteered"] = _save(pipe, one, out / f"{number:03}-unsteered.png")
            told["identical"] = bool(torch.equal(one, other))
        result["page"] = str(_page(rows, before, after, out / "compare.png"))
    write_atomically(out / "generate.json", f"{json.dumps(result, indent=2)}\n".encode())
    return result


def table(result: dict[str, Any]) -> str:
    """The same for people: a line for each image."""
    ways = [f"steered by {result['bundle']}"] if result["bundle"] is not None else []
    ways += [f"kept from {result['negatives']} images in {result['negation']}"] if "negation" in result else []
    lines = [f"{result['model']}, {' and '.join(ways)}", ""]
    for one in result["images"]:
        acts = [
            f"{site}: {told['touched']} of {told['passed']} tokens, by up to {told['moved']:.1%}"
            for site, told in one["sites"].items()
            if told["touched"]
        ]
        if (told := one.get("denoiser")) and told["sigmas"]:
            acts.append(f"x̂0 moved in {len(told['sigmas'])} steps, by up to {told['moved']:.1%}")
        same = "; bit-identical" if one.get("identical") else ""
        lines.append(f"{one['steered']}  {'; '.join(acts) or 'no gate has opened'}{same}")
    return "\n".join([*lines, *([f"unsteered beside steered: {result['page']}"] if "page" in result else [])])


def asked(recipe: Recipe, options: Options) -> list[Row]:
    """The prompt of the command, or those of the file; `--seed` counts on from one image to the next."""
    if options.prompts is None and not (options.prompt or "").strip():
        raise UsageError(
            'There is nothing to draw: give a prompt, safedig generate "a cup on a table" …, or --prompts.'
        )
    if options.prompts is None:
        return [{"id": "prompt", "prompt": options.prompt, "seed": options.seed_of(recipe)}]
    return counted_on(as_rows(load_prompts(options.prompts)), options.seed)


@dataclass(frozen=True)
class _Acting:
    """What is on the pipeline while it draws."""

    steering: Steering | None
    denoiser: SafeDenoiser | None

    def told(self, images: int) -> list[Row]:
        """What was done to each image of the last batch, which had so many."""
        touches = self.steering.audit if self.steering is not None else []
        found: list[Row] = [{"sites": _told(one)} for one in [*touches, *[[]] * images][:images]]
        if self.denoiser is not None:
            for one, moves in zip(found, [*self.denoiser.audit, *[[]] * images], strict=False):
                one["denoiser"] = _moved([move for move in moves if move.beta > 0])
        return found


def _denoiser(pipe: Any, drawing: Drawing, folder: Path | None) -> SafeDenoiser | None:
    """Against a folder of images, at the size that is drawn."""
    if folder is None:
        return None
    return SafeDenoiser(NegationSet.of(folder, pipe, height=drawing.height, width=drawing.width))


def _drawn(
    pipe: Any, drawing: Drawing, rows: list[Row], acting: _Acting | None
) -> Iterator[tuple[Float[Tensor, "3 height width"], Row]]:
    with ExitStack() as stack:
        for one in () if acting is None else (acting.steering, acting.denoiser):
            if one is not None:
                stack.enter_context(one.apply(pipe))
        batches = draw(pipe, rows, drawing=drawing, batch_size=BATCH)
        for _, images in track(batches, "unsteered" if acting is None else "steered", total=-(-len(rows) // BATCH)):
            told: list[Row] = [{}] * len(images) if acting is None else acting.told(len(images))
            yield from zip(images, told, strict=True)


def _moved(moves: list[Told]) -> dict[str, Any]:
    """The σ at which a safe denoiser moved the image, and by how much at most."""
    largest = {name: max((getattr(one, name) for one in moves), default=0.0) for name in ("beta", "moved")}
    return {"sigmas": [one.sigma for one in moves]} | largest


def _told(touches: list[Touch]) -> dict[str, Any]:
    """At each site: tokens over all steps, those touched, the σ at which any was, and the largest ‖a′ − a‖ / ‖a‖."""
    told: dict[str, Any] = {}
    for touch in touches:
        one = told.setdefault(str(touch.site), {"passed": 0, "touched": 0, "sigmas": [], "moved": 0.0})
        count = int(touch.open.sum())
        one["passed"] += len(touch.open)
        one["touched"] += count
        one["sigmas"] += [touch.sigma] if count and touch.sigma not in one["sigmas"] else []
        one["moved"] = max(one["moved"], touch.moved)
    return told


def _save(pipe: Any, image: Float[Tensor, "3 height width"], path: Path) -> str:
    pixels, png = rearrange(image.cpu().clamp(0, 1), "c h w -> 1 h w c").numpy(), io.BytesIO()
    pipe.image_processor.numpy_to_pil(pixels)[0].save(png, format="PNG")
    write_atomically(path, png.getvalue())
    return str(path)


def _page(rows: list[Row], before: list[Tensor], after: list[Tensor], path: Path) -> Path:
    """Unsteered left of steered, all images as they come."""
    from safedig.figures import gallery, save

    scenes = []
    for row, one, other in zip(rows, before, after, strict=True):
        scenes += [(one, f"unsteered: {row['prompt']}"), (other, "steered")]
    say(f"Unsteered beside steered: {path}")
    return save(gallery(scenes, columns=2, side=224), path)
