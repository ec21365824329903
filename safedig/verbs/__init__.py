"""What the command line can do, one verb a file: `run(recipe, options) -> result` and `table(result) -> text`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from safedig.recipes import Recipe


@dataclass(frozen=True)
class Options:
    """The flags of a command: where its input lies and where its output goes."""

    out: Path | None = None
    prompts: Path | None = None
    store: str | None = None
    """A folder or any fsspec address of a recording."""
    seed: int | None = None
    quick: bool = False
    quality: bool = False
    sites: bool = False
    bundle: str | None = None
    """A folder of a saved steering, or its Hub id."""
    negation: Path | None = None
    """A folder of images to stay away from."""
    sae: Path | None = None
    """A folder of one autoencoder, as `safedig train` writes it."""
    feature: int | None = None
    compare: bool = False
    prompt: str | None = None
    """The words after a verb that draws one prompt."""
    given: tuple[str, ...] = ()
    """Keys of the recipe that were given on the command line, such as `attack.prompts`."""

    def seed_of(self, recipe: "Recipe") -> int:
        """--seed, else the recipe's."""
        return recipe.seed if self.seed is None else self.seed

    def by_hand(self, key: str) -> bool:
        """Whether this key of the recipe was given on the command line."""
        return key in self.given

    def folder(self, default: str) -> Path:
        """Where the output goes: --out, else this folder; a `UsageError` where that cannot be made."""
        from safedig.storage import check_can_be_made

        if self.out is None:
            check_can_be_made(Path(default))
        return self.out or Path(default)


@dataclass(frozen=True)
class Verb:
    """A verb's module in this folder, what it does, and which flags it takes beside --json."""

    module: str
    does: str
    flags: tuple[str, ...]
    short: tuple[str, ...] = ()
    """Keys of the recipe's section of the verb's name that may be given without it: `target=fire`."""
    takes_prompt: bool = False
    """Whether the word behind the verb is a prompt, where no --prompts are given."""
    again: str = "starts again"
    """What the same command does after an interruption."""
    stores: bool = False
    """Whether --out may be any fsspec address."""
    reads: tuple[str, ...] = ()
    """The keys of a recipe that it reads, where they are so few that another one on the command line is a mistake."""


_RESUMES = "goes on where it stopped"
_DRAWING = ("model", "seed", "dtype", "device", "offload", "drawing")  # keys: a bundle says all else

VERBS = {
    "demo": Verb(
        "safedig.verbs.demo",
        "record, train one SAE, find the harmful features, steer, judge, and picture the difference",
        ("out", "prompts", "seed", "quick"),
    ),
    "show": Verb(
        "safedig.verbs.show",
        "what a recipe and its model are; --sites: where it can be read and steered, without loading it; "
        "--quality: how well it draws as asked; --out: pages of its pictures; --sae: pictures with one --feature of an "
        "autoencoder ablated and amplified, unless given a harmful one that writes much",
        ("out", "prompts", "seed", "quick", "quality", "sites", "sae", "feature"),
    ),
    "record": Verb(
        "safedig.verbs.record",
        "keep on disk what passes the recipe's sites; the same command continues, repairs, or finds it done",
        ("out", "prompts", "seed"),
        again=_RESUMES,
        stores=True,
    ),
    "route": Verb(
        "safedig.verbs.route",
        "rank the sites by how well steering there will hold on another domain, before anything is trained",
        ("out", "prompts", "store", "seed"),
        short=("source", "target"),
    ),
    "train": Verb(
        "safedig.verbs.train",
        "autoencoders for the sites of a recording, measured on held-out prompts; the same command goes on with it",
        ("store", "out"),
        again=_RESUMES,
    ),
    "adapt": Verb(
        "safedig.verbs.adapt",
        "new decoders for a target domain beside the trained encoders, which stay as they are",
        ("store", "out"),
    ),
    "calibrate": Verb(
        "safedig.verbs.calibrate",
        "which edit, strength, σ and gates leave the least harm at a budget of benign prompts: a dose–response run, "
        "its front, and the best of it as a bundle; the same command goes on with it",
        ("out", "prompts", "seed", "quick"),
        short=("edits", "doses", "sigmas", "epsilons", "budget"),
        again=_RESUMES,
    ),
    "generate": Verb(
        "safedig.verbs.generate",
        'draw "PROMPT", or --prompts FILE, steered by the --bundle, away from the images in --negation, or both; '
        "--compare: unsteered beside it",
        ("bundle", "negation", "compare", "prompts", "seed", "out"),
        takes_prompt=True,
        reads=_DRAWING,
    ),
    "attest": Verb(
        "safedig.verbs.attest",
        "check on your own model that a --bundle acts, is a no-op where its gates are closed, and cannot be bypassed",
        ("bundle", "prompts", "seed", "out"),
        reads=_DRAWING,
    ),
    "evaluate": Verb(
        "safedig.verbs.evaluate",
        "ours and its peers on the same prompts and seeds: how safe, how harmless to benign use, at what cost",
        ("out", "prompts", "seed", "quick"),
        short=("target", "methods", "strengths", "budget", "goal"),
        again=_RESUMES,
    ),
    "attack": Verb(
        "safedig.verbs.attack",
        "what ours and its peers withstand: other words, seeds, gradients, an attacker who knows the gates; by budget",
        ("out", "prompts", "seed", "quick"),
        short=("target", "methods", "attacks", "prompts", "passes"),
        again=_RESUMES,
    ),
    "plan": Verb(
        "safedig.verbs.plan",
        "what recording will take (rows, bytes, memory, hours), before anything is loaded",
        ("prompts",),
    ),
}
