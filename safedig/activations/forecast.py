"""What a recording will take, in bytes and hours, from drawing its first batch; too small a disk is refused."""

from collections.abc import Sequence
from dataclasses import dataclass

from .address import Address, StoreError
from .stream import Batch

HOUR = 3600.0


@dataclass(frozen=True)
class Forecast:
    """Of what is still to be drawn."""

    images: int
    bytes: int
    """On disk, of all processes together."""
    seconds: float
    """An upper estimate: the first batch starts cold."""

    @classmethod
    def of(cls, batches: Sequence[Batch], drawn: int, seconds: float, images: int, processes: int) -> "Forecast":
        """What `drawn` images have taken, scaled to `images` that the processes share."""
        size = sum(batch.x.nbytes + 4 * len(batch.token) for batch in batches)
        return cls(images, round(size / drawn * images), seconds / drawn * images / processes)

    def __str__(self) -> str:
        seconds = f"{self.seconds:.0f} s" if self.seconds < HOUR / 10 else f"{self.seconds / HOUR:.1f} h"
        return f"{self.images} images to record: {amount(self.bytes)} in about {seconds}."

    def check(self, address: Address) -> None:
        """Raise where the disk has no room for it."""
        free = address.free()
        if free is not None and free < self.bytes:
            raise StoreError(
                f"The recording needs {amount(self.bytes)} and '{address}' has {amount(free)} left: "
                "free some, give another store, or record fewer tokens, sites or sigmas."
            )


def amount(size: int) -> str:
    """Bytes in the unit that suits them."""
    unit, name = next(
        (unit, name) for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if size >= unit or unit == 1e3
    )
    return f"{size / unit:.3g} {name}"
