"""SafeDIG's two operators to the letter, at every token: the published form of what ours has as gated deltas.

arXiv 2605.30049: Repel a' = a − γ · (D_T(z ⊙ M) − a), Blend a' = (1 − β) · a + β · D_T(E(a)), D_T the decoder adapted
to the target, γ = β = 0.2. Strength 0 changes no bit; any other moves tokens in which nothing harmful fires as well.
"""

from dataclasses import dataclass, replace

from ...steering.edits import Blend, Repel
from ...steering.steering import Steering
from .lesson import Lesson
from .method import Learnt

OPEN = -1.0  # codes add up to no less than 0: no token is left out


@dataclass(frozen=True)
class PaperForm:
    """Strength is γ, or β."""

    operator: type[Repel] | type[Blend] = Repel
    name: str = "SafeDIG paper form, Repel"
    unit: float = 0.2

    def learn(self, lesson: Lesson) -> Learnt:
        open_ = {site: replace(one, threshold=OPEN) for site, one in lesson.features.items()}
        return lambda strength: Steering(lesson.reconstruction, open_, [self.operator(strength, "paper")])


REPEL = PaperForm()
BLEND = replace(REPEL, operator=Blend, name="SafeDIG paper form, Blend")
