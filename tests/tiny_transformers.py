"""One small instance of every transformer that safedig knows, with arguments for its forward; random, seeded, fp32."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportPrivateImportUsage=false
from collections.abc import Callable
from typing import Any

import diffusers
import torch

BATCH, TEXT, SIDE = 2, 5, 8  # images, text tokens, latent pixels
IMAGE = (SIDE // 2) ** 2  # tokens of 2 × 2 latent pixels
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}

Built = tuple[Any, dict[str, Any]]


def _ids(axes: int) -> dict[str, torch.Tensor]:
    image = torch.zeros(IMAGE, axes)
    image[:, 1], image[:, 2] = torch.arange(IMAGE) // (SIDE // 2), torch.arange(IMAGE) % (SIDE // 2)
    return {"img_ids": image, "txt_ids": torch.zeros(TEXT, axes)}


def _packed(timestep: float = 0.7) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(BATCH, IMAGE, 16),
        "encoder_hidden_states": torch.randn(BATCH, TEXT, 32),
        "timestep": torch.full((BATCH,), timestep),
    }


def _latent(side: int = SIDE, text: int = 32) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(BATCH, 4, side, side),
        "encoder_hidden_states": torch.randn(BATCH, TEXT, text),
        "timestep": torch.full((BATCH,), 700.0),
    }


def flux_transformer(**options: Any) -> Any:
    given = {"in_channels": 16, "num_layers": 2, "num_single_layers": 2, "joint_attention_dim": 32}
    return diffusers.FluxTransformer2DModel(**given | {"axes_dims_rope": (4, 6, 6)} | HEADS | options)


def sd3_transformer(**options: Any) -> Any:
    given = {"in_channels": 4, "out_channels": 4, "num_layers": 3, "caption_projection_dim": 32}
    return diffusers.SD3Transformer2DModel(**given | {"qk_norm": "rms_norm"} | HEADS | options)


def _flux(guided: bool) -> Built:
    model = flux_transformer(pooled_projection_dim=24, guidance_embeds=guided)
    guidance = {"guidance": torch.full((BATCH,), 3.5)} if guided else {}
    return model, _packed() | _ids(3) | {"pooled_projections": torch.randn(BATCH, 24)} | guidance


def _sd3(dual: tuple[int, ...]) -> Built:
    model = sd3_transformer(
        sample_size=SIDE,
        pos_embed_max_size=SIDE,
        joint_attention_dim=32,
        pooled_projection_dim=24,
        dual_attention_layers=dual,
    )
    return model, _latent() | {"pooled_projections": torch.randn(BATCH, 24)}


def _flux2() -> Built:
    model = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        joint_attention_dim=32,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        **HEADS,
    )
    return model, _packed() | _ids(4) | {"guidance": torch.full((BATCH,), 3.5)}


def _qwen() -> Built:
    model = diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, joint_attention_dim=32, axes_dims_rope=(4, 6, 6), **HEADS
    )
    shapes = [[(1, SIDE // 2, SIDE // 2)]] * BATCH
    return model, _packed() | {"img_shapes": shapes, "encoder_hidden_states_mask": torch.ones(BATCH, TEXT).bool()}


def _z_image() -> Built:
    """The second text is so much longer that it is filled up to twice as many tokens."""
    model = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=24,
        axes_dims=[4, 6, 6],
        axes_lens=[80, 16, 16],
    )
    images = [torch.randn(4, 1, SIDE, SIDE) for _ in range(BATCH)]
    return model, {"x": images, "t": torch.full((BATCH,), 0.3), "cap_feats": [torch.randn(n, 24) for n in (5, 40)]}


def _chroma() -> Built:
    model = diffusers.ChromaTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=16,
        approximator_hidden_dim=32,
        approximator_layers=1,
        **HEADS,
    )
    return model, _packed() | _ids(3)


def _aura() -> Built:
    model = diffusers.AuraFlowTransformer2DModel(
        sample_size=SIDE,
        in_channels=4,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=SIDE * SIDE,
        **HEADS,
    )
    return model, _latent()


def _lumina2() -> Built:
    """The second text is padded."""
    model = diffusers.Lumina2Transformer2DModel(
        sample_size=SIDE,
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(32, 16, 16),
        cap_feat_dim=24,
    )
    mask = torch.tensor([[True] * TEXT, [True] * (TEXT - 2) + [False] * 2])
    return model, _latent(text=24) | {"encoder_attention_mask": mask}


def _pixart() -> Built:
    model = diffusers.PixArtTransformer2DModel(
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=32,
        sample_size=SIDE,
        caption_channels=24,
        **HEADS,
    )
    return model, _latent(text=24) | {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}


def _sana() -> Built:
    model = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=24,
        sample_size=SIDE // 2,
        **HEADS,
    )
    return model, _latent(side=SIDE // 2, text=24)


BUILDERS: dict[str, Callable[[], Built]] = {
    "FLUX.1-dev": lambda: _flux(guided=True),
    "FLUX.1-schnell": lambda: _flux(guided=False),
    "SD3.5-large": lambda: _sd3(dual=()),
    "SD3.5-medium": lambda: _sd3(dual=(0,)),
    "Flux2": _flux2,
    "Qwen-Image": _qwen,
    "Z-Image": _z_image,
    "Chroma": _chroma,
    "AuraFlow": _aura,
    "Lumina2": _lumina2,
    "PixArt": _pixart,
    "Sana": _sana,
}


def build(name: str, seed: int = 0) -> Built:
    """The model and the keyword arguments of its forward; what diffusers initialises with zeros is random here."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, given = BUILDERS[name]()
        for parameter in model.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
    return model.eval().requires_grad_(False), given


def forward(model: Any, given: dict[str, Any]) -> torch.Tensor:
    """What the model makes of these arguments, as one tensor."""
    with torch.no_grad():
        output = model(**given, return_dict=False)[0]
    return torch.stack(output) if isinstance(output, list) else output
