"""Memory of a training step: kept by name, lent by shape, and never held twice."""

import torch

from safedig.sae.memory import Memory


def test_what_is_kept_is_the_same_memory_until_its_shape_or_type_changes():
    memory = Memory()
    first = memory.kept("scores", (3, 4), torch.float32)
    assert memory.kept("scores", (3, 4), torch.float32) is first
    assert memory.kept("other", (3, 4), torch.float32) is not first
    for shape, dtype in (((4, 3), torch.float32), ((4, 3), torch.bfloat16)):
        again = memory.kept("scores", shape, dtype)
        assert again is not first and again.shape == shape and again.dtype == dtype


def test_what_is_given_back_is_lent_again_and_only_once():
    memory = Memory()
    lent = memory.lend((3, 4))
    assert memory.lend((3, 4)) is not lent
    memory.give_back(lent)
    assert memory.lend((4, 3)) is not lent
    assert memory.lend((3, 4)) is lent and memory.lend((3, 4)) is not lent


def test_what_could_not_be_written_to_row_by_row_is_let_go():
    memory = Memory()
    for unfit in (torch.zeros(4, 3).t(), torch.zeros(3, 4, dtype=torch.float64)):
        memory.give_back(unfit)
    lent = memory.lend((3, 4))
    assert lent.is_contiguous() and lent.dtype == torch.float32
