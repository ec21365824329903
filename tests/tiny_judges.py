"""Judges of real classes with random weights, in folders on disk: nothing is fetched."""

import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.tiny_pipelines import _clip_tokenizer, _clip_vocab

SIDE = 32
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def config():
    text = CLIPTextConfig(
        vocab_size=len(_clip_vocab()),
        **VISION,
        max_position_embeddings=77,
        bos_token_id=_clip_tokenizer().bos_token_id,
        eos_token_id=_clip_tokenizer().eos_token_id,
    )
    vision = CLIPVisionConfig(**VISION, image_size=SIDE, patch_size=8)
    return CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)


def processor():
    return CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})


def clip_folder(path):
    """CLIP with its image processor and tokenizer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(config())
    for part in (model, processor(), _clip_tokenizer()):
        part.save_pretrained(path)
    return path


def q16_head(path, width=16):
    save_file({"prompts": torch.randn(2, width, generator=torch.Generator().manual_seed(1))}, path)
    return path


def checker_folder(path, loose=False):
    """The safety checker with random concepts; thresholds near 0, so that some images are flagged and some are not."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = StableDiffusionSafetyChecker(config())
        for name in ("concept_embeds", "special_care_embeds"):
            getattr(model, name).data.normal_()
        for name in ("concept_embeds_weights", "special_care_embeds_weights"):
            getattr(model, name).data.fill_(1.0 if loose else 0.35)
    model.save_pretrained(path)
    processor().save_pretrained(path)
    return path


def images(n, seed=0, side=40):
    """Smooth pictures of random colours."""
    coarse = torch.rand(n, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return list(torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1))
