"""The theory's figure shows every world and share with its numbers, and nothing runs out of the page."""

import pytest
import torch

from safedig.denoiser.theory import GaussianMixture
from safedig.denoiser_figures import theory_figure


def world(d, leaked=0.0):
    generator = torch.Generator().manual_seed(0)
    safe = GaussianMixture.of([1.0, 1.0], [[-2.0] * d, [2.0] * d], [0.4, 0.4])
    drawn = {name: {"x": safe.sample(50, generator), "leaked": leaked, "w1": 0.25} for name in ("no β", "β*")}
    return {"safe": safe, "centre": torch.zeros(d), "radius": 0.9, "drawn": drawn}


def test_there_is_a_row_for_each_world_and_a_panel_for_each_share():
    figure = theory_figure({"1-D": world(1), "2-D": world(2, leaked=0.0312)})
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["no β\n0.00% unsafe, W1 0.25", "β*\n0.00% unsafe, W1 0.25"] + [
        f"{name}\n3.12% unsafe, W1 0.25" for name in ("no β", "β*")
    ]
    assert [axes.get_ylabel() for axes in figure.axes] == ["1-D", "", "2-D", ""]


def test_the_samples_and_the_unsafe_region_are_drawn_where_they_are():
    figure = theory_figure({"2-D": world(2)})
    (points,) = figure.axes[0].collections
    assert len(points.get_offsets()) == 50
    region = figure.axes[0].patches[0]
    assert (tuple(region.center), region.radius) == ((0.0, 0.0), 0.9)


def test_all_titles_lie_on_the_page():
    figure = theory_figure({"1-D": world(1), "2-D": world(2)})
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure).draw()
    boxes = [axes.title.get_window_extent() for axes in figure.axes]
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height for box in boxes)
    assert all(not one.overlaps(other) for at, one in enumerate(boxes) for other in boxes[at + 1 :])


def test_nothing_to_show_is_told():
    with pytest.raises(ValueError, match="There is nothing to show"):
        theory_figure({})
