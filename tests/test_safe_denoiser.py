"""A safe denoiser moves x̂0 where its gate is open, changes no bit of anything else, and cannot be bypassed silently."""

import threading

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
)

from safedig.config import UsageError
from safedig.denoiser import (
    Exact,
    NegationSet,
    SafeDenoiser,
    SafeDensity,
    Semantic,
    Tempered,
    Thresholds,
    fit_thresholds,
)
from safedig.denoiser.calibrate import watch
from safedig.denoiser.mixing import mixing
from safedig.hooks import SafetyBypassError
from safedig.pipelines import Drawing
from safedig.shadow import amend
from tests import tiny_pipelines, unet_pipeline
from tests.steerings import NEVER, steering

ALWAYS = Thresholds((1.0,), (0.0,), (0.0,))  # β = 1 whatever is seen
FLOW = ["flux", "sd3"]
LATER = [  # schedulers and predictions of Stable Diffusion 1 and 2
    (DDIMScheduler, "epsilon"),
    (DDIMScheduler, "v_prediction"),
    (PNDMScheduler, "epsilon"),
    (EulerDiscreteScheduler, "v_prediction"),
    (DPMSolverMultistepScheduler, "epsilon"),
]


def sd1(kind=DDIMScheduler, says="epsilon"):
    options = {"skip_prk_steps": True} if kind is PNDMScheduler else {}
    return unet_pipeline.tiny_sd1(unet_pipeline.scheduler(kind, prediction_type=says, **options))


@pytest.fixture(params=[*FLOW, "sd1"])
def any_pipe(request):
    return sd1() if request.param == "sd1" else request.getfixturevalue(f"tiny_random_{request.param}")


def draw(pipe, prompts=("a cup", "a gun"), **options):
    room = unet_pipeline if "unet" in pipe.components else tiny_pipelines
    return room.draw_images(pipe, list(prompts), **options)


def negation(pipe, n=3, **frame):
    images = torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return NegationSet.of(images, pipe, cache=None, **({"height": 32, "width": 32} | frame))


def acting(pipe, strength=0.5, **options):
    return SafeDenoiser(negation(pipe), strength, **({"threshold": ALWAYS} | options))


def untouched(pipe):
    return not {"step"} & set(vars(pipe.scheduler)) and not {"check_inputs", "maybe_free_model_hooks"} & set(vars(pipe))


# ---- idle


IDLE = {
    "strength 0": {"strength": 0.0},
    "a closed gate": {"threshold": 1e6},
    "a window nothing is in": {"sigmas": (2.0, 3.0)},
    "a floor that is not reached": {"floor": 1.5, "limit": 2.0},
}


@pytest.mark.parametrize("idle", IDLE)
def test_idle_it_changes_no_bit(any_pipe, idle):
    plain = draw(any_pipe)
    with acting(any_pipe, **IDLE[idle]).apply(any_pipe):
        assert torch.equal(draw(any_pipe), plain)


def test_an_empty_set_changes_no_bit(any_pipe):
    plain, empty = draw(any_pipe), NegationSet(torch.zeros(0, *negation(any_pipe, 1).shape))
    with SafeDenoiser(empty, threshold=ALWAYS).apply(any_pipe):
        assert torch.equal(draw(any_pipe), plain)


def test_control_it_acts(any_pipe):
    plain = draw(any_pipe)
    with acting(any_pipe).apply(any_pipe):
        assert not any(torch.equal(one, other) for one, other in zip(draw(any_pipe), plain, strict=True))


@pytest.mark.parametrize("idle", IDLE)
def test_idle_the_scheduler_gets_the_very_same_tensor(tiny_random_flux, idle):
    pipe, given, passed = tiny_random_flux, [], []
    with (
        amend(pipe.scheduler, "step", lambda one: given.append(one["model_output"]) or {}),
        acting(pipe, **IDLE[idle]).apply(pipe),
        amend(pipe.scheduler, "step", lambda one: passed.append(one["model_output"]) or {}),
    ):
        draw(pipe)
    assert len(given) == 3 and all(one is other for one, other in zip(given, passed, strict=True))


def test_idle_it_changes_no_bit_in_low_precision_and_otherwise_keeps_the_type(pipe):
    images, closed, open_ = negation(pipe), {"threshold": 1e6}, {"threshold": ALWAYS}
    pipe.to(torch.bfloat16)
    try:
        plain, types = draw(pipe), []
        with SafeDenoiser(images, **closed).apply(pipe):
            assert torch.equal(draw(pipe), plain)
        with (
            SafeDenoiser(images, 0.5, **open_).apply(pipe),
            amend(pipe.scheduler, "step", lambda one: types.append(one["model_output"].dtype) or {}),
        ):
            assert not torch.equal(draw(pipe), plain)
        assert set(types) == {torch.bfloat16}
    finally:
        pipe.to(torch.float32)


# ---- acting


def test_at_the_last_step_the_image_is_the_x0_that_was_asked_for(pipe):
    """v′ = v − (x̂0′ − x̂0) / σ, and the unmodified scheduler does the rest."""
    images = negation(pipe, 1)
    z = torch.cat(list(images.parts()))
    plain = draw(pipe, ["a cup"], output_type="latent")
    with SafeDenoiser(images, 0.5, threshold=ALWAYS, sigmas=(0.0, 0.65)).apply(pipe) as made:
        pushed = draw(pipe, ["a cup"], output_type="latent")
    (told,) = made.audit
    assert [one.step for one in told] == [2] and told[0].beta == 0.5  # the last of three steps
    assert torch.allclose(pushed, plain + 0.5 * (plain - z), atol=1e-4)


@pytest.mark.parametrize(("kind", "says"), LATER)
def test_schedulers_of_stable_diffusion_1_and_2_are_told_the_x0_that_was_asked_for(kind, says):
    pipe, before, after = sd1(kind, says), [], []
    images = negation(pipe, 1)
    (z,) = images.parts()
    with (
        amend(pipe.scheduler, "step", keep(pipe, before)),
        SafeDenoiser(images, 0.5, threshold=ALWAYS).apply(pipe),
        amend(pipe.scheduler, "step", keep(pipe, after)),
    ):
        assert draw(pipe, ["a cup"]).isfinite().all()
    assert len(before) == pipe.num_timesteps
    for x0, pushed in zip(before, after, strict=True):
        assert torch.allclose(pushed, x0 + 0.5 * (x0 - z), rtol=1e-3, atol=1e-3 * x0.abs().max())


def keep(pipe, into):
    """Note what x̂0 the scheduler is about to be told."""

    def look(given):
        into.append(mixing(pipe.scheduler, given["timestep"]).x0(given["sample"], given["model_output"]))
        return {}

    return look


def test_per_sample_gates_leave_the_other_images_bit_for_bit_as_they_are(any_pipe):
    plain, latents = draw(any_pipe), draw(any_pipe, output_type="latent")
    one = SafeDenoiser(NegationSet(latents[:1]), 1.0, kernel=Tempered(0.5), limit=0.5, floor=0.3)
    with one.apply(any_pipe):
        drawn = draw(any_pipe)
    betas = [[told.beta > 0 for told in image] for image in one.audit]
    assert any(betas[0]) and not any(betas[1])
    assert torch.equal(drawn[1], plain[1]) and not torch.equal(drawn[0], plain[0])


def test_several_images_a_prompt_are_gated_each_by_itself(pipe):
    def two(prompts, output):
        generators = [torch.Generator().manual_seed(seed) for seed in range(2 * len(prompts))]
        options = tiny_pipelines.CALL | {"output_type": output}
        return pipe(prompts, num_images_per_prompt=2, generator=generators, **options).images

    plain, latents = two(["a cup", "a gun"], "pt"), two(["a cup", "a gun"], "latent")
    with SafeDenoiser(NegationSet(latents[2:3]), 1.0, kernel=Tempered(0.5), limit=0.5, floor=0.3).apply(pipe) as made:
        drawn = two(["a cup", "a gun"], "pt")
    assert [torch.equal(a, b) for a, b in zip(drawn, plain, strict=True)] == [True, True, False, True]
    assert [any(told.beta for told in image) for image in made.audit] == [False, False, True, False]


def test_what_is_drawn_keeps_away_from_the_set(pipe):
    """The memorised image: negated, it is not drawn again, and more strength keeps further away."""
    latents = draw(pipe, ["a cup"], output_type="latent")
    images, away = NegationSet(latents), [0.0]
    for strength in (0.5, 1.0):
        with SafeDenoiser(images, strength, kernel=Tempered(0.1)).apply(pipe):
            away.append(float((draw(pipe, ["a cup"], output_type="latent") - latents).norm()))
    assert away[0] < away[1] < away[2]


@pytest.mark.parametrize("kernel", [Exact(), Tempered(0.3), Semantic(lambda z: z.flatten(1)[:, :8])])
@pytest.mark.parametrize("mode", ["theory", "released", "renoise-only", "spell"])
def test_every_kernel_and_mode_draws_finite_images(tiny_random_sd3, kernel, mode):
    threshold = 5.0 if mode == "spell" else ALWAYS
    made = acting(tiny_random_sd3, 0.1, kernel=kernel, mode=mode, threshold=threshold)
    with made.apply(tiny_random_sd3):
        drawn = draw(tiny_random_sd3)
    assert drawn.isfinite().all() and not torch.equal(drawn, draw(tiny_random_sd3))


def test_renoised_at_every_step_but_the_last_the_sample_goes_nowhere(tiny_random_sd3):
    seen = []
    with (
        acting(tiny_random_sd3, mode="renoise-only", sigmas=(0.65, 1.0)).apply(tiny_random_sd3),
        amend(tiny_random_sd3.scheduler, "step", lambda one: seen.append(one["sample"].clone()) or {}),
    ):
        draw(tiny_random_sd3)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[1], seen[2])


@pytest.mark.parametrize("steps", [2, 6])
def test_with_any_number_of_steps_the_image_is_the_x0_that_was_asked_for_last(pipe, steps):
    """What is asked for is a place for x̂0, not a length of step."""
    images, asked = negation(pipe, 1), []
    with SafeDenoiser(images, 0.5, threshold=ALWAYS).apply(pipe), amend(pipe.scheduler, "step", keep(pipe, asked)):
        pushed = draw(pipe, ["a cup"], output_type="latent", num_inference_steps=steps)
    assert len(asked) == steps and torch.allclose(asked[-1], pushed, rtol=1e-3, atol=1e-3)


# ---- off again, and beside others


def test_it_leaves_no_trace(any_pipe):
    plain = draw(any_pipe)
    with pytest.raises(ZeroDivisionError), acting(any_pipe).apply(any_pipe):
        draw(any_pipe)
        raise ZeroDivisionError
    assert untouched(any_pipe) and torch.equal(draw(any_pipe), plain)


def test_interrupted_inside_a_step_it_leaves_no_trace_and_the_next_call_is_whole(pipe):
    plain = draw(pipe)

    def stop(*_):
        raise KeyboardInterrupt

    with acting(pipe).apply(pipe):
        with pytest.raises(KeyboardInterrupt):
            draw(pipe, callback_on_step_end=stop)
        first = draw(pipe)
        assert torch.equal(draw(pipe), first)
    assert untouched(pipe) and torch.equal(draw(pipe), plain)


def test_several_act_in_the_order_they_were_put_on(pipe):
    with acting(pipe, 0.3).apply(pipe), acting(pipe, 0.7).apply(pipe):
        both = draw(pipe)
    with acting(pipe, 0.3).apply(pipe):
        one = draw(pipe)
    assert not torch.equal(both, one) and untouched(pipe)


def test_steering_and_denoising_act_together_and_leave_in_any_order(pipe):
    with acting(pipe).apply(pipe):
        denoised = draw(pipe)
    with steering(pipe, gate=NEVER).apply(pipe), acting(pipe).apply(pipe):
        assert torch.equal(draw(pipe), denoised)  # a steering that is idle changes nothing of it
    with acting(pipe).apply(pipe), steering(pipe).apply(pipe):
        assert not torch.equal(draw(pipe), denoised)
    assert untouched(pipe)


# ---- the sentinel


def test_a_scheduler_that_was_replaced_is_noticed():
    pipe = tiny_pipelines.tiny_sd3()
    with acting(pipe).apply(pipe):
        draw(pipe)
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        with pytest.raises(SafetyBypassError, match="Armed but not run: 0 of 3 steps"):
            draw(pipe)


def test_a_step_that_goes_around_it_is_noticed(tiny_random_sd3):
    pipe = tiny_random_sd3
    with acting(pipe).apply(pipe):
        shadowed = pipe.scheduler.step
        pipe.scheduler.step = lambda *args, **kwargs: type(pipe.scheduler).step(pipe.scheduler, *args, **kwargs)
        with pytest.raises(SafetyBypassError, match="0 of 3 steps"):
            draw(pipe)
        pipe.scheduler.step = shadowed
        draw(pipe)
    assert untouched(pipe)


def test_a_shadow_that_hides_the_arguments_is_noticed(tiny_random_sd3):
    pipe = tiny_random_sd3
    inner = pipe.scheduler.step
    pipe.scheduler.step = lambda *args, **kwargs: inner(*args, **kwargs)
    try:
        with acting(pipe).apply(pipe), pytest.raises(SafetyBypassError, match="hides its arguments"):
            draw(pipe)
    finally:
        del pipe.scheduler.step


def test_another_threads_step_is_refused(tiny_random_sd3):
    pipe, caught = tiny_random_sd3, []

    def elsewhere(*_):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return {}

    def run():
        x = torch.zeros(1, 4, 16, 16)
        try:
            pipe.scheduler.step(x, pipe.scheduler.timesteps[0], x)
        except SafetyBypassError as error:
            caught.append(error)

    with acting(pipe).apply(pipe):
        draw(pipe, callback_on_step_end=elsewhere)
    assert len(caught) == 3


# ---- mistakes


def test_another_size_than_the_sets_is_refused_even_where_it_has_as_many_numbers(pipe):
    with SafeDenoiser(negation(pipe, height=16, width=64), threshold=ALWAYS).apply(pipe):
        draw(pipe, height=16, width=64)
        for height, width in ((64, 16), (32, 32)):
            with pytest.raises(UsageError, match=f"16 × 64 pixels .*is to have {height} × {width}"):
                draw(pipe, height=height, width=width)


def test_latents_of_another_shape_are_refused(pipe):
    message = r"draws latents of shape .* and the negation set holds \(7,\)"
    with (
        SafeDenoiser(NegationSet(torch.zeros(2, 7)), threshold=ALWAYS).apply(pipe),
        pytest.raises(UsageError, match=message),
    ):
        draw(pipe)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "releasd"}, "mode='releasd'.*Did you mean 'released'"),
        ({"strength": -1.0}, "strength=-1.0"),
        ({"limit": 0.0}, "limit=0.0"),
        ({"sigmas": (0.9, 0.1)}, "expected the lowest σ first"),
        ({"mode": "spell", "threshold": None}, "give its radius"),
        ({"kernel": Exact(), "threshold": None}, "no measure of nearness by itself"),
        ({"threshold": SafeDensity(lambda x, _: x[:, 0])}, "give kernel=Exact"),
    ],
)
def test_a_mistake_is_told(tiny_random_sd3, options, message):
    with pytest.raises(UsageError, match=message):
        acting(tiny_random_sd3, **options)


def test_schedulers_that_are_not_understood_are_refused_before_anything_is_drawn():
    pipe = sd1()
    made = acting(pipe)
    pipe.scheduler = KDPM2DiscreteScheduler()
    with pytest.raises(UsageError, match="KDPM2DiscreteScheduler is not understood"), made.apply(pipe):
        pass
    made, message = acting(sd1(), mode="released"), "mode='released' is known for FlowMatchEuler"
    with pytest.raises(UsageError, match=message), made.apply(sd1()):
        pass


# ---- calibration on a pipeline


DRAWING = Drawing(steps=3, guidance=3.0, height=32, width=32, max_sequence_length=12, true_cfg=True)
ROWS = [{"id": str(at), "prompt": "a gun" if at % 2 else "a cup", "seed": at % 4} for at in range(12)]


def test_watching_changes_no_bit_and_sees_the_image_come(pipe):
    seen = watch(pipe, ROWS[:3], drawing=DRAWING, batch_size=2)
    sigmas = pipe.scheduler.sigmas.tolist()[:-1]
    assert [at.mixing.sigma for at in seen.moments] == pytest.approx(sigmas) and untouched(pipe)
    latents = draw(pipe, [row["prompt"] for row in ROWS[:3]], output_type="latent")
    assert torch.allclose(seen.moments[-1].x0, latents.flatten(1), atol=1e-3) and len(seen.images) == 3


def test_thresholds_open_for_what_becomes_unsafe_and_stay_closed_for_the_rest(pipe):
    """Guns are drawn unsteered and negated: the gate then knows their x̂0 from that of cups."""
    guns = draw(pipe, ["a gun"] * 2, seeds=[1, 3], output_type="latent")
    images, kernel = NegationSet(guns), Tempered(0.05)
    fitted = fit_thresholds(
        pipe, images, ROWS, lambda rows, _: ["gun" in row["prompt"] for row in rows], kernel=kernel, drawing=DRAWING
    )
    assert fitted.sigmas == pytest.approx(pipe.scheduler.sigmas.tolist()[:-1])
    with SafeDenoiser(images, 0.5, kernel=kernel, threshold=fitted, floor=0.5, sigmas=(0.0, 0.7)).apply(pipe) as made:
        draw(pipe, ["a gun", "a cup"], seeds=[1, 0])
    assert [any(told.beta for told in image) for image in made.audit] == [True, False]


def test_nothing_to_calibrate_on_is_told(pipe):
    with pytest.raises(UsageError, match="There is no prompt to calibrate on"):
        watch(pipe, [], drawing=DRAWING)
