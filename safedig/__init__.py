"""Steer what a Diffusion Transformer draws, from inside. Public names load on first use: the import costs nothing."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "load_pipeline": "pipelines",
    "draw": "pipelines",
    "load_prompts": "prompts",
    "save_prompts": "prompts",
    "record": "activations.record",
    "open_store": "activations.store",
    "route": "routing.route",
    "Route": "routing.route",
    "train": "sae.train",
    "find_features": "features",
    "weigh": "features",
    "fit_counterparts": "features",
    "adapt": "adaptation",
    "fit_contrast": "adaptation",
    "Repel": "steering.edits",
    "Blend": "steering.edits",
    "Replace": "steering.edits",
    "calibrated": "steering.conformal",
    "fit_guards": "steering.guard",
    "feature_dose": "steering.dose",
    "Steering": "steering.steering",
    "apply_steering": "steering.holding",
    "remove_steering": "steering.holding",
    "NegationSet": "denoiser.negation",
    "SafeDenoiser": "denoiser.safe_denoiser",
    "SafetyBypassError": "hooks",
    "UsageError": "config",
}
__all__ = list(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'safedig' has no attribute '{name}'; it has {', '.join(sorted(_HOMES))}")
    value = globals()[name] = getattr(import_module(f"safedig.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
