"""Shapes and types of every call in safedig are checked while testing; tiny random pipelines for all tests."""

# ruff: noqa: E402 — the import hook must be in place before safedig is first imported
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from jaxtyping import install_import_hook

# an int may stand where a float is expected (PEP 484)
install_import_hook("safedig", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_random_flux():
    """A FluxPipeline with random weights: 2 double and 2 single blocks, 32 × 32 pixels."""
    from tests.tiny_pipelines import tiny_flux

    return tiny_flux()


@pytest.fixture(scope="session")
def tiny_random_sd3():
    """A StableDiffusion3Pipeline with random weights: 3 joint blocks, 32 × 32 pixels."""
    from tests.tiny_pipelines import tiny_sd3

    return tiny_sd3()


@pytest.fixture(params=["flux", "sd3"])
def pipe(request):
    """Each of the two architectures in turn."""
    return request.getfixturevalue(f"tiny_random_{request.param}")
