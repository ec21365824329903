"""Steering changes the tokens its gate opens for, and not one bit of anything else, on both architectures."""

import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from safedig.activations.record import record
from safedig.adaptation import fit_contrast
from safedig.config import UsageError
from safedig.features import Features, find_features
from safedig.hooks import Context, SafetyBypassError, attach
from safedig.pipelines import draw
from safedig.prompts import prompts_from_rows
from safedig.sae.model import Decoder, SparseAutoencoder, ThresholdEncoder
from safedig.sae.train import SAEOptions, train
from safedig.sites import Site, d_in, sites, transformer
from safedig.steering.applied import Live, Opened
from safedig.steering.edits import Blend, Repel, Replace
from safedig.steering.gate import Gate
from safedig.steering.guard import fit_guards
from safedig.steering.holding import apply_steering, remove_steering
from safedig.steering.material import Material
from safedig.steering.rule import Rule
from safedig.steering.steering import Steering
from tests.steerings import (
    ALWAYS,
    DRAWING,
    EVERY_EDIT,
    EVERYWHERE,
    IMG,
    NEVER,
    POOLED,
    TXT,
    detector,
    edited,
    made_of,
    rule,
    steering,
    whole,
)
from tests.tiny_pipelines import CALL, draw_images

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
        def __call__(self, z, context, opened=None):
            uncond = torch.tensor([row == "uncond" for row in context.rows])
            return super().__call__(z, context, opened) & uncond[:, None]

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


def test_what_passes_on_is_the_formula_in_the_inputs_dtype(pipe):
    made = steering(pipe, [IMG])
    with made.apply(pipe):
        live = made._live[IMG]
        x = torch.randn(1, 64, d_in(pipe, IMG)).bfloat16()
        out = live(x, Context(IMG, 0, 1.0, ("cond",)))
    expected = x.float() - torch.ones(4) @ made.rules[IMG].material.directions
    assert out is not None and out.dtype == torch.bfloat16 and torch.equal(out, expected.bfloat16())


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
    contrasts = fit_contrast(saes, activations, features)
    made = Steering(contrasts, features, edits=[Repel(2.0)])
    return SimpleNamespace(**locals())


def test_steering_moves_harmful_prompts_towards_their_twins(learnt):
    """Where the edit acts, before any block: the pooled vectors come closer to those of the safe twins."""
    live = {row["id"]: row for row in learnt.prompts}
    rule = learnt.made.rules[POOLED]
    vectors = {name[0]: batch.x[rows] for batch in learnt.activations.at(POOLED) for name, rows in batch.images()}
    before, after = [], []
    for name, row in live.items():
        if row["twin"]:
            harmful, safe = vectors[name], vectors[row["twin"]]
            moved = harmful - rule.encoder(harmful) @ rule.material.directions
            before.append((harmful - safe).norm())
            after.append((moved - safe).norm())
    assert torch.stack(after).mean() < 0.9 * torch.stack(before).mean()


def test_a_steering_that_was_learnt_acts(learnt):
    pipe, made = learnt.pipe, learnt.made
    harmful = [row for row in learnt.prompts if row["risk"]][:4]
    plain = torch.cat([images for _, images in draw(pipe, harmful, drawing=DRAWING)])
    with made.apply(pipe):
        steered = torch.cat([images for _, images in draw(pipe, harmful, drawing=DRAWING)])
    assert not torch.equal(steered, plain)
    assert all(count["touched"] > 0 for count in made.report.values())


def test_saes_that_do_not_name_their_model_are_refused():
    eye, zero, one = torch.eye(2), torch.zeros(2), torch.ones(1)
    nameless = SparseAutoencoder(ThresholdEncoder(eye, zero, zero), Decoder(eye, zero))
    with pytest.raises(UsageError, match="do not all name one model"):
        Steering({TXT: nameless}, {TXT: Features(torch.tensor([0]), 1.0, one, one)})


def test_repel_alone_is_what_it_has_always_been(learnt):
    """To the bit: z of M, the gate on their sum, and where it opens a − strength · z·w in float32."""
    rule = learnt.made.rules[TXT]
    found = replace(learnt.features[TXT], threshold=0.0)

    def by_hand(x, context):
        z = rule.encoder(x.float())
        open_ = (z.sum(-1) > 0.0) & torch.tensor([row == "cond" for row in context.rows])[:, None]
        out = x.float() - 2.0 * (z @ learnt.contrasts[TXT].decoder.W_dec[found.index])
        return torch.where(open_[..., None], out.to(x.dtype), x)

    one = Steering({TXT: learnt.contrasts[TXT]}, {TXT: found}, edits=[Repel(2.0)])
    prompts = ["a gun 0", "a bomb 6", "a cup 0"]
    with one.apply(learnt.pipe):
        steered = draw_images(learnt.pipe, prompts)
    assert one.report[str(TXT)]["touched"] > 0
    with attach(learnt.pipe, {TXT: by_hand}):
        assert torch.equal(draw_images(learnt.pipe, prompts), steered)


def test_both_decoders_and_a_guard_are_learnt_on_one_path(learnt):
    """Blend reads the SAEs as they were trained beside the contrast that Repel reads; the guard holds both back."""
    safe = [row for row in learnt.prompts if not row["risk"]]
    guards = fit_guards(learnt.activations.of(safe), quantile=1.0)
    pipe, both = learnt.pipe, [Repel(40.0), Blend(0.5)]
    free = Steering(learnt.contrasts, learnt.features, both, reconstruction=learnt.saes)
    held = Steering(learnt.contrasts, learnt.features, both, reconstruction=learnt.saes, guards=guards)
    moved = {}
    for name, made in (("free", free), ("held", held)):
        with made.apply(pipe):
            draw_images(pipe, ["a gun 0", "a bomb 6"])
        moved[name] = [touch.moved for image in made.audit for touch in image]
    assert all(one <= other for one, other in zip(moved["held"], moved["free"], strict=True))
    assert 0 < sum(moved["held"]) < 0.5 * sum(moved["free"])


# ---- every edit


@pytest.mark.parametrize("edits", EVERY_EDIT, ids=str)
def test_no_edit_changes_a_bit_under_a_closed_gate_and_each_changes_the_image_under_an_open_one(pipe, edits):
    plain = draw_images(pipe, ["a gun"])
    with edited(pipe, edits, gate=NEVER).apply(pipe):
        assert torch.equal(draw_images(pipe, ["a gun"]), plain)
    made = edited(pipe, edits)
    with made.apply(pipe):
        assert not torch.equal(draw_images(pipe, ["a gun"]), plain)
    assert all(count["touched"] > 0 for count in made.report.values())


def test_detected_tokens_of_a_map_take_values_of_the_others(tiny_random_flux):
    pipe = tiny_random_flux
    made = edited(pipe, [Replace(by="map")], [IMG], gate=ALWAYS)
    site_rule = made.rules[IMG]
    seen = []
    with attach(pipe, {IMG: lambda x, _: seen.append(site_rule.encoder(x.float()).sum(-1).median().item())}):
        plain = draw_images(pipe, ["a gun"])
    made = edited(pipe, [Replace(by="map")], [IMG], gate=seen[0])
    with made.apply(pipe):
        assert not torch.equal(draw_images(pipe, ["a gun"]), plain)
    assert 0 < made.report[str(IMG)]["touched"] < made.report[str(IMG)]["passed"]


def test_each_site_may_have_a_window_of_its_own(tiny_random_flux):
    pipe = tiny_random_flux
    made = edited(pipe, [Repel()], [TXT, IMG], sigmas={IMG: (0.99, 1.0)})
    with made.apply(pipe):
        draw_images(pipe, ["a gun"])
    report = made.report
    assert report[str(IMG)]["passed"] == 64 and report[str(TXT)]["passed"] == 3 * 12  # one step, and all three


# ---- from a route, in words


def route_of(pipe, **windows):
    from safedig.pipelines import fingerprint

    ranked = [SimpleNamespace(site=site, sigmas=windows.get(site.stream, (0.0, 1.0))) for site in EVERYWHERE]
    return SimpleNamespace(chosen=(IMG, TXT), sites=ranked, fingerprint=fingerprint(pipe))


def test_a_route_names_the_sites_and_their_windows(tiny_random_flux):
    saes, contrasts, features = whole(tiny_random_flux)
    route = route_of(tiny_random_flux, img=(0.3, 0.9))
    made = Steering.from_route(route, contrasts, features, edits=[Blend(1.0)], reconstruction=saes, scope="image")
    assert list(made.rules) == [IMG, TXT] and made.rules[IMG].edits == (Blend(1.0),)
    assert made.rules[IMG].gate == Gate(ALWAYS, "image", "cond", (0.3, 0.9))
    assert made.rules[TXT].gate.sigmas == (0.0, 1.0)
    asked = Steering.from_route(route, contrasts, features, sigmas=(0.5, 0.6))
    assert asked.rules[IMG].gate.sigmas == (0.5, 0.6)


def test_a_route_without_saes_or_of_another_model_is_explained(tiny_random_flux, tiny_random_sd3):
    _, contrasts, features = whole(tiny_random_flux, [TXT])
    with pytest.raises(UsageError, match=r"no SAEs and features for transformer_blocks.0.img.resid_post: train and"):
        Steering.from_route(route_of(tiny_random_flux), contrasts, features)
    _, contrasts, features = whole(tiny_random_flux)
    with pytest.raises(UsageError, match="The route is of the model"):
        Steering.from_route(route_of(tiny_random_sd3), contrasts, features)


def test_it_says_in_a_few_lines_what_it_does_where(tiny_random_flux):
    made = edited(tiny_random_flux, [Repel(1.5), Blend(0.5)], sigmas=(0.25, 1.0))
    lines = str(made).splitlines()
    assert len(lines) == 4 and lines[0] == f"Steering at 3 sites of the model {made.model[:12]}…"
    for words in (str(TXT), "Repel(strength=1.5", "Blend(strength=0.5", "on 3 features", "cond rows, σ 0.25–1"):
        assert words in lines[1]


def test_a_window_may_be_of_a_site_by_its_name(tiny_random_flux):
    saes, _, features = whole(tiny_random_flux)
    made = Steering(saes, features, sigmas={str(TXT): (0.5, 1.0), POOLED: (0.0, 0.25)})
    windows = {site: one.gate.sigmas for site, one in made.rules.items()}
    assert windows[TXT] == (0.5, 1.0) and windows[POOLED] == (0.0, 0.25) and windows[IMG] == (0.0, 1.0)


def test_a_steering_none_of_whose_gates_can_open_says_so_when_it_is_put_on(tiny_random_flux, capsys):
    for gate, said in ((NEVER, True), (ALWAYS, False)):
        with edited(tiny_random_flux, [Repel()], gate=gate).apply(tiny_random_flux):
            assert ("No gate of this steering can open" in capsys.readouterr().err) == said


# ---- sites that open the gates of others


def watching(pipe, watched=POOLED, scope="image", acting=True):
    """A detector that edits nothing, and at the text tokens an edit whose own gate never opens."""
    watch = replace(detector(pipe, "a gun", "a cup", [watched]).rules[watched], edits=())
    act = rule(pipe, TXT, NEVER, scope=scope)
    shut = replace(watch, gate=Gate(NEVER, "image"))
    return made_of(pipe, {watched: replace(watch, gate=Gate(0.0, "image")) if acting else shut, TXT: act})


def test_an_image_that_a_watched_site_tells_is_edited_elsewhere_and_no_bit_of_the_others_is(pipe):
    prompts = ["a cup", "a gun", "a cup"]
    plain, made = draw_images(pipe, prompts), watching(pipe)
    with made.apply(pipe):
        steered = draw_images(pipe, prompts)
    assert torch.equal(steered[0], plain[0]) and torch.equal(steered[2], plain[2])
    assert not torch.equal(steered[1], plain[1])
    assert all(touch.moved == 0 for image in made.audit for touch in image if touch.site == POOLED)
    assert [sum(touch.moved > 0 for touch in image) for image in made.audit] == [0, 3, 0], "in each of three steps"


def test_control_without_what_is_watched_or_by_tokens_nothing_is_edited(pipe):
    plain = draw_images(pipe, ["a cup", "a gun"])
    for made in (watching(pipe, acting=False), watching(pipe, scope="token")):
        with made.apply(pipe):
            assert torch.equal(draw_images(pipe, ["a cup", "a gun"]), plain)


def test_what_a_site_tells_opens_none_that_was_passed_before_it(pipe):
    """Nor in the next step: each decides by what it has seen itself. The later one has an edit, of strength 0."""
    made, plain = watching(pipe, IMG), draw_images(pipe, ["a gun", "a cup"])
    made.rules[IMG] = replace(made.rules[IMG], edits=(Repel(0.0),))
    with made.apply(pipe):
        assert torch.equal(draw_images(pipe, ["a gun", "a cup"]), plain)
    assert any(touch.open.any() for image in made.audit for touch in image if touch.site == IMG), "the control"


def test_a_text_encoder_cannot_be_watched_for_it_is_passed_before_any_step(tiny_random_flux):
    encoder = Site.parse("text_encoder_2:final.txt.resid_post")
    saes, _, features = whole(tiny_random_flux, [encoder, TXT])
    with pytest.raises(UsageError, match=r"passed before the first step, and can open no gate"):
        Steering(saes, features, watch=[encoder], scope="image")
    assert Steering(saes, features, scope="image").rules.keys() == {encoder, TXT}, "it may be edited"


def test_a_watched_site_that_is_passed_after_all_that_it_could_open_is_an_error(pipe):
    with watching(pipe, IMG).apply(pipe), pytest.raises(UsageError, match=r"after txt\.embed, whose gates it should"):
        draw_images(pipe, ["a gun"])


def test_a_watched_site_decides_anew_in_each_call(pipe):
    with watching(pipe).apply(pipe):
        first, gun = draw_images(pipe, ["a cup"]), draw_images(pipe, ["a gun"])
        assert torch.equal(draw_images(pipe, ["a cup"]), first) and torch.equal(draw_images(pipe, ["a gun"]), gun)
    assert torch.equal(draw_images(pipe, ["a cup"]), first) and not torch.equal(draw_images(pipe, ["a gun"]), gun)


def test_what_one_steering_tells_opens_no_gate_of_another_on_the_same_pipeline(pipe):
    both = watching(pipe)
    watch, act = (made_of(pipe, {site: one}) for site, one in both.rules.items())
    plain = draw_images(pipe, ["a gun"])
    with watch.apply(pipe), act.apply(pipe):
        assert torch.equal(draw_images(pipe, ["a gun"]), plain)
    with watch.merge(act).apply(pipe):
        assert not torch.equal(draw_images(pipe, ["a gun"]), plain), "merged they are one"


def test_a_pass_ends_with_its_step_its_rows_or_where_a_site_is_passed_again():
    opened, one, two = Opened(), torch.tensor([True, False]), torch.tensor([False, True])
    at = {site: Context(site, 0, 0.5, ("cond", "cond")) for site in (POOLED, TXT)}
    assert opened.before(at[POOLED]) is None
    opened.add(at[POOLED], one)
    assert torch.equal(opened.before(at[TXT]), one)
    opened.add(at[TXT], two)
    assert opened.before(Context(IMG, 1, 0.4, ("cond", "cond"))) is None
    for other in (Context(TXT, 0, 0.5, ("uncond", "uncond")), at[POOLED]):
        opened.before(at[POOLED])
        opened.add(at[POOLED], one)
        assert opened.before(other) is None
    opened.before(at[POOLED])
    opened.add(at[POOLED], one)
    opened.before(at[TXT])
    opened.add(at[TXT], two)
    assert opened.before(Context(IMG, 0, 0.5, ("cond", "cond"))).all(), "what each has opened for adds up"


def test_a_watched_site_has_no_edit_and_what_only_an_edit_needs_is_not_asked_of_it(tiny_random_flux):
    made = edited(tiny_random_flux, [Replace()], [TXT, POOLED], watch=[POOLED], scope="image")
    assert made.rules[POOLED].edits == () and made.rules[TXT].edits and made.rules[POOLED].material.bank is None
    assert "watches" in str(made).splitlines()[2]
    _, contrasts, features = whole(tiny_random_flux, [TXT, POOLED])
    saes = {TXT: whole(tiny_random_flux, [TXT])[0][TXT]}
    options = {"reconstruction": saes, "watch": [POOLED], "scope": "image"}
    assert Steering(contrasts, features, [Blend()], **options).rules.keys() == {TXT, POOLED}


@pytest.mark.parametrize(
    ("watch", "scope", "message"),
    [
        ([IMG], "image", "no features for 'transformer_blocks.0.img.resid_post', which is to be watched"),
        ([POOLED], "token", "scope='image'"),
        ([TXT, POOLED], "image", "one that is not watched"),
    ],
)
def test_what_cannot_be_watched_is_explained(tiny_random_flux, watch, scope, message):
    with pytest.raises(UsageError, match=message):
        edited(tiny_random_flux, [Repel()], [TXT, POOLED], watch=watch, scope=scope)


# ---- several steerings on one pipeline


def test_two_steerings_at_different_sites_nest_and_are_the_merged_one(pipe):
    text, image = edited(pipe, [Repel(0.5)], [TXT, POOLED]), edited(pipe, [Blend(0.5)], [IMG])
    with text.apply(pipe), image.apply(pipe):
        nested = draw_images(pipe, ["a gun", "a cup"])
    with image.apply(pipe), text.apply(pipe):
        assert torch.equal(draw_images(pipe, ["a gun", "a cup"]), nested)
    both = text.merge(image)
    with both.apply(pipe):
        assert torch.equal(draw_images(pipe, ["a gun", "a cup"]), nested)
    assert list(both.rules) == [TXT, POOLED, IMG] and both.facts.keys() == both.rules.keys()
    with text.apply(pipe):
        assert not torch.equal(draw_images(pipe, ["a gun", "a cup"]), nested)


def test_two_at_one_site_are_refused_and_the_outer_one_goes_on(pipe):
    outer, keys = steering(pipe, [TXT, IMG]), set(vars(pipe))
    with outer.apply(pipe):
        expected = draw_images(pipe, ["a gun"])
        for other in (steering(pipe, [IMG, POOLED]), outer):
            with pytest.raises(UsageError, match="The pipeline is steered at '.*' already"), other.apply(pipe):
                raise AssertionError
        assert torch.equal(draw_images(pipe, ["a gun"]), expected)
    assert untouched(pipe, keys)
    with pytest.raises(UsageError, match=f"Both steerings act at '{IMG}'"):
        outer.merge(steering(pipe, [IMG]))


def test_steerings_of_two_models_are_not_merged(tiny_random_flux, tiny_random_sd3):
    with pytest.raises(UsageError, match="Merge steerings of one model"):
        steering(tiny_random_flux, [TXT]).merge(steering(tiny_random_sd3, [IMG]))


def test_without_a_with_it_stays_on_until_it_is_removed(pipe):
    plain, keys, made = draw_images(pipe, ["a gun"]), set(vars(pipe)), steering(pipe)
    with made.apply(pipe):
        expected = draw_images(pipe, ["a gun"])
    assert apply_steering(pipe, made) is made
    try:
        for _ in range(2):
            assert torch.equal(draw_images(pipe, ["a gun"]), expected)
        with pytest.raises(UsageError, match="is steered already: remove_steering"):
            apply_steering(pipe, steering(pipe, [IMG]))
        assert torch.equal(draw_images(pipe, ["a gun"]), expected)
    finally:
        remove_steering(pipe)
    assert untouched(pipe, keys) and torch.equal(draw_images(pipe, ["a gun"]), plain)
    with pytest.raises(UsageError, match="holds no steering"):
        remove_steering(pipe)


def test_inside_a_with_nothing_is_put_on_for_good(pipe):
    with steering(pipe, [TXT]).apply(pipe), pytest.raises(UsageError, match="is steered already"):
        apply_steering(pipe, steering(pipe, [IMG]))


def test_what_was_refused_is_not_on(tiny_random_flux, tiny_random_sd3):
    keys = set(vars(tiny_random_sd3))
    with pytest.raises(UsageError, match="made for the model"):
        apply_steering(tiny_random_sd3, steering(tiny_random_flux))
    assert untouched(tiny_random_sd3, keys)


# ---- threads


class Elsewhere(threading.Thread):
    """A call of the pipeline in another thread, which stops after its first step until it may go on."""

    def __init__(self, pipe, fail=False):
        super().__init__()
        self.pipe, self.fail = pipe, fail
        self.inside, self.may_go_on = threading.Event(), threading.Event()
        self.image = self.error = None
        self.start()
        assert self.inside.wait(60)

    def run(self):
        try:
            self.image = draw_images(self.pipe, ["a gun"], callback_on_step_end=self.stop)
        except (SafetyBypassError, RuntimeError) as error:
            self.error = error

    def stop(self, pipe, step, time, tensors):
        if step == 0:
            self.inside.set()
            assert self.may_go_on.wait(60)
            if self.fail:
                raise RuntimeError("out of memory")
        return tensors

    def end(self):
        self.may_go_on.set()
        self.join(60)
        return self


def test_a_second_thread_is_refused_and_the_first_ones_image_is_what_it_would_have_been(pipe):
    made = steering(pipe)
    with made.apply(pipe):
        expected = draw_images(pipe, ["a gun"])
        other = Elsewhere(pipe)
        with pytest.raises(SafetyBypassError, match="Another thread is drawing with this steered pipeline"):
            draw_images(pipe, ["a cup"])
        assert other.end().error is None and other.image is not None and torch.equal(other.image, expected)
        assert torch.equal(draw_images(pipe, ["a gun"]), expected)  # one after the other they may


def test_a_call_that_failed_in_another_thread_keeps_nobody_out(pipe):
    made = steering(pipe)
    with made.apply(pipe):
        expected = draw_images(pipe, ["a gun"])
        assert "out of memory" in str(Elsewhere(pipe, fail=True).end().error)
        assert torch.equal(draw_images(pipe, ["a gun"]), expected)


def test_a_call_that_had_begun_before_is_not_steered_in_part(pipe):
    other = Elsewhere(pipe)
    with steering(pipe).apply(pipe):
        assert isinstance(other.end().error, SafetyBypassError)
    assert other.image is None


def test_another_thread_cannot_put_a_second_steering_on(pipe):
    refused = []

    def put_on():
        try:
            with steering(pipe, [IMG]).apply(pipe):
                raise AssertionError
        except SafetyBypassError as error:
            refused.append(str(error))

    with steering(pipe, [TXT]).apply(pipe):
        thread = threading.Thread(target=put_on)
        thread.start()
        thread.join(60)
    assert len(refused) == 1 and "Another thread has put a steering on" in refused[0]


# ---- the audit


def test_the_audit_tells_of_each_image_what_was_open_where_and_how_much_it_moved(pipe):
    made = detector(pipe, "a gun", "a cup")
    with made.apply(pipe):
        draw_images(pipe, ["a cup", "a gun", "a cup"])
    audit = made.audit
    assert len(audit) == 3
    for number, image in enumerate(audit):
        assert [touch.step for touch in image] == [0, 1, 2] and image[0].sigma == 1.0 > image[1].sigma
        for touch in image:
            assert (touch.image, touch.site, touch.row) == (number, POOLED, "cond")
            assert touch.open.tolist() == [number == 1] and (touch.moved > 0) == (number == 1)


def test_what_the_audit_says_was_moved_was_moved(tiny_random_flux):
    pipe, seen = tiny_random_flux, []
    made = steering(pipe, [IMG], gate=ALWAYS, sigmas=(0.99, 1.0))
    reader = {IMG: lambda x, _: seen.append(x.clone())}
    with attach(pipe, reader), made.apply(pipe), attach(pipe, reader):
        draw_images(pipe, ["a gun"])
    before, after = seen[:2]
    (touch,) = made.audit[0]
    assert touch.open.all() and touch.open.shape == (64,)
    assert touch.moved == pytest.approx(((after - before).norm() / before.norm()).item(), rel=1e-4)


def test_the_audit_is_of_the_last_call_and_the_report_of_all(tiny_random_flux):
    made = steering(tiny_random_flux, [TXT])
    with made.apply(tiny_random_flux):
        draw_images(tiny_random_flux, ["a gun", "a cup"])
        draw_images(tiny_random_flux, ["a gun"])
    assert len(made.audit) == 1 and made.report[str(TXT)]["passed"] == 3 * 3 * 12


def test_what_is_done_to_a_prompt_in_a_text_encoder_is_told_of_all_its_images(pipe):
    """A text encoder has a row for each prompt, the transformer one for each image."""
    encoder = Site.parse(f"text_encoder_{2 if 'Flux' in type(pipe).__name__ else 3}:final.txt.resid_post")
    made = made_of(pipe, {encoder: rule(pipe, encoder), TXT: rule(pipe, TXT)})
    options = CALL | {"num_images_per_prompt": 2, "num_inference_steps": 1, "guidance_scale": 1.0}
    with made.apply(pipe):
        pipe(["a gun", "a cup"], **options)
    assert [[touch.site for touch in image] for image in made.audit] == [[encoder, TXT]] * 4
    assert [[touch.image for touch in image] for image in made.audit] == [[number] * 2 for number in range(4)]
    alone = made_of(pipe, {encoder: made.rules[encoder]})
    with alone.apply(pipe):
        pipe(["a gun", "a cup"], **options)
    assert [[touch.site for touch in image] for image in alone.audit] == [[encoder]] * 2
    assert [image[0].moved for image in made.audit] == [image[0].moved for image in alone.audit for _ in range(2)]


# ---- gradients and mixed precision


def test_gradients_are_those_of_the_very_pass_and_can_be_taken_twice():
    """What was decided before, for the same values, has no graph or another one; without gradients it serves."""
    W_enc = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    encoder = ThresholdEncoder(W_enc, torch.ones(4), torch.zeros(4))
    one = Rule(torch.arange(4), encoder, Material(torch.linspace(-1, 1, 32).reshape(4, 8)), Gate(-1.0), (Repel(1.0),))
    x, context = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(1)), Context(TXT, 0, 1.0, ("cond",))

    def gradient(live):
        leaf = x.clone().requires_grad_()
        live(leaf, context).square().sum().backward()
        return leaf.grad

    expected, live = gradient(Live(one)), Live(one)
    with torch.no_grad():
        live(x, context)
        decided = live._last
        live(x, context)
        assert live._last is decided is not None
    assert torch.equal(gradient(live), expected) and torch.equal(gradient(live), expected)
    assert expected.norm() > 0


@pytest.mark.parametrize("edits", EVERY_EDIT, ids=str)
def test_under_autocast_all_is_decided_in_float32(tiny_random_flux, edits):
    one = edited(tiny_random_flux, edits, [TXT]).rules[TXT]
    x, context = torch.randn(2, 12, d_in(tiny_random_flux, TXT)), Context(TXT, 0, 0.5, ("cond", "cond"))
    open_, delta = one.decided(x, context)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x[0] @ x[0].T).dtype == torch.bfloat16, "the control"
        again = one.decided(x, context)
    assert torch.equal(again[0], open_) and again[1].dtype == torch.float32 and torch.equal(again[1], delta)


# ---- what it is made of


def test_what_cannot_be_put_together_is_explained(tiny_random_flux):
    saes, contrasts, features = whole(tiny_random_flux)
    some = {TXT: saes[TXT]}
    for make, message in (
        (lambda: Steering(some, features), "features for 'pooled.embed' and no SAE in saes="),
        (
            lambda: Steering(contrasts, features, [Blend()]),
            "fitted to the contrast: give the SAEs of train or adapt as",
        ),
        (lambda: Steering(contrasts, features, [Blend()], reconstruction=some), "no SAE in reconstruction="),
        (lambda: Steering(contrasts, features, [Replace(), Repel()], reconstruction=saes), "give it alone"),
        (lambda: Steering(saes, features, [Replace(by="map")]), "at a pooled vector there are none"),
        (lambda: Steering(saes, features, sigmas=(0.9, 0.1)), "expected the lowest σ first"),
        (lambda: Steering({}, {}), "There are no features"),
        (lambda: Steering(saes, features, sigmas={"img.embed": (0.0, 1.0)}), "a window for 'img.embed', where there"),
        (
            lambda: Steering({site: replace(one, metadata={}) for site, one in saes.items()}, features),
            "do not all name one model",
        ),
    ):
        with pytest.raises(UsageError, match=message):
            make()
    assert Steering(saes, features, [Blend()]).rules.keys() == set(EVERYWHERE)  # SAEs that reconstruct serve both
