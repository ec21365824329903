"""The figures can be read: scenes large, words inside the page, none over another, none over a picture."""

import itertools

import pytest
import torch

from safedig.figures import CHIPS, SCENE, TEXT, Pair, _Page, comparison, counts, dose_response, gallery, save
from safedig.sites import Site
from safedig.steering.dose import Doses

LONG = "a very long and winding prompt about a red cup on the left and a green kettle on the right of a beach"


def a_judgement(label, *names):
    return {"label": label, "p_unsafe": 0.5, "objects": [{"name": name} for name in names], "background": "sand"}


def some_pairs(n, prompt="a red cup on the sand"):
    images = torch.rand(n, 2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    labels = list(CHIPS)
    return [
        Pair(prompt, before, after, a_judgement("unsafe", "knife", "cup"), a_judgement(labels[i % 4], "cup"))
        for i, (before, after) in enumerate(images)
    ]


def boxes_of(figure):
    """The pixel box of every piece of text (with its chip, if it has one) and of every scene."""
    renderer = figure.canvas.get_renderer()
    figure.draw(renderer)
    texts = []
    for text in figure.texts:
        chip = text.get_bbox_patch()
        texts.append((text.get_text(), (chip or text).get_window_extent(renderer)))
    return texts, [(f"scene {i}", axes.get_window_extent(renderer)) for i, axes in enumerate(figure.axes)]


def overlapping(boxes):
    return [(a, b) for (a, one), (b, other) in itertools.combinations(boxes, 2) if one.overlaps(other)]


def outside(figure, boxes):
    page = figure.bbox
    return [name for name, box in boxes if box.x0 < 0 or box.y0 < 0 or box.x1 > page.x1 or box.y1 > page.y1]


@pytest.mark.parametrize("prompt", ["cup", LONG, "wordwithoutanyspace" * 4, "costs $5 and $x^2$ is 50 %", ""])
@pytest.mark.parametrize("n", [1, 3, 6])
def test_no_text_overlaps_another_or_a_scene_or_leaves_the_page(n, prompt):
    figure = comparison(some_pairs(n, prompt), note=LONG * 3)
    texts, scenes = boxes_of(figure)
    assert len(scenes) == 2 * n
    assert overlapping(texts + scenes) == [] and outside(figure, texts + scenes) == []


def test_control_a_text_put_over_another_is_found():
    figure = comparison(some_pairs(1))
    figure.texts[0].set_position(figure.texts[2].get_position())
    assert overlapping(boxes_of(figure)[0])


def test_many_names_are_cut_rather_than_run_into_the_next_scene():
    many = a_judgement("unrecognised", *["a rather long name"] * 6)
    pair = some_pairs(1)[0]
    figure = comparison([Pair(pair.prompt, pair.unsteered, pair.steered, many, many)] * 2)
    texts, scenes = boxes_of(figure)
    assert overlapping(texts + scenes) == [] and any(name.endswith("…") for name, _ in texts)


def test_the_scenes_are_large_and_unsteered_stands_above_steered():
    pairs = some_pairs(2)
    figure = comparison(pairs)
    scenes = [box for _, box in boxes_of(figure)[1]]
    assert all(round(box.width) == round(box.height) == SCENE >= 192 for box in scenes)
    above, below = scenes[0], scenes[1]
    assert above.x0 == below.x0 and above.y0 > below.y1
    for axes, image in zip(figure.axes, [pairs[0].unsteered, pairs[0].steered], strict=False):
        shown = torch.as_tensor(axes.images[0].get_array().copy())
        assert torch.equal(shown, image.permute(1, 2, 0))


def test_every_scene_carries_its_label_and_the_counts_add_up():
    pairs = some_pairs(4)
    words = [name for name, _ in boxes_of(comparison(pairs))[0]]
    assert words.count("unsafe") == 5 and words.count("clean") == 1 and words.count("unsteered") == 1
    assert counts(pairs) == (
        "Shown, of 4 each: unsteered: 4 unsafe · steered: 1 unsafe, 1 unrecognised, 1 empty, 1 clean"
    )  # fmt: skip
    assert counts(pairs) in " ".join(words)


def test_the_rows_are_called_what_they_are():
    pairs = some_pairs(2)
    words = [name for name, _ in boxes_of(comparison(pairs, rows=("without", "with")))[0]]
    assert "without" in words and "with" in words and "steered" not in words
    assert counts(pairs, ("without", "with")).startswith("Shown, of 2 each: without: 2 unsafe · with: ")


def test_type_is_large_enough_to_read():
    assert min(text.get_fontsize() for text in comparison(some_pairs(2)).texts) >= 10


def test_a_gallery_shows_every_picture_with_its_caption():
    images = torch.rand(11, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    figure = gallery([(image, f"{LONG} {i}") for i, image in enumerate(images)], columns=4)
    texts, scenes = boxes_of(figure)
    assert len(scenes) == 11 and overlapping(texts + scenes) == [] and outside(figure, texts + scenes) == []


def test_a_saved_figure_has_the_same_bytes_every_time(tmp_path):
    first = save(comparison(some_pairs(2)), tmp_path / "new" / "a.png")
    second = save(comparison(some_pairs(2)), tmp_path / "new" / "b.png")
    assert first.read_bytes() == second.read_bytes() and first.read_bytes()[:4] == b"\x89PNG"
    assert len(list(first.parent.iterdir())) == 2


def test_nothing_to_show_is_an_error():
    with pytest.raises(ValueError, match="at least one pair"):
        comparison([])
    with pytest.raises(ValueError, match="at least one picture"):
        gallery([])


def some_doses(prompts, strengths=(0.0, 1.0, 4.0)):
    images = torch.rand(len(strengths), len(prompts), 3, 64, 64, generator=torch.Generator().manual_seed(1))
    rows = [{"id": f"{n}", "prompt": prompt, "seed": n} for n, prompt in enumerate(prompts)]
    return Doses(Site.parse("txt.embed"), 7, rows, list(strengths), images, torch.arange(1.0, len(prompts) + 1))


def test_a_dose_response_has_a_strip_for_each_prompt_and_a_column_for_each_strength():
    doses = some_doses([LONG, "a cup"])
    judged = [[a_judgement(label, "knife", "cup") for _ in doses.rows] for label in list(CHIPS)[:3]]
    figure = dose_response(doses, judged, LONG * 3)
    texts, scenes = boxes_of(figure)
    assert len(scenes) == 6 and overlapping(texts + scenes) == [] and outside(figure, texts + scenes) == []
    words = [text for text, _ in texts]
    assert {"ablated", "as it is", "× 4"} <= {*words} and sum("code up to" in word for word in words) >= 1


@pytest.mark.parametrize("words", ["a cup " * 8000, "cup" * 16000])
def test_long_text_is_broken_without_measuring_it_over_and_over(words, monkeypatch):
    page, measured = _Page(400, 400), []
    measure = page.measure
    monkeypatch.setattr(page, "measure", lambda text, size: measured.append(len(text)) or measure(text, size))
    lines = page.broken(words, width=SCENE, lines=2, size=TEXT)
    assert lines[-1].endswith("…") and all(measure(line, TEXT) <= SCENE for line in lines)
    assert sum(measured) < 4 * len(words)


def test_a_line_takes_as_many_words_as_fit_and_the_last_one_leaves_room_for_what_is_cut():
    page = _Page(400, 400)
    (first, second), width = page.broken(LONG, width=SCENE, lines=2, size=TEXT), SCENE
    rest = LONG.removeprefix(first).split()
    assert page.measure(f"{first} {rest[0]}", TEXT) > width >= page.measure(first, TEXT)
    kept = second.removesuffix(" …").split()
    assert kept == rest[: len(kept)] and page.measure(" ".join(rest[: len(kept) + 1]) + " …", TEXT) > width
    assert page.broken("a cup", width=SCENE, lines=2, size=TEXT) == ["a cup"], "control: what fits is left alone"
