"""The model families that are understood: what their parts are called, and where each stream passes. Data only.

A new family is a new row; how rows are read is told by sites.py and taps.py. Every row is checked against the
installed diffusers and transformers by tests/test_architectures.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .blocks import (
    AURA_PAIRS,
    AURA_SINGLE,
    CHROMA_SINGLE,
    CROSS,
    FLUX2_SINGLE,
    FLUX_SINGLE,
    LUMINA,
    MMDIT,
    QWEN,
    Z_IMAGE,
    Points,
    Port,
    on,
    parts,
)
from .config import UsageError

Lengths = Callable[[Mapping[str, Any], Any], tuple[int | list[int], int]]
"""The model's arguments and its config → text tokens (a list where images differ) and image tokens of joint tensors."""


@dataclass(frozen=True)
class Architecture:
    """One family of transformers or of text encoders."""

    families: Mapping[str, Points]
    """Lists of blocks, in the order in which they run; or single modules, of a text encoder."""
    top: Points
    """Sites that are passed before the blocks."""
    end: Points
    """Sites that are passed after them."""
    width: str = "inner_dim"
    """Attribute of the model that says how wide its streams are."""
    paths: Mapping[str, str] = field(default_factory=dict)
    """Where a family lies, if not under its own name."""
    inside: str = ""
    """Submodule that holds all of this, in those releases and variants of the model that have it."""
    joint: tuple[str, str] = ("txt", "img")
    """The order of the streams in a joint tensor."""
    lengths: Lengths | None = None
    text: str = "encoder_hidden_states"
    """Name of the argument by which the text enters."""
    patch: int | str = 2
    """Latent pixels to the side of an image token: a number, or an attribute of the model."""
    clip_first: bool = False
    """Whether CLIP's tokens stand before those of the longest text sequence."""
    registers: int = 0
    """Learned tokens that the model puts before the text after `txt.embed`."""
    pixels: bool = False
    """Whether the velocity is an image of latent pixels, not a sequence of tokens."""
    modulations: str = ""
    """Attribute with an entry for each vector of `temb.out`, where that is more than one."""
    fill: int = 1
    """Inside the blocks a text or an image has a multiple of this many tokens."""


_POOLED = Port("time_text_embed", argument="pooled_projection", width="config.pooled_projection_dim")
_FLUX_TOP = {
    "txt.embed": Port("context_embedder"),
    "img.embed": Port("x_embedder"),
    "pooled.embed": _POOLED,
    "temb.out": Port("time_text_embed"),
}
_LATENT = {"img.final": Port("norm_out"), "velocity": Port(element=0, width="out_channels")}
_PACKED = {"img.final": Port("norm_out"), "velocity": Port(element=0, width="proj_out.out_features")}


def _sequences(given: Mapping[str, Any], config: Any) -> tuple[int, int]:
    return given["encoder_hidden_states"].shape[1], given["hidden_states"].shape[1]


def _patches(latent: Any, config: Any) -> int:
    height, width = latent.shape[-2:]
    return (height // config.patch_size) * (width // config.patch_size)


def _registered(given: Mapping[str, Any], config: Any) -> tuple[int, int]:
    return 8 + given["encoder_hidden_states"].shape[1], _patches(given["hidden_states"], config)


def _masked(given: Mapping[str, Any], config: Any) -> tuple[list[int], int]:
    """Lumina2 leaves out the padding of each text, so that its image follows at once."""
    return given["encoder_attention_mask"].sum(dim=1).tolist(), _patches(given["hidden_states"], config)


def _filled(given: Mapping[str, Any], config: Any) -> tuple[list[int], int]:
    """Z-Image fills each text and each image up to a multiple of 32 tokens; its patches are 2 × 2 × 1."""
    if isinstance(given["x"][0], list):
        raise UsageError("Z-Image with reference images has joint sequences that are not understood: leave them out.")
    frames, height, width = given["x"][0].shape[-3:]
    return [-(-len(text) // 32) * 32 for text in given["cap_feats"]], -(-frames * height * width // (4 * 32)) * 32


ARCHITECTURES = {
    "FluxTransformer2DModel": Architecture(
        {"transformer_blocks": MMDIT, "single_transformer_blocks": FLUX_SINGLE},
        _FLUX_TOP,
        _PACKED,
        lengths=_sequences,
    ),
    "SD3Transformer2DModel": Architecture(
        {"transformer_blocks": MMDIT},
        _FLUX_TOP | {"img.embed": Port("pos_embed")},
        _LATENT,
        patch="config.patch_size",
        clip_first=True,
        pixels=True,
    ),
    "Flux2Transformer2DModel": Architecture(
        {"transformer_blocks": MMDIT, "single_transformer_blocks": FLUX2_SINGLE},
        {
            "txt.embed": Port("context_embedder"),
            "img.embed": Port("x_embedder"),
            "temb.out": Port("time_guidance_embed"),
        },
        _PACKED,
        lengths=_sequences,
    ),
    "QwenImageTransformer2DModel": Architecture(
        {"transformer_blocks": QWEN},
        {
            "txt.embed": Port("txt_in"),
            "img.embed": Port("img_in"),
            "temb.out": Port("time_text_embed", unless="zero_cond_t"),  # then there are two for each image
        },
        _PACKED,
    ),
    "ZImageTransformer2DModel": Architecture(
        {"noise_refiner": on("img", Z_IMAGE), "context_refiner": on("txt", Z_IMAGE), "layers": parts(Z_IMAGE)},
        {
            # What the embedders themselves put out is one flat list of the tokens of all images.
            "txt.embed": Port("context_refiner.0", argument="x"),
            "img.embed": Port("noise_refiner.0", argument="x"),
            "temb.out": Port("t_embedder", width="t_embedder.mlp.2.out_features"),
        },
        {
            "img.final": Port("all_final_layer.2-1.linear", argument=0, part="img"),
            "velocity": Port(element=0, width="out_channels"),
        },
        width="dim",
        joint=("img", "txt"),
        lengths=_filled,
        text="cap_feats",
        fill=32,
        pixels=True,
    ),
    "ChromaTransformer2DModel": Architecture(
        {"transformer_blocks": MMDIT, "single_transformer_blocks": CHROMA_SINGLE},
        {
            "txt.embed": Port("context_embedder"),
            "img.embed": Port("x_embedder"),
            "temb.out": Port("distilled_guidance_layer"),
        },
        _PACKED,
        lengths=_sequences,
        modulations="time_text_embed.mod_proj",
    ),
    "AuraFlowTransformer2DModel": Architecture(
        {"joint_transformer_blocks": AURA_PAIRS, "single_transformer_blocks": AURA_SINGLE},
        {
            "txt.embed": Port("context_embedder"),
            "img.embed": Port("pos_embed"),
            "temb.out": Port("time_step_proj"),
        },
        _LATENT,
        lengths=_registered,
        patch="config.patch_size",
        registers=8,
        pixels=True,
    ),
    "Lumina2Transformer2DModel": Architecture(
        {"context_refiner": on("txt", LUMINA), "noise_refiner": on("img", LUMINA), "layers": parts(LUMINA)},
        {
            "txt.embed": Port("time_caption_embed", element=1),
            "img.embed": Port("x_embedder"),
            "temb.out": Port(
                "time_caption_embed", element=0, width="time_caption_embed.timestep_embedder.linear_2.out_features"
            ),
        },
        {
            "img.final": Port("norm_out.linear_2", argument=0, part="img"),
            "velocity": Port(element=0, width="out_channels"),
        },
        width="config.hidden_size",
        lengths=_masked,
        patch="config.patch_size",
        pixels=True,
    ),
    "PixArtTransformer2DModel": Architecture(
        {"transformer_blocks": CROSS},
        {
            "txt.embed": Port("caption_projection"),
            "img.embed": Port("pos_embed"),
            "temb.out": Port("adaln_single.emb"),
        },
        {
            "img.final": Port("proj_out", argument=0),
            "velocity": Port(element=0, width="out_channels"),
        },
        patch="config.patch_size",
        pixels=True,
    ),
    "SanaTransformer2DModel": Architecture(
        {"transformer_blocks": CROSS},
        {
            "txt.embed": Port("caption_norm"),
            "img.embed": Port("patch_embed"),
            "temb.out": Port("time_embed.emb"),
        },
        _LATENT | {"velocity": Port(element=0, width="config.out_channels")},
        width="proj_out.in_features",
        patch="config.patch_size",
        pixels=True,
    ),
}

TEXT_ENCODERS = {
    "T5EncoderModel": Architecture(
        {"block": {"txt.resid_post": Port(element=0)}, "final": {"txt.resid_post": Port()}},
        {},
        {},
        width="config.d_model",
        paths={"block": "encoder.block", "final": "encoder.final_layer_norm"},
    ),
    "CLIPTextModel": Architecture(
        {"layers": {"txt.resid_post": Port()}, "final": {"txt.resid_post": Port()}},
        {},
        {"pooled.embed": Port(element=1)},
        width="config.hidden_size",
        paths={"layers": "encoder.layers", "final": "final_layer_norm"},
        inside="text_model",
    ),
    "CLIPTextModelWithProjection": Architecture(
        {"layers": {"txt.resid_post": Port()}, "final": {"txt.resid_post": Port()}},
        {},
        {"pooled.embed": Port(element=0, width="config.projection_dim")},
        width="config.hidden_size",
        paths={"layers": "encoder.layers", "final": "final_layer_norm"},
        inside="text_model",
    ),
}

STAGES = {
    "transformer_blocks": "bind",
    "joint_transformer_blocks": "bind",
    "single_transformer_blocks": "render",
    "context_refiner": "text",
    "noise_refiner": "bind",
    "layers": "bind",
    "txt.embed": "text",
    "pooled.embed": "text",
    "temb.out": "text",
    "img.embed": "bind",
    "img.final": "render",
    "velocity": "render",
}
"""What a family or a site outside the blocks is for; a text encoder's sites are all `text`.

The last family of a model renders from two thirds of its depth on, whatever is said here (`sites.stage`).
"""
