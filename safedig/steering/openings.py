"""Which images a steering would touch, told from a recording of the unsteered pipeline.

Where no gate opens on the way that an image takes unsteered, nothing is changed, and it takes that way: all other
images are those of the unsteered pipeline to the bit.
"""

from jaxtyping import Float
from torch import Tensor

from ..activations.record import Activations, Image
from .rule import Rule
from .steering import Steering

_SLACK = 1e-4  # of a dose of 1, or of a sum of codes: what batches of another size may round differently is open


def touched(steering: Steering, activations: Activations) -> set[Image]:
    """The recorded images in which a gate opens for a token at any recorded σ, in the window or not."""
    found: set[Image] = set()
    for site, rule in steering.rules.items():
        for batch in activations.at(site):
            found |= {image for image, rows in batch.images() if _opens(rule, batch.x[rows])}
    return found


def _opens(rule: Rule, x: Float[Tensor, "token d_in"]) -> bool:
    threshold = rule.gate.threshold
    unit = abs(threshold) if rule.material.dose is None else 1.0
    return bool(rule.heights(x[None]).amax() > threshold - _SLACK * unit)
