"""A complete named run: a TOML file in this folder, or anywhere, read into a `Recipe`."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safedig.config import UsageError, did_you_mean, from_toml, to_toml
from safedig.sae.train import SAEOptions

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Counts:
    """How many prompts of each use a run draws: pairs to learn from, and fresh ones to report on."""

    learn: int = 160
    report: int = 64
    benign: int = 64
    shown: int = 4


@dataclass(frozen=True)
class Recipe:
    """Which model, where to act, how much to learn from, how hard to push."""

    model: str  # a shipped name, a local folder or a Hub id
    sites: tuple[str, ...]
    seed: int = 0
    strength: float = 2.0
    quantile: float = 0.999  # share of the benign tokens learnt from on which the gate stays closed
    prompts: Counts = field(default_factory=Counts)
    sae: SAEOptions = field(default_factory=SAEOptions)

    @property
    def sha(self) -> str:
        """What stands for these options in a result: a result whose recipe has changed since is stale."""
        return hashlib.sha256(to_toml(self).encode()).hexdigest()[:16]


def names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """A shipped recipe by its name, or any by its path, with `key=value` overrides laid over it."""
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not path.is_file() or (path.parent == FOLDER and path.stem not in names()):
        raise UsageError(f"There is no recipe '{name}'. {did_you_mean(name, names())}")
    return from_toml(Recipe, path.read_text(encoding="utf-8"), overrides)
