"""Gradient search on the words of a prompt, through the text encoders and the steered model.

White-box, in the manner of UnlearnDiffAtk (arXiv 2310.11868) and HotFlip (arXiv 1712.06751): the gradient at the input
embeddings ranks every exchange of one word for another; the best few are tried by their loss, and the best one stays.
Words are those that are one token to every text encoder.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor, nn

from ..methods.text import encode
from .attack import Candidate, Row
from .objective import Objective
from .victim import Victim


@dataclass(frozen=True)
class TokenSearch:
    white_box: ClassVar[bool] = True
    tiny_world: ClassVar[bool] = False
    name: str = "token search"
    free: int = 2
    """Words added at the end, which may become anything."""
    tried: int = 8
    """Exchanges whose loss is looked at in each step."""
    steps: int = 2
    """Exchanges between two images."""

    def candidates(self, victim: Victim, row: Row) -> Iterator[list[Candidate]]:
        yield [Candidate(row["prompt"], row["seed"])]
        vocabulary = Vocabulary(victim.pipe)
        objective = Objective(victim, row)
        words = [*row["prompt"].split(), *vocabulary.words[: self.free]]
        while True:
            for _ in range(self.steps):
                words = self._exchanged(victim, objective, vocabulary, words)
            yield [Candidate(" ".join(words), row["seed"])]

    def _exchanged(self, victim: Victim, objective: Objective, vocabulary: "Vocabulary", words: list[str]) -> list[str]:
        """The prompt with the exchange of least loss, or as it was."""
        length = victim.drawing.max_sequence_length
        with victim.acting.apply(victim.pipe), torch.enable_grad(), vocabulary.watched() as inputs:
            loss = objective.loss(encode(victim.pipe, [" ".join(words)], length)).sum()
            gradients = objective.gradients(loss, inputs())
        ranked = vocabulary.exchanges([one.detach() for one in gradients], words)[: self.tried]
        tried = [words, *([*words[:at], new, *words[at + 1 :]] for at, new in ranked)]
        with victim.acting.apply(victim.pipe), torch.no_grad():
            losses = objective.loss(encode(victim.pipe, [" ".join(one) for one in tried], length))
        return tried[int(losses.argmin())]


class Vocabulary:
    """The words of all tokenizers, and where they lie in each encoder's table."""

    def __init__(self, pipe: Any):
        names = [(f"tokenizer{end}", f"text_encoder{end}") for end in ("", "_2", "_3")]
        pairs = [(getattr(pipe, one, None), getattr(pipe, other, None)) for one, other in names]
        self.encoders = [(tokenizer, encoder) for tokenizer, encoder in pairs if encoder is not None]
        known = [_single_words(tokenizer) for tokenizer, _ in self.encoders]
        self.words = sorted(set.intersection(*(set(one) for one in known)))
        self.tables = [_table(encoder) for _, encoder in self.encoders]
        self.rows: list[Int[Tensor, " word"]] = [torch.tensor([one[word] for word in self.words]) for one in known]

    def watched(self) -> "_Watched":
        return _Watched(self.tables)

    def exchanges(self, gradients: list[Tensor], words: list[str]) -> list[tuple[int, str]]:
        """(place, new word), the steepest descent first."""
        slope = torch.zeros(len(words), len(self.words))
        prompt = " ".join(words)
        for (tokenizer, _), table, rows, gradient in zip(self.encoders, self.tables, self.rows, gradients, strict=True):
            words_of, gradient = table.weight.detach().cpu()[rows].float(), gradient.cpu().float()
            for at, token in enumerate(_first_tokens(tokenizer, prompt)):
                if token is not None and token < gradient.shape[1]:
                    slope[at] += words_of @ gradient[0, token]
        order = slope.flatten().argsort(stable=True).tolist()
        places = ((index // len(self.words), self.words[index % len(self.words)]) for index in order)
        return [(at, word) for at, word in places if words[at] != word]


class _Watched:
    """The first output of each table of embeddings while it lasts, as leaves that gradients reach, in their order."""

    def __init__(self, tables: list[nn.Embedding]):
        self.tables, self.stack = tables, ExitStack()
        self.seen: dict[nn.Module, Tensor] = {}

    def leaf(self, table: nn.Module, args: Any, output: Tensor) -> Tensor:
        if table in self.seen:
            return output
        self.seen[table] = output.detach().clone().requires_grad_()
        return self.seen[table]

    def __enter__(self) -> Callable[[], list[Tensor]]:
        for table in self.tables:
            self.stack.callback(table.register_forward_hook(self.leaf).remove)
        return lambda: [self.seen[table] for table in self.tables]

    def __exit__(self, *_: Any) -> None:
        self.stack.close()


def _table(encoder: nn.Module) -> nn.Embedding:
    """The one that is read: T5 keeps another copy of the same size outside its encoder."""
    return encoder.encoder.embed_tokens if hasattr(encoder, "shared") else encoder.get_input_embeddings()  # type: ignore[union-attr,return-value]


def _single_words(tokenizer: Any) -> dict[str, int]:
    """Whole words of letters that are one token."""
    found = {}
    for piece, index in tokenizer.get_vocab().items():
        word = piece.removeprefix("\u2581") if piece.startswith("\u2581") else piece.removesuffix("</w>")
        if word != piece and re.fullmatch("[a-z]{2,}", word):
            found[word] = index
    return found


def _first_tokens(tokenizer: Any, prompt: str) -> list[int | None]:
    """The place of each word's first token."""
    offsets = tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
    starts = [found.start() for found in re.finditer(r"\S+", prompt)]
    places = {low: at for at, (low, high) in reversed(list(enumerate(offsets))) if high > low}
    return [places.get(start) for start in starts]
