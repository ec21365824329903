"""The sparse classes of training are sae-lens' own in every number, and leave to sae-lens what they cannot do."""

from copy import deepcopy

import pytest
import torch

from safedig.config import UsageError
from safedig.sae.options import SAEOptions
from safedig.sae.row_adam import RowAdam
from safedig.sae.sparse_training import trainer_for, training_sae

D_IN, D_SAE, K, BATCH = 24, 128, 5, 60
SPARSE = ("topk", "batchtopk", "matryoshka")
ROUGH = ("bfloat16", "int8")
WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")


def rows(n=BATCH, seed=0):
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(seed))


def rate(steps):
    return SAEOptions(steps=steps, warm_up=5).rate


def pair(architecture, **settings):
    """Ours, and sae-lens' own class with the same weights."""
    import sae_lens

    theirs = {
        "topk": sae_lens.TopKTrainingSAE,
        "batchtopk": sae_lens.BatchTopKTrainingSAE,
        "matryoshka": sae_lens.MatryoshkaBatchTopKTrainingSAE,
    }[architecture]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ours = training_sae(architecture, D_IN, D_SAE, K, **settings)
        for param in ours.parameters():
            param.data += 0.1 * torch.randn_like(param)
    stock = theirs(deepcopy(ours.cfg))
    stock.load_state_dict(ours.state_dict())
    assert isinstance(ours, theirs) and type(ours) is not theirs
    return ours, stock


def stepped(sae, x, dead=None):
    from sae_lens.saes.sae import TrainStepInput

    sae.zero_grad()
    dead = torch.zeros(D_SAE, dtype=torch.bool) if dead is None else dead
    output = sae.training_forward_pass(TrainStepInput(x, {}, dead, 0, False))
    output.loss.backward()
    return output


def relative(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def largest_difference(ours, stock, *, dead=None, x=None):
    x = rows() if x is None else x
    stepped(ours, x, dead), stepped(stock, x, dead)
    return max(relative(getattr(ours, name).grad, getattr(stock, name).grad) for name in WEIGHTS)


def some_dead(share):
    return torch.rand(D_SAE, generator=torch.Generator().manual_seed(1)) < share


# ---- one step


@pytest.mark.parametrize("architecture", SPARSE)
@pytest.mark.parametrize("share", [0, 0.02, 0.6], ids=["none dead", "fewer than may be active", "more"])
def test_gradients_and_losses_equal_those_of_sae_lens(architecture, share):
    ours, stock = pair(architecture)
    assert largest_difference(ours, stock, dead=some_dead(share)) < 1e-5
    found, expected = (stepped(sae, rows(), some_dead(share)) for sae in (ours, stock))
    assert found.losses.keys() == expected.losses.keys()
    for name, loss in expected.losses.items():
        assert float(found.losses[name].detach()) == pytest.approx(float(loss.detach()), rel=1e-5)
    assert float(found.loss.detach()) == pytest.approx(float(expected.loss.detach()), rel=1e-5)
    assert (float(found.losses["auxiliary_reconstruction_loss"].detach()) > 0) == (share > 0)
    torch.testing.assert_close(found.sae_out, expected.sae_out)
    torch.testing.assert_close(found.feature_acts.to_dense(), expected.feature_acts)


@pytest.mark.parametrize("change", ["scale", "bias"])
def test_control_weights_that_differ_slightly_give_other_gradients(change):
    ours, stock = pair("batchtopk")
    with torch.no_grad():
        stock.W_dec.mul_(1.001) if change == "scale" else stock.b_dec.add_(0.01)
    assert largest_difference(ours, stock) > 1e-4


def test_control_the_loss_of_the_dead_moves_them():
    ours, stock = pair("topk")
    stepped(ours, rows(), some_dead(0.6)), stepped(stock, rows(), None)
    assert relative(ours.W_enc.grad, stock.W_enc.grad) > 1e-2


@pytest.mark.parametrize("settings", [{"rescale_acts_by_decoder_norm": False}, {"apply_b_dec_to_input": False}])
def test_settings_of_sae_lens_keep_their_meaning(settings):
    ours, stock = pair("topk")
    for sae in (ours, stock):
        vars(sae.cfg).update(settings)
    assert largest_difference(ours, stock, dead=some_dead(0.6)) < 1e-5
    assert stepped(ours, rows()).feature_acts.is_sparse


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka"])
def test_the_threshold_moves_as_it_does_in_sae_lens(architecture):
    ours, stock = pair(architecture)
    stepped(ours, rows()), stepped(stock, rows())
    assert float(ours.topk_threshold) == pytest.approx(float(stock.topk_threshold), rel=1e-6)
    assert float(ours.topk_threshold) > 0


def test_rows_without_any_positive_code_are_reconstructed_by_the_bias():
    ours, stock = pair("batchtopk")
    for sae in (ours, stock):
        sae.b_enc.data.fill_(-100)
    assert torch.equal(stepped(ours, rows()).sae_out, ours.b_dec.expand(BATCH, -1))
    assert not ours.W_enc.grad.any() and torch.allclose(ours.b_dec.grad, (stepped(stock, rows()), stock.b_dec.grad)[1])


# ---- low precision


@pytest.mark.parametrize("dtype", ROUGH)
@pytest.mark.parametrize("architecture", SPARSE)
def test_what_is_found_in_low_precision_is_scored_in_float32(architecture, dtype):
    ours, stock = pair(architecture, encoder_dtype=dtype)
    found, expected = stepped(ours, rows()).feature_acts.to_dense(), stepped(stock, rows()).feature_acts
    both = (found > 0) & (expected > 0)
    assert both.sum() > 0.95 * (expected > 0).sum() and (found > 0).sum() <= K * BATCH
    torch.testing.assert_close(found[both], expected[both])
    if architecture == "topk":
        assert ((found > 0).sum(1) <= K).all()


def test_control_bfloat16_throughout_would_not_be_as_exact():
    _, stock = pair("topk")
    x = rows()
    exact = x @ stock.W_enc
    with pytest.raises(AssertionError):
        torch.testing.assert_close((x.bfloat16() @ stock.W_enc.bfloat16()).float(), exact)


@pytest.mark.parametrize("dtype", [None, *ROUGH])
@pytest.mark.parametrize("architecture", SPARSE)
def test_what_is_no_number_is_seen_in_the_loss(architecture, dtype):
    ours, _ = pair(architecture, encoder_dtype=dtype)
    x = rows()
    x[3, 5] = float("nan")
    assert stepped(ours, x).loss.isnan() and stepped(ours, rows()).loss.isfinite()


# ---- what is left to sae-lens


def test_hooks_autocast_and_other_types_fall_back_to_sae_lens():
    ours, stock = pair("batchtopk")
    seen = []
    ours.hook_sae_acts_post.register_forward_hook(lambda module, given, out: seen.append(out.shape))
    assert not stepped(ours, rows()).feature_acts.is_sparse and seen == [(BATCH, D_SAE)]
    ours, stock = pair("batchtopk")
    with torch.autocast("cpu", torch.bfloat16):
        assert not stepped(ours, rows()).feature_acts.is_sparse
    ours, stock = ours.to(torch.float64), stock.to(torch.float64)
    assert largest_difference(ours, stock, x=rows().double()) < 1e-12
    assert not stepped(ours, rows().double()).feature_acts.is_sparse


def test_gradients_of_the_input_are_sae_lens_own():
    ours, _ = pair("topk")
    x = rows().requires_grad_()
    stepped(ours, x)
    assert x.grad.norm() > 0


# ---- many steps, in sae-lens' trainer


def trained(sae, steps=40, window=8):
    trainer = trainer_for(sae, lr=1e-2, steps=steps, batch_size=BATCH, share=rate(steps), dead_window=window)
    losses = []
    for step in range(steps):
        losses.append(float(trainer.step(rows(seed=step)).loss.detach()))
        trainer.n_training_steps += 1
    return trainer, losses


@pytest.mark.parametrize("architecture", SPARSE)
def test_a_run_follows_that_of_sae_lens_and_counts_the_same(architecture):
    ours, stock = pair(architecture)
    (mine, losses), (theirs, expected) = trained(ours), trained(stock)
    assert losses == pytest.approx(expected, rel=1e-3) and losses[-1] < 0.9 * losses[0]
    assert (mine.act_freq_scores - theirs.act_freq_scores).abs().max() <= 2
    assert (mine.dead_neurons != theirs.dead_neurons).float().mean() < 0.05
    assert mine.optimizer.param_groups[0]["lr"] == theirs.optimizer.param_groups[0]["lr"] == 1e-2 * rate(40)(40) < 1e-2
    told = mine.build_train_step_log_dict(mine.step(rows()), 0)
    assert told["metrics/l0"] <= K


def test_jumprelu_is_drawn_to_the_number_of_active_features_asked_for():
    torch.manual_seed(0)
    sae = training_sae("jumprelu", D_IN, D_SAE, K)
    _, losses = trained(sae, steps=300)
    acts = sae.encode(rows(500, seed=-1))
    assert losses[-1] < losses[0] and K / 2 < (acts > 0).float().sum(1).mean() < 2 * K


@pytest.mark.parametrize("architecture", SPARSE)
def test_what_is_saved_is_read_by_sae_lens_and_the_training_goes_on(architecture, tmp_path):
    import sae_lens

    sae, _ = pair(architecture)
    trainer, _ = trained(sae)
    sae.save_inference_model(tmp_path / "inference")
    loaded = sae_lens.SAE.load_from_disk(str(tmp_path / "inference"))
    assert loaded.W_enc.shape == (D_IN, D_SAE) and (loaded.encode(rows()) > 0).any()
    trainer.save_checkpoint("now", tmp_path)
    again, _ = pair(architecture)
    resumed = trainer_for(again, lr=1e-2, steps=40, batch_size=BATCH, share=rate(40), dead_window=8)
    again.load_weights_from_checkpoint(tmp_path / "now")
    resumed.load_trainer_state(tmp_path / "now")
    assert torch.equal(resumed.step(rows(seed=99)).loss, trainer.step(rows(seed=99)).loss)
    assert all(torch.equal(getattr(again, name), getattr(sae, name)) for name in WEIGHTS)


# ---- the optimiser


def test_the_optimiser_moves_a_transposed_matrix_as_adam_does():
    base = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    ours, theirs = torch.nn.Parameter(base.clone().t()), torch.nn.Parameter(base.t().contiguous())
    optimisers = RowAdam([ours], 0.1, (0.9, 0.999)), torch.optim.Adam([theirs], 0.1)
    for step in range(5):
        grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        ours.grad, theirs.grad = (grad.t().contiguous().t() if step % 2 else grad.clone()), grad.clone()
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
    torch.testing.assert_close(ours.data, theirs.data)
    assert ours.grad is None and not torch.allclose(ours.data, base.t())


def test_weights_put_in_their_place_are_the_ones_that_move():
    param = torch.nn.Parameter(torch.zeros(6, 4).t())
    optimiser = RowAdam([param], 0.1, (0.9, 0.999))
    param.data = torch.ones(6, 4).t()
    param.grad = torch.ones(4, 6)
    optimiser.step()
    torch.testing.assert_close(param.data, torch.full((4, 6), 0.9))


def test_gradients_come_back_to_the_memory_that_the_next_step_writes_to():
    sae = training_sae("topk", D_IN, D_SAE, K)
    trainer = trainer_for(sae, lr=1e-2, steps=9, batch_size=BATCH)
    places = []
    for parameter in (sae.W_enc, sae.W_dec):
        parameter.register_post_accumulate_grad_hook(lambda param: places.append(param.grad.data_ptr()))
    for step in range(4):
        trainer.step(rows(seed=step))
    assert len(set(places)) == 2 < len(places) and sae.W_enc.grad is None


def test_without_that_memory_every_number_is_the_same():
    found = []
    for forget in (False, True):
        torch.manual_seed(0)
        sae = training_sae("topk", D_IN, D_SAE, K)
        trainer = trainer_for(sae, lr=1e-2, steps=9, batch_size=BATCH)
        trainer.optimizer.memory = None if forget else sae.memory
        for step in range(4):
            trainer.step(rows(seed=step))
        found.append(torch.cat([sae.W_enc.detach().flatten(), sae.W_dec.detach().flatten()]))
    assert torch.equal(*found)


# ---- what is refused


def test_what_there_is_not_is_refused():
    with pytest.raises(UsageError, match="no architecture 'gated'.*topk, batchtopk"):
        training_sae("gated", D_IN, D_SAE, K)
    with pytest.raises(UsageError, match="encoder_dtype='int4'.*int8"):
        training_sae("topk", D_IN, D_SAE, K, encoder_dtype="int4")
    for k in (0, D_SAE + 1):
        with pytest.raises(UsageError, match=f"k={k} of {D_SAE} features.*lower k or raise expansion"):
            training_sae("topk", D_IN, D_SAE, k)


# ---- a planted dictionary


def planted(rows, seed, d_in=128, atoms=512, active=8, noise_db=20):
    """Sums of `active` unit atoms, drawn with Zipf's frequencies, in noise; and the atoms."""
    generator = torch.Generator().manual_seed(0)
    dictionary = torch.nn.functional.normalize(torch.randn(atoms, d_in, generator=generator), dim=1)
    generator = torch.Generator().manual_seed(seed)
    frequency = 1 / torch.arange(1, atoms + 1)
    chosen = torch.multinomial(frequency.expand(rows, -1), active, generator=generator)
    weight = 0.5 + torch.rand(rows, active, generator=generator)
    signal = torch.einsum("ra,rad->rd", weight, dictionary[chosen])
    scale = signal.square().mean().sqrt() * 10 ** (-noise_db / 20)
    return signal + scale * torch.randn(rows, d_in, generator=generator), dictionary


def recovered(sae, dictionary):
    rows = torch.nn.functional.normalize(sae.W_dec.detach(), dim=1)
    return (dictionary @ rows.T).max(1).values.mean().item()


@pytest.mark.slow
def test_a_planted_dictionary_is_recovered():
    torch.manual_seed(0)
    steps, batch = 4000, 1024
    sae = training_sae("batchtopk", 128, 1024, 8)
    share = SAEOptions(steps=steps).rate
    trainer = trainer_for(sae, lr=2e-3, steps=steps, batch_size=batch, share=share, dead_window=200)
    x, dictionary = planted(2**18, seed=1)
    order = torch.Generator().manual_seed(2)
    before = recovered(sae, dictionary)
    for _ in range(steps):
        trainer.step(x[torch.randint(len(x), (batch,), generator=order)])
        trainer.n_training_steps += 1
    assert before < 0.5 and recovered(sae, dictionary) >= 0.95
