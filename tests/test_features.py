"""The features that carry the harm are found, by their contrast with safe twins, and no others."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from safedig.activations.record import Activations
from safedig.config import UsageError
from safedig.features import find_features, load_features, save_features
from safedig.features.prototypes import Prototypes
from safedig.sae.model import Decoder, SparseAutoencoder, ThresholdEncoder, TopKEncoder
from safedig.sites import Site
from tests.synthetic import HARM, RARE, SHARED, SITE, STEPS, TOKENS, WEAK, activation, recording, rows, sae


def find(activations=None, fdr=1.0, **options: Any):
    """Whatever chance may have found with it, unless a test says otherwise."""
    return find_features({SITE: sae()}, activations or recording(), fdr=fdr, **options)[SITE]


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


def heights(names, features, factor=1.0):
    """From the definition: what the codes of one token add up to at most in each image, lowest image first."""
    return sorted(
        max((factor * activation(row, step))[:, features].clamp(min=0).sum(1).max().item() for step in range(STEPS))
        for row in rows()
        if row["id"][0] in names
    )


def test_the_threshold_is_a_quantile_of_benign_images_not_of_vague_or_harmful_ones():
    """Underspecified prompts may draw harm: counted as benign they would raise the threshold to HARM's codes."""
    assert find(quantile=1.0).threshold == 0.0
    found = find(min_ratio=0.45, quantile=1.0)
    assert set(found.index.tolist()) == {HARM, RARE, WEAK, SHARED}
    plain = heights("sb", [WEAK, SHARED])  # the noise in the others stays below the encoder's threshold
    assert found.threshold == pytest.approx(plain[-1], rel=1e-6)
    assert find(min_ratio=0.45, quantile=0.5).threshold == pytest.approx(plain[20], rel=1e-6)
    assert plain[20] < plain[-1] < heights("sbu", [HARM, WEAK, SHARED])[-1]


@pytest.mark.parametrize("quantile", [0.5, 0.8])
def test_on_that_share_of_benign_images_no_token_is_above_in_any_step(quantile):
    """A quantile of tokens would not do: the gate would open somewhere in nearly every image of 5 tokens × 2 steps."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(len(rows()) * STEPS * TOKENS, 20, generator=generator)
    parts = iter(noise.split(TOKENS))
    eye, zero = torch.eye(20), torch.zeros(20)
    wide = SparseAutoencoder(ThresholdEncoder(eye, zero, zero), Decoder(eye, zero))
    given = recording(batch_size=1)
    drawn = [
        replace(batch, x=next(parts) + (batch.prompt_ids[0][0] == "h") * torch.linspace(2, 3, 20)) for batch in given
    ]
    noisy = Activations(lambda sites, ids: drawn, [SITE], given.prompts, "fingerprint")
    found = find_features({SITE: wide}, noisy, quantile=quantile, fdr=1.0)[SITE]
    assert len(found) == 20
    above: dict[str, bool] = {}
    for batch in drawn:
        if (name := batch.prompt_ids[0])[0] in "sb":
            above[name] = above.get(name, False) or bool((batch.x.sum(1) > found.threshold).any())
    share = sum(above.values()) / len(above)
    assert 0.8 * (1 - quantile) < share <= 1 - quantile
    tokens = torch.cat([batch.x for batch in drawn if batch.prompt_ids[0][0] in "sb"]).sum(1)
    at_a_quantile_of_tokens = tokens.quantile(quantile)
    assert (tokens.unflatten(0, (-1, TOKENS)).amax(1) > at_a_quantile_of_tokens).float().mean() > 1.5 * (1 - quantile)


def test_thresholds_come_from_the_calibration_recording_where_there_is_one():
    """Doubled codes in unseen benign wordings double the threshold, and change no feature."""
    given = recording()
    doubled = [replace(batch, x=2 * batch.x) for batch in given]
    louder = Activations(lambda sites, ids: doubled, [SITE], given.prompts, "fingerprint")
    own, same, other = (find(min_ratio=0.45, calibration=one) for one in (None, given, louder))
    assert own.index.tolist() == same.index.tolist() == other.index.tolist()
    assert own.threshold == same.threshold
    assert other.threshold == pytest.approx(2 * own.threshold)


def test_a_calibration_without_benign_prompts_is_refused():
    harmful = [row for row in rows() if row["risk"]]
    with pytest.raises(UsageError, match="no benign prompt in the calibration recording: record some"):
        find(calibration=recording(harmful))


def test_what_chance_may_give_is_not_found_unless_asked_for():
    """RARE is up in 2 of 20 pairs: p = 1/4. HARM is up in all of them: p = 2⁻²⁰."""
    assert find(fdr=0.05).index.tolist() == [HARM]
    assert find(fdr=0.6).index.tolist() == [HARM, RARE]


def two_domains():
    """Even prompts are weapons, odd ones fire: RARE fires on every fifth weapon and on no fire."""
    named = [row | {"risk": ("weapons", "fire")[row["seed"] % 2]} if row["risk"] else row for row in rows()]
    return recording(named)


def test_a_feature_of_one_of_two_domains_is_refused_where_every_domain_must_show_it():
    assert find(two_domains(), domains="every").index.tolist() == [HARM]
    assert find(two_domains()).index.tolist() == [HARM, RARE]


def test_the_lowest_ratio_of_the_domains_ranks():
    """WEAK's twins of the fire domain are made silent: it is 1 there and 5/9 in the other."""
    given = two_domains()
    quiet = [replace(batch, x=batch.x.clone()) for batch in given]
    for batch in quiet:
        for at, name in enumerate(batch.prompt_ids):
            if name[0] == "s" and batch.seeds[at] % 2:
                batch.x[at, WEAK] = 0
    half = Activations(lambda sites, ids: quiet, [SITE], given.prompts, "fingerprint")
    pooled, every = (find(half, min_ratio=0.54, domains=domains) for domains in ("pooled", "every"))
    assert pooled.ratio[pooled.index == WEAK] == pytest.approx(1 / 1.4, abs=1e-3)
    assert every.ratio[every.index == WEAK] == pytest.approx(1 / 1.8, abs=1e-3)


def test_the_order_of_the_domains_changes_nothing():
    forth, back = two_domains().prompts, two_domains().prompts[::-1]
    first, second = (find(recording(order), domains="every", min_ratio=0.5) for order in (forth, back))
    assert torch.equal(first.index, second.index) and first.threshold == second.threshold
    torch.testing.assert_close(first.ratio, second.ratio)


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
    assert torch.equal(first.index, second.index) and first.threshold == pytest.approx(second.threshold)
    torch.testing.assert_close(first.ratio, second.ratio)


def test_unconditional_rows_are_left_out():
    given = recording()
    doubled = [
        part for batch in given for part in (batch, replace(batch, row=("uncond",) * len(batch.row), x=batch.x * 9))
    ]
    both = Activations(lambda sites, ids: doubled, [SITE], given.prompts, "fingerprint")
    assert find(both, quantile=0.9, min_ratio=0.45).threshold == find(quantile=0.9, min_ratio=0.45).threshold


def test_topk_codes_are_summed_as_they_are_in_full():
    """Of a TopK encoder no part can be taken: of k = 1 only the highest feature of a token fires."""
    of = sae().encoder
    first = SparseAutoencoder(TopKEncoder(of.W_enc, of.b_enc, 1), sae().decoder)
    found = find_features({SITE: first}, recording(), fdr=1.0, min_ratio=0.45, quantile=1.0)[SITE]
    assert {HARM, SHARED} <= set(found.index.tolist())
    assert found.threshold == pytest.approx(heights("sb", [SHARED])[-1], rel=1e-6)


def test_a_centre_beside_the_decoder_is_subtracted_before_the_heights_are_taken():
    """Half a unit of SHARED is mean: the codes of benign tokens, and with them the threshold, are that much lower."""
    half = torch.zeros(8).index_fill(0, torch.tensor([SHARED]), 0.5)
    centred = sae().with_decoder(replace(sae().decoder, centre=half))
    options: dict[str, Any] = {"min_ratio": 0.45, "fdr": 1.0, "quantile": 1.0}
    found = find_features({SITE: centred}, recording(), **options)[SITE]
    assert found.threshold == pytest.approx(find(**options).threshold - 0.5, rel=1e-5)


# ---- what they were found in, and what stands in safety


def test_the_facts_say_what_was_contrasted():
    facts = find(two_domains()).facts
    assert facts["contrast"] == "twins" and facts["harmful"] == {"fire": 10, "weapons": 10} and facts["safe"] == 20
    assert facts["benign_images"] == 40 and facts["fdr"] == 1.0 and facts["model"] == "fingerprint"


def test_class_means_are_announced_and_written_down(capsys):
    facts = find(recording(rows(twins=False)), min_ratio=0.6).facts
    assert facts["contrast"] == "class means" and facts["saving"] is None and facts["safe"] == 40
    assert "class means are contrasted" in capsys.readouterr().err
    assert find().facts["saving"] is not None
    assert "class means" not in capsys.readouterr().err


def test_prototypes_are_the_safe_twins_codes_where_the_harm_stands():
    """Token 1 holds the harm; in the twin only SHARED fires there."""
    bank = find().prototypes
    assert bank is not None and len(bank) == 20 * STEPS
    assert bank.harmful.tolist() == [[0.0, 0.0]] * 40
    codes = torch.stack([activation(row, step)[1] for row in rows()[1:40:2] for step in range(STEPS)])
    expected = sae().encode(codes)
    assert sorted(map(tuple, bank.others(16).tolist())) == sorted(map(tuple, expected.tolist()))


def test_the_bank_is_as_large_as_asked_whatever_was_recorded():
    bank = find(prototypes=7).prototypes
    assert bank is not None and len(bank) == 7
    without_twins = find(recording(rows(twins=False)), min_ratio=0.6, prototypes=9).prototypes
    assert without_twins is not None and len(without_twins) == 9
    assert find(prototypes=0).prototypes is None


def test_of_a_prototype_what_fires_is_kept_and_split_by_the_features():
    z = torch.tensor([[0.0, 3.0, 1.0, 0.0, 2.0], [4.0, 0.0, 0.0, 0.0, 0.0]])
    bank = Prototypes.of(z, torch.tensor([2, 0]))
    assert bank.harmful.tolist() == [[1.0, 0.0], [0.0, 4.0]]
    assert bank.others(5).tolist() == [[0.0, 3.0, 0.0, 0.0, 2.0], [0.0] * 5]
    assert bank.codes.shape == (2, 2)


@pytest.mark.parametrize("prototypes", [0, 5])
def test_saving_and_loading_changes_no_bit(tmp_path, prototypes):
    other = Site.parse("pooled.embed")
    before = {SITE: find(prototypes=prototypes), other: find(min_ratio=0.45, prototypes=prototypes)}
    save_features(before, tmp_path / "f")
    after = load_features(tmp_path / "f")
    assert sorted(path.name for path in (tmp_path / "f").iterdir()) == ["features.json", "features.safetensors"]
    assert list(after) == list(before)
    for site, one in before.items():
        assert after[site].threshold == one.threshold and after[site].facts == one.facts
        assert all(
            torch.equal(getattr(after[site], name), getattr(one, name)) for name in ("index", "ratio", "support")
        )
        banks = after[site].prototypes, one.prototypes
        assert banks == (None, None) or all(torch.equal(x, y) for x, y in zip(*map(_tensors, banks), strict=True))


def _tensors(bank):
    return list(bank.tensors().values())


def test_a_folder_that_is_wrong_is_explained(tmp_path):
    with pytest.raises(UsageError, match="is no folder of features, as save_features writes it"):
        load_features(tmp_path)
    save_features({SITE: find()}, tmp_path)
    written = (tmp_path / "features.json").read_text()
    (tmp_path / "features.json").write_text(written.replace('"format": 1', '"format": 9'))
    with pytest.raises(UsageError, match="has format 9; this version reads format 1"):
        load_features(tmp_path)
    (tmp_path / "features.json").write_text(written.replace(str(SITE), "velocity"))
    with pytest.raises(UsageError, match="is incomplete: 'index' is missing"):
        load_features(tmp_path)


def test_what_is_not_there_is_an_error_that_says_what_to_do():
    with pytest.raises(UsageError, match=r"No feature at 'txt\.embed' has a ratio above 0\.999.*lower them"):
        find(recording([row | {"id": row["id"].replace("h", "b")} for row in rows()]), min_ratio=0.999)
    with pytest.raises(
        UsageError, match=r"in each of fire, weapons that chance would not give \(1 have, fdr=0\.0001\)"
    ):
        find(two_domains(), domains="every", fdr=0.0001)
    with pytest.raises(UsageError, match="There are 0 harmful and 40 safe images"):
        find(recording([row for row in rows() if row["id"][0] in "sb"]))
    with pytest.raises(UsageError, match="There are 20 harmful and 0 safe images"):
        find(recording([row for row in rows() if row["id"][0] == "h"]))
    with pytest.raises(UsageError, match="'velocity' was not recorded"):
        find_features({Site.parse("velocity"): sae()}, recording())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantile": 99}, "quantile=99: expected the share of benign images"),
        ({"fdr": 0.0}, r"fdr=0\.0: expected a share"),
    ],
)
def test_an_option_out_of_range_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        find(**options)
