"""A reservoir is a uniform sample whatever the size of the parts; endless batches use every row equally often.

So do those that come straight from a store, well mixed, in an order that goes on where it stopped.
"""

import json
from itertools import islice

import pytest
import torch

from safedig.activations import shards
from safedig.activations.address import Address, StoreError
from safedig.activations.filling import fill
from safedig.activations.plan import Plan
from safedig.activations.shuffle import Reservoir, Shuffled, endless
from safedig.activations.stream import Activations, Batch
from safedig.config import UsageError
from safedig.sites import Site


def filled(size, parts, seed=0):
    reservoir = Reservoir(size, seed)
    for part in parts:
        reservoir.add(part)
    return reservoir


def numbered(count):
    return torch.arange(float(count))[:, None]


def test_a_reservoir_with_room_keeps_every_row_in_order():
    x = numbered(50)
    assert torch.equal(filled(60, x.split(7)).rows(), x) and torch.equal(filled(50, x.split(7)).rows(), x)


def test_a_full_reservoir_keeps_distinct_rows_of_the_stream():
    reservoir = filled(20, numbered(500).split(13))
    assert reservoir.seen == 500 and reservoir.rows().shape == (20, 1)
    assert len(reservoir.rows().unique()) == 20


@pytest.mark.parametrize("part", [5, 64, 200])
def test_every_row_is_kept_with_the_same_probability(part):
    """300 reservoirs of 20 from 200: each row is kept 30 ± 5.2 times; a first-come sample would fail at once."""
    kept = torch.zeros(200)
    for seed in range(300):
        kept[filled(20, numbered(200).split(part), seed).rows()[:, 0].long()] += 1
    assert kept.sum() == 300 * 20
    assert (kept - 30).abs().max() < 5 * 5.2
    assert abs(kept[:100].sum() - 3000) < 5 * 39


def test_the_seed_alone_decides():
    x = numbered(300)
    assert torch.equal(filled(20, x.split(30), seed=1).rows(), filled(20, x.split(30), seed=1).rows())
    assert not torch.equal(filled(20, x.split(30), seed=1).rows(), filled(20, x.split(30), seed=2).rows())


def test_a_reservoir_does_not_hold_the_tensor_it_was_given():
    x = torch.zeros(3, 2)
    reservoir = filled(5, [x])
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


# Straight from a store

IMG, TXT = Site.parse("img.embed"), Site.parse("txt.embed")
IMAGES, STEPS, TOKENS, D_IN = 48, 4, 20, 4
ROWS = IMAGES * STEPS * TOKENS
ROW_BYTES = 4 * D_IN


def written(store, dtype=torch.float32, batch_size=5):
    """A store made by hand, in which a row is its own number; prompt n has the rows from n · STEPS · TOKENS on."""

    def drawn(part):
        for step in range(STEPS):
            for site in (IMG, TXT):
                starts = [(image["seed"] * STEPS + step) * TOKENS for image in part.images]
                number = torch.cat([torch.arange(start, start + TOKENS) for start in starts]).to(dtype)
                x = number[:, None].repeat(1, D_IN)
                x[:, 1] = float(site == TXT)
                yield Batch(
                    site,
                    step,
                    1.0 - step / STEPS,
                    [image["id"] for image in part.images for _ in range(TOKENS)],
                    [image["seed"] for image in part.images for _ in range(TOKENS)],
                    ("cond",) * len(x),
                    torch.arange(TOKENS).repeat(len(part.images)),
                    x,
                )

    plan = Plan.of([{"id": f"p{n}", "prompt": "a cup", "seed": n} for n in range(IMAGES)], batch_size)
    facts = {"sites": [str(IMG), str(TXT)], "batches": len(plan.parts), "model": "m", "images": plan.sha}
    return fill(store, facts, plan, lambda part: list(drawn(part)))


@pytest.fixture
def store(tmp_path, monkeypatch):
    """With blocks of 30 rows, 14 to a shard and 130 in all, so that a small store has many."""
    monkeypatch.setattr(shards, "_BLOCK", 30 * ROW_BYTES)
    return written(tmp_path)


POOL = 480 * ROW_BYTES
"""An eighth of the store."""


def order(store, count, batch_size=37, site=IMG, **options):
    return torch.cat(list(islice(Shuffled(store.at(site), batch_size, **{"pool": POOL} | options), count)))


@pytest.mark.parametrize("pool", [POOL // 8, POOL, 2**30], ids=["a few blocks", "an eighth", "all"])
@pytest.mark.parametrize("batch_size", [32, 37, 2 * ROWS + 5], ids=str)
def test_every_row_comes_once_an_epoch_and_every_batch_is_full(store, batch_size, pool):
    batches = list(islice(Shuffled(store.at(IMG), batch_size, pool=pool), -(-3 * ROWS // batch_size)))
    assert {len(batch) for batch in batches} == {batch_size}
    rows = torch.cat(batches)
    epochs = [epoch[:, 0] for epoch in rows[: 3 * ROWS].split(ROWS)]
    for epoch in epochs:
        assert torch.equal(epoch.sort().values, torch.arange(float(ROWS)))
    assert not torch.equal(epochs[0], epochs[1]) and (rows[:, 1] == 0).all()


def test_the_other_site_has_its_own_rows(store):
    assert (order(store, 3, site=TXT)[:, 1] == 1).all()


def test_the_order_depends_on_the_seed_alone(store):
    state = torch.random.get_rng_state()
    assert torch.equal(order(store, 150), order(store, 150)) and torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(order(store, 5), order(store, 5, seed=1))


@pytest.mark.parametrize("done", [0, 1, 12, 13, 14, 103, 104, 260])
def test_an_order_goes_on_where_it_stopped(store, done):
    """Within a pool, at its border, within and beyond an epoch; the state is a few plain numbers."""
    shuffled = Shuffled(store.at(IMG), 37, seed=3, pool=POOL)
    list(islice(shuffled, done))
    state = json.loads(json.dumps(shuffled.state()))
    assert len(json.dumps(state)) < 300
    resumed = Shuffled(store.at(IMG), 37, seed=3, pool=POOL, state=state)
    assert all(map(torch.equal, islice(shuffled, 120), islice(resumed, 120)))
    assert shuffled.state() == resumed.state()


def test_a_state_of_another_order_is_refused(store):
    state = Shuffled(store.at(IMG), 37, pool=POOL).state()
    for options in ({"seed": 1}, {"pool": POOL + 1}):
        with pytest.raises(UsageError, match="is of another order than"):
            Shuffled(store.at(IMG), 37, **{"pool": POOL} | options, state=state)
    with pytest.raises(UsageError, match="is of another order than"):
        Shuffled(store.at(TXT), 37, pool=POOL, state=state)
    with pytest.raises(UsageError, match="is of another order than"):
        Shuffled(store.at(IMG), 36, pool=POOL, state=state)


def neighbours(rows):
    """How often a row is of the same prompt as the one before it."""
    prompt = rows[:, 0].long() // (STEPS * TOKENS)
    return (prompt[1:] == prompt[:-1]).float().mean().item()


def spread(rows, parts=8):
    """The largest share that any part of the epoch holds of one prompt's rows; an even spread has 1 / parts."""
    prompt = rows[:, 0].long() // (STEPS * TOKENS)
    return max((part == n).sum().item() for n in range(IMAGES) for part in prompt.chunk(parts)) / (STEPS * TOKENS)


def test_the_rows_of_one_prompt_are_spread_over_the_epoch(store):
    """A prompt has 80 rows of 3840: chance puts the same prompt next to itself at 2 %."""
    in_store_order = torch.cat([batch.x for batch in store.at(IMG)])
    all_at_once = torch.cat(list(islice(Shuffled(store.at(IMG), ROWS, pool=2**30), 1)))
    by_eighths = torch.cat(list(islice(Shuffled(store.at(IMG), ROWS, pool=POOL), 1)))
    assert neighbours(in_store_order) > 0.9 and spread(in_store_order) == 1.0, "control: unshuffled"
    assert neighbours(all_at_once) < 0.04 and spread(all_at_once) < 0.35
    assert neighbours(by_eighths) < 0.08 and spread(by_eighths) < 0.7
    for batch in by_eighths.split(128):
        assert len((batch[:, 0].long() // (STEPS * TOKENS)).unique()) > 10


@pytest.fixture
def bytes_read(monkeypatch):
    count, plain = [0], Address.read_into

    def counting(self, name, start, room):
        count[0] += len(room)
        return plain(self, name, start, room)

    monkeypatch.setattr(Address, "read_into", counting)
    return count


def test_an_epoch_reads_each_byte_once_and_never_more_than_two_pools_ahead(store, bytes_read):
    shuffled = Shuffled(store.at(IMG), 40, pool=POOL // 4)
    for number in range(1, ROWS // 40 + 1):
        next(shuffled)
        shuffled._ahead.submit(int).result()  # let the read-ahead finish
        assert bytes_read[0] <= number * 40 * ROW_BYTES + 2 * (POOL // 4 + 30 * ROW_BYTES)
    assert bytes_read[0] <= 1.1 * ROWS * ROW_BYTES


def test_the_disk_is_told_of_each_block_before_it_is_read(store, monkeypatch):
    events, told, read = [], Address.expect, Address.read_into
    monkeypatch.setattr(Address, "expect", lambda *a: events.append(("told", *a[1:3])) or told(*a))
    monkeypatch.setattr(Address, "read_into", lambda *a: events.append(("read", *a[1:3])) or read(*a))
    order(store, ROWS // 40, batch_size=40)
    first = [event[1:] for event in events if event[0] == "read"][:130]
    at = {event: number for number, event in reversed([*enumerate(events)])}
    assert len(set(first)) == 130, "an epoch"
    early = [at.get(("told", *block), len(events)) < at["read", *block] for block in first]
    assert early == [False] * 16 + [True] * 114, "of the first, nobody knew"


def test_an_order_of_some_prompts_has_their_rows_alone(store, bytes_read):
    few = store.of([{"id": f"p{n}"} for n in (3, 4, 5, 30)])
    rows = torch.cat(list(islice(Shuffled(few.at(IMG), 64, pool=POOL), 10)))
    assert len(rows) == 2 * 4 * STEPS * TOKENS
    for epoch in rows[:, 0].split(4 * STEPS * TOKENS):
        assert sorted({int(row) // (STEPS * TOKENS) for row in epoch}) == [3, 4, 5, 30] and len(epoch.unique()) == 320
    assert bytes_read[0] < 3 * ROWS * ROW_BYTES / 4, "shards without them are not read"


def test_a_flipped_byte_stops_the_order(store, tmp_path):
    path = next(tmp_path.rglob("000004.safetensors"))
    data = bytearray(path.read_bytes())
    data[store.store.shards[4].strips[str(IMG)].offset + 99] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match="000004.safetensors' differs from its checksum: record again"):
        order(store, 105)
    assert len(order(store, 105, site=TXT)), "control: the other site is whole"


def test_rows_keep_their_precision_and_may_lie_at_any_address():
    rows = order(written("memory://shuffled", dtype=torch.bfloat16), 110)
    assert rows.dtype == torch.bfloat16


def test_only_one_site_of_a_store_is_shuffled(store):
    with pytest.raises(UsageError, match="one site at a time"):
        Shuffled(store, 8)
    with pytest.raises(UsageError, match="Only a store is shuffled"):
        Shuffled(Activations(lambda sites, ids: [], [IMG], [], "m"), 8)
