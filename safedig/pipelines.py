"""Load a text-to-image pipeline, draw images from it, know it again. The door to `diffusers`; nothing is subclassed."""

import hashlib
import inspect
import json
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .config import UsageError, build, did_you_mean
from .sites import transformer

SHIPPED = ("tiny-flux", "tiny-sd3")
_WEIGHTS = Path(__file__).parent / "tiny" / "weights"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_MAX_HASHED = 2**20  # elements of one tensor; a larger one is sampled at equal distances


def load_pipeline(
    name_or_path: str | PathLike[str], *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> Any:
    """A diffusers pipeline from a shipped name ("tiny-flux", "tiny-sd3"), a local folder or a Hub id with a '/'.

    Only safetensors are read. Whatever is missing is a `UsageError`; a name without '/' never touches the network.
    """
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    name = str(name_or_path)
    folder = _WEIGHTS / name if name in SHIPPED else Path(name).expanduser()
    local = bool(name) and folder.is_dir()
    if local:
        _check_folder(folder)
    elif not _HUB_ID.fullmatch(name) or isinstance(name_or_path, PathLike) or name.startswith("."):
        raise UsageError(_no_such_model(name))
    try:
        pipe = DiffusionPipeline.from_pretrained(
            str(folder) if local else name,
            dtype=dtype or torch.float32,
            use_safetensors=True,
            local_files_only=local,
        )
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(_why_not(name, local, error)) from error
    return pipe.to(device)


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
        if not _is_flux(pipe):
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
    """SHA-256 of the transformer's class, configuration and weights; equal in float32 and bfloat16, on any device."""
    model: Any = transformer(pipe)
    config = {key: value for key, value in dict(model.config).items() if not key.startswith("_")}
    digest = hashlib.sha256(json.dumps([type(model).__name__, config], sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.is_meta:
            raise UsageError("The weights are offloaded: take the fingerprint before enabling sequential offload.")
        sample = tensor.flatten()[:: -(-tensor.numel() // _MAX_HASHED) or 1].to(torch.bfloat16)
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(sample.view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()


def _is_flux(pipe: Any) -> bool:
    return "true_cfg_scale" in inspect.signature(type(pipe).__call__).parameters


def _options(pipe: Any, drawing: Drawing) -> dict[str, Any]:
    scale = "true_cfg_scale" if _is_flux(pipe) and drawing.true_cfg else "guidance_scale"
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


def _check_folder(folder: Path) -> None:
    """Every model that model_index.json lists must be there with whole safetensors."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"'{folder}' is no pipeline folder: its model_index.json cannot be read ({error}). "
            "Give a folder written by pipe.save_pretrained."
        ) from error
    parts = [name for name, kind in index.items() if isinstance(kind, list) and any(kind)]
    for part in parts:
        if not (folder / part).is_dir():
            raise UsageError(f"'{folder}' has no '{part}', which model_index.json lists: copy it.")
        if (folder / part / "config.json").is_file():
            _check_weights(folder / part)


def _check_weights(folder: Path) -> None:
    files = set(folder.glob("*.safetensors"))
    for index in folder.glob("*.safetensors.index.json"):
        files |= {folder / shard for shard in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    if not files:
        raise UsageError(f"'{folder}' has no *.safetensors (other formats are not read): copy the weights there.")
    for file in sorted(files):
        if not file.is_file():
            raise UsageError(f"'{file}' is missing: copy it there.")
        if file.stat().st_size != _promised_size(file):
            raise UsageError(f"'{file}' is truncated or no safetensors file: copy it again.")


def _promised_size(file: Path) -> int:
    """The size in bytes that a safetensors header promises; −1 if there is no such header."""
    with file.open("rb") as stream:
        try:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length if length < 2**28 else 0))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (struct.error, ValueError, KeyError, TypeError, AttributeError):
            return -1
    return 8 + length + max(ends, default=0)


def _no_such_model(name: str) -> str:
    if name in SHIPPED:
        return f"The weights of '{name}' are not in this installation: expected them in '{_WEIGHTS / name}'."
    if "/" in name or name.startswith((".", "~")):
        return f"There is no folder '{name}': give a folder written by pipe.save_pretrained, or a Hub id."
    return f"There is no model '{name}'. {did_you_mean(name, SHIPPED)} Or give a local folder, or a Hub id with a '/'."


def _why_not(name: str, local: bool, error: Exception) -> str:
    first_line = str(error).strip().split("\n")[0]
    if local:
        return f"'{name}' cannot be loaded: {first_line}"
    kinds = {cls.__name__ for cls in type(error).__mro__}
    if "GatedRepoError" in kinds:
        return f"'{name}' is gated: accept its terms on its Hub page, log in with `hf auth login`, and try again."
    if "RepositoryNotFoundError" in kinds:
        return f"There is no folder and no Hub model '{name}' (or it is private): check the name, or `hf auth login`."
    return f"'{name}' is no local folder and could not be fetched from the Hub: {first_line}"
