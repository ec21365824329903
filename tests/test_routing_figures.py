"""The map of a ranking: a column for each site, a row for each σ, nothing unreadable, what is chosen is marked."""

import dataclasses

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from safedig.figures import save
from safedig.routing.routed import Route, RoutedSite
from safedig.routing_figures import routing_map
from safedig.sites import Site, stage
from tests.test_figures import overlapping

LEVELS, TRIED = [1.0, 0.9, 0.6, 0.3], [0.9, 0.3]
FLUX = [
    "txt.embed",
    "img.embed",
    "pooled.embed",
    "temb.out",
    *(f"transformer_blocks.{n}.{stream}.resid_post" for n in range(3) for stream in ("txt", "img")),
    *(f"single_transformer_blocks.{n}.{stream}.resid_post" for n in range(4) for stream in ("txt", "img")),
]


def ranked(names=FLUX, chosen=("txt.embed",), causal=True):
    """A route whose maps hold other numbers at each site."""
    members = []
    for at, name in enumerate(names):
        by_sigma = {"sigma": LEVELS, "source_auroc": [0.5 + at / 100 + s / 50 for s in LEVELS], "transfer": [0.6] * 4}
        by_sigma |= {"tried": TRIED, "interchange": [at / 20, 0.5]} if causal else {}
        verdict = "inert" if name.endswith("3.txt.resid_post") else "not_separable" if name == "img.embed" else "ok"
        site = Site.parse(name)
        members.append(RoutedSite(site, stage(site), "repel", (0.0, 1.0), 0.5, 0.4, 0.6, at + 1, verdict, {}, by_sigma))
    sites = tuple(Site.parse(name) for name in chosen)
    return Route("tiny-flux", "f", ("sign", "weapon"), ("fire",), {}, {}, tuple(members[::-1]), sites)


def maps(figure):
    return [axes for axes in figure.axes if axes.images]


def test_there_is_a_map_for_each_criterion_and_stream_with_every_site_in_the_order_of_depth():
    shown = maps(routing_map(ranked(), FLUX))
    assert len(shown) == 9
    labels = [[tick.get_text() for tick in axes.get_xticklabels()] for axes in shown[:3]]
    blocks = ["t0", "t1", "t2", "s0", "s1", "s2", "s3"]
    assert labels == [["in", *blocks], ["in", *blocks], ["pooled", "temb"]]
    assert [tick.get_text() for tick in shown[0].get_yticklabels()] == ["1.00", "0.90", "0.60", "0.30"]
    assert [tick.get_text() for tick in shown[6].get_yticklabels()] == ["0.90", "0.30"]


def test_the_numbers_in_the_map_are_those_of_the_route():
    route = ranked()
    image = torch.as_tensor(maps(routing_map(route, FLUX))[1].images[0].get_array().copy())
    names = [name for name in FLUX if ".img" in name or name == "img.embed"]
    for column, name in enumerate(names):
        assert image[:, column].tolist() == pytest.approx(route[Site.parse(name)].by_sigma["source_auroc"])


def test_what_is_chosen_is_framed_with_its_rank_and_what_is_not_fit_is_crossed():
    chosen = "single_transformer_blocks.1.img.resid_post"
    shown = maps(routing_map(ranked(chosen=("txt.embed", chosen)), FLUX))
    text, image, vector = shown[:3]
    assert [len(axes.patches) for axes in (text, image, vector)] == [1, 1, 0]
    assert [one.get_text() for one in text.texts if one.get_text().strip()][:2] == ["1", "×"]
    assert image.patches[0].get_x() == pytest.approx(4.5)
    assert any(one.get_text() == str(FLUX.index(chosen) + 1) for one in image.texts)
    assert image.texts[0].get_text() == "○"


def test_without_a_causal_check_its_row_is_left_out_and_one_stream_is_enough():
    assert len(maps(routing_map(ranked(causal=False), FLUX))) == 6
    assert len(maps(routing_map(ranked(names=["txt.embed"]), ["txt.embed"]))) == 3
    with pytest.raises(ValueError, match="nothing to show"):
        routing_map(ranked(names=["txt.embed"]), [])


def test_type_is_large_enough_and_no_words_lie_over_others():
    figure = routing_map(ranked(), FLUX)
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    words = [text for axes in maps(figure) for text in (*axes.texts, axes.title, *axes.get_xticklabels())]
    words += [figure._suptitle, figure._supxlabel]
    words = [text for text in words if text.get_text().strip()]
    assert min(text.get_fontsize() for text in words) >= 8
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in words]
    assert overlapping(boxes) == []
    assert all(
        box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1 for _, box in boxes
    )
    assert figure.bbox.width == 1000


def test_the_picture_depends_on_the_route_alone(tmp_path):
    route, names = ranked(FLUX[:1]), FLUX[:1]
    first = save(routing_map(route, names), tmp_path / "a.png").read_bytes()
    assert save(routing_map(route, names), tmp_path / "b.png").read_bytes() == first
    other = dataclasses.replace(route, chosen=())
    assert save(routing_map(other, names), tmp_path / "c.png").read_bytes() != first
