"""`NegationSet`: latents to stay away from, in memory or on disk; distances to them and means of them, in parts."""

from collections.abc import Iterator, Sequence
from math import prod
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor

from ..config import UsageError
from .cached import cache_folder, encoded
from .encoding import check_vae, frame_of
from .pictures import Fit, pictures

Part = Tensor | Path
PART = 2**28  # bytes that are looked at in one product
_NAME = "latents"


class NegationSet:
    """What is not to be drawn: one latent an image, as the pipeline's scheduler sees latents, in float32.

    Distances and means take one matrix product a part and O(images) memory beside the set; nothing is tiled.
    """

    def __init__(self, latents: Tensor, *, frame: tuple[int, int] | None = None):
        """From latents [n, …] that are there already; `frame`, height and width of the images, is checked if given."""
        if latents.ndim < 2 or not latents.is_floating_point() or not latents.isfinite().all():
            raise UsageError(
                f"Latents of shape {tuple(latents.shape)} and type {latents.dtype} are no negation set: expected "
                "finite floats [images, …], as the pipeline's scheduler sees them."
            )
        self.shape, self.frame = tuple(latents.shape[1:]), frame
        rows = max(1, PART // (4 * max(1, prod(self.shape))))
        flat = latents.detach().float().reshape(len(latents), prod(self.shape))
        self._fill([part for part in flat.split(rows) if len(part)])

    @classmethod
    def of(
        cls,
        images: Any,
        pipe: Any,
        *,
        height: int | None = None,
        width: int | None = None,
        fit: Fit = "crop",
        skip_corrupt: bool = False,
        cache: str | PathLike[str] | None = "",
        mapped: bool = False,
    ) -> "NegationSet":
        """Encode a folder, a `datasets` dataset, tensors or PIL images with the VAE of `pipe`.

        Height and width, pixels, are those of the images that will be drawn: by default the pipeline's own. Images are
        cropped to it (or stretched); see `pictures`. Latents are kept in `cache`, by the content of images and VAE: by
        default `~/.cache/safedig/negation`, nowhere with None. `mapped` leaves them there, and reads a part at a time.
        A corrupt image is a `UsageError` unless `skip_corrupt`, which says how many were left out.
        """
        check_vae(pipe)
        frame = frame_of(pipe, height, width)
        folder = cache_folder(cache)
        if mapped and folder is None:
            raise UsageError("mapped=True reads the latents from the cache, and cache=None keeps none: give a folder.")
        made = list(encoded(pipe, pictures(images), frame, fit, folder, skip_corrupt))
        if not made:
            raise UsageError(
                "There is no readable image among those given: an empty negation set would change nothing."
            )
        if not mapped:
            return cls(torch.cat([one.latents() for one in made]), frame=frame)
        paths = [one.path for one in made if one.path is not None]
        return cls._on_disk(paths, made[0].latents().shape[1:], frame)

    @classmethod
    def _on_disk(cls, paths: Sequence[Path], shape: Sequence[int], frame: tuple[int, int]) -> "NegationSet":
        made = cls.__new__(cls)
        made.shape, made.frame = tuple(shape), frame
        made._fill(paths)
        return made

    def _fill(self, parts: Sequence[Part]) -> None:
        self._parts = list(parts)
        self._squares = [_read(part).square().sum(1) for part in self._parts]
        self._elsewhere: dict[torch.device, NegationSet] = {}

    def __len__(self) -> int:
        return sum(map(len, self._squares))

    @property
    def d(self) -> int:
        """Numbers in one latent."""
        return prod(self.shape)

    def to(self, device: torch.device | str) -> "NegationSet":
        """The same set on a device, moved there once; one on disk stays there, and is read to where it is wanted."""
        place = torch.device(device)
        if all(squares.device == place for squares in self._squares):
            return self
        if place not in self._elsewhere:
            moved = self._elsewhere[place] = NegationSet.__new__(NegationSet)
            moved.shape, moved.frame, moved._elsewhere = self.shape, self.frame, {}
            moved._parts = [part.to(place) if isinstance(part, Tensor) else part for part in self._parts]
            moved._squares = [squares.to(place) for squares in self._squares]
        return self._elsewhere[place]

    def parts(self) -> Iterator[Float[Tensor, "part *latent"]]:
        """The latents, a part after the other."""
        for part in self._parts:
            yield _read(part).unflatten(1, self.shape)

    def squared_distances(self, x: Float[Tensor, "batch d"], scale: float = 1.0) -> Float[Tensor, "batch n"]:
        """‖x − scale · z_n‖² for every latent z_n."""
        own = x.square().sum(1, keepdim=True)
        found = [
            # z xᵀ, not x zᵀ: the set is the long side of the product, and a third faster on its left
            torch.addmm(scale**2 * squares[:, None], _read(part, x.device), x.T, alpha=-2 * scale)
            for part, squares in zip(self._parts, self._squares, strict=True)
        ]
        return (torch.cat(found).T + own).clamp_(min=0) if found else x.new_zeros(len(x), 0)

    def mean(self, weights: Float[Tensor, "batch n"]) -> Float[Tensor, "batch d"]:
        """Σ_n w_n z_n; only those with a weight are read."""
        total = weights.new_zeros(len(weights), self.d)
        for part, w in zip(self._parts, weights.split([len(squares) for squares in self._squares], 1), strict=True):
            used = (w != 0).any(0)
            if (count := int(used.sum())) == 0:
                continue
            z = _read(part, weights.device)
            if 2 * count < len(z):
                w, z = w[:, used], z[used]
            total.addmm_(w, z)
        return total

    def __repr__(self) -> str:
        seen = f" of {self.frame[0]} × {self.frame[1]} pixels" if self.frame else ""
        return f"NegationSet of {len(self)} images{seen}, latents {self.shape}"


def _read(part: Part, device: torch.device | str = "cpu") -> Float[Tensor, "rows d"]:
    if isinstance(part, Tensor):
        return part
    with safe_open(part, framework="pt", device=str(device)) as file:
        return rearrange(file.get_tensor(_NAME), "rows ... -> rows (...)")
