"""The quick selection finds exactly what sorting everything finds, also where there are ties and odd widths."""

import pytest
import torch

from safedig.sae.selection import GROUP, top_of_batch, top_of_rows


def scores(batch=37, d_sae=1024, seed=0):
    return torch.randn(batch, d_sae, generator=torch.Generator().manual_seed(seed))


def crowded(batch=37, d_sae=1024):
    """All that is large lies in few groups and in few rows."""
    x = scores(batch, d_sae) - 10
    x[:5, : d_sae // 4] += 20
    x[:, :: d_sae // GROUP] += 5
    return x


@pytest.mark.parametrize("make", [scores, crowded])
@pytest.mark.parametrize(("d_sae", "k"), [(1024, 1), (1024, 12), (1024, 500), (1000, 3), (1001, 3), (64, 64)])
def test_the_largest_of_each_row_are_those_of_sorting(make, d_sae, k):
    x = make(d_sae=d_sae)
    found = top_of_rows(x, k)
    assert torch.equal(found.sort(1).values, x.topk(k).indices.sort(1).values)


@pytest.mark.parametrize("make", [scores, crowded])
@pytest.mark.parametrize("d_sae", [1024, 1000, 1001, 24])
@pytest.mark.parametrize("share", [0, 1e-4, 0.01, 0.1, 1])
def test_the_largest_of_the_batch_are_those_of_sorting(make, d_sae, share):
    x = make(d_sae=d_sae)
    n = int(share * x.numel())
    assert torch.equal(top_of_batch(x, n).sort().values, x.flatten().topk(n).indices.sort().values)


def test_control_the_maxima_of_groups_alone_are_not_the_largest():
    x = crowded()
    maxima = x.view(len(x), GROUP, -1).amax(1)
    assert not torch.equal(maxima.flatten().topk(200).values, x.flatten().topk(200).values)


def test_of_ties_as_many_are_taken_as_were_asked_for():
    x = scores().round()
    assert torch.equal(x.gather(1, top_of_rows(x, 9)).sort(1).values, x.topk(9).values.flip(1))
    found = top_of_batch(x, 333)
    assert len(found.unique()) == 333
    assert torch.equal(x.flatten()[found].sort(descending=True).values, x.flatten().topk(333).values)


@pytest.mark.parametrize("k", [1, 12, 500])
def test_whole_numbers_of_16_bits_are_taken_in_their_order_of_either_sign(k):
    x = scores().bfloat16().view(torch.int16)
    assert (x < 0).any() and (x > 0).any()
    assert torch.equal(x.gather(1, top_of_rows(x, k)).sort(1).values, x.topk(k).values.flip(1))
    found = top_of_batch(x, 37 * k)
    assert len(found.unique()) == 37 * k
    assert torch.equal(x.flatten()[found].sort(descending=True).values, x.flatten().topk(37 * k).values)


def test_infinities_are_the_ends_of_the_order():
    x = scores()
    x[:, :100], x[:, 100] = -torch.inf, torch.inf
    assert torch.equal(top_of_rows(x, 900).sort(1).values, x.topk(900).indices.sort(1).values)
    assert (top_of_rows(x, 1) == 100).all()


@pytest.mark.parametrize("bits", [0x7FC00000, -0x400000], ids=["positive", "negative"])
def test_what_is_no_number_is_kept_in_sight_of_either_sign(bits):
    x = scores()
    x[3, 5] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    assert x[3, 5].isnan() and torch.signbit(x[3, 5]) == (bits < 0)
    assert 3 * 1024 + 5 in top_of_batch(x, 50).tolist() and 5 in top_of_rows(x, 2)[3].tolist()
