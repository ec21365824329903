"""One training step of every library that trains sparse autoencoders, as a function of a batch, at its best settings.

A library that is not installed is named with the command that installs it. Each is driven through its own trainer;
eai-sparsify's wants a language model, so what it does at a step is done here in the same order.
"""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec, module_from_spec
from typing import Any

import torch
from torch import Tensor

from safedig.sae.sparse_training import trainer_for, training_sae

LR = 1e-4
OURS = {"float32": None, "bfloat16": "bfloat16", "int8": "int8"}  # by name, what active codes are looked for in
MISSING = {
    "dictionary_learning": "pip install --no-deps dictionary-learning",
    "sparsify": "pip install --no-deps eai-sparsify natsort schedulefree",
}


@dataclass(frozen=True)
class Size:
    d_in: int
    d_sae: int
    k: int
    batch: int

    @property
    def name(self) -> str:
        return f"{self.d_in} to {self.d_sae}, k {self.k}, {self.batch} rows"


Step = Callable[[Tensor], Any]


def contenders(size: Size) -> dict[str, Step]:
    """Names are `library architecture dtype …`; those of one library and architecture share their weights."""
    steps: dict[str, Step] = {}
    for architecture in ("topk", "batchtopk"):
        steps |= _safedig(size, architecture) | _sae_lens(size, architecture)
    steps["sae_lens topk float32 coo"] = _coo(size)
    if find_spec("dictionary_learning"):
        steps |= _dictionary_learning(size)
    if find_spec("sparsify"):
        steps |= _sparsify(size, "adam") | _sparsify(size, "signum")
    return steps


def absent() -> dict[str, str]:
    return {name: f"not installed: {command}" for name, command in MISSING.items() if not find_spec(name)}


def _of_trainer(trainer: Any) -> Step:
    def step(x: Tensor) -> None:
        trainer.step(x)
        trainer.n_training_steps += 1

    return step


def _safedig(size: Size, architecture: str) -> dict[str, Step]:
    sae: Any = training_sae(architecture, size.d_in, size.d_sae, size.k)
    plain = _of_trainer(trainer_for(sae, lr=LR, steps=10_000, batch_size=size.batch))

    def step(x: Tensor, dtype: str) -> None:
        sae.encoder_dtype = OURS[dtype]
        plain(x)

    return {f"safedig {architecture} {dtype}": lambda x, dtype=dtype: step(x, dtype) for dtype in OURS}


def stock(architecture: str, d_in: int, d_sae: int, k: int, lr: float, steps: int, batch: int, **settings: Any) -> Any:
    """sae-lens' own class in its own trainer."""
    import sae_lens
    from sae_lens.config import SAETrainerConfig

    name = {"topk": "TopK", "batchtopk": "BatchTopK"}[architecture]
    config = getattr(sae_lens, f"{name}TrainingSAEConfig")
    sae = getattr(sae_lens, f"{name}TrainingSAE")(
        config(d_in=d_in, d_sae=d_sae, k=k, aux_loss_coefficient=1 / 32, **settings)
    )
    cfg = SAETrainerConfig(total_training_samples=steps * batch, train_batch_size_samples=batch, lr=lr, lr_end=lr)
    return sae_lens.SAETrainer(cfg=cfg, sae=sae, data_provider=iter(()))


def _sae_lens(size: Size, architecture: str) -> dict[str, Step]:
    trainer = stock(architecture, size.d_in, size.d_sae, size.k, LR, 10_000, size.batch)
    plain = _of_trainer(trainer)

    def step(x: Tensor, low: bool) -> None:
        trainer.autocast_if_enabled = torch.autocast("cpu", torch.bfloat16) if low else nullcontext()
        plain(x)

    return {
        f"sae_lens {architecture} float32": lambda x: step(x, False),
        f"sae_lens {architecture} bfloat16": lambda x: step(x, True),
    }


def _coo(size: Size) -> Step:
    settings = {"use_sparse_activations": True, "rescale_acts_by_decoder_norm": False}  # both, or backward raises
    return _of_trainer(stock("topk", size.d_in, size.d_sae, size.k, LR, 10_000, size.batch, **settings))


def _dictionary_learning(size: Size) -> dict[str, Step]:
    if "dictionary_learning" not in sys.modules:  # its __init__ imports nnsight, which plain tensors do not need
        spec = find_spec("dictionary_learning")
        assert spec is not None
        sys.modules["dictionary_learning"] = module_from_spec(spec)
    from dictionary_learning.trainers import batch_top_k, top_k

    steps: dict[str, Step] = {}
    for name, make in (("topk", top_k.TopKTrainer), ("batchtopk", batch_top_k.BatchTopKTrainer)):
        trainer = make(10_000, size.d_in, size.d_sae, size.k, 0, "", lr=LR, warmup_steps=1, device="cpu")

        def step(x: Tensor, low: bool, trainer: Any = trainer) -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                trainer.update(1, x)

        steps[f"dictionary_learning {name} float32"] = lambda x, step=step: step(x, False)
        steps[f"dictionary_learning {name} bfloat16"] = lambda x, step=step: step(x, True)
    return steps


def _sparsify(size: Size, optimiser: str) -> dict[str, Step]:
    from schedulefree import ScheduleFreeWrapper
    from sparsify import SparseCoder, SparseCoderConfig
    from sparsify.sign_sgd import SignSGD

    coder = SparseCoder(size.d_in, SparseCoderConfig(num_latents=size.d_sae, k=size.k))
    params = list(coder.parameters())
    if optimiser == "adam":
        chosen: Any = torch.optim.Adam(params, LR, fused=True)
    else:
        chosen = ScheduleFreeWrapper(SignSGD(params, LR), momentum=0.95)
        chosen.train()
    silent = torch.zeros(size.d_sae, dtype=torch.long)

    def step(x: Tensor, low: bool) -> None:
        coder.set_decoder_norm_to_unit_norm()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            out = coder(x)
        out.fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        chosen.step()
        chosen.zero_grad()
        silent.add_(len(x))
        silent[out.latent_indices.flatten()] = 0

    return {
        f"sparsify topk float32 {optimiser}": lambda x: step(x, False),
        f"sparsify topk bfloat16 {optimiser}": lambda x: step(x, True),
    }
