"""The pipelines' objective: what is predicted, at which noise, under which captions, and what the sentences teach."""

import numpy as np
import pytest
import torch
from torch import nn

from safedig.tiny import corpus, flow_matching
from safedig.tiny.flow_matching import (
    DROPPED,
    FAMILIES,
    FOREGROUND,
    NAMED_BLOCK,
    NAMING,
    NAMING_ENDS,
    NAMING_FADES,
    SEEN,
    SENTENCES_SHARE,
    _random_sigma,
)
from safedig.tiny.models import SCENE_TOKENS, WIDTH
from safedig.tiny.training import fit
from tests.tiny_training import untrained


@pytest.fixture(scope="module", params=FAMILIES)
def objective(request):
    return untrained(request.param)


def rng(seed=0):
    return np.random.default_rng(seed)


class Recorder:
    """Stands in for a family's velocity and keeps what it is asked."""

    def __init__(self, answer=None):
        self.answer, self.calls = answer, []

    def __call__(self, parts, x, sigma, t5_ids, clip_ids):
        self.calls.append((x, sigma, t5_ids, clip_ids))
        return torch.zeros_like(x) if self.answer is None else self.answer(x, sigma)


@pytest.fixture
def recorded(objective, monkeypatch):
    def record(answer=None):
        recorder = Recorder(answer)
        monkeypatch.setattr(type(objective.family), "velocity", lambda self, *args: recorder(*args))
        monkeypatch.setattr(flow_matching, "SENTENCES_SHARE", 0.0)
        monkeypatch.setattr(flow_matching, "NAMING_ENDS", 0.0)  # nothing inside runs, so there is nothing to name
        return recorder

    return record


def test_the_flow_loss_of_the_right_velocity_is_nil(objective, recorded, monkeypatch):
    """From x = (1 − σ) x0 + σ ε alone, v = ε − x0 follows where x0 is known: with all latents equal."""
    latents = torch.full_like(objective.data.latents, 0.5)
    monkeypatch.setattr(objective, "data", type(objective.data)(objective.data.asks, objective.data.scenes, latents))
    recorded(lambda x, sigma: (x - 0.5) / sigma[:, None, None, None])
    assert objective.loss(rng(), 0.0)["loss"] < 1e-6
    recorded(lambda x, sigma: -(x - 0.5) / sigma[:, None, None, None])
    assert objective.loss(rng(), 0.0)["loss"] > 1, "control: the opposite direction"


def test_latents_are_mixed_with_noise_according_to_sigma(objective, recorded, monkeypatch):
    latents = torch.full_like(objective.data.latents, 3.0)
    monkeypatch.setattr(objective, "data", type(objective.data)(objective.data.asks, objective.data.scenes, latents))
    recorder = recorded()
    objective.loss(rng(), 0.0)
    ((x, sigma, _, _),) = recorder.calls
    torch.testing.assert_close(x.mean(dim=(1, 2, 3)), 3 * (1 - sigma), atol=0.1, rtol=0)
    torch.testing.assert_close(x.std(dim=(1, 2, 3)), sigma, atol=0.1, rtol=0)


def test_one_caption_in_ten_is_dropped(objective, recorded):
    recorder = recorded()
    for seed in range(30):
        objective.loss(rng(seed), 0.0)
    empty = objective.t5_ids([""])[0]
    dropped = [torch.equal(row, empty) for _, _, t5_ids, _ in recorder.calls for row in t5_ids]
    assert abs(np.mean(dropped) - DROPPED) < 0.03
    nothing = objective.clip_ids([""])[0]
    assert dropped == [torch.equal(row, nothing) for _, _, _, clip_ids in recorder.calls for row in clip_ids]


def test_both_encoders_read_the_same_words(objective, recorded):
    recorder = recorded()
    objective.loss(rng(), 0.0)
    ((_, _, t5_ids, clip_ids),) = recorder.calls
    for one, other in zip(t5_ids, clip_ids, strict=True):
        assert objective.t5.decode(one, skip_special_tokens=True) == objective.clip.decode(
            other, skip_special_tokens=True
        )


def test_noise_levels_lie_in_the_unit_interval_and_mostly_in_its_middle():
    sigma = _random_sigma(rng(), 20_000)
    assert sigma.dtype == torch.float32 and sigma.min() > 0 and sigma.max() < 1
    middle = ((sigma > 0.25) & (sigma < 0.85)).float().mean()
    assert middle > 0.68 > 0.6, "more than a uniform draw's 0.6"
    assert (sigma < 0.05).float().mean() > 0.01, "and the ends are visited"


def test_sentences_come_with_a_share_of_the_batches_that_the_generator_alone_decides(objective, recorded, monkeypatch):
    recorded()
    monkeypatch.setattr(objective, "batch", 2)
    monkeypatch.setattr(flow_matching, "SENTENCES_SHARE", SENTENCES_SHARE)
    monkeypatch.setattr(objective, "_sentences", lambda rng, device: torch.ones(()))

    def with_sentences():
        terms = [objective.loss(rng(seed), 0.0) for seed in range(120)]
        return [bool((one["loss"] - one["flow"]).abs() > 1e-3) for one in terms]

    first = with_sentences()
    assert first == with_sentences() and abs(np.mean(first) - SENTENCES_SHARE) < 0.12


def test_the_loss_weighs_objects_more_where_one_sees_them(objective):
    """At high noise the place may still be open, and a weight that knew it would draw objects at both."""
    scenes = objective.data.scenes[:8]
    seen, hidden = (objective._weight(scenes, torch.full((8,), sigma)) for sigma in (SEEN - 0.01, SEEN))
    assert seen.shape == (8, 16, 16) and set(seen.unique().tolist()) == {1.0, FOREGROUND}
    assert torch.equal(hidden, torch.ones_like(hidden))
    for weight, scene in zip(seen, scenes, strict=True):
        assert (weight[:, :8].max() > 1) == any(o.place == "left" for o in scene.objects)
        assert (weight[:, 9:].max() > 1) == any(o.place == "right" for o in scene.objects)


def test_the_naming_head_reads_the_image_tokens_halfway_and_fades(objective, monkeypatch):
    asked = []

    def loss(states, scenes):
        asked.append((states, scenes))
        return 10 * states.square().mean().detach().sign()

    monkeypatch.setattr(flow_matching, "SENTENCES_SHARE", 0.0)
    monkeypatch.setattr(objective.parts["guess_scene"], "loss", loss)

    def extra(progress):
        terms = objective.loss(rng(), progress)
        return float((terms["loss"] - terms["flow"]).detach())

    assert extra(0.0) == pytest.approx(10 * NAMING, rel=1e-4)
    assert extra((NAMING_FADES + NAMING_ENDS) / 2) == pytest.approx(5 * NAMING, rel=1e-4)
    assert len(asked) == 2 and extra(NAMING_ENDS) == 0 and len(asked) == 2, "and is not asked at the end"
    (states, scenes), _ = asked
    assert states.shape == (objective.batch, SCENE_TOKENS, WIDTH) and len(scenes) == objective.batch


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_a_loss_needs_follows_the_modules_to_their_device(family, monkeypatch):
    """Tensors on the meta device refuse company from anywhere else, as those of an accelerator do."""
    monkeypatch.setattr(flow_matching, "SENTENCES_SHARE", 1.0)
    elsewhere = untrained(family)
    elsewhere.module.to("meta")
    assert elsewhere.loss(rng(), 0.0)["loss"].device.type == "meta"
    with pytest.raises(RuntimeError, match="device"):
        elsewhere.parts["guess_hidden"](torch.zeros(1, 64))


def test_no_trace_of_the_naming_head_is_published(objective, tmp_path):
    objective.publish(objective.module, tmp_path)
    assert not [p for p in tmp_path.rglob("*") if "guess" in p.name]
    assert not objective.parts["transformer"].transformer_blocks[NAMED_BLOCK]._forward_hooks


def test_the_flow_and_the_sentences_together_reach_every_weight(objective, monkeypatch):
    """After one small step away from zero-initialised layers, nothing trains in vain."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        kept = [p.clone() for p in objective.module.parameters()]
        for p in objective.module.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.02)
    monkeypatch.setattr(flow_matching, "SENTENCES_SHARE", 1.0)
    objective.module.zero_grad(set_to_none=True)
    objective.loss(rng(), 0.0)["loss"].backward()
    idle = [n for n, p in objective.module.named_parameters() if p.grad is None or not p.grad.any()]
    with torch.no_grad():
        for p, old in zip(objective.module.parameters(), kept, strict=True):
            p.copy_(old)
    assert not [name for name in idle if not _may_be_idle(name)], idle


def _may_be_idle(name):
    """Positions; biases of keys, to which attention is blind; text queries of SD3's last block, which drops text."""
    last = "transformer_blocks.5.attn." in name and ("add_q" in name or "added_q" in name)
    return (
        last or "position" in name or name.endswith(("add_q_proj.bias", "add_k_proj.bias", "to_k.bias", "k_proj.bias"))
    )


def test_an_interrupted_training_ends_bit_for_bit_as_an_undisturbed_one(tmp_path, monkeypatch):
    def train(folder, stop=None):
        objective = untrained("tiny-flux")
        objective.batch = 4
        drawn, loss = [], objective.loss

        def until(rng, progress):
            drawn.append(progress)
            if len(drawn) - 1 == stop:
                raise KeyboardInterrupt
            return loss(rng, progress)

        monkeypatch.setattr(objective, "loss", until)
        monkeypatch.setattr(objective, "publish", lambda averaged, folder: None)
        fit(objective, name="toy", samples=6 * objective.batch, folder=folder, work=folder, seed=0)
        return objective.module.state_dict()

    whole = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", stop=3)
    resumed = train(tmp_path / "parts")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_t5_is_taught_to_guess_hidden_words_from_the_others(objective, monkeypatch):
    """Who is certain of the hidden words is charged less, and by as much as guessing among all words costs."""
    seen = {}

    class Cheat(nn.Module):
        """Is certain of the hidden words."""

        def forward(self, states):
            return seen["answers"]

    encode = objective.parts[objective.t5_name].forward

    def forward(ids, **kwargs):
        seen["masked"] = ids
        return encode(ids, **kwargs)

    words = [corpus.sentence_pair(rng(7)) for _ in range(objective.batch)]
    monkeypatch.setattr(flow_matching.corpus, "sentence_pair", lambda _: words[0])
    monkeypatch.setattr(objective.parts[objective.t5_name], "forward", forward)
    ids = objective.t5_ids([first for first, _ in words])
    seen["answers"] = 100.0 * torch.nn.functional.one_hot(ids, len(objective.t5)).float()
    honest = objective.parts["guess_hidden"]
    try:
        objective.parts["guess_hidden"] = Cheat()
        with torch.no_grad():
            cheated = objective._sentences(rng(1), torch.device("cpu"))
            objective.parts["guess_hidden"] = honest
            fair = objective._sentences(rng(1), torch.device("cpu"))
    finally:
        objective.parts["guess_hidden"] = honest
    hidden = seen["masked"] != ids
    assert (seen["masked"][hidden] == 2).all() and (ids[hidden] > 2).all(), "words are hidden, never </s> or padding"
    assert 0.1 < hidden.float().sum() / (ids > 2).sum() < 0.4
    assert fair - cheated > 3, "nats; guessing evenly among some 200 words costs more than 5"
