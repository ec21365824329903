"""NudeNet's own detector, weights from its own wheel, nothing fetched. An extra: its bundled files are AGPL-3.0."""

import hashlib
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from einops import rearrange

from safedig.config import UsageError
from safedig.evaluation.judges.judge import Look
from safedig.evaluation.pictures import Image

DETECTOR = "nudenet3"
FLOOR = 0.2  # the package drops weaker boxes itself, before its own non-maximum suppression (.25, .45)


class NudeNet:
    """Boxes {class, score, box: x, y, width, height in pixels}; a rule says which of them count."""

    detector = DETECTOR

    def __init__(self, weights: str | Path | None = None, side: int = 320) -> None:
        """`weights`: another ONNX file of the detector, such as 640m with side 640; by default the wheel's own."""
        try:
            import nudenet
        except ImportError as error:
            raise UsageError(
                f"NudeNet is not installed ({error}): pip install 'safedig[nudenet]' (its files are AGPL-3.0)."
            ) from error
        path = Path(nudenet.__file__).parent / "320n.onnx" if weights is None else Path(weights)
        if not path.is_file():
            raise UsageError(f"There are no NudeNet weights '{path}': give an .onnx file, or none for the wheel's own.")
        # Where the package is not installed, pyright takes this very file for it.
        made = nudenet.NudeDetector  # pyright: ignore[reportAttributeAccessIssue]
        self._detector: Any = made(model_path=str(path), inference_resolution=side)
        self.version = f"{version('nudenet')} {path.stem} {side} px"
        self.weights_sha = hashlib.sha256(path.read_bytes()).hexdigest()

    def __call__(self, images: Sequence[Image]) -> list[Look]:
        """One at a time: the package pads each to a square of its own."""
        return [Look(boxes=tuple(self._detector.detect(_as_read_from_disk(image)))) for image in images]


def _as_read_from_disk(image: Image) -> Any:
    """Bytes in the order blue, green, red, as OpenCV reads files: in another order the scores would be others."""
    pixels = rearrange((image.clamp(0, 1) * 255).round().to(torch.uint8), "c h w -> h w c")
    return pixels.flip(-1).contiguous().numpy()
