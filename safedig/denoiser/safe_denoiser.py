"""`SafeDenoiser`: while a `with` lasts, a pipeline's x̂0 is moved away from a negation set, after guidance.

Nothing of the pipeline is copied: what its scheduler is given is amended, and a sentinel sees that every step was.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args

from ..config import UsageError, did_you_mean
from ..shadow import amend, listen
from .applied import Run, Told
from .kernels import Exact, Kernel, Tempered
from .mixing import check_scheduler
from .negation import NegationSet
from .rules import HOLDING, RULES, Mode, Sizes
from .threshold import SafeDensity, Threshold, Thresholds, own_threshold


class SafeDenoiser:
    """Keeps a pipeline away from the images of a negation set (arXiv 2502.08011), without training anything.

    At each step x̂0 becomes x̂0 + strength · β · (x̂0 − E_unsafe), for each sample by itself; where β stays under
    `floor`, where σ is outside the window, with strength 0 or an empty set, the scheduler gets the very same tensor.
    """

    def __init__(
        self,
        negation: NegationSet,
        strength: float = 1.0,
        *,
        sigmas: tuple[float, float] = (0.0, 1.0),
        kernel: Kernel | None = None,
        threshold: Threshold | float | None = None,
        limit: float = 1.0,
        floor: float = 0.05,
        mode: Mode | str = "theory",
    ):
        """`threshold` says how β follows from the kernel's density p̂_u; β is at most `limit`.

        A number τ: β = p̂_u · exp(−τ). `Thresholds`, of `fit_thresholds`: calibrated at each σ. `SafeDensity`: β*
        itself, for an `Exact` kernel and without guidance, where the density of what is safe is known. None: found on
        the set itself. `sigmas` is the window, lowest first, of a rectified flow's σ (of the same signal-to-noise ratio
        for other schedulers). With mode="spell" the threshold is the radius, root mean square per latent number.
        """
        if mode not in RULES:
            raise UsageError(f"mode='{mode}': {did_you_mean(mode, get_args(Mode))}")
        if strength < 0 or not limit > 0 or floor < 0:
            raise UsageError(
                f"strength={strength}, limit={limit}, floor={floor}: expected none below 0, limit above it."
            )
        if not sigmas[0] <= sigmas[1]:
            raise UsageError(f"sigmas={sigmas}: expected the lowest σ first, then the highest.")
        if mode == "spell" and not isinstance(threshold, int | float):
            raise UsageError("mode='spell' moves x̂0 out of a ball around every image: give its radius as threshold=.")
        self.kernel: Kernel = Tempered() if kernel is None else kernel
        if isinstance(threshold, SafeDensity) and not isinstance(self.kernel, Exact):
            raise UsageError("SafeDensity is compared with the density of the noised set: give kernel=Exact() with it.")
        radius = float(threshold) if mode == "spell" and isinstance(threshold, int | float) else 0.0
        self.negation, self.strength, self.sigmas, self.mode = negation, strength, sigmas, mode
        self.threshold = self._threshold(threshold)
        self._sizes = Sizes(negation, self.kernel, self.threshold, strength, limit, floor, radius)
        self._run: Run | None = None

    def _threshold(self, given: Threshold | float | None) -> Threshold:
        if isinstance(given, int | float):
            return Thresholds((1.0,), (1.0,), (-float(given),))
        if given is None and isinstance(self.kernel, Exact):
            raise UsageError("The Exact kernel's density is no measure of nearness by itself: give threshold=.")
        return own_threshold(self.kernel, self.negation) if given is None else given

    @contextmanager
    def apply(self, pipe: Any) -> Iterator["SafeDenoiser"]:
        """Act in every call of `pipe` inside the `with`; afterwards it is bit for bit as it was.

        Several may be on one pipeline, and a `Steering` with them: each sees what those put on before it have made.
        A step that was not seen is a `SafetyBypassError`, raised before the image is given out.
        """
        kind = check_scheduler(pipe.scheduler)
        if self.mode in HOLDING and (kind != "flow" or "Euler" not in type(pipe.scheduler).__name__):
            raise UsageError(
                f"mode='{self.mode}' is known for FlowMatchEulerDiscreteScheduler, not for "
                f"{type(pipe.scheduler).__name__}: use mode='theory'."
            )
        self._run = run = Run(pipe, self._sizes, self.sigmas, self.mode)
        with (
            amend(pipe, "check_inputs", run.begin),
            amend(pipe.scheduler, "step", run.step),
            listen(pipe, "maybe_free_model_hooks", after=run.end),
        ):
            yield self

    @property
    def audit(self) -> list[list[Told]]:
        """What was done to each image of the pipeline's last call, step by step, closed gates too."""
        return [] if self._run is None else self._run.told_by_image()

    def __repr__(self) -> str:
        low, high = self.sigmas
        return f"SafeDenoiser({self.negation!r}, {self.mode} × {self.strength}, σ in {low} … {high}, {self.kernel})"
