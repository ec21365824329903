"""Where a Diffusion Transformer can be read or rewritten: names for places, and the places a live model has.

What a model family looks like is told by architectures.py. Nothing is hooked here: see taps.py and hooks.py.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import reduce
from typing import Any, Literal

from torch import nn

from .architectures import ARCHITECTURES, STAGES, TEXT_ENCODERS, Architecture
from .blocks import Points, Port
from .config import UsageError, did_you_mean

_NAME = re.compile(
    r"(?:(?P<component>\w+):)?(?:(?P<family>\w+)\.(?:(?P<index>\d+)\.)?)?"
    r"(?P<stream>img|txt|joint|pooled|temb|velocity)(?:\.(?P<point>\w+))?"
)
TEXT_COMPONENTS = ("text_encoder", "text_encoder_2", "text_encoder_3")
Stage = Literal["text", "bind", "render"]
DEAD = "nothing that reaches the image reads what passes here"


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
        index = "" if self.index is None else str(self.index)
        prefix = "" if self.component == "transformer" else f"{self.component}:"
        return prefix + ".".join(part for part in (self.family, index, self.stream, self.point) if part)

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
class Place:
    """A site on a live model: where its tensor passes, seen from its component, and what can be done there."""

    site: Site
    port: Port
    d_in: int
    dead: bool
    absent: str = ""
    """Why this model passes no tensor here, although its family knows the site."""

    @property
    def why_not(self) -> str:
        """Why an edit here is refused or in vain; empty: it changes the image."""
        return DEAD if self.dead else self.port.read_only


def transformer(pipe: Any) -> nn.Module:
    """The denoising transformer itself, out of any torch.compile or data-parallel wrapper; of itself, itself."""
    return component(pipe, "transformer")


def component(pipe: Any, name: str) -> nn.Module:
    """The transformer or a text encoder by its name in the pipeline, unwrapped."""
    model: Any = pipe if isinstance(pipe, nn.Module) else getattr(pipe, name)
    while hasattr(model, "_orig_mod") or type(model).__name__ == "DistributedDataParallel":
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return model


def components(pipe: Any) -> dict[str, nn.Module]:
    """The text encoders that a pipeline has, and its transformer, in the order in which they run; or a bare model."""
    names = () if isinstance(pipe, nn.Module) else TEXT_COMPONENTS
    there = [name for name in names if getattr(pipe, name, None) is not None]
    return {name: component(pipe, name) for name in (*there, "transformer")}


def architecture(model: nn.Module) -> Architecture:
    """The row of the table that describes this transformer or text encoder."""
    for kind in _kinds(model):
        if kind in ARCHITECTURES or kind in TEXT_ENCODERS:
            return ARCHITECTURES.get(kind) or TEXT_ENCODERS[kind]
    raise UsageError(f"{type(model).__name__} is not supported: expected one of {', '.join(ARCHITECTURES)}.")


def places(pipe: Any) -> list[Place]:
    """Every place of the text encoders and the transformer, dead ones too, in the order of the computation."""
    return [place for place in _known(pipe) if not place.absent]


def ports(pipe: Any) -> dict[Site, Port]:
    """Every site that a function can be put on, and where its tensor passes."""
    return {place.site: place.port for place in places(pipe)}


def sites(pipe: Any, *, editable: bool = False) -> list[Site]:
    """Every live site of the transformer, in the order of the computation; or those alone that can be edited."""
    live = [place for place in places(pipe) if place.site.component == "transformer" and not place.dead]
    return [place.site for place in live if not (editable and place.why_not)]


def resolve(pipe: Any, pattern: "str | Site | Iterable[str | Site]") -> list[Site]:
    """The sites that match: globs, `{a,b}` and negative block indices are understood; several patterns add up.

    Globs find live sites only; a dead one is found by its name. Each name without globs must exist.
    """
    if not isinstance(pattern, str | Site):
        return list(dict.fromkeys(site for part in pattern for site in resolve(pipe, part)))
    known = _known(pipe)
    found: set[Site] = set()
    wanted = _braces(str(pattern))
    for one in wanted:
        glob = bool(re.search(r"[*?\[]", one))
        names = _spelt_out(one, known)
        matching = {place.site for place in known for name in names if _matches(place, name, glob)}
        if not matching and (len(wanted) == 1 or not glob):
            raise SiteError(_why_nothing(pipe, str(pattern), names[0], known))
        found |= matching
    if not found:
        raise SiteError(_why_nothing(pipe, str(pattern), _spelt_out(wanted[0], known)[0], known))
    return [place.site for place in known if place.site in found]


def d_in(pipe: Any, site: Site) -> int:
    """The width of the vectors at a site."""
    for place in _known(pipe):
        if place.site == site and not place.absent:
            return place.d_in
    raise SiteError(f"'{site}' is no site of {type(transformer(pipe)).__name__}: see safedig.sites.sites(pipe).")


def stage(site: Site, pipe: Any = None) -> Stage:
    """Whether text is prepared here, bound to the image, or rendered.

    Where no family of blocks is there to render (SD3), the last third of the last one does: by then text has had its
    say. How deep it is the pipeline knows; without one such blocks all count as `bind`.
    """
    if site.component != "transformer":
        return "text"
    if pipe is not None and site.index is not None:
        row = architecture(model := transformer(pipe))
        depth = sum(family == site.family for family, _, _ in _blocks(model, row))
        if site.family == list(row.families)[-1] and 3 * site.index >= 2 * depth:
            return "render"
    return STAGES[site.family or str(site)]  # type: ignore[return-value]


def of_the_prompt(site: Site) -> bool:
    """Whether only the prompt passes here, the same in every step: what text encoders give, and text as it enters.

    The timestep's embedding is prepared beside it, and knows σ.
    """
    enters = STAGES.get(str(site)) == "text" and site.stream != "temb"
    return site.component != "transformer" or enters


def _known(pipe: Any) -> list[Place]:
    """Whatever the table says of this pipeline's components, or of a bare transformer."""
    described = [
        (name, model)
        for name, model in components(pipe).items()
        if name == "transformer" or TEXT_ENCODERS.keys() & set(_kinds(model))
    ]
    return [place for name, model in described for place in _of(name, model)]


def _of(name: str, model: nn.Module) -> Iterator[Place]:
    row = architecture(model)
    blocks = list(_blocks(model, row))
    last = [block for block in blocks if block[1] is not None][-1:]
    yield from _at_points(name, model, row.top, ("", None, ""))
    for block in blocks:
        dying = block in last and name == "transformer"
        yield from _at_points(name, model, row.families[block[0]], block, dying)
    yield from _at_points(name, model, row.end, ("", None, ""))


def _blocks(model: nn.Module, row: Architecture) -> Iterator[tuple[str, int | None, str]]:
    """Each block's family, index and path; a family that is a single module has no index."""
    inside = f"{row.inside}." if row.inside and hasattr(model, row.inside) else ""
    for family in row.families:
        path = inside + row.paths.get(family, family)
        blocks = model.get_submodule(path)
        if isinstance(blocks, nn.ModuleList):
            yield from ((family, index, f"{path}.{index}") for index in range(len(blocks)))
        else:
            yield family, None, path


def _at_points(
    name: str, model: nn.Module, points: Points, block: tuple[str, int | None, str], dying: bool = False
) -> Iterator[Place]:
    family, index, path = block
    owner = model.get_submodule(path)
    width = _attribute(model, architecture(model).width)
    for point, port in points.items():
        module = _attribute(owner, port.module) if port.module else owner
        absent = f"its {port.module} is missing" if module is None else ""
        if port.unless and getattr(owner, port.unless, None):
            absent = f"its {port.unless} is set"
        stream, _, rest = point.partition(".")
        yield Place(
            Site(stream, rest, family, index, name),
            replace(port, module=".".join(part for part in (path, port.module) if part)),
            d_in=_attribute(owner, port.width) if port.width and not absent else width,
            # After the last block only the image goes on.
            dead=dying and stream == "txt" and rest != "resid_pre",
            absent=absent,
        )


def _attribute(owner: Any, path: str) -> Any:
    """What lies at a dotted path, None where there is nothing."""
    return reduce(lambda found, name: getattr(found, name, None), path.split("."), owner)


def _kinds(model: nn.Module) -> list[str]:
    return [cls.__name__ for cls in type(model).__mro__]


def _braces(pattern: str) -> list[str]:
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [name for option in match[1].split(",") for name in _braces(head + option.strip() + tail)]


def _full(site: Site) -> str:
    return str(site) if ":" in str(site) else f"transformer:{site}"


def _matches(place: Place, name: str, glob: bool) -> bool:
    if glob:
        return not (place.absent or place.dead) and fnmatchcase(_full(place.site), name)
    return not place.absent and _full(place.site) == name


def _spelt_out(name: str, known: list[Place]) -> list[str]:
    """The name with each component that it may mean, and with a negative block index counted from that one's end."""
    prefix, _, rest = name.rpartition(":")
    components = list(dict.fromkeys(place.site.component for place in known))
    meant = [component for component in components if fnmatchcase(component, prefix or "transformer")]
    if not meant:
        raise SiteError(f"No component matches '{prefix}'. {did_you_mean(prefix, components)}")
    return [f"{component}:{_positive_index(rest, component, known)}" for component in meant]


def _positive_index(name: str, component: str, known: list[Place]) -> str:
    match = re.fullmatch(r"(\w+)\.-(\d+)\.(.*)", name)
    if match is None:
        return name
    here = [place.site for place in known if (place.site.component, place.site.family) == (component, match[1])]
    index = 1 + max((site.index or 0 for site in here), default=-1) - int(match[2])
    return name if index < 0 else f"{match[1]}.{index}.{match[3]}"


def _why_nothing(pipe: Any, pattern: str, name: str, known: list[Place]) -> str:
    """What stands in the way: the model passes no tensor there, only dead ones, not that stream, or not that name."""
    kind, component = type(transformer(pipe)).__name__, name.partition(":")[0]
    start = f"No site of {kind} matches '{pattern}'"
    here = [place for place in known if place.site.component == component]
    matching = [place for place in here if fnmatchcase(_full(place.site), name)]
    if matching and matching[0].absent:
        return f"{start}: '{matching[0].site}' passes no tensor here, {matching[0].absent}."
    if matching:
        return f"{start} alive: {DEAD}. Name '{matching[0].site}' in full to record it all the same."
    asked = re.search(r"(?:^|[.:])(img|txt|joint|pooled)(?=\.|$)", name)
    head = re.sub(r"\.\d+\.", ".*.", name[: asked.start(1)]) if asked else ""
    beside = sorted({place.site.stream for place in here if fnmatchcase(_full(place.site), f"{head}*")})
    if asked and beside and asked[1] not in beside:
        where = head.partition(":")[2].rstrip(".*")
        return f"{start}: {where or 'it'} has no {asked[1]} stream, only {', '.join(beside)}."
    hint = did_you_mean(name.removeprefix("transformer:"), [str(place.site) for place in here if not place.absent])
    return f"{start}. {hint if hint.startswith('Did') else 'Ask safedig.sites.sites(pipe) for all of them.'}"
