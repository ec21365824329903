"""Pipelines of real diffusers classes with random weights, built in memory in a moment; no file and no network."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportPrivateImportUsage=false, reportReturnType=false, reportAttributeAccessIssue=false
from typing import Any

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from tests.tiny_transformers import flux_transformer, sd3_transformer

LETTERS = "abcdefghijklmnopqrstuvwxyz!"
TEXT_TOKENS = 12
CALL = {"height": 32, "width": 32, "num_inference_steps": 3, "max_sequence_length": TEXT_TOKENS, "output_type": "pt"}


def tiny_flux(seed: int = 0) -> FluxPipeline:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = flux_transformer(pooled_projection_dim=32)
        pipe = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=_vae(),
            text_encoder=CLIPTextModel(_clip_config()),
            tokenizer=_clip_tokenizer(),
            text_encoder_2=_t5(width=32),
            tokenizer_2=_t5_tokenizer(),
            transformer=transformer,
        )
    return _quiet(pipe)


def tiny_sd3(seed: int = 0) -> StableDiffusion3Pipeline:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = sd3_transformer(
            sample_size=16, pos_embed_max_size=32, joint_attention_dim=64, pooled_projection_dim=64
        )
        pipe = StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=_vae(),
            text_encoder=CLIPTextModelWithProjection(_clip_config()),
            tokenizer=_clip_tokenizer(),
            text_encoder_2=CLIPTextModelWithProjection(_clip_config()),
            tokenizer_2=_clip_tokenizer(pad="!"),
            text_encoder_3=_t5(width=64),
            tokenizer_3=_t5_tokenizer(),
        )
    return _quiet(pipe)


def tiny_auraflow(seed: int = 0) -> AuraFlowPipeline:
    """An AuraFlowPipeline with random weights: one joint and one single block."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = AuraFlowTransformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pos_embed_max_size=64,
        )
        pipe = AuraFlowPipeline(
            tokenizer=_t5_tokenizer(),
            text_encoder=_t5(width=32),
            vae=_vae(),
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )
    return _quiet(pipe)


def draw_images(pipe: Any, prompts: list[str], seeds: list[int] | None = None, **options: Any) -> torch.Tensor:
    """Plain pipeline call with true guidance, one generator an image."""
    seeds = list(range(len(prompts))) if seeds is None else seeds
    guided = (
        {"negative_prompt": [""] * len(prompts), "true_cfg_scale": 3.0}
        if isinstance(pipe, FluxPipeline)
        else {"guidance_scale": 3.0}
    )
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(prompts, generator=generators, **(CALL | guided | options)).images


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.eval().requires_grad_(False)
    return pipe


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=32,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def _clip_config() -> CLIPTextConfig:
    vocab = _clip_vocab()
    return CLIPTextConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        intermediate_size=64,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=vocab["<|startoftext|>"],
        eos_token_id=vocab["<|endoftext|>"],
        pad_token_id=vocab["<|endoftext|>"],
    )


def _clip_vocab() -> dict[str, int]:
    pieces = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return {piece: index for index, piece in enumerate(pieces)}


def _clip_tokenizer(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    return CLIPTokenizer(vocab=_clip_vocab(), merges=[], pad_token=pad, model_max_length=77)


def _t5(width: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=4 + 2 * len(LETTERS),
        d_model=width,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return T5EncoderModel(config)


def _t5_tokenizer() -> T5Tokenizer:
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    pieces = [(letter, -3.0) for letter in LETTERS] + [(f"\u2581{letter}", -2.5) for letter in LETTERS]
    return T5Tokenizer(vocab=special + pieces, extra_ids=0, additional_special_tokens=[], model_max_length=512)
