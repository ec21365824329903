"""What a method does to text on its way in: to the words of a prompt, or to what the text encoders make of them.

`encode_prompt` is answered for on the instance: Stable Diffusion 3 asks once for a prompt and its negative one, FLUX
once for each, the prompt first.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from ...shadow import answer, listen


@dataclass(frozen=True)
class Text:
    """What a pipeline's text encoders make of some prompts."""

    tokens: Float[Tensor, "prompt token d"]
    pooled: Float[Tensor, "prompt d_pooled"]


Encode = Callable[[list[str]], Text]
Words = Callable[[list[str]], list[str]]
Meaning = Callable[[list[str], Text, Encode], Text]
"""From prompts and what they were encoded to; with the encoder, as this call of the pipeline uses it."""


@dataclass(frozen=True)
class OnText:
    """Acts on the prompts, or on the negative ones, of every call of a pipeline."""

    row: Literal["cond", "uncond"] = "cond"
    words: Words | None = None
    meaning: Meaning | None = None

    @contextmanager
    def apply(self, pipe: Any) -> Iterator[None]:
        asked = 0

        def begin() -> None:
            nonlocal asked
            asked = 0

        def encode(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            nonlocal asked
            asked += 1
            given = inspect.signature(inner).bind(*args, **kwargs).arguments
            both = "negative_prompt" in inspect.signature(inner).parameters
            if not both and (asked == 1) != (self.row == "cond"):
                return inner(**given)
            return self._encoded(inner, given, "negative_prompt" if both and self.row == "uncond" else "prompt")

        with listen(pipe, "check_inputs", before=begin), answer(pipe, "encode_prompt", encode):
            yield

    def _encoded(self, inner: Callable[..., Any], given: dict[str, Any], name: str) -> tuple[Any, ...]:
        if given.get("prompt") is None or given.get(f"{name}_embeds") is not None:
            return inner(**given)
        count = 1 if isinstance(given["prompt"], str) else len(given["prompt"])
        asked = given.get(name) or ""  # without a negative prompt the empty one is guided from
        prompts = count * [asked] if isinstance(asked, str) else list(asked)
        said = prompts if self.words is None else self.words(prompts)
        result = inner(**(given | {name: said}))
        if self.meaning is None:
            return result
        text = _text(result, name)
        changed = self.meaning(said, text, lambda others: encoded_by(inner, given, others))
        return result if changed is text else _with(result, name, changed)


def encoded_by(inner: Callable[..., Any], given: dict[str, Any], prompts: Sequence[str]) -> Text:
    """Other prompts as the same call of `encode_prompt` would encode them."""
    alone = given | {"prompt": list(prompts), "num_images_per_prompt": 1}
    for name in ("prompt_2", "prompt_3", "prompt_embeds", "pooled_prompt_embeds"):
        alone |= {name: None} if name in given else {}
    for name in given.keys() & {"negative_prompt", "negative_prompt_2", "negative_prompt_3"}:
        alone |= {name: None}
    return _text(inner(**alone), "prompt")


def encode(pipe: Any, prompts: Sequence[str], max_sequence_length: int) -> Text:
    """Some prompts outside any call of the pipeline."""
    given = {"prompt": None, "prompt_2": None, "max_sequence_length": max_sequence_length}
    given |= {"prompt_3": None} if hasattr(pipe, "tokenizer_3") else {}
    return encoded_by(pipe.encode_prompt, given | {"device": pipe._execution_device}, prompts)


def _places(result: tuple[Any, ...], name: str) -> tuple[int, int]:
    """Where tokens and pooled vector lie: (cond, uncond, pooled, uncond pooled), or (tokens, pooled, ids)."""
    if len(result) == 4:
        return (0, 2) if name == "prompt" else (1, 3)
    return 0, 1


def _text(result: tuple[Any, ...], name: str) -> Text:
    tokens, pooled = _places(result, name)
    return Text(result[tokens], result[pooled])


def _with(result: tuple[Any, ...], name: str, text: Text) -> tuple[Any, ...]:
    new = list(result)
    tokens, pooled = _places(result, name)
    new[tokens], new[pooled] = text.tokens, text.pooled
    return tuple(new)
