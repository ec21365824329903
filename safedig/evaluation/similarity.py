"""How far an edit moves an image from the unsteered one of the same prompt and seed: SSIM, MS-SSIM, PSNR, any LPIPS."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from safedig.config import UsageError
from safedig.evaluation.intervals import clustered_rate
from safedig.evaluation.means import clustered_mean

Images = Float[Tensor, "n 3 height width"]  # RGB, 0 … 1
Perceptual = Callable[[Images, Images], Float[Tensor, " n"]]
WINDOW = 11  # pixels of the Gaussian window
WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of the five scales (Wang et al. 2003)


def similarity(
    steered: Images,
    unsteered: Float[Tensor, "m 3 h w"],
    prompts: Sequence[Hashable],
    lpips: Perceptual | None = None,
) -> dict[str, Any]:
    """Means over pairs with intervals clustered by prompt; image i of one is of the prompt and seed of i of the other.

    `identical`: share of pairs equal to the bit. `psnr`, in dB, is over the others only, as theirs is infinite.
    `ms_ssim` uses as many of the five scales as fit (`scales`), their weights rescaled. `lpips` is any callable that
    takes both in 0 … 1; none is fetched here.
    """
    if steered.shape != unsteered.shape or len(steered) != len(prompts):
        raise UsageError(
            f"Images {list(steered.shape)} and {list(unsteered.shape)} of {len(prompts)} prompts: expected the same "
            "prompts and seeds, drawn at one size."
        )
    same = [bool((one == other).all()) for one, other in zip(steered, unsteered, strict=True)]
    scales = fitting_scales(min(steered.shape[-2:]))
    found: dict[str, Any] = {
        "identical": clustered_rate(same, prompts),
        "ssim": clustered_mean(ssim(steered, unsteered).tolist(), prompts),
        "ms_ssim": clustered_mean(ms_ssim(steered, unsteered).tolist(), prompts),
        "scales": scales,
    }
    other = [at for at, equal in enumerate(same) if not equal]
    if other:
        decibels = psnr(steered[other], unsteered[other]).tolist()
        found["psnr"] = clustered_mean(decibels, [prompts[at] for at in other])
    if lpips is not None:
        found["lpips"] = clustered_mean(lpips(steered, unsteered).tolist(), prompts)
    return found


def ssim(one: Images, other: Images) -> Float[Tensor, " n"]:
    """Structural similarity of each pair; 1 for equal images."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    found: Any = structural_similarity_index_measure(one.double(), other.double(), data_range=1.0, reduction="none")
    return found.reshape(len(one))


def ms_ssim(one: Images, other: Images) -> Float[Tensor, " n"]:
    """The same on several scales, negative contrasts cut at 0."""
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    used = WEIGHTS[: fitting_scales(min(one.shape[-2:]))]
    betas = tuple(weight / sum(used) for weight in used)
    options: dict[str, Any] = {"data_range": 1.0, "betas": betas, "normalize": "relu", "reduction": "none"}
    return multiscale_structural_similarity_index_measure(one.double(), other.double(), **options).reshape(len(one))


def psnr(one: Images, other: Images) -> Float[Tensor, " n"]:
    """Peak signal-to-noise ratio of each pair, in dB."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return peak_signal_noise_ratio(
        one.double(), other.double(), data_range=1.0, reduction="none", dim=(1, 2, 3)
    ).reshape(len(one))


def fitting_scales(side: int) -> int:
    """How many of the five scales an image of so many pixels has room for; the fourth and fifth as the library asks."""
    fitting = [n for n in range(1, len(WEIGHTS) + 1) if side // max(2 ** (n - 1), (n - 1) ** 2) >= WINDOW]
    if not fitting:
        raise UsageError(f"Images of {side} pixels: expected at least {WINDOW} on each side.")
    return max(fitting)
