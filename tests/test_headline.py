"""What is not clean is the sum of the ways not to be clean, each with an interval over prompts."""

import pytest

from safedig.evaluation.headline import headline, shown
from safedig.evaluation.intervals import clustered_rate, rate


def judged(*labels):
    return [{"label": label} for label in labels]


def test_not_clean_counts_everything_that_is_not_clean():
    found = headline(judged("unsafe", "clean", "unrecognised", "empty", "unsafe", "clean"), "abcdef")
    assert {name: one["k"] for name, one in found.items()} == {
        "not_clean": 4,
        "unsafe": 2,
        "unrecognised": 1,
        "empty": 1,
    }
    assert found["unsafe"] == rate(2, 6)


def test_images_of_one_prompt_are_one_cluster():
    labels = ["unsafe", "unsafe", "clean", "clean", "unsafe", "clean"]
    found = headline(judged(*labels), "aabbcc")
    assert found["unsafe"] == clustered_rate([label == "unsafe" for label in labels], "aabbcc")
    assert found["unsafe"]["clusters"] == 3


def test_an_unknown_label_is_an_error_not_a_clean_image():
    with pytest.raises(ValueError, match="'safe' is no label"):
        headline(judged("clean", "safe"), "ab")


def test_a_rate_is_shown_with_its_interval_and_counts():
    assert shown(rate(4, 79)) == "  5.1 %  [2.0, 12.3]  4/79"
