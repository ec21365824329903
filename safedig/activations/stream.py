"""A recording as its readers see it: labelled batches, and an iterable of them that starts anew at every `for`."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from jaxtyping import Float, Int
from torch import Tensor

from ..config import UsageError
from ..hooks import Row
from ..sites import Site

if TYPE_CHECKING:
    from .store import Store

Prompts = Iterable[Any]
"""Rows of the prompt columns: a `datasets` Dataset, or mappings."""
Image = tuple[str, int]
"""Prompt id and seed."""
Stream = Callable[[list[Site], set[str]], Iterable["Batch"]]


@dataclass(frozen=True)
class Batch:
    """What passed one site in one step; a row is one token of one image, an image's rows are adjacent."""

    site: Site
    step: int
    sigma: float
    prompt_ids: list[str]
    seeds: list[int]
    row: tuple[Row, ...]
    token: Int[Tensor, " rows"]
    """−1 for a vector that stands for the whole image."""
    x: Float[Tensor, "rows d_in"]

    def segments(self) -> list[tuple[Image, Row, slice]]:
        """Each image, whether it is its conditional or unconditional row, and its rows here."""
        keys = list(zip(self.prompt_ids, self.seeds, self.row, strict=True))
        starts = [at for at in range(len(keys)) if at == 0 or keys[at] != keys[at - 1]]
        spans = zip(starts, [*starts[1:], len(keys)], strict=True)
        return [(keys[start][:2], keys[start][2], slice(start, stop)) for start, stop in spans]

    def images(self, row: Row = "cond") -> list[tuple[Image, slice]]:
        """Each image, in its conditional or unconditional row, and its rows here."""
        return [(image, rows) for image, label, rows in self.segments() if label == row]

    def of(self, prompt_ids: set[str]) -> "Batch | None":
        """The rows of these prompts, or None if there are none."""
        keep = [at for at, name in enumerate(self.prompt_ids) if name in prompt_ids]
        if len(keep) in (0, len(self.prompt_ids)):
            return self if keep else None
        return replace(
            self,
            prompt_ids=[self.prompt_ids[at] for at in keep],
            seeds=[self.seeds[at] for at in keep],
            row=tuple(self.row[at] for at in keep),
            token=self.token[keep],
            x=self.x[keep],
        )


class Activations:
    """A stream of batches that starts anew at every `for`; `prompts` are the rows that it draws, in its order."""

    def __init__(
        self,
        stream: Stream,
        sites: list[Site],
        prompts: list[dict[str, Any]],
        model: str,
        store: "Store | None" = None,
    ):
        self._stream = stream
        self.sites = sites
        self.prompts = prompts
        self.model = model
        """Fingerprint of the pipeline that was recorded."""
        self.store = store
        """Where it lies on disk, if it does."""

    def __iter__(self) -> Iterator[Batch]:
        ids = {row["id"] for row in self.prompts}
        for batch in self._stream(self.sites, ids):
            if batch.site in self.sites and (part := batch.of(ids)) is not None:
                yield part

    def at(self, *sites: Site) -> "Activations":
        """The same stream at one or some of its sites."""
        for site in sites:
            if site not in self.sites:
                raise UsageError(f"'{site}' was not recorded: there are {', '.join(map(str, self.sites))}.")
        return Activations(self._stream, list(sites), self.prompts, self.model, self.store)

    def of(self, prompts: Prompts) -> "Activations":
        """The same stream for the prompts with these ids."""
        ids = {row["id"] for row in prompts}
        kept = [row for row in self.prompts if row["id"] in ids]
        if not kept:
            raise UsageError(f"None of the {len(ids)} prompts was recorded: record them first.")
        return Activations(self._stream, self.sites, kept, self.model, self.store)

    def in_memory(self) -> "Activations":
        """Run once and keep everything, so that later passes cost nothing; bytes = rows · d_in · 4 in float32."""
        kept = list(self)
        return Activations(lambda sites, ids: kept, self.sites, self.prompts, self.model, self.store)
