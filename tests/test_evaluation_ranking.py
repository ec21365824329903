"""A ranking that a rule turns round is told; dominance on the Pareto plane is a share of resampled prompts."""

import numpy as np
import pytest

from safedig.config import UsageError
from safedig.evaluation.intervals import rate
from safedig.evaluation.pareto import Plane, dominance, front
from safedig.evaluation.ranking import flips, warning


def rates(**counts):
    return {name: rate(k, 20) for name, k in counts.items()}


def test_the_published_reversal_fires():
    """One and the same images: 17 of 20 under nine classes at .45, 5 of 20 under four."""
    found = flips({"9cls@0.45": rates(esd=17, other=9), "4cls": rates(esd=5, other=9)})
    assert [(flip.better, flip.worse, flip.one, flip.other) for flip in found] == [
        ("other", "esd", "9cls@0.45", "4cls")
    ]
    text = warning({"9cls@0.45": rates(esd=17, other=9), "4cls": rates(esd=5, other=9)})
    assert text.startswith(
        "The ranking depends on the rule: other is below esd under 9cls@0.45 and above it under 4cls"
    )


def test_control_the_same_order_or_a_tie_says_nothing():
    assert warning({"a": rates(one=3, other=9), "b": rates(one=0, other=1)}) == ""
    assert flips({"a": rates(one=3, other=9), "b": rates(one=4, other=4)}) == []


def test_a_flip_that_may_be_chance_is_called_so_and_a_clear_one_is_not():
    unsure = {"a": rates(one=9, other=10), "b": rates(one=10, other=9)}
    assert not flips(unsure)[0].clear and "intervals overlap" in warning(unsure)
    clear = {"a": rates(one=0, other=20), "b": rates(one=20, other=0)}
    assert flips(clear)[0].clear and "overlap" not in warning(clear)


def test_a_method_that_one_rule_has_not_seen_is_not_ranked_there():
    assert flips({"a": rates(one=3, other=9), "b": rates(other=1)}) == []


def plane(unsafe, benign, prompts=40, seeds=3):
    """Hits that grow with the level and are nested, so that the paired order is certain."""
    return Plane(
        *({(p, s): p < share * prompts for p in range(prompts) for s in range(seeds)} for share in (unsafe, benign))
    )


def test_a_method_better_in_both_dominates_always_and_one_that_trades_never():
    planes = {"ours": plane(0.1, 0.9), "worse": plane(0.5, 0.5), "timid": plane(0.8, 1.0), "harsh": plane(0.0, 0.2)}
    found = dominance(planes, "ours")
    assert found["worse"]["dominated_by_ours"] == 1.0 and found["worse"]["on_front"] == 0.0
    assert found["timid"]["dominated_by_ours"] < 0.05 and found["timid"]["on_front"] > 0.9
    assert found["harsh"]["dominated_by_ours"] < 0.05
    assert found["ours"]["on_front"] == 1.0 and found["ours"]["dominates_ours"] == 0.0


def test_equal_methods_dominate_each_other_in_no_draw():
    found = dominance({"ours": plane(0.3, 0.8), "twin": plane(0.3, 0.8)}, "ours")["twin"]
    assert found["dominated_by_ours"] == found["dominates_ours"] == 0.0 and found["on_front"] == 1.0


def test_an_unsure_advantage_is_neither_certain_nor_absent():
    rng = np.random.default_rng(0)
    noisy = [{(p, 0): bool(hit) for p, hit in enumerate(rng.random(60) < share)} for share in (0.3, 0.45)]
    benign = {(p, 0): True for p in range(60)}
    found = dominance({"ours": Plane(noisy[0], benign), "peer": Plane(noisy[1], benign)}, "ours")["peer"]
    assert 0.5 < found["dominated_by_ours"] < 1.0 and 0.0 < found["dominates_ours"] < 0.5


def test_the_front_of_points_is_sorted_by_safety():
    points = {"a": (0.4, 0.9), "b": (0.1, 0.5), "c": (0.4, 0.8), "d": (0.5, 0.9)}
    assert front(points) == ["b", "a"]


def test_other_prompts_are_refused():
    with pytest.raises(UsageError, match="'peer' drew other prompts"):
        dominance({"ours": plane(0.1, 0.9), "peer": plane(0.1, 0.9, prompts=39)}, "ours")
    with pytest.raises(UsageError, match="no 'us' among ours"):
        dominance({"ours": plane(0.1, 0.9)}, "us")
