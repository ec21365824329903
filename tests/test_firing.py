"""What sae-lens' trainer counts of the codes is what it would count of dense ones."""

import torch

from safedig.sae.firing import codes
from safedig.sae.sparse_ops import Support

BATCH, D_SAE = 9, 30


def some():
    generator = torch.Generator().manual_seed(0)
    support = Support.of_batch(torch.randperm(BATCH * D_SAE, generator=generator)[:40], BATCH, D_SAE)
    return torch.rand(40, generator=generator) * (torch.arange(40) % 3 > 0), support


def test_sums_over_rows_and_features_are_those_of_dense_codes():
    values, support = some()
    found = codes(values, support)
    dense = found.to_dense()
    assert found.is_sparse and int((dense > 0).sum()) == int((values > 0).sum()) < 40
    firing, expected = found.bool().float(), dense.bool().float()
    for dim in (0, -2, 1, -1):
        assert torch.equal(firing.sum(dim), expected.sum(dim))


def test_control_a_code_of_zero_that_counted_would_be_seen():
    values, support = some()
    firing = codes(values + 1, support).bool().float()
    assert not torch.equal(firing.sum(0), codes(values, support).to_dense().bool().float().sum(0))
