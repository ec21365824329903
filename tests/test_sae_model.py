"""Codes are the encoder's alone, for both kinds of encoder; halves that do not fit are refused."""

import pytest
import torch
from jaxtyping import TypeCheckError

from safedig.config import UsageError
from safedig.sae.model import Decoder, Encoder, SparseAutoencoder, ThresholdEncoder, TopKEncoder

D_IN, D_SAE, K = 32, 48, 5
KINDS = ("threshold", "topk")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def encoder(kind, seed=0):
    W_enc, b_enc = normal(D_IN, D_SAE, seed=seed), normal(D_SAE, seed=seed + 1)
    return TopKEncoder(W_enc, b_enc, K) if kind == "topk" else ThresholdEncoder(W_enc, b_enc, b_enc.abs())


def sae(kind):
    return SparseAutoencoder(
        encoder(kind), Decoder(normal(D_SAE, D_IN, seed=7), normal(D_IN, seed=8)), {"site": "txt.embed"}
    )


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


# ---- the codes


def test_the_codes_are_bit_equal_under_any_decoder(kind):
    before, a = sae(kind), normal(50, D_IN, seed=3)
    for seed in range(5):
        W_dec, b_dec = 9 * normal(D_SAE, D_IN, seed=seed) * normal(D_SAE, 1, seed=seed), 5 * normal(D_IN, seed=seed)
        after = before.with_decoder(Decoder(W_dec, b_dec))
        assert after.encoder is before.encoder
        assert torch.equal(after.encode(a), before.encode(a))
        assert not torch.allclose(after.decode(after.encode(a)), before.decode(before.encode(a)))


def test_what_fired_are_the_codes_that_are_not_zero(kind):
    of, a = sae(kind), normal(50, D_IN, seed=3)
    z = of.encode(a)
    active, held = of.fired(a)
    assert torch.equal(active, z != 0) and torch.equal(held[active], z[active]) and 0 < active.sum() < active.numel()
    moved = of.with_decoder(Decoder(of.decoder.W_dec, of.decoder.b_dec, centre=normal(D_IN, seed=4)))
    assert torch.equal(moved.fired(a)[0], moved.encode(a) != 0)


def test_control_another_encoder_gives_other_codes(kind):
    a = normal(50, D_IN, seed=3)
    assert not torch.equal(encoder(kind, seed=1)(a), encoder(kind)(a))


def test_a_threshold_code_is_its_preactivation_or_nothing():
    enc, a = (
        ThresholdEncoder(normal(D_IN, D_SAE), normal(D_SAE, seed=1), normal(D_SAE, seed=1).abs()),
        normal(200, D_IN, seed=3),
    )
    pre, z = a @ enc.W_enc + enc.b_enc, enc(a)
    assert torch.equal(z > 0, pre > enc.threshold)
    assert torch.equal(z[z > 0], pre[z > 0]) and 0.05 < (z > 0).float().mean() < 0.5


def test_a_topk_row_keeps_its_k_highest_preactivations():
    enc, a = encoder("topk"), normal(200, D_IN, seed=3)
    pre, z = a @ enc.W_enc + enc.b_enc, enc(a)
    for row, codes in zip(pre, z, strict=True):
        highest = row.sort(descending=True).indices[:K]
        assert set(codes.nonzero()[:, 0].tolist()) == set(highest.tolist())
        assert torch.equal(codes[highest], row[highest])


def test_a_topk_code_is_never_negative():
    enc = TopKEncoder(torch.eye(3), torch.tensor([1.0, -9.0, -9.0]), 2)
    assert torch.equal(enc(torch.zeros(1, 3)), torch.tensor([[1.0, 0.0, 0.0]]))


def test_leading_dimensions_are_batches(kind):
    a = normal(2, 3, 4, D_IN, seed=3)
    z = encoder(kind)(a)
    assert z.shape == (2, 3, 4, D_SAE)
    torch.testing.assert_close(z.flatten(0, 2), encoder(kind)(a.flatten(0, 2)))


def test_low_precision_is_encoded_in_float32(kind):
    a = normal(5, D_IN, seed=3).bfloat16()
    assert torch.equal(sae(kind).encode(a), sae(kind).encode(a.float()))


# ---- a few columns


def test_a_few_columns_give_the_same_codes():
    enc, a, index = encoder("threshold"), normal(50, D_IN, seed=3), torch.tensor([7, 2, 19])
    torch.testing.assert_close(enc.columns(index)(a), enc(a)[:, index])


def test_a_few_columns_of_topk_are_refused_because_they_would_be_wrong():
    enc, a, index = encoder("topk"), normal(50, D_IN, seed=3), torch.tensor([7, 2, 19])
    with pytest.raises(UsageError, match="depends on all 48: encode in full, or train architecture='batchtopk'"):
        enc.columns(index)
    alone = TopKEncoder(enc.W_enc[:, index], enc.b_enc[index], 3)
    assert not torch.equal(alone(a) > 0, enc(a)[:, index] > 0)


# ---- a centre beside the decoder


def test_a_centre_moves_the_input_and_leaves_the_encoder(kind):
    before, a, centre = sae(kind), normal(50, D_IN, seed=3), 2 * normal(D_IN, seed=4)
    after = before.with_decoder(Decoder(before.decoder.W_dec, before.decoder.b_dec + centre, centre))
    assert after.encoder is before.encoder
    torch.testing.assert_close(after.encode(a + centre), before.encode(a), atol=1e-4, rtol=1e-4)
    assert not torch.equal(after.encode(a), before.encode(a)), "the one case in which codes change"


def test_under_a_mean_shift_a_centre_gives_back_the_old_codes_and_the_shifted_reconstruction(kind):
    before, a, shift = sae(kind), normal(50, D_IN, seed=3), torch.full((D_IN,), 3.0)
    after = before.with_decoder(Decoder(before.decoder.W_dec, before.decoder.b_dec + shift, shift))
    expected = before.decode(before.encode(a)) + shift
    torch.testing.assert_close(after.decode(after.encode(a + shift)), expected, atol=1e-3, rtol=1e-4)
    without = before.with_decoder(Decoder(before.decoder.W_dec, before.decoder.b_dec + shift))
    assert not torch.allclose(without.decode(without.encode(a + shift)), expected, atol=0.1)


def test_low_precision_is_centred_in_float32(kind):
    before, centre, a = sae(kind), 100 + normal(D_IN, seed=4), (100 + normal(50, D_IN, seed=3)).bfloat16()
    after = before.with_decoder(Decoder(before.decoder.W_dec, before.decoder.b_dec, centre))
    assert torch.equal(after.encode(a), before.encode(a.float() - centre))


# ---- what is written down


def test_metadata_is_added_not_replaced(kind):
    before = sae(kind)
    after = before.with_decoder(before.decoder, objective="contrast")
    assert after.metadata == {"site": "txt.embed", "objective": "contrast"}
    assert before.metadata == {"site": "txt.embed"}


def test_the_values_are_frozen(kind):
    for value, name in ((sae(kind), "encoder"), (sae(kind).encoder, "W_enc"), (sae(kind).decoder, "W_dec")):
        with pytest.raises(AttributeError):
            setattr(value, name, None)


def test_both_kinds_are_encoders_and_the_interface_alone_is_none():
    assert all(isinstance(encoder(kind), Encoder) for kind in KINDS)
    with pytest.raises(TypeError, match="abstract"):
        Encoder(torch.eye(2), torch.zeros(2))  # pyright: ignore[reportAbstractUsage]


# ---- what does not fit


def test_activations_of_another_width_are_refused(kind):
    with pytest.raises(
        UsageError, match="have d_in=31 and this SAE reads d_in=32: give it those of the model and site"
    ):
        sae(kind).encode(torch.zeros(3, 31))


@pytest.mark.parametrize("k", [0, -1, D_SAE + 1])
def test_a_k_that_no_row_can_have_is_refused(k):
    with pytest.raises(UsageError, match=f"k={k} of 48 features: give a k from 1 to d_sae"):
        TopKEncoder(normal(D_IN, D_SAE), normal(D_SAE), k)


def test_all_features_may_be_active():
    z = TopKEncoder(normal(D_IN, D_SAE), torch.full((D_SAE,), 99.0), D_SAE)(torch.zeros(2, D_IN))
    assert (z > 0).all()


@pytest.mark.parametrize("shape", [(D_SAE + 1, D_IN), (D_SAE, D_IN + 1)])
def test_the_decoder_of_another_encoder_is_refused(kind, shape):
    with pytest.raises(UsageError, match=r"cannot stand beside this encoder, which needs \(48, 32\)"):
        sae(kind).with_decoder(Decoder(torch.zeros(shape), torch.zeros(shape[1])))


def test_tensors_that_contradict_each_other_are_caught_while_testing():
    with pytest.raises(TypeCheckError):
        ThresholdEncoder(normal(D_IN, D_SAE), normal(D_SAE), normal(D_SAE + 1))
