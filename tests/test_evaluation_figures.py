"""Figures of a comparison: legible text that never overlaps, units, counts, colours; no picture in the clear."""

import inspect

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from safedig.evaluation.any_of import Chance
from safedig.evaluation.intervals import rate
from safedig.evaluation.methods import METHODS, UNLESS_ASKED
from safedig.evaluation_figures import (
    COLOURS,
    any_of,
    blurred,
    contact_sheet,
    cost,
    forest,
    pareto,
    threshold_sweep,
)

NAMES = [name for name in METHODS if name not in UNLESS_ASKED]


def rates(step, n=96):
    """Of each method, spread over all there is, with ties."""
    return {name: rate(max(0, round(n * (1 - step * (at // 2)))), n) for at, name in enumerate(NAMES)}


def chances(at):
    bounds = {"lo": 0.0, "hi": 1.0, "method": "wilson", "prompts": 96}
    return [Chance(images=n, rate=0.05 * at, **bounds) for n in (1, 2, 4)]


FIGURES = {
    "forest": lambda: forest(rates(0.14), "Unsafe, held-out domain"),
    "pareto": lambda: pareto(rates(0.14), rates(0.01)),
    "sweep": lambda: threshold_sweep({name: [(0.1, one), (0.9, one)] for name, one in rates(0.1).items()}),
    "any-of": lambda: any_of({name: chances(at) for at, name in enumerate(NAMES)}),
    "cost": lambda: cost({name: 0.05 + 0.01 * at for at, name in enumerate(NAMES)}, 300),
    "sheet": lambda: contact_sheet(
        {name: [(torch.rand(3, 64, 64), "unrecognised")] * 8 for name in NAMES}, "weapon held out, first 8 of 96"
    ),
}


def texts(figure):
    """Every piece of text that is seen, and where; in pixels."""
    canvas, drawn = FigureCanvasAgg(figure), []
    renderer = canvas.get_renderer()
    put = renderer.draw_text

    def draw_text(*args, mtext=None, **options):
        drawn.append(mtext)
        put(*args, mtext=mtext, **options)

    vars(renderer)["draw_text"] = draw_text
    canvas.draw()
    drawn += [axes.title for axes in figure.axes]  # one of several lines is drawn line by line, and not named
    named = [one for one in dict.fromkeys(drawn) if one is not None and one.get_text().strip()]
    return [(one, one.get_window_extent(renderer)) for one in named]


def overlapping(figure, slack=1.0):
    """Pairs of texts whose boxes share more than a pixel, and those that leave the page."""
    placed = texts(figure)
    width, height = figure.get_size_inches() * figure.dpi
    faults = [
        (a.get_text(), b.get_text())
        for i, (a, x) in enumerate(placed)
        for b, y in placed[i + 1 :]
        if min(x.x1, y.x1) - max(x.x0, y.x0) > slack and min(x.y1, y.y1) - max(x.y0, y.y0) > slack
    ]
    outside = [
        one.get_text()
        for one, box in placed
        if box.x0 < -slack or box.y0 < -slack or box.x1 > width + slack or box.y1 > height + slack
    ]
    return faults + outside


@pytest.fixture(scope="module", params=FIGURES)
def figure(request):
    """Of all methods, some with the same rate."""
    return request.param, FIGURES[request.param]()


def test_no_text_overlaps_or_leaves_the_page(figure):
    assert overlapping(figure[1]) == []


def test_type_is_legible_at_a_thousand_pixels(figure):
    assert figure[1].get_size_inches()[0] * figure[1].dpi == 1000
    assert min(one.get_fontsize() for one, _ in texts(figure[1])) >= 8


def test_axes_have_units_and_titles_counts(figure):
    name, drawn = figure
    words = [one.get_text() for one, _ in texts(drawn)]
    if name not in ("sheet", "cost", "any-of"):
        assert any("/96" in word and "unsteered" in word and "ours" in word for word in words)
    if name != "sheet":
        assert any("percent" in word or "seconds" in word for word in words)


def test_control_overlapping_text_is_found():
    drawn = FIGURES["forest"]()
    drawn.text(0.5, 0.5, "one thing upon")
    drawn.text(0.5, 0.5, "another")
    drawn.text(0.99, 0.01, "over the edge")
    assert ("one thing upon", "another") in overlapping(drawn) and "over the edge" in overlapping(drawn)


def luminance(colour):
    red, green, blue = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    return 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2


def test_every_method_has_a_look_of_its_own_and_none_is_faint():
    from safedig.evaluation_figures import _look

    looks = [_look(at) for at in range(len(NAMES))]
    assert len(set(looks)) == len(NAMES) and len(set(COLOURS)) == 8
    assert all(1.05 / (luminance(colour) + 0.05) > 1.8 for colour in COLOURS), "against white"


def test_ours_stands_out_and_the_front_is_drawn():
    drawn = forest({"unsteered": rate(90, 96), "ours": rate(3, 96)}, "Unsafe")
    colours = [line.get_color() for line in drawn.axes[0].lines]
    assert colours[0] != colours[-1]
    drawn = pareto({"a": rate(9, 10), "ours": rate(1, 10)}, {"a": rate(9, 10), "ours": rate(9, 10)})
    dotted = next(line for line in drawn.axes[0].lines if line.get_label() == "front")
    assert np.asarray(dotted.get_xdata()).tolist() == [90.0] and np.asarray(dotted.get_ydata()).tolist() == [10.0]


def test_the_points_bear_the_numbers_of_their_methods_and_those_that_coincide_share_one_label():
    at = {"a": (9, 9), "b": (5, 8), "c": (9, 9), "ours": (1, 9)}
    drawn = pareto(
        {name: rate(x, 10) for name, (x, _) in at.items()}, {name: rate(y, 10) for name, (_, y) in at.items()}
    )
    places = {one.get_text(): one.xy for one in drawn.axes[0].texts}
    assert {words: (round(x), round(y)) for words, (x, y) in places.items()} == {
        "1, 3": (90, 90),
        "2": (80, 50),
        "4": (90, 10),
    }
    named = [text.get_text() for text in drawn.legends[0].get_texts()]
    assert [one.split()[0] for one in named] == ["front", "1", "2", "3", "4"]


def test_numbers_of_points_that_lie_close_do_not_cover_one_another():
    close = {f"m{at}": (90 - at // 4, 90 - at % 4) for at in range(12)}
    drawn = pareto(
        {name: rate(x, 100) for name, (x, _) in close.items()}, {name: rate(y, 100) for name, (_, y) in close.items()}
    )
    assert len(drawn.axes[0].texts) == 12 and not overlapping(drawn)


def test_pictures_are_blurred_unless_they_are_to_be_clear():
    checks = (torch.arange(64)[:, None] // 4 + torch.arange(64)[None] // 4) % 2
    image = checks.float().expand(3, 64, 64)
    assert blurred(image).std() < 0.1 * image.std()
    kept = {}
    for blur in (True, False):
        sheet = contact_sheet({"a": [(image, "clean")]}, "one", blur=blur)
        kept[blur] = torch.from_numpy(np.asarray(sheet.axes[0].images[0].get_array()))
        assert ("blurred" in "".join(one.get_text() for one, _ in texts(sheet))) == blur
    assert torch.equal(kept[False], image.permute(1, 2, 0)) and kept[True].std() < 0.1 * image.std()
    assert inspect.signature(contact_sheet).parameters["blur"].default is True
