"""What a recording will take, in bytes and hours, from drawing two of its images; too small a disk is refused."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from .address import Address, StoreError
from .plan import Part
from .stream import Batch

HOUR = 3600.0
_PROBED = 2  # images: a prompt and its safe twin


@dataclass(frozen=True)
class Forecast:
    """Of what is still to be drawn."""

    images: int
    bytes: int
    """On disk, of all processes together."""
    seconds: float
    """An upper estimate: the probe starts cold, and two images use a device less well than a batch."""

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


def probe(draw: Callable[[Part], list[Batch]], part: Part, images: int, processes: int) -> Forecast:
    """Draw two images of a part and scale what they took to `images`, shared by `processes`."""
    few = Part(part.images[:_PROBED], [pair for pair in part.followers if max(pair) < _PROBED])
    started = time.perf_counter()
    batches = draw(few)
    seconds = (time.perf_counter() - started) / len(few.images)
    bytes_each = sum(batch.x.nbytes + 4 * len(batch.token) for batch in batches) / len(few.images)
    return Forecast(images, round(bytes_each * images), seconds * images / processes)


def amount(size: int) -> str:
    """Bytes in the unit that suits them."""
    unit, name = next(
        (unit, name) for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if size >= unit or unit == 1e3
    )
    return f"{size / unit:.3g} {name}"
