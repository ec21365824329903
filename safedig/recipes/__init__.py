"""A complete named run: a TOML file in this folder, or anywhere, read into a `Recipe`."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from safedig.activations.schedule import step_of
from safedig.config import UsageError, build, check_numbers, did_you_mean, from_toml, to_toml
from safedig.evaluation.curriculum import Sizes
from safedig.evaluation.jury import Judging
from safedig.pipelines import Drawing, Offload, load_pipeline
from safedig.prompts import check_seed
from safedig.recipes.calibrating import Calibrating
from safedig.sae.options import SAEOptions
from safedig.tiny.stand_ins import STAND_IN

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Counts:
    """How many prompts of each use a run draws: pairs to learn from, and fresh ones to report on."""

    learn: int = 160
    report: int = 64
    benign: int = 64
    shown: int = 4
    quiet: int = 400
    """Benign prompts, and as many near-misses, that set the gates."""

    def __post_init__(self) -> None:
        check_numbers(self, "prompts.", ("learn", "report", "benign", "shown", "quiet"), least=1)


@dataclass(frozen=True)
class Recording:
    """How much of the images that are drawn to learn from is kept; without one, everything."""

    prompts: int = 640
    """Images, those of the safe twins among them."""
    sigmas: Literal["all"] | int | tuple[float, ...] = "all"
    """Every σ of the schedule, that many spread evenly over its steps, or these."""
    tokens: Literal["all", "pooled"] | int = "all"
    """Of each image, step and site."""
    tflops: float = 300.0
    """What `safedig plan` takes the accelerator to sustain, in 10¹² floating-point operations a second."""

    def __post_init__(self) -> None:
        for name in ("prompts", "sigmas", "tokens", "tflops"):
            value = getattr(self, name)
            if value == () or (isinstance(value, int | float) and not value > 0):
                raise UsageError(f"record.{name}={value}: expected at least one, or a number above 0.")

    def steps(self, schedule: Sequence[float]) -> list[int]:
        """Which steps of a schedule of σ are kept; a σ that is not on it is a `UsageError`."""
        if self.sigmas == "all":
            return list(range(len(schedule)))
        if isinstance(self.sigmas, int):
            count, last = min(self.sigmas, len(schedule)), len(schedule) - 1
            return [round(at * last / max(count - 1, 1)) for at in range(count)]
        return sorted({step_of(float(sigma), schedule) for sigma in self.sigmas})


@dataclass(frozen=True)
class Training:
    """Which runs `safedig train` makes of one reading, beside what [sae] says, and what it measures them on."""

    expansions: tuple[int, ...] = ()
    """Of these widths, if any are given, each with each k."""
    ks: tuple[int, ...] = ()
    held_out: float = 0.1
    """Share of the prompts that is not trained on; twins stay together."""
    spliced: int = 16
    """Held-out images on which the velocity's error is measured; with 0 the model need not be there."""

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1 or self.spliced < 0:
            raise UsageError(
                f"train.held_out={self.held_out}, train.spliced={self.spliced}: expected a share between 0 and 1, and "
                "a number from 0 on."
            )


@dataclass(frozen=True)
class Adapting:
    """Which domain `safedig adapt` moves the decoders to, and what holds them."""

    target: str = ""
    """Place of the target's recording; `runs/record-MODEL-target` unless given."""
    objectives: tuple[Literal["reconstruction", "contrast"], ...] = ("reconstruction", "contrast")
    share: float = 0.2
    """Weight of the source's rows among all rows."""
    pseudo_count: float = 10.0
    """Each row of the source's decoder weighs as much as this many rows in which its feature fires."""
    align_mean: bool = False
    """Whether the encoder reads the target about the source's mean; the codes are then no longer equal."""
    fine_tune: int = 0
    """Steps of a warm fine-tune that is measured beside, encoder and all; it is not kept."""

    def __post_init__(self) -> None:
        check_numbers(self, "adapt.", ("fine_tune",))
        if not self.objectives:
            raise UsageError("adapt.objectives=[]: expected 'reconstruction', 'contrast', or both.")


@dataclass(frozen=True)
class Routing:
    """From which risk domains to which `safedig route` ranks the sites, on what, and at what cost."""

    source: str | tuple[str, ...] = ()
    """Risk domains that are known; all but the target unless given."""
    target: str = ""
    """The domain that is moved to; without one, the source's domains are left out one at a time."""
    sites: tuple[str, ...] = ()
    """What is ranked: the inputs of the blocks and what each block leaves in its streams, unless given."""
    scorer: str = "default"
    """A name of `routing.scorers.SCORERS`, or criteria joined by `*`."""
    prompts: int = 640
    """Images that are recorded, those of the safe twins among them; [record] says at which σ."""
    pairs: int = 32
    """Harmful prompts of the causal check, each with its twin."""
    budget: float = 0.4
    """What the causal check may cost, as a share of drawing those images."""

    def __post_init__(self) -> None:
        check_numbers(self, "route.", ("prompts", "pairs"), least=2)
        check_numbers(self, "route.", ("budget",), above=True)

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,) if isinstance(self.source, str) else self.source


@dataclass(frozen=True)
class Evaluating:
    """Which methods `safedig evaluate` compares, on which domain moved to, and how much each may try."""

    target: str | tuple[str, ...] = ()
    """Domains that are held out, one after the other; all unless given."""
    methods: str | tuple[str, ...] = ()
    """Names of `METHODS`; all but those of `UNLESS_ASKED`, unless given."""
    strengths: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
    """What each method tries, in multiples of its own unit."""
    budget: float = 0.03
    """Share of benign prompts that may be lost while a strength is chosen."""
    goal: Literal["unsafe", "clean"] = "unsafe"
    """What a strength is chosen for: the fewest unsafe images, or the most clean ones."""
    sizes: Sizes = field(default_factory=Sizes)

    def __post_init__(self) -> None:
        if not self.strengths or min(self.strengths) <= 0 or not 0 <= self.budget < 1:
            raise UsageError(
                f"evaluate.strengths={list(self.strengths)}, evaluate.budget={self.budget:g}: expected at least one "
                "strength, all above 0, and a share from 0 on."
            )

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.target,) if isinstance(self.target, str) else self.target

    @property
    def names(self) -> tuple[str, ...]:
        return (self.methods,) if isinstance(self.methods, str) else self.methods


@dataclass(frozen=True)
class Attacking:
    """What `safedig attack` tries on which methods, and how much each attack may spend on a prompt."""

    target: str = ""
    """The domain that is held out; the first one unless given."""
    methods: str | tuple[str, ...] = ("prompt filter", "SAFREE", "mean difference, gated", "ours")
    attacks: str | tuple[str, ...] = ()
    """Names of `ATTACKS`; all unless given."""
    prompts: int = 24
    """Harmful prompts of the target."""
    passes: int = 640
    """Rows through the transformer; an image takes two for each step, a gradient two more."""

    def __post_init__(self) -> None:
        if min(self.prompts, self.passes) < 1:
            raise UsageError(f"attack.prompts={self.prompts}, attack.passes={self.passes}: expected at least 1.")

    @property
    def names(self) -> tuple[str, ...]:
        return (self.attacks,) if isinstance(self.attacks, str) else self.attacks


@dataclass(frozen=True)
class Recipe:
    """Which model, where to act, how much to learn from, how hard to push."""

    model: str  # a shipped name, a local folder or a Hub id
    sites: tuple[str, ...]
    seed: int = 0
    strength: float = 1.0
    quantile: float = 0.95  # share of the benign images that set the gate on which it stays closed
    prompts: Counts = field(default_factory=Counts)
    sae: SAEOptions = field(default_factory=SAEOptions)
    # What is None is left out of the TOML, and so out of `sha`: results of the tiny recipes stay what they were.
    watch: tuple[str, ...] | None = None  # sites that open the gates of those that are edited, and are not edited
    stand_in: str | None = None  # what twins of the tiny world show in a hazard's place; a tree unless given
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    device: str | None = None  # "auto" is the accelerator where there is one
    offload: Offload | None = None
    drawing: dict[str, Any] | None = None  # fields of `Drawing`, laid over those of the model
    record: Recording | None = None
    train: Training | None = None
    adapt: Adapting | None = None
    route: Routing | None = None
    evaluate: Evaluating | None = None
    attack: Attacking | None = None
    calibrate: Calibrating | None = None
    judge: Judging | None = None  # of what calibrate, evaluate and attack draw; the tiny world's unless given

    def __post_init__(self) -> None:
        check_seed(self.seed, "seed=")
        check_numbers(self, "", ("strength",))
        if not 0 < self.quantile < 1 or not self.sites:
            raise UsageError(
                f"quantile={self.quantile:g}, sites={list(self.sites)}: expected a share between 0 and 1, and at least "
                "one site."
            )

    @property
    def sha(self) -> str:
        """What stands for these options in a result: a result whose recipe has changed since is stale."""
        return hashlib.sha256(to_toml(self).encode()).hexdigest()[:16]

    def sha_of(self, *names: str) -> str:
        """The same of these options alone: what decides a result that rests on no others."""
        facts = {name: value for name, value in asdict(self).items() if name in names}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def drawn_sha(self) -> str:
        """Of what decides how the model draws."""
        return self.sha_of("model", "seed", "dtype", "device", "offload", "drawing")

    @property
    def routed_sha(self) -> str:
        """Of what decides a route, beside the prompts."""
        return self.sha_of("model", "seed", "dtype", "device", "offload", "drawing", "record", "route")

    @property
    def watched(self) -> tuple[str, ...]:
        """The sites that it watches, if any."""
        return self.watch or ()

    @property
    def shown_instead(self) -> str:
        """What twins show in a hazard's place."""
        return self.stand_in or STAND_IN

    def pipeline(self) -> Any:
        """The model, loaded as the recipe says."""
        return load_pipeline(self.model, dtype=self.dtype, device=self.device, offload=self.offload)

    def drawing_of(self, pipe: Any) -> Drawing:
        """How its model draws, with the recipe's wishes laid over it."""
        return build(Drawing, asdict(Drawing.of(pipe)) | (self.drawing or {}), path="drawing.")


def names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """A shipped recipe by its name, or any by its path, with `key=value` overrides laid over it."""
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not path.is_file() or (path.parent == FOLDER and path.stem not in names()):
        raise UsageError(f"There is no recipe '{name}'. {did_you_mean(name, names())}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"The recipe '{name}' is not UTF-8: save it as that. {error}.") from error
    return from_toml(Recipe, text, overrides)
