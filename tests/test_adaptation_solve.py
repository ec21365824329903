"""Sparse products are the dense ones, sums add up, and both solvers find the minimum they are said to look for."""

import pytest
import torch

from safedig.adaptation import solve as solving
from safedig.adaptation import statistics as summing
from safedig.adaptation.codes import SparseCodes, encoded, joined
from safedig.adaptation.descent import descend
from safedig.adaptation.solve import HeldOut, Mixture, solve
from safedig.adaptation.statistics import Statistics
from safedig.config import UsageError
from safedig.sae.model import Decoder, SparseAutoencoder, TopKEncoder
from tests.domains import D_IN, D_SAE, fvu, overgrown, sae, source, target

RNG = torch.Generator().manual_seed(3)


def some_codes(rows=50):
    z = torch.rand(rows, D_SAE, generator=RNG)
    return torch.where(z > 0.8, z, 0.0)


def sums(x, of=None):
    of = of or sae()
    found = Statistics(of.decoder.b_dec, of.d_sae)
    for a, z in encoded(of, x):
        found.update(a, z)
    return found


@pytest.fixture
def kept_codes(monkeypatch):
    """As for a dictionary that is too wide for its Gram matrix: the codes are kept, and conjugate gradients solve."""
    monkeypatch.setattr(summing, "DENSEST", 4)
    monkeypatch.setattr(solving, "DENSEST", 4)
    monkeypatch.setattr(solving, "_TOLERANCE", 1e-6)
    monkeypatch.setattr(solving, "_ITERATIONS", 300)


def minimum(of, x, y, share, pseudo_count):
    """From the definition, densely and in float64: the rows that fire twice or more in x, and the bias."""
    z, old = of.encode(x).double(), of.encode(y).double()
    weight = share / (1 - share) * len(x) / len(y) if share else 0.0
    Z = torch.cat([torch.nn.functional.pad(z, (0, 1), value=1), torch.nn.functional.pad(old, (0, 1), value=1)])
    w = torch.cat([torch.ones(len(x)), torch.full((len(y),), weight)]).double()[:, None]
    count = (z > 0).sum(0)
    ridge = torch.cat([pseudo_count * z.square().sum(0) / count.clamp(min=1), torch.zeros(1)])
    free = torch.cat([count >= 2, torch.tensor([True])])
    W = torch.cat([of.decoder.W_dec, torch.zeros(1, D_IN)]).double()
    left = torch.cat([x, y]).double() - Z @ W
    Z = Z[:, free]
    W[free] += torch.linalg.solve(Z.T @ (w * Z) + ridge[free].diag(), Z.T @ (w * left))
    return W[:-1], W[-1]


# ---- codes


def test_sparse_products_are_the_dense_ones():
    z, W, x = some_codes(), torch.randn(D_SAE, 5), torch.randn(50, 5)
    codes = SparseCodes.of(z)
    torch.testing.assert_close(codes.times(W), z @ W)
    torch.testing.assert_close(codes.moment(x), z.T @ x)
    torch.testing.assert_close(codes.gram(), z.double().T @ z.double())
    torch.testing.assert_close(codes._gram_in_blocks(), z.T @ z)
    assert codes.times(W.double()).dtype == torch.float64


def test_rows_and_features_are_picked_as_from_the_dense_matrix():
    z, W = some_codes(), torch.randn(D_SAE, 5)
    codes, pick, kept = SparseCodes.of(z), torch.tensor([7, 7, 0, 31]), torch.arange(D_SAE) % 3 > 0
    torch.testing.assert_close(codes.at(pick).times(W), z[pick] @ W)
    torch.testing.assert_close(codes.only(kept).times(W[kept]), z[:, kept] @ W[kept])
    torch.testing.assert_close(joined([codes.at(pick), codes]).times(W), torch.cat([z[pick], z]) @ W)


def test_rows_in_which_nothing_fires_are_rows_all_the_same():
    z = some_codes()
    z[[0, 17, 49]] = 0
    W, x = torch.randn(D_SAE, 5), torch.randn(50, 5)
    torch.testing.assert_close(SparseCodes.of(z).times(W), z @ W)
    torch.testing.assert_close(SparseCodes.of(z).moment(x), z.T @ x)
    silent = SparseCodes.of(torch.zeros(4, D_SAE))
    assert len(silent) == 4 and silent.times(W).abs().sum() == 0 and silent.gram().abs().sum() == 0


def test_encoding_in_parts_gives_the_codes_of_the_whole(monkeypatch):
    monkeypatch.setattr("safedig.adaptation.codes._ROWS", 7)
    x = source(40)
    parts = [*encoded(sae(), x)]
    assert len(parts) == 6
    torch.testing.assert_close(joined([z for _, z in parts]).times(torch.eye(D_SAE)), sae().encode(x))


# ---- statistics


def test_the_sums_are_those_of_the_definition():
    x, of = source(300) + 4, SparseAutoencoder(sae().encoder, Decoder(sae().decoder.W_dec, torch.full((D_IN,), 4.0)))
    found, z, y = sums(x, of), sae().encode(x).double(), x.double() - 4
    torch.testing.assert_close(found.gram(), z.T @ z, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.zx, z.T @ y, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(found.x, y.sum(0), rtol=1e-5, atol=1e-4)
    assert found.rows == 300 and torch.equal(found.count, (z > 0).double().sum(0))
    assert found.square == pytest.approx(y.square().sum().item(), rel=1e-6)


@pytest.mark.parametrize("wide", [False, True])
def test_the_sums_of_two_parts_are_those_of_the_whole(wide, request):
    if wide:
        request.getfixturevalue("kept_codes")
    x = source(400)
    whole, both = sums(x), sums(x[:150]) + sums(x[150:])
    assert both.rows == whole.rows and bool(both.codes) == wide
    one, other = (solve(Mixture(part), sae().decoder, 10.0).decoder for part in (whole, both))
    torch.testing.assert_close(one.W_dec, other.W_dec, rtol=1e-4, atol=1e-5)


def test_the_sums_of_different_autoencoders_do_not_add_up():
    moved = SparseAutoencoder(sae().encoder, Decoder(sae().decoder.W_dec, torch.ones(D_IN)))
    with pytest.raises(UsageError, match="do not add up"):
        _ = sums(source(50)) + sums(source(50), moved)


# ---- solving


@pytest.mark.parametrize("wide", [False, True], ids=["cholesky", "conjugate gradients"])
@pytest.mark.parametrize(("share", "pseudo_count"), [(0.0, 10.0), (0.2, 10.0), (0.5, 0.1)])
def test_the_solution_is_the_minimum(wide, share, pseudo_count, request):
    if wide:
        request.getfixturevalue("kept_codes")
    x, y = target(600) + 3, source(200)
    W, b = minimum(sae(), x, y, share, pseudo_count)
    found = solve(Mixture(sums(x), sums(y), share), sae().decoder, pseudo_count)
    assert found.solver == ("conjugate gradients" if wide else "cholesky") and (found.iterations > 0) == wide
    torch.testing.assert_close(found.decoder.W_dec.double(), W, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.decoder.b_dec.double(), b, rtol=1e-3, atol=1e-3)
    assert (W - sae().decoder.W_dec).norm() > 0.5  # control: it is not where it started


def test_few_features_that_fire_among_many_are_solved_exactly(monkeypatch):
    monkeypatch.setattr(summing, "DENSEST", 4)
    x = target(600)
    found = solve(Mixture(sums(x)), sae().decoder, 10.0)
    W, _ = minimum(sae(), x, source(10), 0.0, 10.0)
    assert found.solver == "cholesky"
    torch.testing.assert_close(found.decoder.W_dec.double(), W, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("wide", [False, True])
def test_a_decoder_at_its_optimum_stays_where_it_is(wide, request):
    """Whatever the ridge: what is solved for is the change."""
    if wide:
        request.getfixturevalue("kept_codes")
    x = source()
    W, b = minimum(sae(), x, x, 0.2, 0.0)
    best = sae().with_decoder(Decoder(W.float(), b.float()))
    for pseudo_count in (0.1, 10.0, 1000.0):
        again = solve(Mixture(sums(x, best), sums(x, best), 0.2), best.decoder, pseudo_count).decoder
        assert (again.W_dec - best.decoder.W_dec).norm() / best.decoder.W_dec.norm() < 1e-4
        assert (again.b_dec - best.decoder.b_dec).abs().max() < 1e-4
    rough = solve(Mixture(sums(x), sums(x), 0.2), sae().decoder, 10.0).decoder
    assert (rough.W_dec - sae().decoder.W_dec).norm() / sae().decoder.W_dec.norm() > 0.02  # control


def test_more_pseudo_counts_hold_the_decoder_nearer_to_the_source():
    x = target()
    far = [
        (solve(Mixture(sums(x)), sae().decoder, count).decoder.W_dec - sae().decoder.W_dec).norm()
        for count in (0.0, 10.0, 1000.0, 1e6)
    ]
    assert far == sorted(far, reverse=True) and far[-1] < 0.01 * far[0]


def test_a_pseudo_count_of_as_many_rows_as_there_are_goes_half_of_the_way():
    """One feature, no mean: the prior weighs as much as the data."""
    z = torch.ones(100, 1)
    found = Statistics(torch.zeros(2), 1)
    found.update(
        torch.tensor([[2.0, 0.0], [-2.0, 0.0]]).repeat(50, 1),
        SparseCodes.of(z * torch.tensor([1.0, 3.0]).repeat(50)[:, None]),
    )
    change = solve(Mixture(found), Decoder(torch.zeros(1, 2), torch.zeros(2)), 0.0).decoder.W_dec
    held = solve(Mixture(found), Decoder(torch.zeros(1, 2), torch.zeros(2)), 20.0).decoder.W_dec
    assert change[0, 0] == pytest.approx(-2.0, rel=1e-5)
    assert held[0, 0] == pytest.approx(-2.0 * 100 / (100 + 20 * 5), rel=1e-5)  # variance 1, mean square 5


def test_features_that_do_not_fire_or_once_keep_their_row_to_the_bit():
    x = target()
    x = x[(sae().encode(x)[:, [20, 21]] == 0).all(1)]
    fires = (sae().encode(x)[:, 22] > 0).nonzero()[:, 0]
    x = x[[row for row in range(len(x)) if row not in set(fires[1:].tolist())]]
    found = solve(Mixture(sums(x), sums(source()), 0.2), sae().decoder, 10.0)
    kept = (found.decoder.W_dec == sae().decoder.W_dec).all(1)
    assert kept[[20, 21, 22]].all() and not kept[:20].any() and torch.equal(kept, ~found.solved)


def test_without_a_ridge_a_singular_problem_is_still_solved():
    of = sae()
    twice = SparseAutoencoder(
        TopKEncoder(of.encoder.W_enc[:, :2].repeat(1, 2), torch.zeros(4), 4),
        Decoder(of.decoder.W_dec[:2].repeat(2, 1), torch.zeros(D_IN)),
    )
    found = solve(Mixture(sums(source(), twice)), twice.decoder, 0.0).decoder
    assert found.W_dec.isfinite().all() and fvu(twice.with_decoder(found), source()) <= fvu(twice, source())


def test_without_a_ridge_fewer_rows_than_features_are_still_solved():
    of, x = overgrown(), target(150)
    assert of.d_sae == 2 * len(x)
    found = solve(Mixture(sums(x, of)), of.decoder, 0.0)
    assert found.solver == "cholesky" and found.decoder.W_dec.isfinite().all()
    adapted, fresh = of.with_decoder(found.decoder), target(300, seed=9)
    assert fvu(adapted, x) < 0.05 < fvu(of, x) and fvu(adapted, fresh) < 1  # rows that were not fitted: no noise is


# ---- held-out rows


def held_out(of, x):
    parts = list(encoded(of, x))
    return HeldOut(torch.cat([a for a, _ in parts]), joined([z for _, z in parts]))


def test_what_a_change_leaves_of_held_out_rows_is_what_the_decoder_would_leave():
    x, fresh = target(), target(300, seed=9)
    mixture = Mixture(sums(x), sums(source()), 0.2)
    solved = torch.rand(D_SAE, generator=RNG) > 0.3
    change = torch.randn(int(solved.sum()), D_IN, generator=RNG)
    W = sae().decoder.W_dec.clone()
    W[solved] += change
    left = fresh - Decoder(W, mixture.bias(W))(sae().encode(fresh))
    columns = slice(3, 9)
    error = held_out(sae(), fresh).error(mixture, sae().decoder.W_dec, solved, columns)
    assert error(change[:, columns].contiguous()) == pytest.approx(left[:, columns].square().sum().item(), rel=1e-4)


def test_gradients_stop_before_what_is_rare_is_learnt_by_heart(kept_codes):
    of, x = overgrown(), target(150)
    mixture = Mixture(sums(x, of))
    plain = solve(mixture, of.decoder, 0.0)
    stopped = solve(mixture, of.decoder, 0.0, held_out(of, target(300, seed=9)))
    fresh = target(1000, seed=10)
    before, heart, early = (fvu(of.with_decoder(one), fresh) for one in (of.decoder, plain.decoder, stopped.decoder))
    assert early < before and early < heart / 2, (before, heart, early)
    assert stopped.iterations < plain.iterations / 2
    assert fvu(of.with_decoder(plain.decoder), x) < fvu(of.with_decoder(stopped.decoder), x)  # control


def test_where_no_step_helps_none_is_taken(kept_codes):
    """Held-out rows that the decoder explains already, beside others to be fitted that have nothing to do with it."""
    of = sae()
    mixture = Mixture(sums(3 * torch.randn(200, D_IN, generator=RNG), of))
    z = of.encode(target(300))
    known = HeldOut(Decoder(of.decoder.W_dec, mixture.bias(of.decoder.W_dec))(z), SparseCodes.of(z))
    found = solve(mixture, of.decoder, 0.0, known)
    assert found.iterations == 0 and torch.equal(found.decoder.W_dec, of.decoder.W_dec)
    assert solve(mixture, of.decoder, 0.0).iterations > 0  # control


# ---- against gradient descent


def test_gradient_descent_converges_to_the_same_loss_from_above():
    x, y = target(), source()
    best = sae().with_decoder(solve(Mixture(sums(x), sums(y), 0.2), sae().decoder, 0.0).decoder)
    seen = []
    slow = descend(sae(), x, y, steps=1500, batch_size=256, lr=3e-3, watch=lambda step, _: seen.append(step))
    slow = sae().with_decoder(slow)
    loss = [0.8 * fvu(one, x) + 0.2 * fvu(one, y) for one in (sae(), slow, best)]
    assert loss[2] < loss[0] / 2 and loss[2] <= loss[1] * 1.001 and loss[1] == pytest.approx(loss[2], rel=0.03)
    assert seen == list(range(1500))
    assert torch.equal(slow.encode(x), sae().encode(x))
