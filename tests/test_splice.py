"""Loss recovered at the image: a perfect reconstruction loses nothing, and the model is left as it was."""

import math
from dataclasses import replace

import pytest
import torch

from safedig.config import UsageError
from safedig.hooks import attach
from safedig.pipelines import Drawing, draw, fingerprint
from safedig.sae.model import Decoder, SparseAutoencoder, ThresholdEncoder
from safedig.sae.splice import VELOCITY, loss_recovered
from safedig.sites import Site, d_in

ROWS = [{"id": f"p{n}", "prompt": prompt, "seed": n} for n, prompt in enumerate(["a gun", "a red cup", "hats"])]
DRAWING = {True: Drawing(2, 3.0, 32, 32, 12, true_cfg=True), False: Drawing(2, 3.0, 32, 32, 12)}
IMAGE, TEXT = Site.parse("transformer_blocks.1.img.resid_post"), Site.parse("txt.embed")
POOLED = Site.parse("pooled.embed")


def drawing_of(pipe):
    return DRAWING["Flux" in type(pipe).__name__]


def perfect(width, shrink=1.0):
    """Reads every coordinate and its negative; with `shrink` the reconstruction is that much of the activation."""
    eye, none = torch.eye(width), torch.zeros(2 * width)
    return SparseAutoencoder(
        ThresholdEncoder(torch.cat([eye, -eye], 1), none, none),
        Decoder(shrink * torch.cat([eye, -eye], 0), torch.zeros(width)),
    )


def constant(value):
    """Gives the same for every activation."""
    width = len(value)
    encoder = ThresholdEncoder(torch.zeros(width, 2), torch.zeros(2), torch.zeros(2))
    return SparseAutoencoder(encoder, Decoder(torch.zeros(2, width), value))


def plain(pipe):
    """Without guidance, so that every row is conditional."""
    return replace(drawing_of(pipe), guidance=1.0, true_cfg=False)


def recovered(pipe, site, sae, rows=ROWS, **options):
    return loss_recovered(pipe, {site: sae}, rows, **{"drawing": drawing_of(pipe)} | options)[site]


@pytest.mark.parametrize("site", [TEXT, IMAGE], ids=str)
def test_a_perfect_reconstruction_loses_nothing(pipe, site):
    found = recovered(pipe, site, perfect(d_in(pipe, site)))
    assert found["velocity_error"] < 1e-10 and found["recovered"] == pytest.approx(1, abs=1e-6)


def test_the_worse_the_reconstruction_the_larger_the_error_at_every_sigma(pipe):
    found = [recovered(pipe, IMAGE, perfect(d_in(pipe, IMAGE), shrink)) for shrink in (0.99, 0.9, 0.5)]
    errors = [one["velocity_error"] for one in found]
    assert 0 < errors[0] < errors[1] < errors[2]
    assert len(found[0]["sigmas"]) == 2 and next(iter(found[0]["sigmas"])) == "1.000"
    assert all(level["velocity_error"] > 0 for level in found[2]["sigmas"].values())
    assert found[0]["recovered"] > found[2]["recovered"]


def test_at_the_velocity_itself_the_error_is_that_of_the_reconstruction(pipe):
    """v' = s·v there, so that the error is (1 − s)²."""
    found = recovered(pipe, VELOCITY, perfect(d_in(pipe, VELOCITY), 0.7))
    assert found["velocity_error"] == pytest.approx(0.09, rel=1e-4)


def test_what_is_compared_is_at_the_same_latents(pipe):
    """The error of a half reconstruction in the last step is what one forward gives from the undisturbed latents."""
    site, sae, seen = IMAGE, perfect(d_in(pipe, IMAGE), 0.5), {}

    def velocities(edited):
        def edit(x, context):
            return sae.decode(sae.encode(x)) if edited and context.step == 1 else None

        def keep(x, context):
            if context.step == 1:
                seen.setdefault(edited, []).append(x.double())

        with attach(pipe, {site: edit, VELOCITY: keep}):
            list(draw(pipe, ROWS, drawing=drawing_of(pipe), output_type="latent"))
        return torch.cat(seen[edited])

    plain, spliced = velocities(False), velocities(True)
    expected = ((spliced - plain).square().sum() / plain.square().sum()).item()
    found = list(recovered(pipe, site, sae)["sigmas"].values())[1]["velocity_error"]
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("site", [POOLED, TEXT, IMAGE], ids=str)
def test_the_size_of_the_batches_does_not_matter(pipe, site):
    sae = perfect(d_in(pipe, site), 0.5)
    whole, *parts = (recovered(pipe, site, sae, batch_size=size) for size in (3, 2, 1))
    for part in parts:
        assert part["velocity_error"] == pytest.approx(whole["velocity_error"], rel=1e-4)
        assert part["recovered"] == pytest.approx(whole["recovered"], abs=1e-4)
        assert [level["recovered"] for level in part["sigmas"].values()] == pytest.approx(
            [level["recovered"] for level in whole["sigmas"].values()], abs=1e-4
        )


def test_what_is_recovered_is_over_the_mean_of_all_prompts_at_that_step_and_kind_of_row(pipe):
    """An autoencoder that gives that mean recovers nothing; that of the first step does so in the first step alone."""
    means = {}

    def keep(x, context):
        means.setdefault((context.step, context.rows[0]), x.mean((0, 1)))

    with attach(pipe, {IMAGE: keep}):
        list(draw(pipe, ROWS, drawing=plain(pipe), output_type="latent"))
    first, second = (
        recovered(pipe, IMAGE, constant(means[step, "cond"]), drawing=plain(pipe), batch_size=2)["sigmas"]
        for step in (0, 1)
    )
    shares = [[level["recovered"] for level in sigmas.values()] for sigmas in (first, second)]
    assert shares[0][0] == pytest.approx(0, abs=1e-4) and shares[1][1] == pytest.approx(0, abs=1e-4)
    assert abs(shares[0][1]) > 1e-3 and abs(shares[1][0]) > 1e-3


def test_of_one_prompt_that_is_its_own_mean_there_is_no_share(pipe):
    """At a pooled site; at others the mean is over its tokens."""
    found = {site: recovered(pipe, site, perfect(d_in(pipe, site), 0.5), ROWS[:1]) for site in (POOLED, TEXT)}
    assert math.isnan(found[POOLED]["recovered"]) and not math.isnan(found[TEXT]["recovered"])


def test_the_pipeline_is_left_as_it_was(pipe):
    def images():
        return torch.cat([batch for _, batch in draw(pipe, ROWS, drawing=drawing_of(pipe), output_type="latent")])

    before, methods = images(), set(vars(pipe.scheduler)) | set(vars(pipe))
    recovered(pipe, IMAGE, perfect(d_in(pipe, IMAGE), 0.5))
    assert torch.equal(images(), before) and set(vars(pipe.scheduler)) | set(vars(pipe)) == methods


def test_another_model_another_width_and_no_prompts_are_refused(tiny_random_flux):
    sae = perfect(d_in(tiny_random_flux, IMAGE))
    with pytest.raises(UsageError, match="There are no prompts"):
        recovered(tiny_random_flux, IMAGE, sae, rows=[])
    with pytest.raises(UsageError, match=r"has d_in=7 and passes there d_in=32"):
        recovered(tiny_random_flux, IMAGE, perfect(7))
    known = SparseAutoencoder(sae.encoder, sae.decoder, {"model": fingerprint(tiny_random_flux)})
    assert recovered(tiny_random_flux, IMAGE, known)["recovered"] > 0.99
    stranger = SparseAutoencoder(sae.encoder, sae.decoder, {"model": "0" * 64})
    with pytest.raises(UsageError, match=r"trained on the model 000000000000… and the pipeline holds"):
        recovered(tiny_random_flux, IMAGE, stranger)
