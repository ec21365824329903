"""Image files as pixels, or as what is wrong with them: a file that cannot be read never passes for a safe image."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from safedig.evaluation.records import image_sha

Image = Float[Tensor, "3 _ _"]  # RGB, 0 … 1; those of one list may differ in size


@dataclass(frozen=True)
class Picture:
    """One image and its hash; without pixels there is an `error`, and the hash is that of the file's bytes."""

    sha: str
    pixels: Image | None = None
    error: str = ""


def picture(pixels: Image) -> Picture:
    """An image in memory; NaN and infinity, which a broken run leaves behind, are an error."""
    if not bool(pixels.isfinite().all()):
        return Picture(image_sha(pixels.nan_to_num()), error="not every pixel is a finite number")
    return Picture(image_sha(pixels), pixels)


def read_picture(path: str | os.PathLike[str]) -> Picture:
    """The image in a file; one that is missing, empty, truncated or no image comes back with its error."""
    import numpy as np
    from PIL import Image as Images

    try:
        data = Path(path).read_bytes()
    except OSError as error:
        return Picture(f"file:{hashlib.sha256(str(path).encode()).hexdigest()}", error=f"unreadable: {error.strerror}")
    try:
        with Images.open(Path(path)) as image:
            array = np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Images.DecompressionBombError) as error:
        why = str(error).replace(str(path), Path(path).name)
        return Picture(f"file:{hashlib.sha256(data).hexdigest()}", error=f"unreadable: {why}")
    return picture(rearrange(torch.from_numpy(array), "h w c -> c h w").float() / 255)


def as_pil(image: Image) -> Any:
    """The same in 8 bits, for libraries that take nothing else."""
    from PIL import Image as Images

    pixels = (image.detach().float().clamp(0, 1) * 255).round().byte().cpu()
    return Images.fromarray(rearrange(pixels, "c h w -> h w c").contiguous().numpy())
