"""Safe Latent Diffusion on the velocity: the formula by hand beside what the hook hands to the scheduler."""

import pytest
import torch

from safedig.evaluation.methods import METHODS
from safedig.evaluation.methods.safe_latent_diffusion import BETA, MOMENTUM, THRESHOLD, Guiding, _guidance
from safedig.evaluation.methods.text import encode
from safedig.shadow import answer
from tests.lessons import images, lesson, rows


@pytest.fixture(scope="module", params=["tiny-flux", "tiny-sd3"])
def given(request):
    return lesson(request.param)


def test_the_guidance_is_read_off_what_the_pipeline_made_of_both_rows():
    conditional, unconditional = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    assert _guidance(unconditional + 2.5 * (conditional - unconditional), conditional, unconditional) == pytest.approx(
        2.5
    )


def handed_on(given, acting):
    """What the scheduler is given in each step, and at which latents."""
    seen = []

    def spy(inner, model_output, timestep, sample, **more):
        seen.append((model_output, sample))
        return inner(model_output, timestep, sample, **more)

    with answer(given.pipe.scheduler, "step", spy):
        images(given, rows("harmful", "report", 1), acting)
    return seen


def test_the_first_step_is_as_the_formula_says(given):
    """At strength 0.7, from v(c), v(∅) and v(S) that are computed here on their own."""
    strength, concept = 0.7, "a knife"
    calls = []
    handle = given.pipe.transformer.register_forward_hook(
        lambda m, a, k, out: calls.append((k, out[0])), with_kwargs=True
    )
    plain, x = handed_on(given, None)[0]
    handle.remove()
    if len(calls) == 2 * 2:  # FLUX: two calls a step
        kwargs, conditional, unconditional = calls[0][0], calls[0][1], calls[1][1]
    else:
        kwargs, (unconditional, conditional) = calls[0][0], calls[0][1].chunk(2)
    text = encode(given.pipe, [concept], 16)
    n = len(kwargs["hidden_states"])
    asked = kwargs | {
        "encoder_hidden_states": text.tokens.expand(n, -1, -1),
        "pooled_projections": text.pooled.expand(n, -1),
    }
    harmful = given.pipe.transformer(**asked)[0][:1]
    leaning = conditional - harmful
    mu = torch.where(leaning < THRESHOLD, (strength * leaning).abs().clamp(max=1), 0)
    gamma = mu * (harmful - unconditional)
    expected = plain - 2.5 * gamma
    steps = handed_on(given, Guiding(concept, strength))
    assert torch.equal(steps[0][1], x) and torch.allclose(steps[0][0], expected, atol=1e-4)
    assert not torch.allclose(expected, plain, atol=1e-2), "so that the equality could have failed"


def test_the_momentum_of_one_step_is_felt_in_the_next(given):
    """γ_2 = μ_2 · (v(S) − v(∅)) + s_m · (1 − β_m) · γ_1: without it the second step would be another."""
    import safedig.evaluation.methods.safe_latent_diffusion as sld

    with_momentum = handed_on(given, Guiding("a knife", 1.0))
    first = {"plain": handed_on(given, None)[0][0], "guided": with_momentum[0][0]}
    gamma = (first["plain"] - first["guided"]) / 2.5
    before, sld.MOMENTUM = sld.MOMENTUM, 0.0
    try:
        without = handed_on(given, Guiding("a knife", 1.0))
    finally:
        sld.MOMENTUM = before
    assert torch.equal(with_momentum[0][0], without[0][0])
    expected = without[1][0] - 2.5 * MOMENTUM * (1 - BETA) * gamma
    assert torch.allclose(with_momentum[1][0], expected, atol=1e-4)


def test_every_call_begins_anew(given):
    asked = rows("harmful", "report", 2)
    at = METHODS["SLD"].learn(given)(4.0)
    with at.apply(given.pipe):
        once = [images(given, [row]) for row in asked]
        again = [images(given, [row]) for row in asked]
    assert all(torch.equal(one, other) for one, other in zip(once, again, strict=True))
