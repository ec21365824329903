"""What is put on a site runs in every step, knows σ and its rows, leaves no trace, and cannot be bypassed silently."""

import gc
from contextlib import ExitStack

import pytest
import torch

from safedig.config import UsageError
from safedig.hooks import Context, SafetyBypassError, attach
from safedig.shadow import listen
from safedig.sites import Site, SiteError, resolve, sites, transformer
from tests.tiny_pipelines import CALL, draw_images, tiny_auraflow, tiny_flux, tiny_sd3

IMG = Site.parse("transformer_blocks.0.img.resid_post")
TXT = Site.parse("txt.embed")


@pytest.fixture
def seen():
    return []


def watch(seen):
    def function(x: torch.Tensor, context: Context):
        seen.append((context, x.clone()))

    return function


def footprint(pipe):
    """Everything that attaching could leave behind."""
    hooks = [
        (name, len(module._forward_hooks), len(module._forward_pre_hooks), "forward" in vars(module))
        for name, module in transformer(pipe).named_modules()
    ]
    return hooks, set(vars(pipe)), set(vars(pipe.scheduler))


def test_a_reader_changes_no_bit(pipe, seen):
    plain = draw_images(pipe, ["a cup", "a gun"])
    with attach(pipe, {site: watch(seen) for site in sites(pipe)}):
        assert torch.equal(draw_images(pipe, ["a cup", "a gun"]), plain)
    assert seen


def test_nothing_is_left_behind(pipe):
    draw_images(pipe, ["a cup"])
    before, plain = footprint(pipe), draw_images(pipe, ["a cup"])
    with attach(pipe, {site: lambda x, _: x + 1 for site in sites(pipe, editable=True)}):
        assert footprint(pipe) != before
        assert not torch.equal(draw_images(pipe, ["a cup"]), plain)
    assert footprint(pipe) == before
    assert torch.equal(draw_images(pipe, ["a cup"]), plain)


def test_nothing_is_left_behind_by_an_exception_inside_a_hook_or_the_with(pipe):
    draw_images(pipe, ["a cup"])
    before, plain = footprint(pipe), draw_images(pipe, ["a cup"])

    def fail(x, _):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), attach(pipe, {IMG: fail}):
        draw_images(pipe, ["a cup"])
    with pytest.raises(KeyError), attach(pipe, {IMG: lambda x, _: x + 1}):
        raise KeyError
    assert footprint(pipe) == before
    assert torch.equal(draw_images(pipe, ["a cup"]), plain)


def test_a_call_that_failed_does_not_disturb_the_next(pipe, seen):
    with attach(pipe, {TXT: watch(seen)}):
        with pytest.raises(ValueError):
            draw_images(pipe, ["a cup", "a gun"], seeds=[0])
        draw_images(pipe, ["a cup"])
    assert [context.rows for context, _ in seen] == [rows for rows in _rows_of(pipe, 1) for _ in [0]] * 3


def _rows_of(pipe, count):
    """The rows of the transformer's calls in one step, under guidance."""
    cond, uncond = ("cond",) * count, ("uncond",) * count
    return [cond, uncond] if "Flux" in type(pipe).__name__ else [uncond + cond]


def test_nested_attachments_all_run_and_leave_in_any_order(pipe):
    before, plain = footprint(pipe), draw_images(pipe, ["a cup"])
    counts = {"first": 0, "second": 0}

    def count(name):
        def function(x, _):
            counts[name] += 1

        return function

    first, second = ExitStack(), ExitStack()
    first.enter_context(attach(pipe, {IMG: count("first")}))
    second.enter_context(attach(pipe, {IMG: count("second")}))
    draw_images(pipe, ["a cup"])
    assert counts["first"] == counts["second"] > 0
    first.close()
    draw_images(pipe, ["a cup"])
    assert counts["second"] == 2 * counts["first"]
    second.close()
    assert footprint(pipe) == before
    assert torch.equal(draw_images(pipe, ["a cup"]), plain)


def test_an_attribute_that_was_shadowed_before_is_put_back(tiny_random_flux):
    pipe, calls = tiny_random_flux, []
    original = pipe.scheduler.step
    pipe.scheduler.step = own = lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
    try:
        with attach(pipe, {IMG: lambda x, _: None}):
            draw_images(pipe, ["a cup"])
        assert pipe.scheduler.step is own and len(calls) == 3
    finally:
        del pipe.scheduler.step


def test_listeners_leave_a_method_shadowed_by_someone_else_alone():
    class Thing:
        def go(self):
            return 1

    thing, heard = Thing(), []
    with listen(thing, "go", after=heard.append):
        inner = thing.go
        vars(thing)["go"] = lambda: inner() + 1
        assert thing.go() == 2
    assert thing.go() == 2 and heard == [1]


def test_the_clock_reads_sigma_from_the_scheduler(pipe, seen):
    with attach(pipe, {TXT: watch(seen)}):
        draw_images(pipe, ["a cup"])
        draw_images(pipe, ["a cup"], num_inference_steps=2)
    moments = list(dict.fromkeys((context.step, round(context.sigma, 6)) for context, _ in seen[: len(seen) * 3 // 5]))
    assert [step for step, _ in moments] == [0, 1, 2]
    assert moments[0][1] == 1.0 and moments[0][1] > moments[1][1] > moments[2][1] > 0
    last = [context.sigma for context, _ in seen[len(seen) * 3 // 5 :]]
    assert list(dict.fromkeys(last)) == pipe.scheduler.sigmas[:-1].tolist()


@pytest.mark.parametrize("images_per_prompt", [1, 2])
def test_rows_are_recognised_in_every_call(pipe, seen, images_per_prompt):
    """Two calls in a row, for counting calls by parity mislabels the second."""
    with attach(pipe, {TXT: watch(seen)}):
        for prompts in (["a cup", "a gun"], ["a hat"]):
            seeds = list(range(len(prompts) * images_per_prompt))
            draw_images(pipe, prompts, seeds=seeds, num_images_per_prompt=images_per_prompt)
    expected = _rows_of(pipe, 2 * images_per_prompt) * 3 + _rows_of(pipe, images_per_prompt) * 3
    assert [context.rows for context, _ in seen] == expected
    uncond = [x[at] for context, x in seen for at, row in enumerate(context.rows) if row == "uncond"]
    assert all(torch.allclose(x, uncond[0], atol=1e-5) for x in uncond)
    cond = [x[at] for context, x in seen for at, row in enumerate(context.rows) if row == "cond"]
    assert not any(torch.allclose(x, uncond[0], atol=1e-5) for x in cond)


def test_an_empty_prompt_is_still_the_conditional_row(pipe, seen):
    with attach(pipe, {TXT: watch(seen)}):
        draw_images(pipe, ["", "a cup"])
    assert [context.rows for context, _ in seen] == _rows_of(pipe, 2) * 3


def test_without_guidance_all_rows_are_conditional(pipe, seen):
    with attach(pipe, {TXT: watch(seen)}):
        draw_images(pipe, ["a cup"], true_cfg_scale=1.0) if "Flux" in type(pipe).__name__ else draw_images(
            pipe, ["a cup"], guidance_scale=1.0
        )
    assert [context.rows for context, _ in seen] == [("cond",)] * 3


def test_embeddings_given_by_the_caller_are_recognised(tiny_random_sd3, seen):
    pipe = tiny_random_sd3
    embeds = pipe.encode_prompt("a gun", "a gun", "a gun", max_sequence_length=12)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    with attach(pipe, {TXT: watch(seen)}):
        pipe(**dict(zip(names, embeds, strict=True)), height=32, width=32, num_inference_steps=2, output_type="pt")
    assert [context.rows for context, _ in seen] == [("uncond", "cond")] * 2


def test_rows_are_known_where_masks_lie_between_the_embeddings(seen):
    """AuraFlow returns (cond, mask, uncond, mask), and cannot be interrupted."""
    pipe = tiny_auraflow()
    with attach(pipe, {Site.parse("joint_transformer_blocks.0.img.resid_post"): watch(seen)}):
        pipe("a gun", negative_prompt="a tree", **CALL)
    assert [context.rows for context, _ in seen] == [("uncond", "cond")] * 3


def test_a_pipeline_whose_calls_cannot_be_followed_is_refused(tiny_random_flux, monkeypatch):
    monkeypatch.delattr(type(tiny_random_flux), "check_inputs")
    with pytest.raises(UsageError, match=r"has no check_inputs\(\)"), attach(tiny_random_flux, {IMG: lambda x, _: x}):
        raise AssertionError


def test_a_batch_is_steered_like_its_images_alone(pipe):
    site = Site.parse("transformer_blocks.1.img.resid_post")
    with attach(pipe, {site: lambda x, _: x * 1.2}):
        both = draw_images(pipe, ["a cup", "a gun"], seeds=[3, 4])
        one = draw_images(pipe, ["a gun"], seeds=[4])
    torch.testing.assert_close(both[1:], one, atol=1e-4, rtol=0)


@pytest.mark.parametrize("changed", [lambda x: x[:, :1], lambda x: x.double()])
def test_a_result_of_another_shape_or_dtype_is_refused(pipe, changed):
    with (
        pytest.raises(ValueError, match=r"transformer_blocks\.0\.img\.resid_post returned"),
        attach(pipe, {IMG: lambda x, _: changed(x)}),
    ):
        draw_images(pipe, ["a cup"])


def test_a_site_of_another_model_is_refused_before_anything_is_hooked(tiny_random_sd3):
    before = footprint(tiny_random_sd3)
    alien = Site.parse("single_transformer_blocks.0.img.resid_post")
    with (
        pytest.raises(SiteError, match="no live site of SD3Transformer2DModel"),
        attach(tiny_random_sd3, {IMG: lambda x, _: None, alien: lambda x, _: None}),
    ):
        raise AssertionError
    assert footprint(tiny_random_sd3) == before


# ---- the sentinel


def test_a_block_that_is_bypassed_stops_the_image(pipe):
    """A compiled graph calls a block's forward without its hooks: PyTorch does so through this attribute. What is
    compiled before the call is seen sooner; see test_compatibility.py.
    """
    module = transformer(pipe).get_submodule("transformer_blocks.1")
    site = Site.parse("transformer_blocks.1.img.resid_post")
    try:
        with (
            pytest.raises(SafetyBypassError, match=r"transformer_blocks\.1\.img\.resid_post' fired 0 of"),
            attach(pipe, {site: lambda x, _: x}),
            listen(pipe, "encode_prompt", after=lambda _: setattr(module, "_compiled_call_impl", module.forward)),
        ):
            draw_images(pipe, ["a cup"])
    finally:
        module._compiled_call_impl = None


def test_a_model_that_is_bypassed_whole_stops_the_image(pipe):
    root = transformer(pipe)
    try:
        with (
            pytest.raises(SafetyBypassError, match="without calling its hooks"),
            attach(pipe, {Site.parse("velocity"): lambda x, _: x}),
            listen(pipe, "encode_prompt", after=lambda _: setattr(root, "_compiled_call_impl", root.forward)),
        ):
            draw_images(pipe, ["a cup"])
    finally:
        root._compiled_call_impl = None


def test_the_second_image_is_watched_as_closely_as_the_first(pipe):
    module = transformer(pipe).get_submodule("transformer_blocks.1")
    with (
        pytest.raises(SafetyBypassError),
        attach(pipe, {Site.parse("transformer_blocks.1.img.resid_post"): lambda x, _: x}),
    ):
        draw_images(pipe, ["a cup"])
        module._forward_hooks.clear()
        draw_images(pipe, ["a cup"])


def test_a_replaced_transformer_or_scheduler_stops_the_image(pipe):
    own, clock = pipe.transformer, pipe.scheduler
    other = tiny_flux(1) if "Flux" in type(pipe).__name__ else tiny_sd3(1)
    try:
        with pytest.raises(SafetyBypassError, match="was replaced"), attach(pipe, {IMG: lambda x, _: x}):
            pipe.transformer = other.transformer
            draw_images(pipe, ["a cup"])
        pipe.transformer = own
        with pytest.raises(SafetyBypassError, match="0 of 3 steps were seen"), attach(pipe, {IMG: lambda x, _: x}):
            pipe.scheduler = other.scheduler
            draw_images(pipe, ["a cup"])
    finally:
        pipe.transformer, pipe.scheduler = own, clock


def test_entering_and_leaving_without_drawing_is_no_bypass(pipe):
    with attach(pipe, {IMG: lambda x, _: x}):
        pass


def test_a_reader_that_is_not_strict_does_not_stop_the_image(pipe):
    with attach(pipe, {IMG: lambda x, _: None}, strict=False):
        transformer(pipe).get_submodule("transformer_blocks.0")._forward_hooks.clear()
        draw_images(pipe, ["a cup"])


def test_an_interrupted_image_is_no_bypass(pipe):
    def interrupt(pipeline, step, timestep, tensors):
        pipeline._interrupt = True
        return tensors

    with attach(pipe, {IMG: lambda x, _: x}):
        draw_images(pipe, ["a cup"], callback_on_step_end=interrupt)


def test_layers_skipped_by_guidance_are_not_missed(tiny_random_sd3, seen):
    site, skipped = (Site.parse(f"transformer_blocks.{index}.img.resid_post") for index in (0, 1))
    options = {"skip_guidance_layers": [1], "skip_layer_guidance_start": -1.0, "skip_layer_guidance_stop": 0.5}
    with attach(tiny_random_sd3, {site: watch(seen), skipped: watch(seen)}):
        draw_images(tiny_random_sd3, ["a cup"], **options)
    fired = [str(context.site) for context, _ in seen]
    assert fired.count(str(site)) == 3 + 2 and fired.count(str(skipped)) == 3
    assert [context.rows for context, _ in seen if context.site == site][1] == ("cond",)


SLOW = pytest.mark.slow


@pytest.mark.parametrize("how", ["blocks", pytest.param("module", marks=SLOW), pytest.param("wrapper", marks=SLOW)])
@pytest.mark.parametrize("build", [tiny_flux, tiny_sd3])
def test_compiled_models_run_the_functions(build, how):
    """By default torch.compile ignores hooks that come after the first call."""
    pipe = build()
    site = resolve(pipe, "transformer_blocks.1.img.resid_post")[0]
    plain = draw_images(pipe, ["a cup"])
    with attach(pipe, {site: lambda x, _: x * 1.5}):
        edited = draw_images(pipe, ["a cup"])
    if how == "module":
        pipe.transformer.compile(backend="eager")
    elif how == "wrapper":
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    else:
        for block in pipe.transformer.transformer_blocks:
            block.compile(backend="eager")
    assert torch.equal(draw_images(pipe, ["a cup"]), plain)
    for _ in range(2):
        with attach(pipe, {site: lambda x, _: x * 1.5}):
            assert torch.equal(draw_images(pipe, ["a cup"]), edited)
        assert torch.equal(draw_images(pipe, ["a cup"]), plain)
    torch.compiler.reset()


def test_step_caches_are_refused(tiny_random_flux):
    from diffusers.hooks.first_block_cache import FirstBlockCacheConfig

    tiny_random_flux.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    try:
        with (
            pytest.raises(UsageError, match=r"step cache 'fbc_.*disable_cache"),
            attach(tiny_random_flux, {IMG: lambda x, _: x}),
        ):
            raise AssertionError
    finally:
        tiny_random_flux.transformer.disable_cache()
    with attach(tiny_random_flux, {IMG: lambda x, _: x}):
        draw_images(tiny_random_flux, ["a cup"])


def test_no_tensor_is_kept_alive_after_leaving(pipe):
    with attach(pipe, {IMG: lambda x, _: x + 0}):
        draw_images(pipe, ["a cup"])
    gc.collect()
    assert not any(hasattr(value, "listeners") for value in vars(pipe).values())


def test_the_output_is_rewritten_in_a_tuple_and_in_a_named_output_alike(pipe):
    """Pipelines ask for a tuple; a caller of the transformer itself gets a dataclass by default."""
    calls, root, site = [], transformer(pipe), Site.parse("velocity")
    handle = root.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
    draw_images(pipe, ["a cup"])
    handle.remove()
    given = calls[0] | {"return_dict": True}
    with torch.no_grad():
        plain = root(**given).sample
        with attach(pipe, {site: lambda x, _: x * 2}):
            named, bare = root(**given), root(**(given | {"return_dict": False}))
    assert torch.equal(named.sample, plain * 2) and torch.equal(bare[0], plain * 2)
