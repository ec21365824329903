"""Images of any kind, size and colour mode → RGB pixels of one height and width, each known by its content's hash."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ..config import UsageError

Fit = Literal["crop", "stretch"]
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
BROKEN = (OSError, SyntaxError, ValueError)  # what PIL raises for files that are torn, or are no images


class CorruptError(UsageError):
    """One image cannot be read."""


@dataclass(frozen=True)
class Picture:
    """An image that is read when it is wanted."""

    name: str
    digest: str
    """SHA-256 of the file, or of the pixels."""
    read: Callable[[], Float[Tensor, "3 height width"]]
    """Its pixels in 0 … 1; a `CorruptError` where it cannot be read."""


def pictures(images: Any) -> Iterator[Picture]:
    """The images of a folder (with those inside it), a `datasets` dataset, tensors, or an iterable of PIL images.

    Tensors: [n, c, h, w] or a list of [c, h, w] of any sizes, bytes or floats in 0 … 1, with 1, 3 or 4 channels.
    """
    if isinstance(images, str | PathLike):
        yield from map(_of_file, _files(Path(images)))
    elif hasattr(images, "column_names"):
        yield from (_of_any(one, f"row {at}") for at, one in enumerate(_rows(images)))
    elif isinstance(images, Iterable):
        yield from (_of_any(one, f"image {at}") for at, one in enumerate(images))
    else:
        raise UsageError(
            f"A {type(images).__name__} is no set of images: give a folder, a datasets dataset with images, tensors "
            "[n, 3, height, width], or a list of images."
        )


def framed(pixels: Float[Tensor, "3 h w"], height: int, width: int, fit: Fit) -> Float[Tensor, "3 height width"]:
    """Resized to this frame: the middle of it at its own aspect ("crop"), or all of it, out of proportion ("stretch").

    An image that has this size already is not touched.
    """
    h, w = pixels.shape[1:]
    if (h, w) == (height, width):
        return pixels
    if fit == "crop":
        scale = max(height / h, width / w)
        h, w = max(1, min(h, round(height / scale))), max(1, min(w, round(width / scale)))
        top, left = (pixels.shape[1] - h) // 2, (pixels.shape[2] - w) // 2
        pixels = pixels[:, top : top + h, left : left + w]
    return F.interpolate(pixels[None], (height, width), mode="bicubic", antialias=True)[0].clamp(0, 1)


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UsageError(f"'{folder}' is no folder: give one with the images to stay away from.")
    found = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES and path.is_file()]
    if not found:
        raise UsageError(
            f"There is no image in '{folder}': put some of those to stay away from there ({', '.join(SUFFIXES)})."
        )
    return found


def _rows(dataset: Any) -> Iterator[Any]:
    """The dataset's images: the column of that kind, or the one that is called `image`."""
    features = getattr(dataset, "features", None) or {}
    columns = [name for name, kind in features.items() if type(kind).__name__ == "Image"]
    columns = columns or [name for name in dataset.column_names or () if name == "image"]
    if len(columns) != 1:
        raise UsageError(
            f"The dataset has {len(columns) or 'no'} columns of images (columns: "
            f"{', '.join(dataset.column_names or ())}): select the one to use with select_columns."
        )
    rows = iter(dataset.select_columns(columns))
    for at in range(2**63):
        try:
            yield next(rows)[columns[0]]
        except StopIteration:
            return
        except BROKEN as error:
            raise CorruptError(
                f"Row {at} of the dataset holds no readable image ({_why(error)}): leave it out."
            ) from error


def _of_file(path: Path) -> Picture:
    def read() -> Tensor:
        from PIL import Image

        try:
            with Image.open(path) as image:
                return _pixels(image)
        except (*BROKEN, Image.DecompressionBombError) as error:
            raise CorruptError(f"'{path}' cannot be read as an image ({_why(error)})") from error

    with path.open("rb") as file:
        return Picture(str(path), hashlib.file_digest(file, "sha256").hexdigest(), read)


def _of_any(image: Any, name: str) -> Picture:
    if isinstance(image, Tensor | np.ndarray):
        pixels = _of_tensor(torch.as_tensor(image), name)
    elif hasattr(image, "convert"):
        pixels = _pixels(image)
    else:
        raise UsageError(
            f"The {name} is a {type(image).__name__}: expected a PIL image or a tensor [3, height, width]."
        )
    raw = pixels.contiguous().numpy().tobytes()
    return Picture(name, hashlib.sha256(f"{tuple(pixels.shape)}".encode() + raw).hexdigest(), lambda: pixels)


def _of_tensor(x: Tensor, name: str) -> Float[Tensor, "3 h w"]:
    shape = tuple(x.shape)
    if len(shape) != 3 or shape[0] not in (1, 3, 4) or 0 in shape:
        raise UsageError(f"The {name} has shape {shape}: expected [1, 3 or 4 channels, height, width].")
    x = x.float() / 255 if x.dtype == torch.uint8 else x.detach().float().cpu()
    if not (x.isfinite().all() and x.min() > -1e-3 and x.max() < 1 + 1e-3):
        raise UsageError(
            f"The {name} has values from {float(x.min()):.3g} to {float(x.max()):.3g}: expected bytes (uint8), or "
            "floats in 0 … 1; halve and shift those in −1 … 1."
        )
    return _on_white(x.cpu().clamp(0, 1))


def _pixels(image: Any) -> Float[Tensor, "3 h w"]:
    """Turned as its EXIF data say, whatever is transparent on white, one channel thrice."""
    from PIL import ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # 16 bits or more: to the range that is there
        x = torch.from_numpy(np.asarray(image, dtype=np.float32))[None]
        full = 65535.0 if image.mode.startswith("I") and x.max() > 255 else max(float(x.max()), 1.0)
        return _on_white((x / full).clamp(0, 1))
    see_through = "A" in image.mode or "transparency" in image.info
    array = np.asarray(image.convert("RGBA" if see_through else "RGB"))
    return _on_white(rearrange(torch.tensor(array), "h w c -> c h w").float() / 255)


def _on_white(x: Float[Tensor, "channels h w"]) -> Float[Tensor, "3 h w"]:
    if len(x) == 4:
        return x[:3] * x[3:] + 1 - x[3:]
    return x.expand(3, *x.shape[1:])


def _why(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
