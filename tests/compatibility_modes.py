"""Ways to run a pipeline, in a table: how each is turned on, and what it must agree with. See compatibility.py."""

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tests.tiny_pipelines import draw_images

CPU = torch.device("cpu")
CLOSE = 1e-4
"""Of images in 0..1, of activations absolute and relative, where an equal computation is rounded otherwise."""


def nothing(pipe: Any) -> None:
    """A mode that is the plain pipeline, or whose weights are those of the plain one."""


def drawn(pipe: Any) -> torch.Tensor:
    return draw_images(pipe, ["a cup", "a gun"])


@dataclass(frozen=True)
class Mode:
    """A way to run a pipeline, and the plain pipeline that it must agree with."""

    name: str
    run: str
    """What was called, for the document."""
    enable: Callable[[Any], None]
    weights: Callable[[Any], None] = nothing
    """Gives the plain pipeline the weights that the mode computes with."""
    tolerance: float = 0.0
    """Zero: equal to the plain pipeline bit for bit."""
    needs: str = ""
    """A package that may be missing."""
    draw: Callable[[Any], torch.Tensor] = drawn
    broken: tuple[str, ...] = ()
    """Pipelines on which the mode fails without our doing, so that only a refusal is right."""

    @property
    def missing(self) -> bool:
        return bool(self.needs) and importlib.util.find_spec(self.needs) is None


def compiled(pipe: Any) -> None:
    pipe.transformer = torch.compile(pipe.transformer, backend="aot_eager")


def compiled_by_blocks(pipe: Any) -> None:
    if pipe.transformer._repeated_blocks:
        pipe.transformer.compile_repeated_blocks(backend="aot_eager")
    else:
        for block in pipe.transformer.transformer_blocks:
            block.compile(backend="aot_eager")


def offloaded_layer_by_layer(pipe: Any) -> None:
    from accelerate import cpu_offload

    cpu_offload(pipe.transformer, CPU)


def offloaded_by_groups(pipe: Any) -> None:
    pipe.enable_group_offload(CPU, CPU, offload_type="block_level", num_blocks_per_group=1)


def offloaded_by_leaves(pipe: Any) -> None:
    pipe.enable_group_offload(CPU, CPU, offload_type="leaf_level")


def cast(pipe: Any) -> None:
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)


def cast_weights(pipe: Any) -> None:
    stored = copy.deepcopy(pipe.transformer)
    stored.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    pipe.transformer.load_state_dict({name: x.float() for name, x in stored.state_dict().items()})


def quantized(pipe: Any) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(pipe.transformer, Int8WeightOnlyConfig())


def quantized_weights(pipe: Any) -> None:
    quantized(pipe)
    for module in pipe.transformer.modules():
        if isinstance(module, torch.nn.Linear) and hasattr(module.weight, "dequantize"):
            module.weight = torch.nn.Parameter(module.weight.dequantize(), requires_grad=False)


def adapted(pipe: Any) -> None:
    from peft import LoraConfig

    targets = ["to_q", "to_v", "proj_out", "context_embedder"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe.transformer.add_adapter(LoraConfig(r=4, target_modules=targets, init_lora_weights=False))


def adapted_weights(pipe: Any) -> None:
    adapted(pipe)
    pipe.transformer.fuse_lora()
    pipe.transformer.unload_lora()


def cached(pipe: Any) -> None:
    from diffusers import FirstBlockCacheConfig, apply_first_block_cache

    apply_first_block_cache(pipe.transformer, FirstBlockCacheConfig(threshold=0.5))


def drawn_with_gradients(pipe: Any) -> torch.Tensor:
    """The images, and the gradient of their sum by every weight of the blocks: checkpointing computes it anew."""
    call, weights = type(pipe).__call__, list(pipe.transformer.requires_grad_(True).parameters())
    try:
        type(pipe).__call__ = call.__wrapped__  # without torch.no_grad
        images = drawn(pipe)
    finally:
        type(pipe).__call__ = call
    gradients = torch.autograd.grad(images.sum(), weights, allow_unused=True)
    pipe.transformer.requires_grad_(False)
    return torch.cat([images.detach().flatten(), *(x.flatten() for x in gradients if x is not None)])


MODES = (
    Mode("eager", "nothing", nothing),
    Mode(
        "torch.compile, whole model",
        'pipe.transformer = torch.compile(pipe.transformer, backend="aot_eager")',
        compiled,
        tolerance=CLOSE,
    ),
    Mode(
        "torch.compile, regional",
        'pipe.transformer.compile_repeated_blocks(backend="aot_eager"); SD3, which names no blocks, block by block',
        compiled_by_blocks,
        tolerance=CLOSE,
    ),
    Mode(
        "model offload",
        'pipe.enable_model_cpu_offload(device="cpu")',
        lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    ),
    Mode(
        "sequential offload",
        "accelerate.cpu_offload(pipe.transformer, torch.device('cpu')); the pipeline's own method needs an accelerator",
        offloaded_layer_by_layer,
    ),
    Mode(
        "group offload, by blocks",
        'pipe.enable_group_offload(cpu, cpu, offload_type="block_level", num_blocks_per_group=1)',
        offloaded_by_groups,
    ),
    Mode(
        "group offload, by leaves",
        'pipe.enable_group_offload(cpu, cpu, offload_type="leaf_level")',
        offloaded_by_leaves,
    ),
    Mode(
        "layerwise casting",
        "pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)",
        cast,
        weights=cast_weights,
    ),
    Mode(
        "int8, weights only",
        "torchao.quantization.quantize_(pipe.transformer, Int8WeightOnlyConfig())",
        quantized,
        weights=quantized_weights,
        tolerance=1e-2,
        needs="torchao",
    ),
    Mode(
        "gradient checkpointing",
        "pipe.transformer.enable_gradient_checkpointing(), drawing under autograd; the weights' gradients are compared",
        lambda pipe: pipe.transformer.enable_gradient_checkpointing(),
        draw=drawn_with_gradients,
        tolerance=CLOSE,
    ),
    Mode(
        "LoRA",
        "pipe.transformer.add_adapter(LoraConfig(…)) on attention and on projections that are sites themselves",
        adapted,
        weights=adapted_weights,
        tolerance=CLOSE,
        needs="peft",
    ),
    Mode(
        "FirstBlockCache",
        "apply_first_block_cache(pipe.transformer, FirstBlockCacheConfig(threshold=0.5)); on SD3, whose pipeline opens "
        "no cache context and whose last block hands on no text, diffusers itself fails",
        cached,
        broken=("tiny-sd3",),
    ),
)
