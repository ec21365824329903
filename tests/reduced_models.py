"""Folders of a released architecture at reduced depth and width, with random weights and tiny text encoders.

Everything that does not cost much is real: head size, positions, embeddings' widths, guidance, norms, dual attention,
the schedule. `python -m tests.reduced_models flux1-dev FOLDER` writes one.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportPrivateImportUsage=false, reportReturnType=false, reportAttributeAccessIssue=false
import json
import sys
from pathlib import Path
from typing import Any

import torch

from safedig import model_folders
from safedig.recipes import load
from tests.tiny_pipelines import _clip_tokenizer, _clip_vocab, _t5_tokenizer

GAIN = 3.0  # on the weights as torch first draws them, which let hardly any text through to the image
DRAWING = {"steps": 4, "guidance": 3.5, "height": 64, "width": 64, "max_sequence_length": 32}


def reduced(recipe: str, *, layers: int = 2, heads: int | None = 1, seed: int = 0) -> Any:
    """The pipeline of a recipe with this many blocks of each kind; `heads=None` keeps the full width."""
    import diffusers

    folder = model_folders.described(load(recipe).model)
    assert folder is not None, f"the configuration of {recipe} is not embedded"
    config = json.loads((folder / "transformer" / "config.json").read_text()) | {"num_layers": layers}
    heads = heads or config["num_attention_heads"]
    config |= {"num_attention_heads": heads}
    flux = config["_class_name"] == "FluxTransformer2DModel"
    config |= (
        {"num_single_layers": layers}
        if flux
        else {
            "caption_projection_dim": heads * config["attention_head_dim"],
            "sample_size": DRAWING["height"] // 8,
            "pos_embed_max_size": 16,
            "dual_attention_layers": [layer for layer in config["dual_attention_layers"] if layer < layers - 1],
        }
    )
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        parts = _flux_text() if flux else _sd3_text()
        parts["transformer"] = getattr(diffusers, config["_class_name"]).from_config(config)
        for weight in parts["transformer"].parameters():
            weight.data *= GAIN if weight.ndim == 2 else 1
        parts["vae"] = _vae(json.loads((folder / "vae" / "config.json").read_text()))
    parts["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler.from_config(scheduler)
    pipe = (diffusers.FluxPipeline if flux else diffusers.StableDiffusion3Pipeline)(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def write(recipe: str, folder: Path, **options: Any) -> Path:
    """The same as a folder in bfloat16, with a drawing.json that makes small images in few steps."""
    reduced(recipe, **options).to(torch.bfloat16).save_pretrained(folder)
    (folder / "drawing.json").write_text(json.dumps(DRAWING))
    return folder


def _flux_text() -> dict[str, Any]:
    return {
        "text_encoder": _clip(768, projected=False),
        "tokenizer": _clip_tokenizer(),
        "text_encoder_2": _t5(),
        "tokenizer_2": _t5_tokenizer(),
    }


def _sd3_text() -> dict[str, Any]:
    return {
        "text_encoder": _clip(768, projected=True),
        "tokenizer": _clip_tokenizer(),
        "text_encoder_2": _clip(1280, projected=True),
        "tokenizer_2": _clip_tokenizer(pad="!"),
        "text_encoder_3": _t5(),
        "tokenizer_3": _t5_tokenizer(),
    }


def _clip(width: int, *, projected: bool) -> Any:
    """One layer of CLIP's real width."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    vocab = _clip_vocab()
    config = CLIPTextConfig(
        vocab_size=len(vocab),
        hidden_size=width,
        intermediate_size=64,
        projection_dim=width,
        num_hidden_layers=1,
        num_attention_heads=4,
        bos_token_id=vocab["<|startoftext|>"],
        eos_token_id=vocab["<|endoftext|>"],
        pad_token_id=vocab["<|endoftext|>"],
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def _t5() -> Any:
    """One layer of T5-XXL's real width."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(_t5_tokenizer()),
        d_model=4096,
        d_kv=64,
        d_ff=64,
        num_layers=1,
        num_heads=1,
        decoder_start_token_id=0,
    )
    return T5EncoderModel(config)


def _vae(config: dict[str, Any]) -> Any:
    """The real factor and latents, narrow inside."""
    from diffusers import AutoencoderKL

    narrow = {"block_out_channels": [8, 8, 8, 8], "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 64}
    return AutoencoderKL.from_config(config | narrow)


if __name__ == "__main__":
    print(write(sys.argv[1], Path(sys.argv[2])))
