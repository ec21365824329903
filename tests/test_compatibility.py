"""However a pipeline is run, functions on its sites work or are refused aloud; docs/compatibility.md says which."""

from contextlib import nullcontext

import pytest
import torch

from safedig.config import UsageError
from safedig.hooks import SafetyBypassError, attach
from safedig.sites import Site, SiteError, resolve, transformer
from tests.compatibility import (
    ACTIONS,
    DOCUMENT,
    PIPELINES,
    Cell,
    Outcome,
    cells,
    document,
    functions,
    listed,
    outcome,
    wrong_rows,
)
from tests.compatibility_modes import CLOSE, MODES, cached
from tests.tiny_pipelines import draw_images, tiny_flux, tiny_sd3

EAGER = MODES[0]
IMG = Site.parse("transformer_blocks.1.img.resid_post")


def the_cell(name, order, pipeline, action):
    (mode,) = [mode for mode in MODES if mode.name == name]
    return Cell(mode, order, pipeline, action)


@pytest.fixture
def graphs_are_dropped():
    yield
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("cell", cells(), ids=str)
def test_every_cell_works_or_raises_as_documented(cell, graphs_are_dropped):
    found = outcome(cell)
    if found.verdict == "not run":
        pytest.skip(found.detail)
    assert found.verdict in ("works", "raises"), found.detail
    said = listed(DOCUMENT.read_text(encoding="utf-8"))[cell.mode.name, *cell[1:]]
    assert said == found.verdict or (cell.mode.needs and said == "not run"), found.detail


def test_the_document_lists_exactly_the_cells():
    text = DOCUMENT.read_text(encoding="utf-8")
    expected = [(cell.mode.name, *cell[1:]) for cell in cells()]
    assert list(listed(text)) == expected
    assert set(listed(text).values()) <= {"works", "raises", "not run"}
    assert [mode.run for mode in MODES if mode is not EAGER and f"`{mode.run}`" not in text] == []
    renamed = text.replace("| FirstBlockCache |", "| SecondBlockCache |")
    assert list(listed(renamed)) != expected


def test_the_document_says_what_became_of_each_cell():
    outcomes = {cell: Outcome("works") for cell in cells()}
    cached = the_cell("FirstBlockCache", "after", "tiny-sd3", "edit")
    outcomes[cached] = Outcome("raises", "UsageError: call disable_cache()")
    text = document(outcomes)
    assert {key for key, verdict in listed(text).items() if verdict == "raises"} == {("FirstBlockCache", *cached[1:])}
    assert "- FirstBlockCache, after: UsageError: call disable_cache()" in text


# ---- the matrix sees what it must see


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_functions_that_are_never_run_are_silent(pipeline, action):
    found = outcome(Cell(EAGER, "before", pipeline, action), attach=lambda *_: nullcontext())
    assert found.verdict == "SILENT"


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_no_single_edit_could_be_missing_within_the_tolerance(pipeline):
    pipe = PIPELINES[pipeline]()
    wanted, hidden = [], []
    with attach(pipe, functions(pipe, "edit", wanted)):
        draw_images(pipe, ["a cup"], num_inference_steps=1)
    for site in functions(pipe, "edit", []):
        seen = []
        with attach(pipe, functions(pipe, "edit", seen) | {site: functions(pipe, "record", seen)[site]}):
            draw_images(pipe, ["a cup"], num_inference_steps=1)
        if not wrong_rows(seen, wanted, CLOSE):
            hidden.append(str(site))
    assert hidden == ["velocity"]  # behind it comes the image alone, and there it is as large as anything


# ---- what is turned on while functions are attached


@pytest.mark.parametrize("build", [tiny_flux, tiny_sd3])
def test_a_step_cache_enabled_after_attaching_is_refused(build):
    """A block that it skips calls its hooks as often as it should, with stale tensors: counting does not help."""
    pipe = build()
    with pytest.raises(UsageError, match=r"step cache 'fbc_.*disable_cache"), attach(pipe, {IMG: lambda x, _: x}):
        cached(pipe)
        draw_images(pipe, ["a cup"])


def test_compiling_after_attaching_is_refused(pipe):
    block = transformer(pipe).get_submodule("transformer_blocks.1")
    try:
        with (
            pytest.raises(SafetyBypassError, match=r"compiled after .* Attach after compiling"),
            attach(pipe, {IMG: lambda x, _: x}),
        ):
            block.compile(backend="eager")
            draw_images(pipe, ["a cup"])
    finally:
        block._compiled_call_impl = None


def test_an_edit_under_checkpointed_gradients_is_refused_and_a_reader_is_not():
    """Blocks are computed anew in the backward pass, at no step: an edit would be missing from the gradients."""
    assert outcome(the_cell("gradient checkpointing", "before", "tiny-flux", "record")).verdict == "works"
    refused = outcome(the_cell("gradient checkpointing", "before", "tiny-flux", "edit"))
    assert refused.verdict == "raises" and "turn it off on pipe.transformer" in refused.detail


def test_checkpointing_without_gradients_does_not_stand_in_the_way():
    pipe, plain = tiny_flux(), tiny_flux()
    pipe.transformer.enable_gradient_checkpointing()
    images = []
    for one in (pipe, plain):
        with attach(one, {IMG: lambda x, _: x * 1.5}):
            images.append(draw_images(one, ["a cup"]))
    assert torch.equal(*images)


class Wrapped(torch.nn.Module):
    """A layer in the place of another, as LoRA puts it there."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x):
        return self.base_layer(x) * 1.1


@pytest.mark.parametrize(
    ("site", "missed"),
    [("txt.embed", True), ("transformer_blocks.0.txt.resid_post", False), ("transformer_blocks.0.img.attn_out", False)],
)
def test_a_layer_wrapped_after_attaching_is_missed_where_it_is_a_site_and_seen_where_it_is_inside_one(site, missed):
    pipe, site = tiny_flux(), Site.parse(site)
    before, after = [], []
    root = pipe.transformer
    with attach(pipe, {site: lambda x, _: before.append(x.clone())}):
        draw_images(pipe, ["a cup"])
        attention = root.transformer_blocks[0].attn
        root.context_embedder, attention.to_q = Wrapped(root.context_embedder), Wrapped(attention.to_q)
        if missed:
            with pytest.raises(SafetyBypassError, match="was replaced"):
                draw_images(pipe, ["a cup"])
            return
        draw_images(pipe, ["a cup"])
    with attach(pipe, {site: lambda x, _: after.append(x.clone())}):
        draw_images(pipe, ["a cup"])
    assert all(torch.equal(x, y) for x, y in zip(before[len(after) :], after, strict=True))
    assert not torch.equal(before[0], after[0])


# ---- what a pipeline can be asked for besides


def test_nested_edits_act_one_after_the_other_and_the_outer_goes_on_alone(pipe):
    def drawn(edit):
        with attach(pipe, {IMG: edit}):
            return draw_images(pipe, ["a cup"])

    both, one = drawn(lambda x, _: x * 1.5 + 1), drawn(lambda x, _: x * 1.5)
    with attach(pipe, {IMG: lambda x, _: x * 1.5}):
        with attach(pipe, {IMG: lambda x, _: x + 1}):
            assert torch.equal(draw_images(pipe, ["a cup"]), both)
        assert torch.equal(draw_images(pipe, ["a cup"]), one)
    assert not torch.equal(drawn(lambda x, _: (x + 1) * 1.5), both)


def test_a_reader_inside_a_steering_sees_what_was_steered(pipe):
    seen = []
    with (
        attach(pipe, {IMG: lambda x, _: torch.zeros_like(x)}),
        attach(pipe, {IMG: lambda x, _: seen.append(x.abs().max().item())}),
    ):
        draw_images(pipe, ["a cup"])
    assert seen and not any(seen)


def test_a_controlnet_residual_is_seen_by_the_next_block_and_not_by_its_own(pipe):
    here, there = Site.parse("transformer_blocks.0.img.resid_post"), Site.parse("transformer_blocks.1.img.resid_pre")
    own, following = residual_seen(pipe, here, there, "controlnet_block_samples")
    assert torch.equal(own[1], own[0])
    assert torch.equal(following[0], own[0]) and torch.equal(following[1], own[0] + 5)


def test_a_controlnet_residual_of_a_single_block_is_seen_behind_the_next(tiny_random_flux):
    here, there = (Site.parse(f"single_transformer_blocks.{index}.img.resid_post") for index in (0, 1))
    own, following = residual_seen(tiny_random_flux, here, there, "controlnet_single_block_samples")
    assert torch.equal(own[1], own[0]) and not torch.equal(following[1], following[0])


def residual_seen(pipe, here, there, name):
    """What passes two sites without a ControlNet's residual, and with one of 5 after every block of the family."""
    root, given, seen = transformer(pipe), arguments(pipe), {here: [], there: []}
    name = name if "Flux" in type(root).__name__ else "block_controlnet_hidden_states"
    with torch.no_grad(), attach(pipe, {site: lambda x, at: seen[at.site].append(x.clone()) for site in seen}):
        root(**given)
        root(**given | {name: [torch.full_like(seen[here][0], 5.0)] * len(getattr(root, here.family))})
    return seen[here], seen[there]


def arguments(pipe):
    """What the pipeline calls its transformer with."""
    calls = []
    hook = transformer(pipe).register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    draw_images(pipe, ["a cup"])
    hook.remove()
    return calls[0]


def test_a_chunked_mlp_is_no_site_and_one_chunked_after_attaching_stops_the_image():
    pipe, site = tiny_sd3(), Site.parse("transformer_blocks.1.img.mlp_out")
    with (
        pytest.raises(SafetyBypassError, match=r"img\.mlp_out' fired 2 of 1 times"),
        attach(pipe, {site: lambda x, _: x}),
    ):
        pipe.transformer.enable_forward_chunking(chunk_size=1, dim=0)
        draw_images(pipe, ["a cup"])
    with pytest.raises(SiteError, match="_chunk_size is set"):
        resolve(pipe, str(site))


def test_several_images_a_prompt_are_steered_like_each_alone(pipe):
    def edit(x, context):
        """On conditional rows alone: a row that is taken for another shows."""
        rows = torch.tensor([row == "cond" for row in context.rows])
        return torch.where(rows[:, None, None], x * 1.5, x)

    with attach(pipe, {IMG: edit}):
        both = draw_images(pipe, ["a cup", "a gun"], seeds=[3, 4, 5, 6], num_images_per_prompt=2)
        alone = [
            draw_images(pipe, [text], seeds=[seed])
            for text, seed in zip(["a cup"] * 2 + ["a gun"] * 2, [3, 4, 5, 6], strict=True)
        ]
    torch.testing.assert_close(both, torch.cat(alone), atol=1e-4, rtol=0)
    assert not torch.allclose(both, draw_images(pipe, ["a cup", "a gun"], seeds=[3, 4, 5, 6], num_images_per_prompt=2))
