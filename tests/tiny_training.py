"""What the tests of training share: a few random pictures and latents instead of a trained autoencoder's."""

import numpy as np
import torch

from safedig.tiny.captions import scene_for, training_ask
from safedig.tiny.flow_matching import FlowMatching
from safedig.tiny.latents import Latents
from safedig.tiny.models import build_vae
from safedig.tiny.scenes import posed


def random_latents(n: int = 64) -> Latents:
    """Asks and scenes of the training distribution with latents of pure noise."""
    rng = np.random.default_rng(0)
    asks = [training_ask(rng) for _ in range(n)]
    scenes = [posed(scene_for(ask, rng), rng) for ask in asks]
    return Latents(asks, scenes, torch.from_numpy(rng.standard_normal((n, 8, 16, 16))).half())


def untrained(name: str, seed: int = 0) -> FlowMatching:
    """The objective of a family before its first step."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return FlowMatching(name, random_latents(), build_vae().eval(), seed)
