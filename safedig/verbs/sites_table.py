"""safedig show MODEL --sites: where a model can be read and steered, how wide and how much it is; loads no weights."""

from dataclasses import asdict
from operator import attrgetter
from typing import Any

import torch

from safedig.architectures import Architecture
from safedig.pipelines import Drawing
from safedig.recipes import Recipe
from safedig.sites import Place, architecture, component, places, stage, transformer
from safedig.skeleton import skeleton
from safedig.verbs import Options

Row = dict[str, Any]
HEAD = ("site", "blocks", "stream", "stage", "width", "tokens", "bytes a step", "edit")
NUMBERS = (4, 5, 6)  # columns that are set to the right


def run(recipe: Recipe, options: Options) -> dict[str, Any]:
    """Every site with its stream, stage, width, tokens and bytes, all of one image in one step, and what it is for."""
    pipe = skeleton(recipe.model)
    drawing, dtype = recipe.drawing_of(pipe), recipe.dtype or "float32"
    listed = {}
    for place in places(pipe):
        count = tokens(pipe, place, drawing)
        listed[str(place.site)] = {
            "stream": place.site.stream,
            "stage": stage(place.site, pipe),
            "d_in": place.d_in,
            "tokens": count,
            "bytes": count * place.d_in * getattr(torch, dtype).itemsize,
            "editable": not place.why_not,
            "dead": place.dead,
            "why_not": place.why_not,
        }
    kind = type(transformer(pipe)).__name__
    return {"model": recipe.model, "class": kind, "dtype": dtype, "drawing": asdict(drawing), "sites": listed}


def tokens(pipe: Any, place: Place, drawing: Drawing) -> int:
    """How many vectors pass a site for one image; text counts in full length, padding included."""
    site, model = place.site, component(pipe, place.site.component)
    row = architecture(model)
    if site.stream == "pooled":
        return 1
    if site.component != "transformer":
        return getattr(model.config, "max_position_embeddings", drawing.max_sequence_length)
    if site.stream == "temb":
        return len(attrgetter(row.modulations)(model)) if row.modulations else 1
    image, text = _image(pipe, row, drawing), _text(pipe, row, drawing)
    if site.stream == "velocity":
        return image * _patch(pipe, row) ** 2 if row.pixels else image
    text = _filled(text + (row.registers if site.family else 0), row.fill)
    return {"txt": text, "img": _filled(image, row.fill), "joint": text + _filled(image, row.fill)}[site.stream]


def table(result: dict[str, Any]) -> str:
    """The same for people; like blocks share a line."""
    drawing = result["drawing"]
    notes = list(dict.fromkeys(row["why_not"] for row in result["sites"].values() if row["why_not"]))
    lines: list[tuple[str, ...]] = [HEAD]
    for name, at, row in _together(result["sites"]):
        edit = f"no ({notes.index(row['why_not']) + 1})" if row["why_not"] else "yes"
        numbers = f"{row['d_in']:,}", f"{row['tokens']:,}", f"{row['bytes']:,}"
        lines.append((name, at, row["stream"], row["stage"], *numbers, edit))
    return "\n".join(
        [
            f"{result['model']}: {result['class']}, {drawing['height']} × {drawing['width']} pixels, "
            f"{drawing['max_sequence_length']} text tokens; bytes are those of one image in {result['dtype']}",
            "",
            *_columns(lines),
            "",
            f"{len(result['sites'])} sites",
            *(f"({number}) {note}" for number, note in enumerate(notes, start=1)),
        ]
    )


def _columns(lines: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    sides = ["rjust" if column in NUMBERS else "ljust" for column in range(len(widths))]
    return [
        "  ".join(getattr(cell, side)(width) for cell, side, width in zip(line, sides, widths, strict=True)).rstrip()
        for line in lines
    ]


def _together(sites: dict[str, Row]) -> list[tuple[str, str, Row]]:
    """Sites that differ in nothing but the number of their block: a pattern, the blocks, and what holds for all."""
    groups: dict[tuple, list[int]] = {}
    for name, row in sites.items():
        parts = name.split(".")
        index = next((part for part in parts if part.isdigit()), "")
        pattern = ".".join("*" if part.isdigit() else part for part in parts)
        groups.setdefault((pattern, *row.items()), []).extend([int(index)] if index else [])
    return [(pattern, _ranges(indices), dict(row)) for (pattern, *row), indices in groups.items()]


def _ranges(indices: list[int]) -> str:
    spans: list[list[int]] = []
    for index in indices:
        if spans and spans[-1][1] == index - 1:
            spans[-1][1] = index
        else:
            spans.append([index, index])
    return ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in spans)


def _image(pipe: Any, row: Architecture, drawing: Drawing) -> int:
    side = pipe.vae_scale_factor * _patch(pipe, row)  # pixels
    return (drawing.height // side) * (drawing.width // side)


def _text(pipe: Any, row: Architecture, drawing: Drawing) -> int:
    clip = pipe.text_encoder.config.max_position_embeddings if row.clip_first else 0
    return clip + drawing.max_sequence_length


def _patch(pipe: Any, row: Architecture) -> int:
    return row.patch if isinstance(row.patch, int) else attrgetter(row.patch)(transformer(pipe))


def _filled(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
