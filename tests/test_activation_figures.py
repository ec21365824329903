"""The maps of a recording: a row for each site, a column for each step, every token where it lies."""

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from safedig.activation_figures import change_maps
from safedig.activations.pairs import Pair
from safedig.sites import Site
from tests.test_figures import overlapping

SIGMAS = [1.0, 0.9, 0.6, 0.25]
SITES = ["txt.embed", "transformer_blocks.0.img.resid_post", "transformer_blocks.18.img.resid_post"]


def pair(site, step, at, tokens=16):
    """A prompt that differs from its twin in one token, and half as much in the last one."""
    safe = torch.zeros(tokens, 4)
    harmful = safe.clone()
    harmful[at], harmful[-1] = 2.0, 1.0
    return Pair((("a", 1), ("a-safe", 1)), Site.parse(site), step, torch.arange(tokens), harmful, safe)


def maps(figure):
    return [axes for axes in figure.axes if axes.images]


def shown():
    return change_maps([pair(site, step, 5 + row) for row, site in enumerate(SITES) for step in (0, 2, 3)], SIGMAS)


def test_there_is_a_row_for_each_site_and_a_column_for_each_step_with_its_sigma():
    panels = maps(shown())
    assert len(panels) == 9
    assert [axes.get_title() for axes in panels[:3]] == ["σ = 1.00", "σ = 0.60", "σ = 0.25"]
    assert [axes.get_ylabel() for axes in panels[::3]] == [
        "txt.embed\n16 tokens",
        "transformer_blocks.0\nimg.resid_post\n16 tokens",
        "transformer_blocks.18\nimg.resid_post\n16 tokens",
    ]


def test_an_image_token_lies_where_it_does_in_the_picture_and_text_in_a_line():
    text, image = (torch.as_tensor(maps(shown())[at].images[0].get_array().copy()) for at in (0, 3))
    assert text.shape == (1, 16) and image.shape == (4, 4)
    assert text[0, 5] == 1 and image[6 // 4, 6 % 4] == 1
    assert text[0, -1] == image[-1, -1] == 0.5
    assert (image > 0).sum() == 2


def test_a_picture_that_is_not_square_is_a_line():
    (axes,) = maps(change_maps([pair(SITES[1], 1, 0, tokens=12)], SIGMAS))
    assert axes.images[0].get_array().shape == (1, 12)


def test_type_is_large_enough_and_no_words_lie_over_others():
    figure = shown()
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    words = [text for axes in figure.axes for text in (axes.title, axes.yaxis.label, *axes.get_yticklabels())]
    words = [text for text in words if text.get_text().strip()]
    assert min(text.get_fontsize() for text in words) >= 8
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in words]
    assert overlapping(boxes) == []
    assert all(
        box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1 for _, box in boxes
    )


def test_nothing_to_show_is_told():
    with pytest.raises(ValueError, match="There is nothing to show"):
        change_maps([], SIGMAS)
