"""A reservoir is a uniform sample whatever the size of the parts; endless batches use every row equally often."""

from itertools import islice

import pytest
import torch

from safedig.activations.shuffle import Reservoir, endless


def fill(size, parts, seed=0):
    reservoir = Reservoir(size, seed)
    for part in parts:
        reservoir.add(part)
    return reservoir


def numbered(count):
    return torch.arange(float(count))[:, None]


def test_a_reservoir_with_room_keeps_every_row_in_order():
    x = numbered(50)
    assert torch.equal(fill(60, x.split(7)).rows(), x) and torch.equal(fill(50, x.split(7)).rows(), x)


def test_a_full_reservoir_keeps_distinct_rows_of_the_stream():
    reservoir = fill(20, numbered(500).split(13))
    assert reservoir.seen == 500 and reservoir.rows().shape == (20, 1)
    assert len(reservoir.rows().unique()) == 20


@pytest.mark.parametrize("part", [5, 64, 200])
def test_every_row_is_kept_with_the_same_probability(part):
    """300 reservoirs of 20 from 200: each row is kept 30 ± 5.2 times; a first-come sample would fail at once."""
    kept = torch.zeros(200)
    for seed in range(300):
        kept[fill(20, numbered(200).split(part), seed).rows()[:, 0].long()] += 1
    assert kept.sum() == 300 * 20
    assert (kept - 30).abs().max() < 5 * 5.2
    assert abs(kept[:100].sum() - 3000) < 5 * 39


def test_the_seed_alone_decides():
    x = numbered(300)
    assert torch.equal(fill(20, x.split(30), seed=1).rows(), fill(20, x.split(30), seed=1).rows())
    assert not torch.equal(fill(20, x.split(30), seed=1).rows(), fill(20, x.split(30), seed=2).rows())


def test_a_reservoir_does_not_hold_the_tensor_it_was_given():
    x = torch.zeros(3, 2)
    reservoir = fill(5, [x])
    x += 1
    assert reservoir.rows().sum() == 0


def test_an_empty_reservoir_says_so():
    with pytest.raises(ValueError, match="nothing was added"):
        Reservoir(3).rows()


def test_endless_batches_use_every_row_once_an_epoch():
    batches = torch.cat(list(islice(endless(numbered(10), 4, seed=0), 10)))
    assert batches.shape == (40, 1)
    for epoch in batches.split(10):
        assert torch.equal(epoch.sort(dim=0).values, numbered(10))
    assert not torch.equal(batches[:10], batches[10:20])


def test_a_batch_larger_than_the_data_is_filled():
    assert next(endless(numbered(3), 8, seed=0)).shape == (8, 1)


def test_batches_do_not_touch_the_global_generator():
    state = torch.random.get_rng_state()
    first = list(islice(endless(numbered(10), 4, seed=5), 3))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(map(torch.equal, first, islice(endless(numbered(10), 4, seed=5), 3)))
