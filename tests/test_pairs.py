"""How a recording is dealt out to processes: twins together, whole batches in turn."""

import pytest
import torch

from safedig.activations.pairs import dealt
from safedig.activations.processes import Share
from safedig.activations.record import record
from safedig.config import UsageError
from safedig.pipelines import Drawing
from tests.planted import BIND, NOISE, TRANSFERS, TXT, recording
from tests.together import together

PLANTED = {TXT: TRANSFERS, BIND: NOISE}


def ids(activations):
    return [row["id"] for row in activations.prompts]


@pytest.mark.parametrize("world", [2, 3, 5])
def test_every_prompt_falls_to_one_process_together_with_its_twin(world):
    whole = recording(PLANTED)
    parts = [dealt(whole, Share(rank, world)) for rank in range(world)]
    assert sorted(name for part in parts for name in ids(part)) == sorted(ids(whole))
    for part in parts:
        assert ids(part)
        assert all(not row.get("twin") or row["twin"] in ids(part) for row in part.prompts)


def test_one_process_has_all_of_it():
    whole = recording(PLANTED)
    assert dealt(whole, Share(0, 1)) is whole


def test_more_processes_than_batches_are_refused():
    whole = recording(PLANTED)
    batches = -(-len(whole.prompts) // 16)
    with pytest.raises(UsageError, match=f"{batches + 1} processes share {batches} batches"):
        dealt(whole, Share(0, batches + 1))


def test_what_is_drawn_is_dealt_in_whole_batches(pipe):
    """No batch is drawn by two processes: the forwards of all add up to those of one."""
    rows = [
        {"id": f"{word}{n}", "prompt": f"a {word}", "risk": risk, "twin": twin and f"{twin}{n}", "seed": n}
        for n in range(24)
        for word, risk, twin in (("gun", "weapons", "cup"), ("cup", "", ""))
    ]
    drawing = Drawing(steps=1, guidance=1.0, height=32, width=32, max_sequence_length=12)
    whole = record(pipe, rows, ["txt.embed"], paired=True, drawing=drawing)
    counts = [sum(1 for _ in dealt(whole, Share(rank, 2))) for rank in (0, 1)]
    assert counts == [2, 1] and sum(counts) == sum(1 for _ in whole)


def test_rows_that_are_dealt_out_in_turn_are_joined_to_the_same_bits():
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    for found in together(3, lambda share: share.joined(x[share.rank :: share.world], 7)):
        assert torch.equal(found, x)
    assert torch.equal(Share(0, 1).joined(x, 7), x)
