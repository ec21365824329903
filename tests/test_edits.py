"""Each edit is its formula, moves nothing where there is nothing to move, and a guard keeps it among what is usual."""

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from safedig.activations.record import Activations, Batch
from safedig.config import UsageError
from safedig.features import Counterparts, Dose, Features, Prototypes
from safedig.features.counterparts import Known
from safedig.hooks import Context
from safedig.sae.model import Decoder, SparseAutoencoder, ThresholdEncoder, TopKEncoder
from safedig.sites import Site
from safedig.steering.bank import Bank
from safedig.steering.edits import Blend, Repel, Replace, check_together, from_json, to_json
from safedig.steering.gate import Gate
from safedig.steering.guard import Guard, fit_guards
from safedig.steering.material import Material
from safedig.steering.rule import Rule

SITE = Site.parse("txt.embed")
D_IN, D_SAE, PROTOTYPES = 24, 40, 30
M = torch.tensor([7, 3, 21])
CONTEXT = Context(SITE, 0, 0.5, ("cond", "cond"))
EVERY = [Repel(0.7), Blend(0.7), Repel(0.7, "paper"), Blend(0.7, "paper"), Replace(0.7), Replace(0.7, "map")]
EVERY += [Replace(0.7, "counterparts")]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sae(seed=0, **metadata):
    encoder = ThresholdEncoder(normal(D_IN, D_SAE, seed=1), normal(D_SAE, seed=2), normal(D_SAE, seed=3).abs())
    return SparseAutoencoder(encoder, Decoder(normal(D_SAE, D_IN, seed=seed + 4), normal(D_IN, seed=5)), metadata)


def known():
    """The prototypes of `features`."""
    return Prototypes.of(sae().encode(normal(PROTOTYPES, D_IN, seed=6)), M)


def contrast():
    """The same encoder; rows of M alone, as fit_contrast leaves them."""
    rows = torch.zeros(D_SAE, D_IN).index_copy(0, M, normal(3, D_IN, seed=9))
    return sae().with_decoder(Decoder(rows, torch.zeros(D_IN)), objective="contrast")


def counterparts():
    """Of known tokens each of which harm has changed, by as much again where several tell of it."""
    alone = Known(normal(PROTOTYPES, D_IN, seed=10), normal(PROTOTYPES, D_IN, seed=11))
    return Counterparts(alone, Known(normal(PROTOTYPES, D_IN, seed=12), normal(PROTOTYPES, D_IN, seed=13)))


def features(**options):
    return replace(Features(M, 0.0, torch.ones(3), torch.ones(3), known()), **options)


def rule(*edits, gate=-1.0, found=None, reconstruction=None, **options):
    found = features() if found is None else found
    needs = [need for edit in edits for need in edit.needs]
    other = sae() if reconstruction is None else reconstruction
    material = Material.of(SITE, contrast(), found, needs, other, counterparts())
    return Rule(found.index, sae().encoder.columns(found.index), material, Gate(gate), edits, **options)


def acted(one, x, context=CONTEXT):
    out, open_, _ = one(x, context)
    return out, open_


def nearest(a, k):
    """Of one token, written out: Euclidean distance in all latents outside M, all of them encoded."""
    others = sae().encode(a).index_fill(0, M, 0.0)
    bank = known().others(D_SAE)
    return (bank - others).norm(dim=1).argsort()[:k]


# ---- the height that opens a gate


def test_without_a_dose_the_gate_opens_where_the_harmful_codes_add_up_to_more_than_the_threshold():
    """Not where one is high or many are up: of each token it is the sum that counts, and equal is not more."""
    x = normal(2, 5, D_IN)
    z = sae().encode(x)[..., M]
    for threshold in z.sum(-1).flatten().tolist():
        open_ = acted(rule(Repel(1.0), gate=threshold), x)[1]
        torch.testing.assert_close(rule(Repel(1.0)).heights(x), z.sum(-1))
        assert torch.equal(open_, rule(Repel(1.0)).heights(x) > threshold)
    highest = z.amax(-1)
    assert (z.sum(-1) > highest + 0.1).any(), "the control: some sums are of several codes"


def test_without_harmful_features_no_gate_opens_at_nought():
    none = Features(torch.zeros(0, dtype=torch.long), 0.0, torch.ones(0), torch.ones(0))
    one = replace(rule(Repel(1.0), gate=0.0, found=none), gate=Gate(0.0, "image"))
    assert not one.decided(normal(2, 5, D_IN), CONTEXT)[0].any()
    assert rule(Repel(1.0), gate=-1.0, found=none).decided(normal(2, 5, D_IN), CONTEXT)[0].all(), "the control"


# ---- Repel


def test_repel_takes_out_what_the_contrast_attributes_to_harm():
    x = normal(2, 5, D_IN)
    z = sae().encode(x)[..., M]
    expected = x - 0.7 * torch.einsum("btm,md->btd", z, contrast().decoder.W_dec[M])
    torch.testing.assert_close(acted(rule(Repel(0.7)), x)[0], expected)


@pytest.mark.parametrize("edit", [Repel(0.0), Repel(0.0, "paper"), Blend(0.0), Blend(0.0, "paper"), Replace(0.0)])
def test_an_edit_of_strength_0_is_the_identity_to_the_bit(edit):
    x = normal(2, 5, D_IN)
    x[0, 0] = -0.0  # of which a sum with 0.0 is 0.0, another bit
    out, open_ = acted(rule(edit), x)
    assert open_.all() and torch.equal(out.view(torch.int32), x.view(torch.int32))


def test_repel_without_harmful_features_or_codes_is_the_identity_to_the_bit():
    x = normal(2, 5, D_IN)
    x[0, 0] = -0.0
    none = Features(M[:0], 0.0, torch.ones(0), torch.ones(0))
    silent = replace(rule(Repel(2.0)), encoder=replace(sae().encoder.columns(M), threshold=torch.full((3,), 1e9)))
    for one in (rule(Repel(2.0), found=none), silent):
        out, open_ = acted(one, x)
        assert open_.all() and torch.equal(out.view(torch.int32), x.view(torch.int32))


def test_the_paper_form_of_repel_is_the_literal_formula_and_no_identity_without_harm():
    x, gamma = normal(2, 5, D_IN), 0.2
    masked = torch.zeros(2, 5, D_SAE).index_copy(2, M, sae().encode(x)[..., M])
    expected = x - gamma * (sae().decode(masked) - x)
    torch.testing.assert_close(acted(rule(Repel(gamma, "paper")), x)[0], expected)
    none = Features(M[:0], 0.0, torch.ones(0), torch.ones(0))
    empty = acted(rule(Repel(gamma, "paper"), found=none), x)[0]
    torch.testing.assert_close(empty, (1 + gamma) * x - gamma * sae().decoder.b_dec)  # it moves benign tokens


# ---- Blend


@pytest.mark.parametrize("k", [1, 8, 1000])
def test_blend_is_its_formula(k):
    x = normal(2, 5, D_IN)
    out, _ = acted(rule(Blend(0.3, nearest=k)), x)
    for image in range(2):
        for token in range(5):
            a = x[image, token]
            change = known().harmful[nearest(a, k)].mean(0) - sae().encode(a)[M]
            expected = a + 0.3 * change @ sae().decoder.W_dec[M]
            torch.testing.assert_close(out[image, token], expected, atol=1e-4, rtol=1e-4)


def test_at_strength_1_the_harmful_part_of_the_reconstruction_is_the_mean_of_the_prototypes():
    """Where the decoder is the encoder's inverse, so that what an edit adds is what is read."""
    eye = torch.eye(D_IN)
    plain = SparseAutoencoder(
        ThresholdEncoder(eye, torch.zeros(D_IN), torch.zeros(D_IN)), Decoder(eye, torch.zeros(D_IN))
    )
    x, safe = normal(2, 5, D_IN).abs(), normal(PROTOTYPES, D_IN, seed=6).abs()
    found = features(prototypes=Prototypes.of(plain.encode(safe), M))
    material = Material.of(SITE, plain, found, Blend().needs)
    out, _ = acted(Rule(M, plain.encoder.columns(M), material, Gate(-1.0), (Blend(1.0),)), x)
    distance = (x.index_fill(2, M, 0)[:, :, None] - safe.index_fill(1, M, 0)).norm(dim=-1)
    mean = safe[:, M][distance.argsort(dim=-1)[..., :8]].mean(2)
    torch.testing.assert_close(plain.encode(out)[..., M], mean)
    others = [at for at in range(D_IN) if at not in M]
    assert torch.equal(out[..., others], x[..., others])  # and nothing else is another


def test_a_token_that_is_a_prototype_is_left_where_it_is():
    x = normal(PROTOTYPES, D_IN, seed=6)[None]
    out, _ = acted(rule(Blend(1.0, nearest=1)), x, Context(SITE, 0, 0.5, ("cond",)))
    torch.testing.assert_close(out, x, atol=1e-4, rtol=1e-4)


def test_the_paper_form_of_blend_is_the_literal_formula():
    x, beta = normal(2, 5, D_IN), 0.2
    expected = (1 - beta) * x + beta * sae().decode(sae().encode(x))
    torch.testing.assert_close(acted(rule(Blend(beta, "paper")), x)[0], expected)


def test_only_the_latents_that_some_prototype_holds_are_encoded_and_the_nearest_are_the_same():
    codes = torch.zeros(PROTOTYPES, D_SAE)
    codes[:, 10:14] = normal(PROTOTYPES, 4).abs()
    bank = Bank.of(sae(), features(prototypes=Prototypes.of(codes, M)), values=False)
    assert bank.codes.shape[1] == bank.encoder.W_enc.shape[1] == 4
    x = normal(50, D_IN, seed=8)
    by_hand = torch.cdist(sae().encode(x).index_fill(1, M, 0.0), codes).argsort(dim=1)[:, :8]
    assert torch.equal(bank.nearest(x, 8).sort(dim=1).values, by_hand.sort(dim=1).values)


def test_other_latents_are_computed_for_open_tokens_alone(monkeypatch):
    seen = []
    inner = Bank.nearest
    monkeypatch.setattr(Bank, "nearest", lambda self, a, k: seen.append(len(a)) or inner(self, a, k))
    one, x = rule(Blend(), gate=3.0), normal(2, 50, D_IN)
    _, open_ = acted(one, x)
    assert seen == [int(open_.sum())] and 0 < seen[0] < 100


# ---- Replace


def test_replace_puts_the_mean_of_what_the_nearest_prototypes_are_reconstructed_to():
    x = normal(2, 5, D_IN)
    out, _ = acted(rule(Replace(nearest=3)), x)
    values = sae().decode(sae().encode(normal(PROTOTYPES, D_IN, seed=6)))
    for image, token in ((0, 0), (1, 4)):
        torch.testing.assert_close(out[image, token], values[nearest(x[image, token], 3)].mean(0), atol=1e-4, rtol=1e-4)


def test_replace_by_the_map_takes_undetected_tokens_of_the_same_image():
    """With one nearest every new value is a token of the image, and of no other; the nearest to the token cleaned."""
    x = normal(2, 30, D_IN)
    out, open_ = acted(rule(Replace(by="map", nearest=1), gate=3.0), x)
    clean = x - sae().encode(x)[..., M] @ contrast().decoder.W_dec[M]
    assert open_.any() and not open_.all()
    for image in range(2):
        others = x[image][~open_[image]]
        for token in open_[image].nonzero()[:, 0].tolist():
            expected = others[(others - clean[image, token]).norm(dim=1).argmin()]
            torch.testing.assert_close(out[image, token], expected)


def test_an_image_of_detected_tokens_only_loses_what_is_attributed_to_harm():
    x = normal(2, 5, D_IN)
    torch.testing.assert_close(acted(rule(Replace(by="map")), x)[0], acted(rule(Repel(1.0)), x)[0])


def test_replace_by_counterparts_takes_the_mean_of_what_harm_has_added_to_the_nearest_known():
    x = normal(2, 5, D_IN)
    out, _ = acted(rule(Replace(0.7, "counterparts", 3)), x)
    bank = counterparts().alone
    for image, token in ((0, 0), (1, 4)):
        near = (bank.tokens - x[image, token]).norm(dim=1).argsort()[:3]
        torch.testing.assert_close(out[image, token], x[image, token] - 0.7 * bank.delta[near].mean(0))


def test_by_the_dose_each_image_of_a_batch_is_looked_up_in_a_bank_of_its_own():
    """Together only where pairs tell of it and no token does; where neither does, as attest opens it, among all."""
    x = normal(2, 5, D_IN)
    own = sae().encode(x)[..., M].sum(-1).amax(1)
    loud = int(own.argmax())
    assert own[loud] > own[1 - loud]
    pair = replace(Dose.of(torch.ones(3)), bias=-own.mean(), pairs=torch.tensor([[0, 1]]), pair_weights=torch.zeros(1))
    for height, quiet in ((1.0, counterparts().together), (-1.0, counterparts().all())):
        dose = replace(pair, pair_bias=torch.tensor(height))
        out, open_ = acted(rule(Replace(1.0, "counterparts", 1), gate=-1e9, found=features(dose=dose)), x)
        assert open_.all()
        for image, bank in ((loud, counterparts().alone), (1 - loud, quiet)):
            near = torch.cdist(x[image], bank.tokens).argmin(1)
            torch.testing.assert_close(out[image], x[image] - bank.delta[near])


def test_without_pairs_too_an_image_that_was_opened_elsewhere_is_looked_up_among_all():
    """No token of it tells, and nothing else here can: harm that is kept under `together` is found all the same."""
    x = normal(2, 5, D_IN)
    silent = Dose.of(torch.ones(3)).lowered(1e3)
    one = replace(rule(Replace(1.0, "counterparts"), found=features(dose=silent)), gate=Gate(0.0, "image"))
    open_, delta = one.decided(x, CONTEXT, torch.tensor([True, False]))
    assert open_.tolist() == [[True] * 5, [False] * 5]
    bank = counterparts().all()
    near = torch.cdist(x[0], bank.tokens).argmin(1)
    torch.testing.assert_close(delta[0], -bank.delta[near])
    assert (near >= PROTOTYPES).any(), "some of those that tell only together are nearest"


def test_what_only_replace_by_counterparts_reads_is_kept_for_it_alone():
    made = {by: rule(Replace(by=by)).material for by in ("counterparts", "prototypes", "map")}
    assert made["counterparts"].counterparts is not None and made["counterparts"].bank is None
    assert made["prototypes"].counterparts is made["map"].counterparts is None


# ---- all of them


@pytest.mark.parametrize("edit", EVERY, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_that_the_gate_is_closed_for_keep_every_bit_and_the_others_change(edit, dtype):
    x = normal(2, 50, D_IN).to(dtype)
    out, open_ = acted(rule(edit, gate=3.0), x)
    assert out.dtype == dtype and 0 < open_.sum() < 100
    assert torch.equal(out[~open_], x[~open_]) and (out[open_] != x[open_]).any(1).all()
    assert not acted(rule(edit, gate=math.inf), x)[1].any()


@pytest.mark.parametrize("edit", EVERY, ids=str)
def test_the_input_is_not_written_to(edit):
    x = normal(2, 50, D_IN)
    before = x.clone()
    acted(rule(edit, gate=3.0), x)
    assert torch.equal(x, before)


def test_deltas_of_the_same_activation_are_summed_in_any_order():
    x = normal(2, 5, D_IN)
    alone = [acted(rule(edit), x)[0] - x for edit in (Repel(0.7), Blend(0.5))]
    both = acted(rule(Repel(0.7), Blend(0.5)), x)[0]
    torch.testing.assert_close(both, x + alone[0] + alone[1])
    assert torch.equal(both, acted(rule(Blend(0.5), Repel(0.7)), x)[0])


@pytest.mark.parametrize("edit", EVERY, ids=str)
def test_an_edit_is_written_as_json_and_read_back(edit):
    assert from_json(to_json(edit)) == edit


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Repel(-1.0), "expected a strength from 0 on"),
        (lambda: Blend(math.nan), "expected a strength from 0 on"),
        (lambda: Replace(math.inf), "expected a strength from 0 on"),
        (lambda: Blend(nearest=0), "expected at least 1 nearest"),
        (lambda: from_json({"edit": "blnd"}), "no edit 'blnd'. Did you mean 'blend'"),
        (lambda: check_together((Replace(), Repel()), tokens=True, scope="token"), "give it alone"),
        (lambda: check_together((Replace(by="map"),), tokens=True, scope="image"), "there are none: use scope='token'"),
        (lambda: check_together((Replace(by="map"),), tokens=False, scope="token"), "at a pooled vector"),
        (lambda: Material.of(SITE, contrast(), features(), Blend().needs), "give the SAEs of train or adapt as"),
        (lambda: rule(Blend(), found=features(prototypes=None)), "have no safe prototypes"),
        (lambda: check_together((Replace(by="counterparts"), Blend()), tokens=True, scope="token"), "give it alone"),
        (
            lambda: Material.of(SITE, sae(), features(), Replace(by="counterparts").needs),
            r"Replace looks up counterparts at 'txt\.embed' and there are none: give those of fit_counterparts",
        ),
        (lambda: rule(Blend(), reconstruction=other_encoder()), "has another encoder"),
        (lambda: rule(Blend(), reconstruction=centred()), "adapted with align_mean=True"),
        (lambda: top_k(), "TopK features"),
    ],
)
def test_what_cannot_be_meant_is_explained(make, message):
    with pytest.raises(UsageError, match=message):
        make()


def other_encoder():
    return replace(sae(), encoder=replace(sae().encoder, b_enc=torch.zeros(D_SAE)))


def centred():
    return sae().with_decoder(replace(sae().decoder, centre=torch.ones(D_IN)))


def top_k():
    encoder = TopKEncoder(sae().encoder.W_enc, sae().encoder.b_enc, 3)
    return Bank.of(SparseAutoencoder(encoder, sae().decoder), features(), values=False)


def test_an_sae_that_reconstructs_serves_both_and_an_equal_encoder_is_no_other():
    """Loaded twice from disk, the encoders are two objects."""
    x, copy = normal(2, 5, D_IN), replace(sae(), encoder=replace(sae().encoder))
    alone = Material.of(SITE, sae(), features(), Blend().needs)
    assert torch.equal(alone.directions, sae().decoder.W_dec[M])
    assert torch.equal(acted(rule(Blend(), reconstruction=copy), x)[0], acted(rule(Blend()), x)[0])


# ---- the guard


def tokens(n=200, seed=0, sigma=1.0):
    """One image each of eight tokens, far from isotropic and far from 0."""
    stretch = torch.linspace(0.1, 3.0, D_IN) * (1 + sigma)
    return normal(n, 8, D_IN, seed=seed) * stretch + 2.0


def recording(images=200, kind="benign", seed=0):
    prompts = [{"id": f"p{i}", "seed": i, "risk": "", "kind": kind} for i in range(images)]
    names = [row["id"] for row in prompts for _ in range(8)]
    seeds = [row["seed"] for row in prompts for _ in range(8)]
    batches = [
        Batch(
            SITE,
            step,
            sigma,
            names,
            seeds,
            ("cond",) * len(names),
            torch.arange(8).repeat(images),
            tokens(images, seed, sigma).flatten(0, 1),
        )
        for step, sigma in enumerate((1.0, 0.5))
    ]
    return Activations(lambda sites, ids: batches, [SITE], prompts, "fingerprint")


@pytest.fixture(scope="module", params=[0, 6, 64])
def guard(request):
    """Norms alone, a covariance kept in part, and one kept whole."""
    return fit_guards(recording(), quantile=0.9, rank=request.param)[SITE]


def distances(guard, a, sigma):
    """How far out, in units of the bounds."""
    at = guard.sigmas.index(sigma)
    found = [a.norm(dim=-1) / guard.norm[at]]
    if guard.ellipsoid is not None:
        shape = guard.ellipsoid
        found.append(shape.whitened(a - shape.centre[at], at).norm(dim=-1) / shape.bound[at])
    return torch.stack(found)


@pytest.mark.parametrize("sigma", [1.0, 0.5])
def test_the_guard_never_leaves_the_bound_and_never_touches_what_lies_inside(guard, sigma):
    a = tokens(seed=1, sigma=sigma)
    for size in (0.01, 1.0, 30.0):
        delta = size * normal(*a.shape, seed=2)
        kept = guard(a, delta, sigma)
        before, asked, after = (distances(guard, x, sigma) for x in (a, a + delta, a + kept))
        limit = before.clamp(min=1.0)  # what lies outside to begin with may stay, and go no further
        assert (after <= limit * (1 + 1e-5)).all()
        inside = (asked <= limit).all(0)
        assert torch.equal(kept[inside], delta[inside])
        assert (kept[~inside].norm(dim=-1) < delta[~inside].norm(dim=-1)).all()
        along = torch.cosine_similarity(kept, delta, dim=-1)[kept.norm(dim=-1) > 1e-3]
        torch.testing.assert_close(along, torch.ones_like(along))
    assert not inside.any()  # the control: at the last size all had to be scaled back


def test_what_is_scaled_back_goes_as_far_as_the_bound(guard):
    a = tokens(seed=1)
    inside = (distances(guard, a, 1.0) < 1).all(0)
    after = distances(guard, a + guard(a, 1e3 * normal(*a.shape, seed=2), 1.0), 1.0).amax(0)[inside]
    torch.testing.assert_close(after, torch.ones_like(after), atol=1e-3, rtol=0)


def test_as_many_benign_images_lie_inside_as_asked_for():
    for quantile in (0.5, 0.9, 1.0):
        found = fit_guards(recording(), quantile=quantile, rank=6)[SITE]
        outside = (distances(found, tokens(sigma=0.5), 0.5) > 1 + 1e-6).any(2)  # an image, if any of its tokens is
        assert outside[0].sum() == outside[1].sum() == round((1 - quantile) * 200) - (quantile < 1)


def test_fresh_benign_images_lie_inside_about_as_often():
    found = fit_guards(recording(), quantile=0.9, rank=64)[SITE]
    outside = (distances(found, tokens(seed=5), 1.0) > 1).any(2).float().mean(1)
    assert (outside - 0.1).abs().max() < 0.07


def test_the_mahalanobis_distance_is_the_one_of_the_covariance():
    found = fit_guards(recording(2000), rank=64)[SITE].ellipsoid
    assert found is not None
    x = tokens(2000).flatten(0, 1).double()
    centred = x - x.mean(0)
    expected = (centred @ torch.linalg.inv(centred.T @ centred / len(x)) * centred).sum(1).sqrt()
    found = found.whitened(x.float() - found.centre[0], 0).norm(dim=-1)
    off = (found / expected - 1).abs()
    assert off.median() < 0.02 and off.max() < 0.2  # shrinkage takes a little


def test_each_sigma_has_its_own_bound_and_the_nearest_holds():
    found = fit_guards(recording(), rank=0)[SITE]
    assert found.sigmas == (1.0, 0.5) and found.norm[0] > found.norm[1]
    a, delta = torch.zeros(1, D_IN), 1e3 * torch.ones(1, D_IN)
    for sigma, at in ((0.9, 0), (0.6, 1), (0.0, 1)):
        assert abs(guard_reach(found, a, delta, sigma) / found.norm[at] - 1) < 1e-4


def guard_reach(found, a, delta, sigma):
    return (a + found(a, delta, sigma)).norm().item()


def test_a_rule_with_a_guard_stays_inside_and_without_one_does_not(guard):
    x = tokens(2, seed=1)
    free, held = rule(Repel(50.0)), rule(Repel(50.0), guard=guard)
    context = Context(SITE, 0, 1.0, ("cond", "cond"))
    limit = distances(guard, x, 1.0).clamp(min=1.0)
    assert (distances(guard, acted(held, x, context)[0], 1.0) <= limit * (1 + 1e-5)).all()
    assert not (distances(guard, acted(free, x, context)[0], 1.0) <= limit).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fit_guards(recording(kind="harmful")), "There is no benign prompt"),
        (lambda: fit_guards(recording(), quantile=1.5), "quantile=1.5"),
        (lambda: fit_guards(Activations(lambda s, i: [], [SITE], recording(3).prompts, "m")), "Nothing of the benign"),
    ],
)
def test_a_guard_that_cannot_be_calibrated_is_explained(make, message):
    with pytest.raises(UsageError, match=message):
        make()


def test_activations_that_never_change_are_guarded_too():
    """A site that is constant has no spread: any bound of it is its own value."""
    still = recording(5)
    batches = [replace(batch, x=torch.ones_like(batch.x)) for batch in still]
    found = fit_guards(Activations(lambda s, i: batches, [SITE], still.prompts, "m"))[SITE]
    a = torch.ones(1, D_IN)
    assert torch.isfinite(found(a, normal(1, D_IN), 1.0)).all() and isinstance(found, Guard)


MISSPELT = """
from safedig.config import UsageError
from safedig.steering.edits import Blend, Repel, Replace
from safedig.steering.gate import Gate

for make in (
    lambda: Replace(by="counterpart"),
    lambda: Repel(form="papers"),
    lambda: Blend(form="deltas"),
    lambda: Gate(0.0, "images"),
    lambda: Gate(0.0, rows="conds"),
):
    try:
        make()
    except UsageError as error:
        print(error)
"""


def test_a_misspelt_choice_is_refused_where_no_types_are_checked():
    """A process of its own: here the type checks of the tests would refuse it first."""
    told = subprocess.run([sys.executable, "-c", MISSPELT], capture_output=True, text=True, check=True).stdout
    assert [line.split("Did you mean ")[1] for line in told.splitlines()] == [
        "'counterparts'?",
        "'paper'?",
        "'delta'?",
        "'image'?",
        "'cond'?",
    ]
