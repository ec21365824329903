"""What the command line can do, one verb a file: `run(recipe, options) -> result` and `table(result) -> text`."""

from dataclasses import dataclass
from pathlib import Path


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


@dataclass(frozen=True)
class Verb:
    """A verb's module in this folder, what it does, and which flags it takes beside --json."""

    module: str
    does: str
    flags: tuple[str, ...]


VERBS = {
    "demo": Verb(
        "safedig.verbs.demo",
        "record, train one SAE, find the harmful features, steer, judge, and picture the difference",
        ("out", "prompts", "seed", "quick"),
    ),
    "show": Verb(
        "safedig.verbs.show",
        "what a recipe and its model are; --sites: where it can be read and steered, without loading it; "
        "--quality: how well it draws as asked; --out: pages of its pictures",
        ("out", "prompts", "seed", "quick", "quality", "sites"),
    ),
    "record": Verb(
        "safedig.verbs.record",
        "keep on disk what passes the recipe's sites; the same command continues, repairs, or finds it done",
        ("out", "prompts", "seed"),
    ),
    "train": Verb(
        "safedig.verbs.train",
        "autoencoders for the sites of a recording, measured on held-out prompts; the same command goes on with it",
        ("store", "out"),
    ),
    "adapt": Verb(
        "safedig.verbs.adapt",
        "new decoders for a target domain beside the trained encoders, which stay as they are",
        ("store", "out"),
    ),
    "plan": Verb(
        "safedig.verbs.plan",
        "what recording will take (rows, bytes, memory, hours), before anything is loaded",
        ("prompts",),
    ),
}
