"""The features that carry the harm are found, by their contrast with safe twins, and no others."""

from dataclasses import replace

import pytest
import torch

from safedig.activations.record import Activations
from safedig.config import UsageError
from safedig.features import find_features
from safedig.sae.model import Decoder, Encoder, SparseAutoencoder
from safedig.sites import Site
from tests.synthetic import HARM, RARE, SHARED, SITE, TOKENS, WEAK, activation, recording, rows, sae


def find(activations=None, **options):
    return find_features({SITE: sae()}, activations or recording(), **options)[SITE]


def test_what_fires_on_harm_and_not_on_twins_is_found():
    assert find().index.tolist() == [HARM, RARE]


def test_the_ratio_is_that_of_the_prompt_statistic():
    """Max over tokens, mean over steps, mean over prompts; computed here directly from the definition."""

    def mean(kind, feature):
        images = [row for row in rows() if row["id"].startswith(kind)]
        peaks = [[sae().encode(activation(row, step))[:, feature].max() for step in (0, 1)] for row in images]
        return torch.tensor(peaks).mean()

    found = find(min_ratio=0.5)
    assert set(found.index.tolist()) == {HARM, RARE, WEAK}
    expected = mean("h", WEAK) / (mean("h", WEAK) + mean("s", WEAK))
    torch.testing.assert_close(found.ratio[found.index == WEAK][0], expected)
    assert found.ratio.tolist() == sorted(found.ratio.tolist(), reverse=True)


@pytest.mark.parametrize(("min_ratio", "expected"), [(0.45, {HARM, RARE, WEAK, SHARED}), (0.9, {HARM, RARE})])
def test_the_ratio_decides(min_ratio, expected):
    assert set(find(min_ratio=min_ratio).index.tolist()) == expected


def test_rare_features_need_support():
    assert find(min_support=0.2).index.tolist() == [HARM]
    found = find()
    assert found.support.tolist() == pytest.approx([1.0, 0.1])


def test_the_threshold_is_a_quantile_of_benign_tokens_not_of_vague_or_harmful_ones():
    """Underspecified prompts may draw harm: counted as benign they would raise the threshold of HARM to about 2."""
    assert find(quantile=1.0).threshold.tolist() == [0.0, 0.0]
    shared = find(min_ratio=0.45, quantile=1.0)
    highest = max(activation(row, step)[:, SHARED].max() for row in rows() if row["id"][0] in "sb" for step in (0, 1))
    assert shared.threshold[shared.index == SHARED] == highest
    lower = find(min_ratio=0.45, quantile=0.5)
    assert 1.0 < lower.threshold[lower.index == SHARED] < highest


@pytest.mark.parametrize("quantile", [0.5, 0.8])
def test_on_that_share_of_benign_tokens_no_feature_at_all_is_above_its_threshold(quantile):
    """One quantile a feature would let 20 features of 5 % each open the gate on 64 % of independent tokens."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(len(rows()) * 2 * TOKENS, 20, generator=generator)
    parts = iter(noise.split(TOKENS))
    eye, zero = torch.eye(20), torch.zeros(20)
    wide = SparseAutoencoder(Encoder(eye, zero, zero), Decoder(eye, zero))
    given = recording(batch_size=1)
    drawn = [
        replace(batch, x=next(parts) + (batch.prompt_ids[0][0] == "h") * torch.linspace(2, 3, 20)) for batch in given
    ]
    noisy = Activations(lambda sites, ids: drawn, [SITE], given.prompts, "fingerprint")
    found = find_features({SITE: wide}, noisy, quantile=quantile)[SITE]
    assert len(found) == 20
    plain = torch.cat([batch.x for batch in drawn if batch.prompt_ids[0][0] in "sb"])
    above = plain[:, found.index] > found.threshold
    assert above.any(1).float().mean() <= 1 - quantile
    assert above.any(1).float().mean() > 0.4 * (1 - quantile)


def test_thresholds_come_from_the_calibration_recording_where_there_is_one():
    """Doubled codes in unseen benign wordings double the threshold, and change no feature."""
    given = recording()
    doubled = [replace(batch, x=2 * batch.x) for batch in given]
    louder = Activations(lambda sites, ids: doubled, [SITE], given.prompts, "fingerprint")
    own, same, other = (find(min_ratio=0.45, calibration=one) for one in (None, given, louder))
    assert own.index.tolist() == same.index.tolist() == other.index.tolist()
    assert torch.equal(own.threshold, same.threshold)
    shared = own.index == SHARED
    torch.testing.assert_close(other.threshold[shared], 2 * own.threshold[shared])


def test_a_calibration_without_benign_prompts_is_refused():
    harmful = [row for row in rows() if row["risk"]]
    with pytest.raises(UsageError, match="no benign prompt in the calibration recording: record some"):
        find(calibration=recording(harmful))


def test_without_twins_harm_is_contrasted_with_all_benign_prompts():
    found = find(recording(rows(twins=False)), min_ratio=0.6)
    assert set(found.index.tolist()) == {HARM, RARE, WEAK}  # WEAK fires on half of the benign prompts only


def test_a_prompt_without_a_recorded_twin_is_left_out_where_others_have_one():
    some = [row for row in rows() if row["id"] not in {f"s{i}" for i in range(0, 20, 10)}]
    assert find(recording(some)).index.tolist() == [HARM]  # RARE fires on prompts 0 and 10 alone


def test_a_part_of_the_prompts_can_be_asked_for():
    odd = [row for row in rows() if row["seed"] % 10]
    assert find(prompts=odd).index.tolist() == [HARM]


def test_the_batches_do_not_matter():
    first, second = find(recording(batch_size=1)), find(recording(batch_size=50))
    assert torch.equal(first.index, second.index) and torch.equal(first.threshold, second.threshold)
    torch.testing.assert_close(first.ratio, second.ratio)


def test_unconditional_rows_are_left_out():
    given = recording()
    doubled = [
        part for batch in given for part in (batch, replace(batch, row=("uncond",) * len(batch.row), x=batch.x * 9))
    ]
    both = Activations(lambda sites, ids: doubled, [SITE], given.prompts, "fingerprint")
    assert torch.equal(find(both, quantile=0.9, min_ratio=0.45).threshold, find(quantile=0.9, min_ratio=0.45).threshold)


def test_what_is_not_there_is_an_error_that_says_what_to_do():
    with pytest.raises(UsageError, match=r"No feature at 'txt\.embed' has a ratio above 0\.999.*lower them"):
        find(recording([row | {"id": row["id"].replace("h", "b")} for row in rows()]), min_ratio=0.999)
    with pytest.raises(UsageError, match="There are 0 harmful and 40 safe images"):
        find(recording([row for row in rows() if row["id"][0] in "sb"]))
    with pytest.raises(UsageError, match="There are 20 harmful and 0 safe images"):
        find(recording([row for row in rows() if row["id"][0] == "h"]))
    with pytest.raises(UsageError, match="'velocity' was not recorded"):
        find_features({Site.parse("velocity"): sae()}, recording())
