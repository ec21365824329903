"""A Stable Diffusion 1-like pipeline of real diffusers classes with random weights, and schedulers for it."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportPrivateImportUsage=false
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel

from tests import tiny_pipelines

CALL = {"height": 32, "width": 32, "num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "pt"}


def scheduler(kind: Any, **options: Any) -> Any:
    """One of diffusers' schedulers as Stable Diffusion 1 is trained."""
    return kind(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **options)


def tiny_sd1(steps_by: Any) -> StableDiffusionPipeline:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = StableDiffusionPipeline(
            vae=tiny_pipelines._vae(),
            text_encoder=CLIPTextModel(tiny_pipelines._clip_config()),
            tokenizer=tiny_pipelines._clip_tokenizer(),
            unet=UNet2DConditionModel(
                sample_size=16,
                block_out_channels=(8, 16),
                layers_per_block=1,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                cross_attention_dim=32,
                attention_head_dim=8,
                norm_num_groups=4,
            ),
            scheduler=steps_by,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    return tiny_pipelines._quiet(pipe)


def draw_images(pipe: Any, prompts: list[str], seeds: list[int] | None = None, **options: Any) -> torch.Tensor:
    """Plain pipeline call with guidance, one generator an image."""
    seeds = list(range(len(prompts))) if seeds is None else seeds
    return pipe(prompts, generator=[torch.Generator().manual_seed(s) for s in seeds], **(CALL | options)).images
