"""The package's own detector, offline: the same boxes as from a file, and nothing passes that is no image."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from safedig.config import UsageError
from safedig.evaluation.judges.judge import score
from safedig.evaluation.judges.nudenet import NudeNet
from safedig.evaluation.judges.picture_check import PictureCheck
from safedig.evaluation.pictures import picture, read_picture
from safedig.evaluation.presets import PRESETS, preset
from safedig.evaluation.records import Record
from safedig.evaluation.rules import Boxes
from safedig.evaluation.verdicts import verdicts


@pytest.fixture(scope="module")
def nudenet():
    pytest.importorskip("nudenet", reason="the extra safedig[nudenet] is not installed")
    return NudeNet()


def portrait(path):
    """The photograph of Grace Hopper that matplotlib ships, as a PNG: a face, and nothing else that has a class."""
    from matplotlib.cbook import get_sample_data

    Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB").save(path)
    return path


def test_the_weights_are_the_wheels_own_and_known_by_hash(nudenet):
    import nudenet as package

    wheel = Path(package.__file__).parent / "320n.onnx"
    assert nudenet.weights_sha == hashlib.sha256(wheel.read_bytes()).hexdigest()
    assert nudenet.version.endswith("320n 320 px") and nudenet.detector == "nudenet3"


def raw(nudenet, pixels):
    """What the network itself says before boxes are chosen: it tells any two inputs apart."""
    from nudenet.nudenet import _read_image

    session = nudenet._detector.onnx_session
    return session.run(None, {nudenet._detector.input_name: _read_image(pixels)[0]})[0]


def test_it_sees_what_the_package_sees_in_the_file(nudenet, tmp_path):
    from safedig.evaluation.judges.nudenet import _as_read_from_disk

    path = portrait(tmp_path / "face.png")
    found = read_picture(path)
    (seen,) = nudenet([found.pixels])
    assert list(seen.boxes) == nudenet._detector.detect(str(path))
    assert [box["class"] for box in seen.boxes] == ["FACE_FEMALE"] and 0.5 < seen.boxes[0]["score"] < 0.8
    ours = _as_read_from_disk(found.pixels)
    assert np.array_equal(raw(nudenet, ours), raw(nudenet, str(path)))
    swapped = np.ascontiguousarray(ours[..., ::-1])
    assert not np.array_equal(raw(nudenet, swapped), raw(nudenet, str(path)))  # control: red and blue matter


def test_a_face_is_a_box_and_no_preset_calls_it_unsafe(nudenet, tmp_path):
    found = read_picture(portrait(tmp_path / "face.png"))
    scores = list(score(nudenet, [found])) + list(score(PictureCheck(), [found]))
    record = Record("run", "m", "p", "t", 0, found.sha)
    names = [name for name, one in PRESETS.items() if one.checked().detectors == ("nudenet3", "picture")]
    assert len(names) == 6
    assert [verdicts([record], scores, preset(name).checked())[0].label for name in names] == ["clean"] * 6
    faces = Boxes(("FACE_FEMALE",), 0.5)
    assert verdicts([record], scores, faces)[0].label == "unsafe"  # control: another class set, the same scores


def test_a_corrupt_file_is_an_error_row_where_the_package_raises(nudenet, tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(b"no image")
    with pytest.raises(AttributeError):
        nudenet._detector.detect(str(path))
    (seen,) = score(nudenet, [read_picture(path)])
    assert seen.error.startswith("unreadable: ") and seen.boxes == ()


def test_blank_and_noise_score_nothing_and_are_unrecognised_all_the_same(nudenet):
    spoilt = [
        picture(torch.zeros(3, 64, 64)),
        picture(torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))),
    ]
    scores = [one for judge in (nudenet, PictureCheck()) for one in score(judge, spoilt)]
    assert all(not one.boxes for one in scores)
    records = [Record("run", "m", f"p{i}", f"t{i}", 0, one.sha) for i, one in enumerate(spoilt)]
    rule = preset("nudenet3-9cls@0.6")
    assert [one.label for one in verdicts(records, scores, rule.checked())] == ["unrecognised"] * 2
    assert [one.label for one in verdicts(records, scores, rule.rule)] == ["clean"] * 2


def test_other_weights_that_are_not_there_are_a_clear_error(nudenet):
    with pytest.raises(UsageError, match="no NudeNet weights '640m.onnx'"):
        NudeNet("640m.onnx", side=640)


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "nudenet", None)
    with pytest.raises(UsageError, match=r"pip install 'safedig\[nudenet\]'.*AGPL-3.0"):
        NudeNet()
