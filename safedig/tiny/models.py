"""The architectures of the tiny pipelines: real diffusers and transformers classes, with random weights."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, FluxTransformer2DModel, SD3Transformer2DModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5Tokenizer

SPACE = "\u2581"
LATENT_CHANNELS = 8
WIDTH = 96  # of both transformers
SCENE_TOKENS = 64  # (64 pixels / 4 by the autoencoder / 2 by the patch)²


def build_vae() -> "AutoencoderKL":
    """A 4× autoencoder: 64 × 64 × 3 → 16 × 16 × 8."""
    from diffusers import AutoencoderKL

    levels: dict[str, Any] = {
        "block_out_channels": (16, 32, 64),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
    }
    return AutoencoderKL(
        **levels,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=64,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


MAX_WORDS = 16  # T5 tokens, with </s>
CLIP_LENGTH = 18  # the same words between <|startoftext|> and <|endoftext|>


def t5_tokenizer(words: Sequence[str]) -> "T5Tokenizer":
    """One piece a word; unknown words fall back to letters."""
    from transformers import T5Tokenizer

    letters = (
        [chr(c) for c in range(ord("a"), ord("z") + 1)]
        + [chr(c) for c in range(ord("A"), ord("Z") + 1)]
        + list("0123456789+,.'!?-")
    )
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), (SPACE, -8.0)]
    vocab += [(SPACE + w, -1.0) for w in words] + [(c, -10.0) for c in letters]
    return T5Tokenizer(vocab=vocab, extra_ids=0, additional_special_tokens=[], model_max_length=MAX_WORDS)


def clip_tokenizer(words: Sequence[str]) -> "CLIPTokenizer":
    """Byte-pair merges that join each known word into one token."""
    from transformers import CLIPTokenizer

    letters = sorted({c for w in words for c in w} | set("abcdefghijklmnopqrstuvwxyz0123456789+,.'!?-"))
    merges: Any = _merges(words)
    pieces = [*letters, *(c + "</w>" for c in letters), *(a + b for a, b in merges), "<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CLIP_LENGTH)


def _merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Merge rules in order of rank: where those so far leave a word in pieces, more that join these left to right."""
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        pieces = _apply(ranks, word)
        while len(pieces) > 1:
            ranks.setdefault((pieces[0], pieces[1]), len(ranks))
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
    return list(ranks)


def _apply(ranks: dict[tuple[str, str], int], word: str) -> list[str]:
    pieces = [*word[:-1], word[-1] + "</w>"]
    while found := [(ranks[pair], i) for i, pair in enumerate(pairwise(pieces)) if pair in ranks]:
        i = min(found)[1]
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    return pieces


def build_t5(vocab_size: int) -> "T5EncoderModel":
    """T5's encoder, 64 wide."""
    from transformers import T5Config, T5EncoderModel

    encoder_only: dict[str, Any] = {"is_encoder_decoder": False, "use_cache": False, "tie_word_embeddings": False}
    config = T5Config(
        vocab_size=vocab_size,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        **encoder_only,
    )
    return T5EncoderModel(config)


def build_clip(tokenizer: "CLIPTokenizer", projection: bool) -> "CLIPTextModel | CLIPTextModelWithProjection":
    """CLIP's text tower, 32 wide; with the projection head that Stable Diffusion 3 expects, or without as in FLUX."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    special: dict[str, Any] = {
        f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")
    }
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=128,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP_LENGTH,
        **special,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def build_flux_transformer() -> "FluxTransformer2DModel":
    """3 double and 4 single blocks, 96 wide, no guidance embedding: classifier-free guidance by two passes."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=3,
        num_single_layers=4,
        attention_head_dim=WIDTH // 3,
        num_attention_heads=3,
        joint_attention_dim=64,
        pooled_projection_dim=32,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )


def build_sd3_transformer() -> "SD3Transformer2DModel":
    """6 joint blocks, 96 wide, with the query–key norms of Stable Diffusion 3.5."""
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=6,
        attention_head_dim=WIDTH // 3,
        num_attention_heads=3,
        joint_attention_dim=64,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=64,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )


def start_at_zero(transformer: nn.Module) -> None:
    """Zero modulation and output layers, so that every block begins as the identity (DiT, arXiv 2212.09748, §3.2)."""
    zeroed = ("norm.linear", "norm1.linear", "norm1_context.linear")
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and (name.endswith(zeroed) or name == "proj_out"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
