"""Sparse products and their gradients are those of dense matrices with zeros in them."""

import pytest
import torch

from safedig.sae.memory import Memory
from safedig.sae.sparse_ops import Support, decoding, encoding, scored, spread_back, squared_error, summed

BATCH, D_IN, D_SAE = 11, 7, 40


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uneven():
    """Some rows and many columns have no entry, some have many."""
    places = torch.randperm(BATCH * D_SAE, generator=torch.Generator().manual_seed(1))[:60]
    return Support.of_batch(places[places // D_SAE != 4], BATCH, D_SAE)


def even():
    return Support.of_rows(normal(BATCH, D_SAE).topk(5, sorted=False).indices, D_SAE)


@pytest.fixture(params=[uneven, even], ids=lambda make: make.__name__)
def support(request):
    return request.param()


def dense(values, support):
    return torch.zeros(BATCH, D_SAE).index_put((support.rows, support.columns), values)


def test_a_support_is_in_order_of_its_rows_and_says_where_each_starts(support):
    assert (support.rows.diff() >= 0).all()
    counts = dense(torch.ones(len(support.rows)), support)
    assert torch.equal(support.row_starts.diff().float(), counts.sum(1))
    assert torch.equal(support.column_starts.diff().float(), counts.sum(0))
    assert (support.columns[support.by_column].diff() >= 0).all()


def test_the_codes_as_a_sparse_matrix_are_the_codes(support):
    values = normal(len(support.rows))
    assert torch.equal(support.coo(values).to_dense(), dense(values, support))


def test_the_three_products(support):
    values, weight, x = normal(len(support.rows)), normal(D_SAE, D_IN, seed=1), normal(BATCH, D_IN, seed=2)
    z = dense(values, support)
    torch.testing.assert_close(summed(values, weight, support), z @ weight)
    torch.testing.assert_close(spread_back(values, x, support), z.T @ x)
    torch.testing.assert_close(scored(x, weight, support), (x @ weight.T)[support.rows, support.columns])


def test_where_there_is_no_mkl_the_gradient_is_the_same_but_for_rounding(support, monkeypatch):
    """Both add in the same order; whether a product is rounded before it is added is up to the processor."""
    values, x = normal(len(support.rows)), normal(BATCH, D_IN, seed=2)
    found = spread_back(values, x, support)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    again = spread_back(values, x, support)
    torch.testing.assert_close(again, found, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(spread_back(values.flip(0), x, support), found, rtol=1e-5, atol=1e-5), "control"


def test_what_lay_in_the_memory_before_is_of_no_account(support):
    values, x, memory = normal(len(support.rows)), normal(BATCH, D_IN, seed=2), Memory()
    memory.give_back(torch.full((D_SAE, D_IN), float("nan")))
    assert torch.equal(spread_back(values, x, support, memory), spread_back(values, x, support))


@pytest.mark.parametrize("d_sae", [2**15, 2**15 + 2])
def test_columns_are_in_order_also_where_there_are_very_many(d_sae):
    support = Support.of_rows(torch.randint(d_sae, (50, 3), generator=torch.Generator().manual_seed(0)), d_sae)
    assert (support.columns[support.by_column].diff() >= 0).all() and support.columns.max() > 2**14


def test_a_matrix_that_lies_transposed_gives_the_same(support):
    values, weight = normal(len(support.rows)), normal(D_IN, D_SAE, seed=1).T
    assert torch.equal(summed(values, weight, support), summed(values, weight.contiguous(), support))


def test_gradients_of_decoding_are_those_of_the_dense_product(support):
    values, weight = normal(len(support.rows)).requires_grad_(), normal(D_SAE, D_IN, seed=1).requires_grad_()
    target = normal(BATCH, D_IN, seed=3)
    (decoding(values, weight, support) - target).square().sum().backward()
    found = values.grad.clone(), weight.grad.clone()
    values.grad = weight.grad = None
    (dense(values, support) @ weight - target).square().sum().backward()
    torch.testing.assert_close(found, (values.grad, weight.grad))


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_of_encoding_are_those_of_the_dense_product(support, transposed):
    W_enc = normal(D_SAE, D_IN, seed=1).T if transposed else normal(D_SAE, D_IN, seed=1).T.contiguous()
    leaves = W_enc.requires_grad_(), normal(D_SAE, seed=2).requires_grad_(), normal(D_IN, seed=3).requires_grad_()
    a, weights = normal(BATCH, D_IN, seed=4), normal(len(support.rows), seed=5)

    def exact():
        return ((a - leaves[2]) @ leaves[0] + leaves[1])[support.rows, support.columns]

    known = exact().detach()
    values = encoding(known, a - leaves[2].detach(), *leaves, support)
    assert torch.equal(values, known)
    (values.relu() * weights).sum().backward()
    found = [leaf.grad.clone() for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    (exact().relu() * weights).sum().backward()
    for ours, theirs in zip(found, leaves, strict=True):
        torch.testing.assert_close(ours, theirs.grad)


def test_control_another_support_gives_other_gradients():
    weight = normal(D_SAE, D_IN, seed=1).requires_grad_()
    grads = []
    for support in (even(), Support.of_rows((-normal(BATCH, D_SAE)).topk(5).indices, D_SAE)):
        decoding(torch.ones(len(support.rows)), weight, support).sum().backward()
        grads.append(weight.grad.clone())
        weight.grad = None
    assert not torch.allclose(*grads)


def test_no_entry_at_all_reconstructs_nothing_and_moves_nothing():
    support = Support.of_batch(torch.zeros(0, dtype=torch.long), BATCH, D_SAE)
    values, weight = torch.zeros(0, requires_grad=True), normal(D_SAE, D_IN).requires_grad_()
    out = decoding(values, weight, support)
    out.sum().backward()
    assert torch.equal(out, torch.zeros(BATCH, D_IN)) and not weight.grad.any() and values.grad.shape == (0,)


def test_the_squared_error_and_its_gradient_are_torch_s_own():
    a, out = normal(BATCH, D_IN), normal(BATCH, D_IN, seed=1).requires_grad_()
    found = []
    for loss in (squared_error(out, a), torch.nn.functional.mse_loss(out, a, reduction="none").sum(1).mean()):
        (gradient,) = torch.autograd.grad(3 * loss, out)
        found.append((loss.detach(), gradient))
    torch.testing.assert_close(found[0], found[1])
