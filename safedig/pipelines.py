"""Load a text-to-image pipeline, draw images from it, know it again. The door to `diffusers`; nothing is subclassed."""

import hashlib
import inspect
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from . import hub, model_folders
from .config import UsageError, build, check_numbers, did_you_mean
from .sites import components, transformer

Offload = Literal["model", "sequential", "group"]
DTYPES = ("float32", "bfloat16", "float16")
_MAX_HASHED = 2**20  # elements of one tensor; a larger one is sampled at equal distances


def load_pipeline(
    name_or_path: str | PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    offload: str | None = None,
) -> Any:
    """A diffusers pipeline from a shipped name ("tiny-flux", "tiny-sd3"), a local folder or a Hub id with a '/'.

    `dtype` is float32 unless given. `device` is the CPU unless given; "auto" is the accelerator where there is one.
    With `offload` the weights stay in the CPU's memory and come to the accelerator model by model ("model"), in groups
    of one block ("group") or layer by layer ("sequential"). Only safetensors are read. Whatever is missing is a
    `UsageError`; a name without '/' never touches the network.
    """
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from huggingface_hub.errors import EntryNotFoundError

    kind, target, name = _dtype(dtype), _device(device, offload), str(name_or_path)
    if (folder := model_folders.on_disk(name)) is not None:
        model_folders.check(folder)
    elif isinstance(name_or_path, PathLike) or not model_folders.is_hub_id(name):
        raise UsageError(model_folders.no_such_model(name))
    try:
        pipe = DiffusionPipeline.from_pretrained(
            str(folder or name), dtype=kind, use_safetensors=True, local_files_only=folder is not None
        )
    except (OSError, ValueError, AttributeError, ImportError, RuntimeError, EntryNotFoundError) as error:
        why = hub.why_not(name, error) if folder is None else f"'{name}' cannot be loaded: {_first_line(error)}"
        raise UsageError(why) from error
    return pipe.to(target) if offload is None else _offloaded(pipe, offload, target)


@dataclass(frozen=True)
class Drawing:
    """How a pipeline draws; the same fields, as JSON, make a model folder's `drawing.json`."""

    steps: int
    guidance: float
    height: int
    width: int
    max_sequence_length: int
    true_cfg: bool = False
    """FLUX only: two passes a step with an empty negative prompt, instead of the distilled guidance of FLUX.1-dev."""

    def __post_init__(self) -> None:
        check_numbers(self, "drawing.", ("steps", "max_sequence_length"), least=1)
        check_numbers(self, "drawing.", ("height", "width"), least=8)
        check_numbers(self, "drawing.", ("guidance",))

    @classmethod
    def of(cls, pipe: Any) -> "Drawing":
        """What the pipeline's folder says, else what its authors recommend."""
        file = Path(str(getattr(pipe.config, "_name_or_path", "") or "")) / "drawing.json"
        if file.is_file():
            try:
                return build(cls, json.loads(file.read_text(encoding="utf-8")))
            except (UsageError, json.JSONDecodeError) as error:
                raise UsageError(f"'{file}' is no drawing.json: {error}") from error
        side = pipe.default_sample_size * pipe.vae_scale_factor
        if not is_flux(pipe):
            return cls(steps=28, guidance=3.5, height=side, width=side, max_sequence_length=256)
        if pipe.transformer.config.guidance_embeds:
            return cls(steps=28, guidance=3.5, height=side, width=side, max_sequence_length=512)
        return cls(steps=4, guidance=0.0, height=side, width=side, max_sequence_length=256)  # timestep-distilled


def draw(
    pipe: Any,
    rows: Iterable[Any],
    *,
    drawing: Drawing | None = None,
    batch_size: int = 16,
    output_type: Literal["pt", "latent"] = "pt",
) -> Iterator[tuple[list[Mapping[str, Any]], Tensor]]:
    """Draw each row's `prompt` from its own `seed`, in order; yields the rows of a batch and their images.

    Images are float32 [batch, 3, height, width] in 0..1. The noise of an image depends on its seed alone.
    """
    options = _options(pipe, drawing or Drawing.of(pipe))
    rows = iter(rows)
    while batch := list(islice(rows, batch_size)):
        generators = [torch.Generator("cpu").manual_seed(int(row["seed"])) for row in batch]
        negative = {"negative_prompt": [""] * len(batch)} if "true_cfg_scale" in options else {}
        with _no_progress_bar(pipe):
            images = pipe(
                [str(row["prompt"]) for row in batch],
                generator=generators,
                output_type=output_type,
                **(options | negative),
            ).images
        yield batch, images.float()


def fingerprint(pipe: Any) -> str:
    """SHA-256 of what makes activations of a prompt: the transformer's configuration, its weights, the text encoders'.

    It is the same in float32 and bfloat16 and on any device; weights that are rounded to fewer bits are others.
    """
    denoiser: Any = transformer(pipe)
    config = {key: value for key, value in dict(denoiser.config).items() if not key.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for part, model in components(pipe).items():
        digest.update(f"{part} {type(model).__name__}".encode())
        for name, tensor in sorted(model.state_dict().items()):
            tensor = _fetched(model, name) if tensor.is_meta else tensor
            sample = tensor.flatten()[:: -(-tensor.numel() // _MAX_HASHED) or 1].to(torch.bfloat16)
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(sample.view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()


def guided(pipe: Any, drawing: Drawing) -> bool:
    """Whether each image has an unconditional row too: in a second pass in FLUX, in the same one elsewhere."""
    return drawing.guidance > 1 and (drawing.true_cfg or not is_flux(pipe))


def is_flux(pipe: Any) -> bool:
    """Whether guidance may come from a second pass (`true_cfg_scale`) beside the distilled one."""
    return "true_cfg_scale" in inspect.signature(type(pipe).__call__).parameters


def _options(pipe: Any, drawing: Drawing) -> dict[str, Any]:
    scale = "true_cfg_scale" if is_flux(pipe) and drawing.true_cfg else "guidance_scale"
    return {
        "num_inference_steps": drawing.steps,
        scale: drawing.guidance,
        "height": drawing.height,
        "width": drawing.width,
        "max_sequence_length": drawing.max_sequence_length,
    }


@contextmanager
def _no_progress_bar(pipe: Any) -> Iterator[None]:
    before = vars(pipe).get("_progress_bar_config")
    pipe._progress_bar_config = {"disable": True}
    try:
        yield
    finally:
        if before is None:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = before


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise UsageError(f"dtype='{dtype}': {did_you_mean(dtype, DTYPES)}")
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32


def _device(device: str | torch.device | None, offload: str | None) -> torch.device:
    """Where the model runs; None is the CPU, but with `offload` the accelerator that it is meant for."""
    from diffusers.utils.torch_utils import get_device

    if offload not in (None, *get_args(Offload)):
        raise UsageError(f"offload='{offload}': {did_you_mean(offload, get_args(Offload))}")
    wanted = get_device() if device == "auto" or (device is None and offload is not None) else device or "cpu"
    if str(wanted) == "cpu" and ((device is None and offload is not None) or offload == "sequential"):
        raise UsageError(f"offload='{offload}' needs an accelerator and there is none: leave offload out.")
    try:
        return torch.empty(0, device=wanted).device
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"The device '{wanted}' cannot be used ({_first_line(error)}): give cpu, or auto.") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _offloaded(pipe: Any, offload: str, device: torch.device) -> Any:
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.enable_group_offload(device, offload_type="block_level", num_blocks_per_group=1)
    return pipe


def _fetched(model: nn.Module, name: str) -> Tensor:
    """A weight that sequential offload keeps aside, as it is in the CPU's memory."""
    from accelerate.utils import align_module_device, has_offloaded_params

    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if not has_offloaded_params(module):
        raise UsageError("The model has no weights, only shapes (it is on the meta device): load it with its weights.")
    with align_module_device(module, torch.device("cpu")):
        return getattr(module, leaf).detach().clone()
