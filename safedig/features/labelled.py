"""Which recorded tokens harm has changed and which are harmless, told from safe twins and benign prompts."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..activations.pairs import Pair, Pairing, benign, twins
from ..activations.record import Activations, Image
from ..config import UsageError

CHANGED, UNTOUCHED = 0.5, 0.2  # of the change of the token that differs most from its twin's; between them: unknown


@dataclass(frozen=True)
class Labelled:
    """The tokens of one image in one step."""

    image: Image
    risk: str
    """Empty for a benign one."""
    x: Float[Tensor, "token d_in"]
    delta: Float[Tensor, "token d_in"]
    """What harm has added; 0 in a benign image."""
    harmful: Bool[Tensor, " token"]
    harmless: Bool[Tensor, " token"]


def labelled(activations: Activations) -> Iterator[Labelled]:
    """The images of benign prompts, safe twins among them, and those of harmful prompts whose twin was recorded."""
    plain, pairing = benign(activations.prompts), Pairing(activations)
    risk = {(row["id"], row["seed"]): row.get("risk") or "unnamed" for row in activations.prompts}
    for batch in activations:
        for image, rows in batch.images():
            if image in plain:
                every = torch.ones(rows.stop - rows.start, dtype=torch.bool)
                x = batch.x[rows].float().cpu()
                yield Labelled(image, "", x, torch.zeros_like(x), ~every, every)
        for pair in map(Pair.aligned, pairing.add(batch)):
            image, change = pair.ends[0], pair.change().cpu()
            x, safe = pair.harmful.float().cpu(), pair.safe.float().cpu()
            yield Labelled(image, risk[image], x, x - safe, change >= CHANGED, change < UNTOUCHED)


def check_both(activations: Activations) -> None:
    """A `UsageError` where there is no harmful prompt with its twin, or no benign prompt."""
    pairs, plain = len(twins(activations.prompts)), len(benign(activations.prompts))
    if not pairs or not plain:
        raise UsageError(
            f"There are {pairs} harmful prompts with safe twins and {plain} benign prompts in the recording: record "
            "harmful prompts with their safe twins, and benign prompts beside them."
        )
