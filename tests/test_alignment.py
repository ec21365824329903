"""Words find their counterparts in a twin of other length, in the order of both, and at the least cost there is."""

from itertools import pairwise

import pytest
import torch

from safedig.activations.alignment import GAP, alignment
from safedig.activations.pairs import Pair, Pairing
from safedig.sites import Site
from tests.phrases import recording, tokens, told

TXT, IMG, POOLED = map(Site.parse, ("txt.embed", "transformer_blocks.0.img.resid_post", "pooled.embed"))


def words(*shape, seed=0):
    return torch.randn(*shape, 16, generator=torch.Generator().manual_seed(seed))


def pair(harmful, safe, site=TXT):
    return Pair((("h", 0), ("s", 0)), site, 0, torch.arange(len(harmful)), harmful, safe)


# ---- what is added or taken away


@pytest.mark.parametrize("order", [list(range(9)), [0, 0, 0, 0], [0, 1, 0, 1, 0], [3, 1, 2, 2, 2, 2], [0]])
def test_equal_sequences_stand_as_they_are_repeated_words_and_padding_too(order):
    text = words(9)[order]
    assert alignment(text, text).tolist() == list(range(len(order)))
    shifted = text + 0.01 * words(len(order), seed=1)
    assert alignment(text, shifted).tolist() == list(range(len(order)))


@pytest.mark.parametrize(("at", "count"), [(0, 1), *((at, count) for at in range(1, 9) for count in (1, 2, 4))])
def test_words_that_are_added_leave_all_others_with_their_counterparts(at, count):
    """Of many that are added before the first, which has a neighbour on one side only, some may be taken for it."""
    text = words(8)
    twin = torch.cat([text[:at], words(count, seed=1), text[at:]])
    assert alignment(text, twin).tolist() == [*range(at), *range(at + count, 8 + count)]
    by_place = (text[at:] - twin[at:8]).norm(dim=1)
    assert at == 8 or (by_place > 1).all(), "the control: token by token all that follows has changed"


@pytest.mark.parametrize("at", range(8))
def test_a_word_that_is_left_out_leaves_all_others_with_their_counterparts(at):
    text = words(8)
    found = alignment(text, torch.cat([text[:at], text[at + 1 :]])).tolist()
    assert found[:at] == list(range(at)) and found[at + 1 :] == list(range(at, 7))
    assert found[at] in (at - 1, at), "it stands where its neighbours do"


def test_of_a_longer_wording_of_the_same_length_only_the_harm_is_changed():
    """One word becomes three, and padding makes up for it; by place most of the text would seem changed."""
    before, after, padding = words(2, seed=1), words(4, seed=2), words(1, seed=3).expand(5, -1)
    gun, cup = words(1, seed=4), words(3, seed=5)
    both = pair(torch.cat([before, gun, after, padding]), torch.cat([before, cup, after, padding[:3]]))
    assert (both.aligned().change() > 0).tolist() == [at == 2 for at in range(12)]
    assert (both.change() > 0).sum() == 7, "the control"
    assert both.aligned().change().max() == both.change().max() == 1


def test_of_several_words_alike_in_direction_the_nearest_is_the_counterpart():
    one = words(1)
    assert alignment(one, torch.cat([3 * one, 1.1 * one, 0.2 * one])).tolist() == [1]


# ---- the order, and the cost


def test_the_order_of_both_is_kept():
    found = [alignment(words(7, seed=seed), words(5 + seed % 6, seed=seed + 99)) for seed in range(40)]
    assert all(one <= other for each in found for one, other in pairwise(each.tolist()))
    back = alignment(words(7), words(7).flip(0)).tolist()
    assert back == sorted(back) and back != [6, 5, 4, 3, 2, 1, 0], "the control: each one's nearest is out of order"


def ways(rows, columns):
    """Every way through all tokens of both, a step on in one of them or in both, from the first pair to the last."""
    if (rows, columns) == (1, 1):
        return [[(0, 0)]]
    before = [(i, j) for i, j in ((rows - 1, columns), (rows, columns - 1), (rows - 1, columns - 1)) if i and j]
    return [[*way, (rows - 1, columns - 1)] for i, j in before for way in ways(i, j)]


def brute_force(one, other):
    """Of the cheapest of all ways, the nearest counterpart of each token."""

    apart = 1 - torch.cosine_similarity(one[:, None].double(), other[None].double(), dim=2).numpy()

    def price(way):
        return sum(apart[i, j] for i, j in way) + GAP * sum(
            (b[0] - a[0], b[1] - a[1]) != (1, 1) for a, b in pairwise(way)
        )

    best = min(ways(len(one), len(other)), key=price)
    near = [
        min((j for i, j in best if i == row), key=lambda j: (one[row] - other[j]).norm()) for row in range(len(one))
    ]
    return near


@pytest.mark.parametrize("rows", range(1, 6))
@pytest.mark.parametrize("columns", range(1, 6))
def test_the_dynamic_programme_finds_what_trying_every_way_finds(rows, columns):
    for seed in range(2):
        one, other = words(rows, seed=seed), words(columns, seed=50 + seed)
        other[: rows // 2] += 2 * one[: min(rows // 2, columns)].sum(0)  # some are alike
        assert alignment(one, other).tolist() == brute_force(one, other)


def test_control_the_number_of_ways_is_that_of_delannoy():
    assert [len(ways(n, n)) for n in range(1, 6)] == [1, 3, 13, 63, 321]


def test_precision_and_size_do_not_matter():
    one, other = words(7).bfloat16(), words(9, seed=1).bfloat16()
    assert torch.equal(alignment(one, other), alignment(one.double(), other.double()))
    assert torch.equal(alignment(100 * one.float(), 100 * other.float()), alignment(one, other))


# ---- pairs


def test_images_and_vectors_stay_in_place_and_text_does_not():
    text = words(8)
    twin = torch.cat([words(1, seed=1), text[:7]])
    for site in (IMG, Site.parse("velocity")):
        assert pair(text, twin, site).aligned().safe is twin
    one = pair(text[:1], twin[:1], POOLED)
    assert one.aligned() is one
    assert torch.equal(pair(text, twin).aligned().safe[:7], twin[1:])


def test_aligned_a_pair_is_the_same_in_all_but_the_twins_order():
    text, twin = words(8), torch.cat([words(8)[:3], words(6, seed=1)[:1], words(8)[3:7]])
    before = pair(text, twin)
    after = before.aligned()
    assert all(getattr(after, name) is getattr(before, name) for name in ("ends", "site", "token", "harmful"))
    assert all((row == twin).all(1).any() for row in after.safe), "and no token is made up"


def test_the_harmful_prompt_is_the_first_end_and_the_pair_names_both():
    acts = recording(told("a gun", 3, "weapon", "a cup"))
    pairing = Pairing(acts)
    (found,) = [one for batch in acts for one in pairing.add(batch)]
    assert found.ends == (("a gun-3", 3), ("a gun-3-safe", 3))
    assert torch.equal(found.harmful, tokens({"prompt": "a gun", "seed": 3}, 0.0))
    assert found.change().tolist() == [0.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert not pair(found.harmful, found.harmful).change().any(), "twins that are alike have not changed at all"
