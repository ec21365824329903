"""x̂0 and the model's output are converted as the schedulers themselves do, there and back."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    KDPM2DiscreteScheduler,
)

from safedig.config import UsageError
from safedig.denoiser.mixing import Mixing, check_scheduler, mixing
from tests.unet_pipeline import scheduler


def sample_and_output(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 4, 8, 8, generator=generator)


@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler])
@pytest.mark.parametrize("says", ["epsilon", "v_prediction", "sample"])
def test_it_is_the_schedulers_own_x0(kind, says):
    if (kind, says) == (EulerDiscreteScheduler, "sample"):
        pytest.skip("diffusers has no `sample` for it")
    options = {"clip_sample": False} if kind is DDIMScheduler else {}
    steps_by = scheduler(kind, prediction_type=says, **options)
    steps_by.set_timesteps(5)
    for timestep in steps_by.timesteps[:-1]:
        x, output = sample_and_output()
        now = mixing(steps_by, timestep)
        theirs = steps_by.step(output, timestep, x).pred_original_sample
        assert torch.allclose(now.x0(x, output), theirs, rtol=1e-4, atol=1e-4)


def test_it_is_the_x0_of_dpm_solver():
    steps_by = scheduler(DPMSolverMultistepScheduler, use_karras_sigmas=True)
    steps_by.set_timesteps(6)
    for timestep in steps_by.timesteps:
        x, output = sample_and_output()
        now = mixing(steps_by, timestep)
        theirs = steps_by.convert_model_output(output, sample=x)
        assert torch.allclose(now.x0(x, output), theirs, rtol=1e-4, atol=1e-4)
        steps_by.step(output, timestep, x)


def test_of_a_rectified_flow_it_is_what_the_step_to_zero_reaches():
    steps_by = FlowMatchEulerDiscreteScheduler(shift=3.0)
    steps_by.set_timesteps(4)
    for timestep in steps_by.timesteps:
        x, output = sample_and_output()
        now = mixing(steps_by, timestep)
        after = steps_by.step(output, timestep, x, return_dict=False)[0]
        noise = x + (1 - now.sigma) * output
        assert now.following is not None
        assert torch.allclose((1 - now.following) * now.x0(x, output) + now.following * noise, after, atol=1e-5)
    assert now.following == 0 and torch.allclose(after, now.x0(x, output), atol=1e-5)


MIXINGS = [
    Mixing(0.3, 0.7, "velocity"),
    Mixing(0.6, 0.8, "epsilon"),
    Mixing(0.6, 0.8, "v_prediction"),
    Mixing(1.0, 9.0, "epsilon"),
    Mixing(1.0, 9.0, "v_prediction"),
    Mixing(0.6, 0.8, "sample"),
]


@pytest.mark.parametrize("now", MIXINGS)
def test_the_amended_output_says_the_amended_x0(now):
    x, output = sample_and_output()
    delta = torch.randn_like(x)
    changed = output + now.output(delta)
    assert torch.allclose(now.x0(x, changed), now.x0(x, output) + delta, atol=1e-4)
    assert not torch.allclose(now.x0(x, output - now.output(delta)), now.x0(x, output) + delta, atol=1e-1)  # control


def test_sigma_is_that_of_the_rectified_flow_of_the_same_noise():
    assert Mixing(0.3, 0.7, "velocity").sigma == pytest.approx(0.7)
    assert Mixing(1.0, 9.0, "epsilon").sigma == pytest.approx(0.9)
    steps_by = scheduler(DDIMScheduler)
    steps_by.set_timesteps(50)
    assert mixing(steps_by, 780).sigma == pytest.approx(0.82, abs=0.005)  # method and model of arXiv 2502.08011


def test_a_scheduler_that_is_not_understood_is_refused():
    with pytest.raises(UsageError, match="KDPM2DiscreteScheduler is not understood.*use one of FlowMatchEuler"):
        check_scheduler(KDPM2DiscreteScheduler())
    with pytest.raises(UsageError, match="prediction_type is 'odd'"):
        check_scheduler(scheduler(DDIMScheduler, prediction_type="odd"))
