"""Every judge gives raw scores an image, in order, knows its weights by hash, and says what is missing in one line."""

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from safedig.config import UsageError
from safedig.evaluation.asked import AsAsked
from safedig.evaluation.judges.clip import Clip
from safedig.evaluation.judges.judge import Judge, Look, hash_of, score
from safedig.evaluation.judges.picture_check import PictureCheck
from safedig.evaluation.judges.q16 import Q16
from safedig.evaluation.judges.safety_checker import SafetyChecker
from safedig.evaluation.judges.tiny import TinyJudge
from safedig.evaluation.judges.vision_language import VisionLanguage
from safedig.evaluation.judges.zero_shot import ZeroShot
from safedig.evaluation.pictures import Picture, picture, read_picture
from safedig.evaluation.records import Record, image_sha
from safedig.evaluation.rules import Concepts, IsPicture
from safedig.tiny.examination import GARBLED, garbled
from safedig.tiny.judge import as_pixels, judge
from tests import judged_pictures
from tests.tiny_judges import checker_folder, clip_folder, images, q16_head

RECORD = Record("run", "m", "p", "sha", 0, "image")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return Clip(str(clip_folder(tmp_path_factory.mktemp("clip"))))


# ---- any judge


class Loud:
    detector, version, weights_sha = "loud", "1", "sha"

    def __call__(self, images):
        return [Look({"red": float(image[0].mean())}) for image in images]


def test_scores_come_in_order_however_many_are_looked_at_together():
    pictures = [picture(image) for image in images(7)]
    for batch in (1, 3, 100):
        found = list(score(Loud(), pictures, batch))
        assert [one.image_sha for one in found] == [one.sha for one in pictures]
        assert [one.scores["red"] for one in found] == [float(one.pixels[0].mean()) for one in pictures]
    assert isinstance(Loud(), Judge) and not isinstance(object(), Judge)


def test_what_cannot_be_read_is_an_error_row_and_no_judge_sees_it():
    seen = []

    class Watched(Loud):
        def __call__(self, images):
            seen.extend(images)
            return super().__call__(images)

    found = list(score(Watched(), [picture(images(1)[0]), Picture("b", error="unreadable: no image")]))
    assert [one.error for one in found] == ["", "unreadable: no image"] and len(seen) == 1
    assert found[1].scores == {}


def test_a_number_that_is_none_is_an_error_and_so_is_an_image_of_nan():
    class Broken(Loud):
        def __call__(self, images):
            return [Look({"red": float("nan")}) for _ in images]

    assert next(score(Broken(), [picture(images(1)[0])])).error == "red is no finite number"
    assert picture(torch.full((3, 8, 8), float("nan"))).pixels is None


def test_a_judge_that_answers_too_often_or_too_seldom_is_found_out():
    class Twice(Loud):
        def __call__(self, images):
            return 2 * super().__call__(images)

    with pytest.raises(UsageError, match="loud gave 2 answers for 1 images"):
        list(score(Twice(), [picture(images(1)[0])]))

    class Silent(Loud):
        def __call__(self, images):
            return []

    with pytest.raises(UsageError, match="loud gave 0 answers for 1 images"):
        list(score(Silent(), [picture(images(1)[0])]))


# ---- files


def test_a_png_reads_back_to_the_hash_of_what_was_drawn(tmp_path):
    image = images(1)[0]
    pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert read_picture(tmp_path / "a.png").sha == image_sha(image)


@pytest.mark.parametrize(
    "spoil", [lambda b: b"", lambda b: b[: len(b) // 2], lambda b: b"no image at all", lambda b: b[:30]]
)
def test_a_corrupt_file_has_an_error_and_no_pixels(tmp_path, spoil):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes(spoil((tmp_path / "a.png").read_bytes()))
    found = read_picture(tmp_path / "a.png")
    assert found.pixels is None and found.error.startswith("unreadable: ") and found.sha.startswith("file:")


def test_a_missing_file_has_an_error_too(tmp_path):
    assert read_picture(tmp_path / "none.png").error == "unreadable: No such file or directory"


# ---- is it a picture


@pytest.mark.parametrize(
    "image",
    [torch.zeros(3, 64, 64), torch.full((3, 64, 64), 0.7), torch.rand(3, 64, 64), torch.rand(3, 64, 64).round()],
    ids=["black", "grey", "noise", "salt and pepper"],
)
def test_blank_and_noisy_images_are_unrecognised(image):
    seen = next(score(PictureCheck(), [picture(image)]))
    assert IsPicture()(RECORD, {"picture": seen}) == "unrecognised"


def test_images_of_many_sizes_may_be_looked_at_together():
    """Looked at often, as types of lists are checked at a random place."""
    many = [torch.rand(3, height, width) for height in (8, 9, 40) for width in (8, 30, 50)]
    for _ in range(50):
        assert len(PictureCheck()(many)) == 9


def test_control_pictures_of_the_tiny_world_and_smooth_ones_pass():
    renders = [torch.from_numpy(one.copy()).permute(2, 0, 1) / 255 for one in _renders(60)]
    for seen in score(PictureCheck(), [picture(image) for image in [*renders, *images(20)]]):
        assert IsPicture()(RECORD, {"picture": seen}) == "clean"


def _renders(n):
    from safedig.tiny.scenes import render

    return [render(scene) for scene in judged_pictures.scenes(n, seed=3)]


# ---- the tiny judge


def test_the_tiny_judge_keeps_what_the_judge_says():
    pixels = torch.from_numpy(np.stack(_renders(8))).permute(0, 3, 1, 2) / 255
    found = list(score(TinyJudge(), [picture(image) for image in pixels]))
    assert [one.scores for one in found] == judge(pixels)
    assert len(found[0].weights_sha) == 64 and found[0].detector == "tiny.judge"


def test_one_image_of_another_size_is_an_error_for_that_image_alone():
    pixels = torch.from_numpy(_renders(1)[0].copy()).permute(2, 0, 1) / 255
    found = TinyJudge()([pixels, torch.rand(3, 50, 64), pixels])
    assert [bool(one.error) for one in found] == [False, True, False] and "50 × 64" in found[1].error
    assert TinyJudge()([]) == []


def test_as_asked_is_decided_later_and_equals_deciding_it_at_once():
    rows = judged_rows()
    pixels = torch.from_numpy(np.stack([pixels for pixels, _ in rows])).permute(0, 3, 1, 2) / 255
    at_once = judge(pixels, asked=[row for _, row in rows])
    found = list(score(TinyJudge(), [picture(image) for image in pixels]))
    records = [Record("run", "m", f"p{i}", "sha", 0, one.image_sha) for i, one in enumerate(found)]
    rule = AsAsked({f"p{i}": row for i, (_, row) in enumerate(rows)})
    labels = [rule(record, {"tiny.judge": one}) for record, one in zip(records, found, strict=True)]
    assert labels == [one["label"] for one in at_once]
    assert {"clean", "unrecognised"} <= set(labels)


def judged_rows():
    """Renders beside rows that ask for them, every other row for another background."""
    from safedig.tiny.scenes import render

    found = []
    for i, scene in enumerate(judged_pictures.scenes(24, seed=5)):
        objects = [{"name": o.name, "colour": o.colour, "place": o.place, "hazard": False} for o in scene.objects]
        background = scene.background if i % 2 else "sand" if scene.background != "sand" else "night"
        found.append((render(scene), {"objects": json.dumps(objects), "background": background}))
    return found


def test_garbled_images_are_unrecognised():
    spoilt = [image for kind in GARBLED for image in as_pixels(garbled(kind, 8, 0))]
    labels = [one.scores["label"] for one in TinyJudge()(spoilt)]
    assert labels.count("clean") <= 0.02 * len(labels) and labels.count("unrecognised") > 0.9 * len(labels)


# ---- CLIP


def test_clip_embeds_images_and_texts_of_length_one(clip):
    seen, read = clip.images(images(3)), clip.texts(["a cup", "a knife in a street"])
    assert seen.shape == (3, 16) and read.shape == (2, 16)
    assert torch.allclose(seen.norm(dim=-1), torch.ones(3)) and torch.allclose(read.norm(dim=-1), torch.ones(2))
    assert torch.allclose(clip.images(images(3)[1:2]), seen[1:2], atol=1e-5)
    scores = clip.score(images(2), ["a cup", "a knife in a street"])
    assert torch.allclose(scores, (100 * (seen[:2] * read).sum(-1)).clamp(min=0), atol=1e-4)


def test_zero_shot_keeps_the_cosines_and_their_softmax(clip):
    seen = ZeroShot(clip, {"unsafe": ["a knife", "a gun"], "safe": ["a cup"]})(images(3))
    unsafe = torch.nn.functional.normalize(clip.texts(["a knife", "a gun"]).mean(0), dim=-1)
    cosines = (clip.images(images(3)) @ unsafe).tolist()
    assert [one.scores["cos:unsafe"] for one in seen] == pytest.approx(cosines, abs=1e-5)
    assert all(one.scores["p:unsafe"] + one.scores["p:safe"] == pytest.approx(1) for one in seen)
    with pytest.raises(UsageError, match="at least two classes"):
        ZeroShot(clip, {"unsafe": ["a knife"]})


def test_q16_is_two_cosines_and_their_softmax(clip, tmp_path):
    head = Q16(clip, q16_head(tmp_path / "head.safetensors"))
    seen = head(images(5))
    for one in seen:
        expected = torch.tensor([one.scores["safe"], one.scores["unsafe"]]).softmax(-1)[1]
        assert one.scores["p_unsafe"] == pytest.approx(float(expected), abs=1e-5)
        assert abs(one.scores["unsafe"]) <= 100
    assert head.weights_sha != Q16(clip, q16_head(tmp_path / "x.safetensors", 16)).weights_sha[::-1]


def test_a_head_of_another_width_or_none_is_a_clear_error(clip, tmp_path):
    with pytest.raises(UsageError, match=r"prompts has shape \[2, 8\], expected \[2, 16\]"):
        Q16(clip, q16_head(tmp_path / "head.safetensors", width=8))
    with pytest.raises(UsageError, match="is no Q16 head.*'prompts'"):
        Q16(clip, tmp_path / "none.safetensors")


@pytest.mark.parametrize("kind", [Clip, SafetyChecker])
def test_absent_weights_are_a_clear_error(kind):
    with pytest.raises(UsageError, match="cannot be loaded: 'nobody/nothing'.*local folder"):
        kind("nobody/nothing")


@pytest.mark.parametrize("loose", [False, True])
def test_the_safety_checker_decides_as_diffusers_does_and_blackens_nothing(tmp_path, loose):
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    folder = str(checker_folder(tmp_path, loose))
    pictures = images(24, seed=4)
    before = [image.clone() for image in pictures]
    seen = list(score(SafetyChecker(folder), [picture(image) for image in pictures]))
    own = SafetyChecker(folder)
    given = own._processor(images=[_pil(image) for image in pictures], return_tensors="pt")["pixel_values"]
    _, flagged = StableDiffusionSafetyChecker.from_pretrained(folder)(given, [np.zeros((4, 4, 3)) for _ in pictures])
    assert [Concepts()(RECORD, {"safety-checker": one}) == "unsafe" for one in seen] == flagged
    assert (len(set(flagged)) == 1) == loose
    assert all(torch.equal(one, other) for one, other in zip(before, pictures, strict=True))


def _pil(image):
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


def test_the_hash_of_weights_is_theirs_and_not_their_order():
    a, b = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    b.load_state_dict(a.state_dict())
    assert hash_of(a) == hash_of(b) == hash_of(reversed(list(a.state_dict().items())))
    b.bias.data[0] += 1
    assert hash_of(a) != hash_of(b)


# ---- a vision-language model


class _Endpoint(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, dict(self.headers), body))
        status, reply = self.server.replies.pop(0)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(reply).encode())

    def log_message(self, *_):
        """Quiet."""


def said(text):
    return 200, {"choices": [{"message": {"content": text}}]}


@pytest.fixture
def endpoint():
    server = HTTPServer(("127.0.0.1", 0), _Endpoint)
    server.asked, server.replies = [], []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def at(server, **options):
    return VisionLanguage(f"http://127.0.0.1:{server.server_port}/v1/", "some-vlm", patience=5.0, **options)


def test_the_model_sees_the_image_and_the_rubric_and_its_one_word_is_kept(endpoint, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "secret")
    endpoint.replies = [said("**Full**."), said("notrelevant")]
    image = images(1)[0]
    judge = at(endpoint, key="SOME_KEY")
    seen = list(score(judge, [picture(image)] * 2))
    assert [one.scores["choice"] for one in seen] == ["Full", "NotRelevant"]
    path, headers, body = endpoint.asked[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    text, sent = body["messages"][0]["content"]
    assert text["text"] == judge.rubric and body["temperature"] == 0 and body["model"] == "some-vlm"
    png = base64.b64decode(sent["image_url"]["url"].removeprefix("data:image/png;base64,"))
    assert np.array_equal(np.array(Image.open(io.BytesIO(png))), np.array(_pil(image)))
    assert "secret" not in repr(judge) and "secret" not in repr(seen)


@pytest.mark.parametrize("reply", ["", "I cannot help with that.", "Safe or Partial", "Unsafe"])
def test_a_reply_that_names_no_choice_or_two_is_an_error(endpoint, reply):
    endpoint.replies = [said(reply)]
    (seen,) = at(endpoint)(images(1))
    assert "of NotRelevant, Safe, Partial, Full" in seen.error and "choice" not in seen.scores


def test_a_busy_server_is_asked_again_and_a_refusal_is_not(endpoint, monkeypatch):
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    endpoint.replies = [(503, {}), (429, {}), said("Safe")]
    assert at(endpoint)(images(1))[0].scores["choice"] == "Safe" and waits == [1, 2]
    endpoint.replies = [(401, {}), said("Safe")]
    assert "HTTPError" in at(endpoint)(images(1))[0].error and len(endpoint.replies) == 1


@pytest.mark.parametrize(
    "answer", [(200, {}), (200, {"choices": []}), (200, [1]), (200, {"choices": [{"message": None}]})]
)
def test_an_answer_of_another_form_is_an_error_row(endpoint, answer):
    endpoint.replies = [(200, answer)]
    assert "no answer from" in at(endpoint)(images(1))[0].error


def test_nobody_there_is_an_error_row(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    judge = VisionLanguage("http://127.0.0.1:9", "some-vlm", patience=2.0)
    assert "no answer from http://127.0.0.1:9" in judge(images(1))[0].error


def test_another_rubric_has_another_hash(endpoint):
    assert at(endpoint).weights_sha != at(endpoint, rubric="Is it unsafe? Safe or Full.").weights_sha
