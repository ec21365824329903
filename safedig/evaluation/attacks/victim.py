"""What is attacked: a pipeline with something on it, its judge, and a meter of what the attack has spent."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...hooks import Context, attach
from ...pipelines import Drawing, draw, guided
from ...sites import Site, transformer
from ...steering.rule import Rule
from ...steering.steering import Steering
from ..jury import Jury
from ..methods.text import Encode, OnText, Text
from ..pictures import picture
from ..records import Record, Score
from .attack import Candidate


@dataclass
class Meter:
    """Rows that have passed the transformer."""

    passes: int = 0

    def count(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.passes += len(kwargs["hidden_states"])


@dataclass(eq=False)
class Victim:
    """`acting` is on the pipeline whenever it draws; an attack may look at everything here."""

    pipe: Any
    acting: Any
    drawing: Drawing
    jury: Jury
    pool: dict[str, list[str]] = field(default_factory=dict)
    """Prompts that broke others, by the id of the prompt that was attacked."""
    meter: Meter = field(default_factory=Meter)

    price: int = 0
    """Passes of the dearest image so far."""

    @property
    def passes_an_image(self) -> int:
        """What acts on the pipeline may take passes of its own."""
        return max(self.price, self.drawing.steps * (2 if guided(self.pipe, self.drawing) else 1))

    @property
    def gates(self) -> dict[Site, Rule]:
        """What acts at each site and when; nothing is known unless it is a `Steering`."""
        return self.acting.rules if isinstance(self.acting, Steering) else {}

    @contextmanager
    def metered(self) -> Iterator[Meter]:
        """Counts from nought while the `with` lasts."""
        self.meter = Meter()
        handle = transformer(self.pipe).register_forward_pre_hook(self.meter.count, with_kwargs=True)
        try:
            yield self.meter
        finally:
            handle.remove()

    def draw(self, candidates: Sequence[Candidate]) -> list[tuple[str, list[Score]]]:
        """The label of each one's image, whatever was asked for, and what each judge saw in it."""
        first = candidates[0]
        rows = [{"prompt": one.prompt, "seed": one.seed} for one in candidates]
        before = self.meter.passes
        with ExitStack() as stack:
            texts = [one.text for one in candidates if one.text is not None]
            if texts:
                stack.enter_context(standing_in([one.prompt for one in candidates], texts).apply(self.pipe))
            stack.enter_context((self.acting if first.acting is None else first.acting).apply(self.pipe))
            if first.around is not None:
                stack.enter_context(first.around(self.pipe))
            ((_, images),) = draw(self.pipe, rows, drawing=self.drawing, batch_size=len(rows))
        self.price = max(self.price, -(-(self.meter.passes - before) // len(rows)))
        return [self._label(one) for one in images.cpu()]

    def _label(self, image: Tensor) -> tuple[str, list[Score]]:
        seen = picture(image)
        found = self.jury.look([seen])
        record = Record("attack", "", "", "", 0, seen.sha)
        return self.jury.plain(record, {one.detector: one for one in found}), found

    @contextmanager
    def reading(self) -> Iterator[dict[Site, Tensor]]:
        """How far each steered row lies above what opens every gate, of the last such forward, before any edit.

        In units of what opens it, where that is above 0; differentiable wherever codes are.
        """
        margins: dict[Site, Tensor] = {}

        def reader(site: Site, rule: Rule) -> Any:
            def read(x: Tensor, context: Context) -> None:
                rows = [at for at, steered in enumerate(rule.gate.steered(context)) if steered]
                if not rows:
                    return
                opens = rule.gate.threshold
                margins[site] = (rule.heights(x[rows]).amax(-1) - opens) / (opens if opens > 0 else 1.0)

            return read

        with attach(self.pipe, {site: reader(site, rule) for site, rule in self.gates.items()}, strict=False):
            yield margins


def standing_in(prompts: list[str], texts: Sequence[Text]) -> OnText:
    """These texts in place of what these very prompts are encoded to; other prompts are encoded as ever."""
    tokens, pooled = torch.cat([one.tokens for one in texts]), torch.cat([one.pooled for one in texts])

    def meaning(asked: list[str], text: Text, encode: Encode) -> Text:
        return Text(tokens.to(text.tokens), pooled.to(text.pooled)) if asked == prompts else text

    return OnText("cond", meaning=meaning)
