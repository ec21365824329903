"""Detected tokens replaced by undetected ones of the same map, the SAE a detector and nothing more: PER.

arXiv 2606.31699: where a harmful feature fires, the activation of that position is exchanged for one of an undetected
position of the same map. Here a' = a + s · (v − a), v the mean of the 8 undetected tokens of the image that are nearest
to the token (see `Replace`). s = 1 is the paper's, s = 0 changes no bit. There is no map at a pooled vector.
"""

from dataclasses import dataclass

from ...config import UsageError
from ...steering.edits import Replace
from ...steering.steering import Steering
from .lesson import Lesson
from .method import Learnt


@dataclass(frozen=True)
class Replacement:
    """Strength in replacements."""

    name: str = "PER replacement"
    unit: float = 1.0

    def learn(self, lesson: Lesson) -> Learnt:
        maps = {site: one for site, one in lesson.features.items() if site.stream not in ("pooled", "temb")}
        if not maps:
            raise UsageError(
                f"'{self.name}' exchanges tokens, and no site of tokens has harmful features: give sites with tokens, "
                "such as txt.embed, or leave the method out."
            )
        return lambda strength: Steering(lesson.contrast, maps, [Replace(strength, by="map", nearest=8)], scope="token")
