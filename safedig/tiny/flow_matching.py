"""The training objective of the tiny pipelines: flow matching on latents of scenes, text encoders learning along."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from . import corpus
from .captions import reworded
from .latents import Latents
from .models import (
    CLIP_LENGTH,
    MAX_WORDS,
    WIDTH,
    build_clip,
    build_flux_transformer,
    build_sd3_transformer,
    build_t5,
    clip_tokenizer,
    start_at_zero,
    t5_tokenizer,
)
from .naming import Naming
from .scenes import Scene, bounds
from .training import IGNORED

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DiffusionPipeline

DROPPED = 0.10  # share of captions replaced by "" for classifier-free guidance
MASKED = 0.25  # share of words hidden from T5 in the sentences
SENTENCES_SHARE, SENTENCES_WEIGHT = 0.25, 0.2  # of the steps; of the loss
FOREGROUND, SEEN = 3.0, 0.6  # weight of the objects' latents; the noise up to which one sees where they are
NAMED_BLOCK = 2  # its image states are named: the last double block of FLUX, the third of six of Stable Diffusion 3
NAMING, NAMING_FADES, NAMING_ENDS = 0.1, 0.5, 0.75  # weight of the naming head; shares of the training
SHIFT = 2.5  # of the sampler's σ grid: more of its steps where place and pose are decided
DRAWING = {"steps": 8, "guidance": 2.5, "height": 64, "width": 64, "max_sequence_length": MAX_WORDS}


@runtime_checkable
class Family(Protocol):
    """What differs between FLUX and Stable Diffusion 3: the modules, and how a noisy latent becomes a velocity."""

    clips: tuple[str, ...]
    true_cfg: bool

    def pipeline(self, **parts: Any) -> "DiffusionPipeline": ...

    def modules(self, t5_size: int, clip: Any) -> dict[str, nn.Module]: ...

    def velocity(self, m: nn.ModuleDict, x: Tensor, sigma: Tensor, t5_ids: Tensor, clip_ids: Tensor) -> Tensor: ...


class Flux:
    """T5 states as text tokens, CLIP's pooled state beside the time embedding; latents packed 2 × 2."""

    clips: tuple[str, ...] = ("text_encoder",)
    true_cfg: bool = True

    def pipeline(self, **parts: Any) -> "DiffusionPipeline":
        from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

        return FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT), **parts)

    def modules(self, t5_size: int, clip: Any) -> dict[str, nn.Module]:
        return {
            "transformer": build_flux_transformer(),
            "text_encoder": build_clip(clip, projection=False),
            "text_encoder_2": build_t5(t5_size),
        }

    def velocity(self, m: nn.ModuleDict, x: Tensor, sigma: Tensor, t5_ids: Tensor, clip_ids: Tensor) -> Tensor:
        side = torch.arange(x.shape[-1] // 2, device=x.device)
        rows, columns = (axis.flatten() for axis in torch.meshgrid(side, side, indexing="ij"))
        out = m["transformer"](
            hidden_states=rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2),
            encoder_hidden_states=m["text_encoder_2"](t5_ids)[0],
            pooled_projections=m["text_encoder"](clip_ids).pooler_output,
            timestep=sigma,
            img_ids=torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).float(),
            txt_ids=x.new_zeros(t5_ids.shape[1], 3),
            return_dict=False,
        )[0]
        return rearrange(out, "b (h w) (c p q) -> b c (h p) (w q)", h=len(side), p=2, q=2)


class SD3:
    """Two CLIPs and T5 as text tokens, both pooled CLIP vectors beside the time embedding."""

    clips: tuple[str, ...] = ("text_encoder", "text_encoder_2")
    true_cfg: bool = False

    def pipeline(self, **parts: Any) -> "DiffusionPipeline":
        from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

        return StableDiffusion3Pipeline(scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT), **parts)

    def modules(self, t5_size: int, clip: Any) -> dict[str, nn.Module]:
        towers = {name: build_clip(clip, projection=True) for name in self.clips}
        return {"transformer": build_sd3_transformer(), **towers, "text_encoder_3": build_t5(t5_size)}

    def velocity(self, m: nn.ModuleDict, x: Tensor, sigma: Tensor, t5_ids: Tensor, clip_ids: Tensor) -> Tensor:
        towers = [m[name](clip_ids, output_hidden_states=True) for name in self.clips]
        tokens = torch.cat([t.hidden_states[-2] for t in towers], dim=-1)
        return m["transformer"](
            hidden_states=x,
            encoder_hidden_states=torch.cat([tokens, m["text_encoder_3"](t5_ids)[0]], dim=1),
            pooled_projections=torch.cat([t.text_embeds for t in towers], dim=-1),
            timestep=sigma * 1000,
            return_dict=False,
        )[0]


FAMILIES: dict[str, Family] = {"tiny-flux": Flux(), "tiny-sd3": SD3()}


class FlowMatching:
    """Predict ε − x0 at a random σ; every few steps also read sentences, which carry the shared notion of harm.

    Of a sentence T5 guesses hidden words, and CLIP's pooled state the words of another one about the same concept.
    """

    batch = 32
    learning_rate = 2e-3

    def __init__(self, name: str, data: Latents, vae: "AutoencoderKL", seed: int) -> None:
        torch.manual_seed(seed)
        self.family, self.data, self.vae = FAMILIES[name], data, vae
        self.t5, self.clip = t5_tokenizer(corpus.vocabulary()), clip_tokenizer(corpus.vocabulary())
        self.t5_ids, self.clip_ids = _Words(self.t5, MAX_WORDS), _Words(self.clip, CLIP_LENGTH)
        self.parts = nn.ModuleDict(self.family.modules(len(self.t5), self.clip))
        start_at_zero(self.parts["transformer"])
        self.t5_name = [n for n in self.parts if n.startswith("text_encoder")][-1]
        self.parts["guess_hidden"] = nn.Linear(64, len(self.t5))
        self.parts["guess_next"] = nn.ModuleDict({n: nn.Linear(32, len(self.t5)) for n in self.family.clips})
        self.parts["guess_scene"] = Naming(WIDTH)

    @property
    def module(self) -> nn.Module:
        return self.parts

    def loss(self, rng: np.random.Generator, progress: float) -> dict[str, Tensor]:
        index = rng.integers(len(self.data), size=self.batch)
        device = next(self.parts.parameters()).device
        x0, scenes = self.data.latents[index].float().to(device), [self.data.scenes[i] for i in index]
        texts = ["" if rng.random() < DROPPED else reworded(self.data.asks[i], self.data.scenes[i], rng) for i in index]
        sigma = _random_sigma(rng, self.batch)
        noise = torch.from_numpy(rng.standard_normal(x0.shape, dtype=np.float32)).to(device)
        weight = self._weight(scenes, sigma).to(device)
        sigma = sigma.to(device)
        s = sigma[:, None, None, None]
        with _image_states(self.parts.get_submodule(f"transformer.transformer_blocks.{NAMED_BLOCK}")) as halfway:
            velocity = self.family.velocity(
                self.parts,
                (1 - s) * x0 + s * noise,
                sigma,
                self.t5_ids(texts).to(device),
                self.clip_ids(texts).to(device),
            )
        flow = (weight * (velocity - (noise - x0)).square().mean(1)).mean() / weight.mean()
        loss, terms = flow, {"flow": flow.detach()}
        if share := min(1.0, max(0.0, (NAMING_ENDS - progress) / (NAMING_ENDS - NAMING_FADES))):
            head: Any = self.parts["guess_scene"]
            naming = head.loss(halfway[0], scenes)
            loss, terms = loss + NAMING * share * naming, terms | {"naming": naming.detach()}
        if rng.random() < SENTENCES_SHARE:
            loss = loss + SENTENCES_WEIGHT * self._sentences(rng, device)
        return {"loss": loss} | terms

    def _weight(self, scenes: Sequence[Scene], sigma: Float[Tensor, " batch"]) -> Float[Tensor, "batch h w"]:
        """Heavier where objects lie: most of a scene is backdrop and soon learnt.

        Not at high noise: where the place is still open, a weight that knows it would draw objects at both.
        """
        weight = torch.ones(len(scenes), *self.data.latents.shape[-2:])
        for one, scene, noise in zip(weight, scenes, sigma, strict=True):
            for left, top, right, bottom in map(bounds, scene.objects if noise < SEEN else ()):
                one[top // 4 : -(-bottom // 4), left // 4 : -(-right // 4)] = FOREGROUND
        return weight

    def _sentences(self, rng: np.random.Generator, device: torch.device) -> Tensor:
        first, second = zip(*(corpus.sentence_pair(rng) for _ in range(self.batch)), strict=True)
        ids, answers = self.t5_ids(first), self.t5_ids(second)
        hidden = torch.from_numpy(rng.random(ids.shape) < MASKED) & (ids > 2)
        states = self.parts[self.t5_name](ids.masked_fill(hidden, 2).to(device))[0]
        guesses = self.parts["guess_hidden"](states).flatten(0, 1)
        loss = F.cross_entropy(guesses, ids.masked_fill(~hidden, IGNORED).flatten().to(device), ignore_index=IGNORED)
        words = (answers > 2).float().to(device)
        guess_next: Any = self.parts["guess_next"]
        for name in self.family.clips:
            tower = self.parts[name](self.clip_ids(first).to(device))
            pooled = tower.text_embeds if "text_embeds" in tower else tower.pooler_output
            log_p = guess_next[name](pooled).log_softmax(-1)
            loss = loss - (log_p.gather(1, answers.to(device)) * words).sum() / words.sum()
        return loss

    def publish(self, averaged: nn.Module, folder: Path) -> None:
        """Save the averaged weights as a diffusers pipeline."""
        self.vae.register_to_config(_name_or_path="")  # the folder it came from means nothing elsewhere
        modules = {n: m for n, m in averaged.named_children() if not n.startswith("guess")}
        tokenizers = {
            n.replace("text_encoder", "tokenizer"): self.t5 if n == self.t5_name else self.clip
            for n in modules
            if n.startswith("text_encoder")
        }
        self.family.pipeline(**modules, **tokenizers, vae=self.vae).save_pretrained(folder)
        (folder / "drawing.json").write_text(json.dumps(DRAWING | {"true_cfg": self.family.true_cfg}, indent=1))


@contextmanager
def _image_states(block: nn.Module) -> Iterator[list[Tensor]]:
    """What a double block hands on as image tokens, each time it runs."""
    seen: list[Tensor] = []
    with block.register_forward_hook(lambda module, given, out: seen.append(out[1])):
        yield seen


class _Words:
    """A tokenizer's padded ids for texts of known words, looked up word by word: 50 times faster than asking it."""

    def __init__(self, tokenizer: Any, length: int) -> None:
        self.tokenizer, self.length = tokenizer, length
        self.one = {w: tokenizer(w).input_ids[-2] for w in corpus.vocabulary()}
        self.head, self.tail = tokenizer("").input_ids[:-1], tokenizer.eos_token_id

    def __call__(self, texts: Sequence[str]) -> Int[Tensor, "batch length"]:
        pad = [self.tokenizer.pad_token_id] * self.length
        rows = ([*self.head, *(self.one[w] for w in text.split())][: self.length - 1] for text in texts)
        return torch.tensor([[*row, self.tail, *pad][: self.length] for row in rows])


def _random_sigma(rng: np.random.Generator, n: int) -> Float[Tensor, " n"]:
    """70 % logit-normal, 30 % uniform: most of the effort where the picture is decided."""
    middle = 1 / (1 + np.exp(-rng.normal(0.2, 1.1, n)))
    return torch.from_numpy(np.where(rng.random(n) < 0.7, middle, rng.random(n)).astype(np.float32))
