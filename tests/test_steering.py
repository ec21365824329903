"""Steering changes the tokens its gate opens for, and not one bit of anything else, on both architectures."""

import json
from dataclasses import replace

import pytest
import torch

from safedig.activations.record import record
from safedig.adaptation import fit_contrast
from safedig.config import UsageError
from safedig.features import Features, find_features
from safedig.hooks import Context, SafetyBypassError
from safedig.pipelines import Drawing, draw, fingerprint
from safedig.prompts import prompts_from_rows
from safedig.sae.model import Decoder, SparseAutoencoder, ThresholdEncoder
from safedig.sae.train import SAEOptions, train
from safedig.sites import Site, SiteError, d_in, sites, transformer
from safedig.steering.edits import Repel
from safedig.steering.gate import Gate
from safedig.steering.steering import Rule, Steering
from tests.tiny_pipelines import draw_images

TXT, POOLED = Site.parse("txt.embed"), Site.parse("pooled.embed")
IMG = Site.parse("transformer_blocks.0.img.resid_post")
EVERYWHERE = [TXT, POOLED, IMG]
DRAWING = Drawing(steps=2, guidance=3.0, height=32, width=32, max_sequence_length=12, true_cfg=True)
NEVER, ALWAYS = float("inf"), -1.0


def rule(pipe, site, gate=ALWAYS, strength=1.0, **options):
    """Four features that fire on everything, in random directions."""
    generator = torch.Generator().manual_seed(0)
    width = d_in(pipe, site)
    encoder = ThresholdEncoder(torch.zeros(width, 4), torch.ones(4), torch.zeros(4))
    directions = torch.randn(4, width, generator=generator)
    return Rule(torch.arange(4), encoder, directions, Gate(gate, **options), (Repel(strength),))


def steering(pipe, where=EVERYWHERE, **options):
    return made_of(pipe, {site: rule(pipe, site, **options) for site in where})


def made_of(pipe, rules):
    """A steering with these very rules."""
    eye, one = torch.eye(1), torch.ones(1)
    sae = SparseAutoencoder(ThresholdEncoder(eye, one, one), Decoder(eye, one), {"model": fingerprint(pipe)})
    made = Steering({TXT: sae}, {TXT: Features(torch.tensor([0]), 1.0, one, one)})
    made.rules = rules
    return made


# ---- a closed gate


@pytest.mark.parametrize("closed", [{"gate": NEVER}, {"sigmas": (2.0, 3.0)}, {"strength": 0.0}])
def test_a_closed_gate_changes_no_bit(pipe, closed):
    plain = draw_images(pipe, ["a gun", "a cup"])
    for where in (EVERYWHERE, sites(pipe, editable=True)):
        with steering(pipe, where, **closed).apply(pipe):
            assert torch.equal(draw_images(pipe, ["a gun", "a cup"]), plain)


def test_an_open_gate_changes_the_image(pipe):
    """The control: the same rules, the same sites, and the check above would fail."""
    plain = draw_images(pipe, ["a gun", "a cup"])
    for site in sites(pipe, editable=True):
        with steering(pipe, [site]).apply(pipe):
            steered = draw_images(pipe, ["a gun", "a cup"])
        assert not torch.equal(steered[0], plain[0]) and not torch.equal(steered[1], plain[1]), site


def test_a_closed_gate_changes_no_bit_in_low_precision(pipe):
    original = pipe.transformer.dtype
    closed, open_ = steering(pipe, gate=NEVER), steering(pipe)
    pipe.to(torch.bfloat16)
    try:
        plain = draw_images(pipe, ["a gun"])
        with closed.apply(pipe):
            assert torch.equal(draw_images(pipe, ["a gun"]), plain)
        with open_.apply(pipe):
            assert not torch.equal(draw_images(pipe, ["a gun"]), plain)
    finally:
        pipe.to(original)


# ---- afterwards


def test_after_leaving_the_pipeline_is_bit_for_bit_as_it_was(pipe):
    plain, keys = draw_images(pipe, ["a gun"]), set(vars(pipe))
    with steering(pipe).apply(pipe):
        draw_images(pipe, ["a gun"])
    assert untouched(pipe, keys) and torch.equal(draw_images(pipe, ["a gun"]), plain)


def test_after_an_exception_inside_the_pipeline_is_bit_for_bit_as_it_was(pipe):
    plain, keys = draw_images(pipe, ["a gun"]), set(vars(pipe))

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), steering(pipe).apply(pipe):
        draw_images(pipe, ["a gun"], callback_on_step_end=stop)
    assert untouched(pipe, keys) and torch.equal(draw_images(pipe, ["a gun"]), plain)


def untouched(pipe, keys):
    modules = transformer(pipe).modules()
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in modules)
    return set(vars(pipe)) == keys and not hooked and "step" not in vars(pipe.scheduler)


def test_the_weights_are_not_touched(pipe):
    before = {name: tensor.clone() for name, tensor in transformer(pipe).state_dict().items()}
    with steering(pipe).apply(pipe):
        draw_images(pipe, ["a gun"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in transformer(pipe).state_dict().items())


def test_steering_can_be_applied_again_and_gives_the_same_bits(pipe):
    made = steering(pipe)
    with made.apply(pipe):
        first = draw_images(pipe, ["a gun", "a cup"])
        assert torch.equal(draw_images(pipe, ["a gun", "a cup"]), first)
    with made.apply(pipe):
        assert torch.equal(draw_images(pipe, ["a gun", "a cup"]), first)


def test_a_bypass_stops_the_image(pipe):
    module = transformer(pipe).get_submodule("transformer_blocks.0")
    with pytest.raises(SafetyBypassError), steering(pipe, [IMG]).apply(pipe):
        module._forward_hooks.clear()
        draw_images(pipe, ["a gun"])


# ---- which tokens


def detector(pipe, harmful, harmless):
    """A rule at pooled.embed whose one feature fires for the first prompt and not for the second."""
    seen = []
    for batch in record(pipe, prompts_from_rows([{"prompt": p} for p in (harmful, harmless)]), POOLED, drawing=DRAWING):
        seen.append(batch.x)
    high, low = seen[0]
    direction = (high - low) / (high - low).square().sum()
    encoder = ThresholdEncoder(direction[:, None], -(low @ direction)[None] - 0.5, torch.zeros(1))  # 0.5 and −0.5
    gated = Rule(torch.arange(1), encoder, 40 * direction[None], Gate(0.0), (Repel(5.0),))
    return made_of(pipe, {POOLED: gated})


def test_in_one_batch_only_the_image_whose_gate_opens_is_changed(pipe):
    prompts = ["a cup", "a gun", "a cup"]
    plain = draw_images(pipe, prompts)
    with detector(pipe, "a gun", "a cup").apply(pipe):
        steered = draw_images(pipe, prompts)
    assert torch.equal(steered[0], plain[0]) and torch.equal(steered[2], plain[2])
    assert not torch.equal(steered[1], plain[1])


def test_the_unconditional_row_is_left_alone_unless_asked(pipe):
    """A feature that fires on the empty prompt alone: with rows="cond" it must never act."""
    plain = draw_images(pipe, ["a gun"])
    made = detector(pipe, "!", "a gun")
    encoder = made.rules[POOLED].encoder
    fires_always = replace(encoder, b_enc=encoder.b_enc + 100)
    for rows, changed in (("cond", False), ("all", True)):
        with attach_only_uncond(pipe, made, fires_always, rows).apply(pipe):
            assert torch.equal(draw_images(pipe, ["a gun"]), plain) != changed


def attach_only_uncond(pipe, made, encoder, rows):
    class OnlyUncond(Gate):
        def __call__(self, z, context):
            uncond = torch.tensor([row == "uncond" for row in context.rows])
            return super().__call__(z, context) & uncond[:, None]

    base = made.rules[POOLED]
    return made_of(pipe, {POOLED: replace(base, encoder=encoder, gate=OnlyUncond(0.0, rows=rows))})


def test_the_window_of_sigma_decides_in_which_steps(pipe):
    made = steering(pipe, [IMG], sigmas=(0.99, 1.0))
    with made.apply(pipe):
        early = draw_images(pipe, ["a gun"])
    assert made.report[str(IMG)] == {"passed": 64, "touched": 64}  # 64 image tokens, the first of three steps
    with steering(pipe, [IMG], sigmas=(0.0, 0.98)).apply(pipe):
        assert not torch.equal(draw_images(pipe, ["a gun"]), early)


def test_the_report_counts_tokens_of_the_last_apply(pipe):
    made = steering(pipe)
    for _ in range(2):
        with made.apply(pipe):
            draw_images(pipe, ["a gun", "a cup"])
        assert made.report[str(IMG)] == {"passed": 64 * 2 * 3, "touched": 64 * 2 * 3}
        assert made.report[str(POOLED)] == {"passed": 2 * 3, "touched": 2 * 3}
    closed = steering(pipe, gate=NEVER)
    with closed.apply(pipe):
        draw_images(pipe, ["a gun"])
    assert closed.report[str(IMG)] == {"passed": 64 * 3, "touched": 0}


@pytest.mark.parametrize("rows", ["cond", "all"])
def test_a_gate_opens_where_the_codes_add_up_to_more_than_the_threshold(rows):
    """Not where one is high or many are up: 2.0 is not more than 2, and neither 1.5 nor 0.6 is alone."""
    gate = Gate(2.0, rows=rows)
    z = torch.tensor([[[2.0, 0.0], [1.5, 0.6], [0.0, 2.1], [0.6, 1.3]]]).repeat(2, 1, 1)
    expected = torch.tensor([[False, True, True, False]]).repeat(2, 1)
    if rows == "cond":
        expected[0] = False
    assert torch.equal(gate(z, Context(TXT, 0, 0.5, ("uncond", "cond"))), expected)


def test_the_scope_decides_whether_one_token_opens_the_gate_for_its_whole_image():
    z = torch.tensor([[[3.0], [0.1], [0.0]], [[1.0], [1.0], [1.9]]])
    context = Context(TXT, 0, 0.5, ("cond", "cond"))
    assert Gate(2.0, "token")(z, context).tolist() == [[True, False, False], [False] * 3]
    assert Gate(2.0, "image")(z, context).tolist() == [[True] * 3, [False] * 3]


def test_repel_is_its_formula():
    a, z, w = torch.randn(2, 3, 5), torch.rand(2, 3, 4), torch.randn(4, 5)
    expected = a - 0.7 * torch.einsum("btm,md->btd", z, w)
    torch.testing.assert_close(Repel(0.7)(a, z, w), expected)
    assert torch.equal(Repel(0.7)(a, torch.zeros_like(z), w), a)


def test_what_passes_on_is_the_formula_in_the_inputs_dtype(pipe):
    made = steering(pipe, [IMG])
    with made.apply(pipe):
        live = made._live[IMG]
        x = torch.randn(1, 64, d_in(pipe, IMG)).bfloat16()
        out = live(x, Context(IMG, 0, 1.0, ("cond",)))
    expected = x.float() - torch.ones(4) @ made.rules[IMG].directions
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected.bfloat16())


# ---- from features, on disk


@pytest.fixture(scope="module", params=["flux", "sd3"])
def learnt(request):
    """The whole path on a random model: record, train, find, fit, steer."""
    pipe = request.getfixturevalue(f"tiny_random_{request.param}")
    nouns = [("gun", "cup"), ("axe", "hat"), ("bomb", "bell"), ("knife", "spoon")]
    rows = []
    for at, (harm, safe) in enumerate((h, s) for h, s in nouns for _ in range(3)):
        rows += [
            {"id": f"h{at}", "prompt": f"a {harm} {at}", "risk": "weapons", "twin": f"s{at}", "seed": at},
            {"id": f"s{at}", "prompt": f"a {safe} {at}", "seed": at},
        ]
    prompts = prompts_from_rows(rows)
    activations = record(pipe, prompts, [TXT, POOLED], drawing=DRAWING).in_memory()
    saes = train(activations, options=SAEOptions(expansion=4, k=4, steps=150, batch_size=128, lr=3e-3))
    features = find_features(saes, activations, min_ratio=0.55, quantile=0.9, fdr=1.0)  # 12 pairs: chance might
    saes = fit_contrast(saes, activations, features)
    return pipe, prompts, activations, Steering(saes, features, edits=[Repel(2.0)])


def test_steering_moves_harmful_prompts_towards_their_twins(learnt):
    """Where the edit acts, before any block: the pooled vectors come closer to those of the safe twins."""
    _, prompts, activations, made = learnt
    live = {row["id"]: row for row in prompts}
    rule = made.rules[POOLED]
    vectors = {name[0]: batch.x[rows] for batch in activations.at(POOLED) for name, rows in batch.images()}
    before, after = [], []
    for name, row in live.items():
        if row["twin"]:
            harmful, safe = vectors[name], vectors[row["twin"]]
            moved = Repel(1.0)(harmful[None], rule.encoder(harmful)[None], rule.directions)[0]
            before.append((harmful - safe).norm())
            after.append((moved - safe).norm())
    assert torch.stack(after).mean() < 0.9 * torch.stack(before).mean()


def test_a_steering_that_was_learnt_acts(learnt):
    pipe, prompts, _, made = learnt
    harmful = [row for row in prompts if row["risk"]][:4]
    plain = torch.cat([images for _, images in draw(pipe, harmful, drawing=DRAWING)])
    with made.apply(pipe):
        steered = torch.cat([images for _, images in draw(pipe, harmful, drawing=DRAWING)])
    assert not torch.equal(steered, plain)
    assert all(count["touched"] > 0 for count in made.report.values())


def test_saving_and_loading_changes_no_bit(learnt, tmp_path):
    pipe, _, _, made = learnt
    made.save(tmp_path / "pack")
    loaded = Steering.load(tmp_path / "pack")
    assert sorted(path.name for path in (tmp_path / "pack").iterdir()) == ["steering.json", "steering.safetensors"]
    with made.apply(pipe):
        expected = draw_images(pipe, ["a gun", "a cup"])
    with loaded.apply(pipe):
        assert torch.equal(draw_images(pipe, ["a gun", "a cup"]), expected)
    assert loaded.report == made.report and loaded.rules[TXT].edits == (Repel(2.0),)
    assert loaded.rules[TXT].gate == made.rules[TXT].gate


def test_all_of_a_gate_is_saved(tiny_random_flux, tmp_path):
    made = steering(tiny_random_flux, gate=0.25, scope="image", rows="all", sigmas=(0.2, 0.7))
    made.save(tmp_path)
    assert Steering.load(tmp_path).rules[IMG].gate == Gate(0.25, "image", "all", (0.2, 0.7))


def test_another_model_is_refused(tiny_random_flux, tiny_random_sd3):
    made = steering(tiny_random_flux)
    with pytest.raises(UsageError, match="was made for the model"), made.apply(tiny_random_sd3):
        raise AssertionError
    single = Site.parse("single_transformer_blocks.0.img.resid_post")
    alien = made_of(tiny_random_sd3, {single: rule(tiny_random_sd3, IMG)})
    with pytest.raises(SiteError), alien.apply(tiny_random_sd3):
        raise AssertionError


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 1}, "has format 1; this version reads format 2"),
        ({"sites": {"txt.embed": {"edits": []}}}, "is incomplete: 'gate' is missing"),
        (
            {"sites": {"txt.embed": {"edits": [], "gate": {"treshold": 1}}}},
            "Did you mean 'gate.threshold'",
        ),
        ({"sites": {"velocity": {"edits": [], "gate": {"threshold": 1}}}}, "is incomplete: 'W_enc' is missing"),
    ],
)
def test_a_folder_that_is_wrong_is_explained(tiny_random_flux, tmp_path, change, message):
    steering(tiny_random_flux).save(tmp_path)
    file = tmp_path / "steering.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UsageError, match=message):
        Steering.load(tmp_path)


def test_an_unknown_edit_points_to_the_known(tiny_random_flux, tmp_path):
    steering(tiny_random_flux).save(tmp_path)
    file = tmp_path / "steering.json"
    file.write_text(file.read_text().replace('"repel"', '"repell"'))
    with pytest.raises(UsageError, match="no edit 'repell'. Did you mean 'repel'"):
        Steering.load(tmp_path)


def test_a_missing_folder_is_explained(tmp_path):
    with pytest.raises(UsageError, match="is no steering folder"):
        Steering.load(tmp_path / "nowhere")


def test_saes_that_do_not_name_their_model_are_refused():
    eye, zero, one = torch.eye(2), torch.zeros(2), torch.ones(1)
    nameless = SparseAutoencoder(ThresholdEncoder(eye, zero, zero), Decoder(eye, zero))
    with pytest.raises(UsageError, match="do not all name one model"):
        Steering({TXT: nameless}, {TXT: Features(torch.tensor([0]), 1.0, one, one)})
