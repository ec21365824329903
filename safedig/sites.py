"""Where a Diffusion Transformer can be read or rewritten: names for places, and the places a live model has.

One row of `ARCHITECTURES` describes a model family; a new family is a new row. Nothing is hooked here: see hooks.py.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import nn

from .config import UsageError, did_you_mean

_NAME = re.compile(
    r"(?:(?P<component>\w+):)?(?:(?P<family>\w+)\.(?P<index>\d+)\.)?(?P<stream>\w+)(?:\.(?P<point>\w+))?"
)


class SiteError(UsageError):
    """A site that is not there; the message names the nearest ones that are."""


@dataclass(frozen=True)
class Site:
    """One place in a model, such as `transformer_blocks.9.img.resid_post`, `txt.embed` or `velocity`."""

    stream: str
    point: str = ""
    family: str = ""
    index: int | None = None
    component: str = "transformer"

    def __str__(self) -> str:
        block = f"{self.family}.{self.index}." if self.family else ""
        prefix = "" if self.component == "transformer" else f"{self.component}:"
        return prefix + block + ".".join(part for part in (self.stream, self.point) if part)

    @classmethod
    def parse(cls, text: str) -> "Site":
        """Read a name back; it need not exist on any model."""
        match = _NAME.fullmatch(text)
        if match is None:
            raise SiteError(
                f"'{text}' is no site: expected [component:][family.index.]stream[.point], "
                "for example transformer_blocks.9.img.resid_post or txt.embed."
            )
        index = match["index"]
        return cls(
            stream=match["stream"],
            point=match["point"] or "",
            family=match["family"] or "",
            index=None if index is None else int(index),
            component=match["component"] or "transformer",
        )


@dataclass(frozen=True)
class Port:
    """How a site's tensor passes a module: as an argument, or (no argument) as its output or one element of it."""

    module: str
    argument: str = ""
    element: int | None = None


@dataclass(frozen=True)
class Architecture:
    """One model family. Blocks take img as `hidden_states`, txt as `encoder_hidden_states`, and return (txt, img)."""

    families: dict[str, tuple[str, ...]]
    image_embedder: str


_DOUBLE = ("img.resid_pre", "txt.resid_pre", "img.resid_post", "txt.resid_post")
_SINGLE = ("img.resid_post", "txt.resid_post")
ARCHITECTURES = {
    "FluxTransformer2DModel": Architecture(
        {"transformer_blocks": _DOUBLE, "single_transformer_blocks": _SINGLE}, image_embedder="x_embedder"
    ),
    "SD3Transformer2DModel": Architecture({"transformer_blocks": _DOUBLE}, image_embedder="pos_embed"),
}
_BLOCK_PORTS = {
    "img.resid_pre": ("hidden_states", None),
    "txt.resid_pre": ("encoder_hidden_states", None),
    "txt.resid_post": ("", 0),
    "img.resid_post": ("", 1),
}
_STAGES = {
    "transformer_blocks": "bind",
    "single_transformer_blocks": "render",
    "txt.embed": "text",
    "pooled.embed": "text",
    "temb.out": "text",
    "img.embed": "bind",
    "velocity": "render",
}


def transformer(pipe: Any) -> nn.Module:
    """The denoising transformer itself, out of any torch.compile or data-parallel wrapper."""
    model = pipe.transformer
    while hasattr(model, "_orig_mod") or type(model).__name__ == "DistributedDataParallel":
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return model


def ports(pipe: Any) -> dict[Site, Port]:
    """Every live site of the pipeline's transformer, in the order of the computation, and where its tensor passes."""
    model = transformer(pipe)
    row = _architecture(model)
    names = {
        "txt.embed": Port("context_embedder"),
        "img.embed": Port(row.image_embedder),
        "pooled.embed": Port("time_text_embed", "pooled_projection"),
        "temb.out": Port("time_text_embed"),
    }
    blocks = [(family, index) for family in row.families for index in range(len(getattr(model, family)))]
    for family, index in blocks:
        for name in row.families[family]:
            # The last block's text output goes nowhere: SD3 returns None there, FLUX drops the tensor.
            if not (name == "txt.resid_post" and (family, index) == blocks[-1]):
                names[f"{family}.{index}.{name}"] = Port(f"{family}.{index}", *_BLOCK_PORTS[name])
    names["velocity"] = Port("", element=0)
    return {Site.parse(name): port for name, port in names.items()}


def sites(pipe: Any) -> list[Site]:
    """Every live site of the pipeline's transformer, in the order of the computation."""
    return list(ports(pipe))


def resolve(pipe: Any, pattern: "str | Site | Iterable[str | Site]") -> list[Site]:
    """The live sites that match: globs, `{a,b}` and negative block indices are understood; several patterns add up."""
    if not isinstance(pattern, str | Site):
        return list(dict.fromkeys(site for part in pattern for site in resolve(pipe, part)))
    live = {str(site): site for site in sites(pipe)}
    wanted = [_positive_index(pipe, name) for name in _braces(str(pattern).removeprefix("transformer:"))]
    found = [site for name, site in live.items() if any(fnmatchcase(name, one) for one in wanted)]
    if not found:
        kind = type(transformer(pipe)).__name__
        raise SiteError(f"No site of {kind} matches '{pattern}'. {_nearest(wanted[0], live)}")
    return found


def d_in(pipe: Any, site: Site) -> int:
    """The width of the vectors at a site."""
    model: Any = transformer(pipe)
    if site.stream == "pooled":
        return model.config.pooled_projection_dim
    return model.out_channels if site.stream == "velocity" else model.inner_dim


def stage(site: Site) -> Literal["text", "bind", "render"]:
    """Whether text is prepared here, bound to the image, or rendered; joint (SD3) blocks all count as `bind`."""
    return _STAGES[site.family or str(site)]  # type: ignore[return-value]


def _architecture(model: nn.Module) -> Architecture:
    for cls in type(model).__mro__:
        if cls.__name__ in ARCHITECTURES:
            return ARCHITECTURES[cls.__name__]
    raise UsageError(f"{type(model).__name__} is not supported: expected one of {', '.join(ARCHITECTURES)}.")


def _braces(pattern: str) -> list[str]:
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [name for option in match[1].split(",") for name in _braces(head + option.strip() + tail)]


def _positive_index(pipe: Any, name: str) -> str:
    match = re.fullmatch(r"(\w+)\.-(\d+)\.(.*)", name)
    blocks = getattr(transformer(pipe), match[1], None) if match else None
    if match is None or blocks is None or int(match[2]) > len(blocks):
        return name
    return f"{match[1]}.{len(blocks) - int(match[2])}.{match[3]}"


def _nearest(name: str, live: Iterable[str]) -> str:
    hint = did_you_mean(name, live)
    return hint if hint.startswith("Did") else "Ask safedig.sites.sites(pipe) for all of them."
