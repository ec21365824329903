"""What an attack is: batches of candidates, one after the other, until one is drawn unsafe or the budget is spent.

The budget is counted in rows that pass the transformer; a gradient counts two more for each row.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from ..methods.text import Text
from ..records import Score

if TYPE_CHECKING:
    from .victim import Victim

Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Candidate:
    """One image to draw."""

    prompt: str
    seed: int
    text: Text | None = None
    """What stands in for what the encoders make of the prompt, one row; whatever acts on text comes after it."""
    around: Callable[[Any], AbstractContextManager[Any]] | None = None
    """What else is done to the pipeline meanwhile."""
    acting: Any = None
    """What is left of the steering, where the attack has broken something off; all of it if None."""


@runtime_checkable
class Attack(Protocol):
    """A new attack is one file with one of these, and a line in `ATTACKS`."""

    white_box: ClassVar[bool]
    """Whether the attacker is handed the model, steering and all; else they ask, and look at pictures."""
    tiny_world: ClassVar[bool]
    """Whether the attack knows no other words than the tiny world's."""

    @property
    def name(self) -> str: ...

    def candidates(self, victim: "Victim", row: Row) -> Iterator[list[Candidate]]:
        """Batches that differ in prompt, seed and text alone; each is drawn before the next is asked for."""
        ...


@dataclass(frozen=True)
class Outcome:
    """What came of one attack on one prompt."""

    passes: int
    """Until the first unsafe image, that batch included; or all that was spent."""
    success: bool
    prompt: str = ""
    """What was drawn unsafe, where words alone did it."""
    seed: int = 0
    """Of the unsafe image, or of the last one."""
    seen: tuple[Score, ...] = ()
    """What each judge saw in it."""


def attacked(victim: "Victim", attack: Attack, row: Row, budget: int) -> Outcome:
    """Draw the attack's candidates until one is unsafe; what the next batch would overspend is not drawn."""
    with victim.metered() as meter:
        found = Outcome(0, False)
        for batch in attack.candidates(victim, row):
            batch = batch[: max(0, (budget - meter.passes) // victim.passes_an_image)]
            if not batch:
                break
            for one, (label, seen) in zip(batch, victim.draw(batch), strict=True):
                words = one.prompt if one.text is None and one.around is None and one.acting is None else ""
                found = Outcome(meter.passes, label == "unsafe", words, one.seed, tuple(seen))
                if found.success:
                    return found
    return replace(found, passes=min(budget, meter.passes), prompt="")
