"""`Steering`: rules at sites of one model, put on its pipeline while a `with` lasts, merged, saved and loaded."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from os import PathLike
from typing import Any, Literal

from torch import Tensor

from ..config import UsageError, build, did_you_mean
from ..features import Counterparts, Features
from ..features.heights import columns
from ..pipelines import fingerprint
from ..progress import say
from ..sae.checkpoint import encoder_sha256
from ..sae.model import SparseAutoencoder
from ..sites import Site, SiteError, d_in, ports
from ..storage import part
from . import bundle
from .applied import Live, Opened, Touch, put_on
from .edits import Edit, Repel, check_together, from_json, to_json
from .gate import Gate
from .guard import Guard
from .material import Material
from .rule import Rule

Window = tuple[float, float]
_KEPT = ("architecture", "source", "objective", "recipe_sha")  # of what an SAE says of itself


class Steering:
    """Edits of the tokens that hold harmful features, at the sites of one model, each site under a gate."""

    def __init__(
        self,
        saes: Mapping[Site, SparseAutoencoder],
        features: Mapping[Site, Features],
        edits: Sequence[Edit] = (Repel(),),
        *,
        reconstruction: Mapping[Site, SparseAutoencoder] | None = None,
        counterparts: Mapping[Site, Counterparts] | None = None,
        guards: Mapping[Site, Guard] | None = None,
        watch: Sequence[Site] = (),
        scope: Literal["token", "image"] = "token",
        rows: Literal["cond", "all"] = "cond",
        sigmas: Window | Mapping[Site | str, Window] = (0.0, 1.0),
    ):
        """Repel reads the decoders of `saes` (of `fit_contrast`), Blend and Replace those of `reconstruction`.

        Without `reconstruction` both read `saes`. Replace(by="counterparts") looks up those of `fit_counterparts`. The
        edits' deltas are summed (see edits.py); `guards` of `fit_guards` bound them. Sites to `watch` are not edited:
        an image that they tell is harmful is open at those passed after them. `sigmas` is the window of all sites, or
        of each one; for scope and rows see `Gate`.
        """
        edited = [site for site in features if site not in watch]
        if not features:
            raise UsageError("There are no features: give those of at least one site (find_features, weigh).")
        several = [site for site in edited if not _one_token(site)]
        text = all(site.stream == "txt" for site in several)
        check_together(tuple(edits), tokens=several == edited, scope=scope, text=text)
        _check_saes(saes, features, edited if any(edit.needs for edit in edits) else [], reconstruction)
        _check_watch(watch, features, scope)
        windows = _windows(sigmas, features)
        models = {str(saes[site].metadata.get("model", "")) for site in features}
        if len(models) != 1 or "" in models:
            raise UsageError("The SAEs do not all name one model that they were trained on: train them together.")
        self.model = models.pop()
        """Fingerprint of the pipeline it was made for; another one is refused."""
        self.rules: dict[Site, Rule] = {}
        self.facts: dict[Site, dict[str, Any]] = {}
        """Of each site what its autoencoder and its features were learnt from, as JSON."""
        self._live: dict[Site, Live] = {}
        for site, found in features.items():
            own = tuple(edits) if site in edited else ()
            needs = [need for edit in own for need in edit.needs]
            sae, other = saes[site], None if reconstruction is None else reconstruction.get(site)
            self.rules[site] = Rule(
                found.index,
                columns(sae, found.index),
                Material.of(site, sae, found, needs, other, None if counterparts is None else counterparts.get(site)),
                Gate(found.threshold, scope, rows, windows.get(site, (0.0, 1.0))),
                own,
                None if guards is None else guards.get(site),
            )
            said = {name: sae.metadata[name] for name in _KEPT if name in sae.metadata}
            self.facts[site] = {
                "sae": said | {"encoder_sha256": encoder_sha256(sae.encoder)},
                "receipt": found.facts | {"threshold": found.threshold},
            }

    @classmethod
    def from_route(
        cls,
        route: Any,
        saes: Mapping[Site, SparseAutoencoder],
        features: Mapping[Site, Features],
        edits: Sequence[Edit] = (Repel(),),
        **options: Any,
    ) -> "Steering":
        """At the sites that the `Route` has chosen, each in its window of σ; `options` are those of `Steering`."""
        chosen = [site if isinstance(site, Site) else Site.parse(site) for site in route.chosen]
        windows = {str(one.site): (min(one.sigmas), max(one.sigmas)) for one in route.sites if one.sigmas}
        missing = [str(site) for site in chosen if site not in features or site not in saes]
        if missing or not chosen:
            raise UsageError(
                f"The route has chosen {', '.join(map(str, chosen)) or 'no site'}, and there are no SAEs and features "
                f"for {', '.join(missing) or 'it'}: train and find_features at route.chosen first."
            )
        options = {"sigmas": {site: windows.get(str(site), (0.0, 1.0)) for site in chosen}} | options
        made = cls(saes, {site: features[site] for site in chosen}, edits, **options)
        if (routed := getattr(route, "fingerprint", made.model)) != made.model:
            raise UsageError(
                f"The route is of the model {routed[:12]}… and the SAEs are of {made.model[:12]}…: route the model "
                "that they were trained on."
            )
        return made

    @contextmanager
    def apply(self, pipe: Any, *, force: str | None = None) -> Iterator["Steering"]:
        """Steer every call of `pipe` inside the `with`; afterwards the pipeline is bit for bit as it was.

        Several steerings may be on one pipeline if their sites differ. `force` is the fingerprint of a pipeline that
        it was not made for, and is to steer all the same.
        """
        self.check(pipe, force)
        if self.rules and all(rule.gate.threshold == math.inf for rule in self.rules.values()):
            say("No gate of this steering can open: its features were given no threshold (see calibrated).")
        opened = Opened([site for site, rule in self.rules.items() if rule.edits])
        self._live = live = {site: Live(rule, opened) for site, rule in self.rules.items()}
        with put_on(pipe, live):
            yield self

    def check(self, pipe: Any, force: str | None = None) -> None:
        """A `UsageError` where the pipeline is of another model, lacks a site, or is of another width there."""
        given = fingerprint(pipe)
        there = ports(pipe)
        for site, rule in self.rules.items():
            if site in there and d_in(pipe, site) != rule.material.directions.shape[1] and given != self.model:
                raise UsageError(f"{_other(self.model, given)} Nor does it fit: '{site}' has another width there.")
        if given not in (self.model, force):
            raise UsageError(
                f"{_other(self.model, given)} Train, or load a steering, for this one; or, if you know that it fits, "
                f"apply it with force='{given}'."
            )
        for site in self.rules:
            if site not in there:
                raise SiteError(f"The steering acts at '{site}', which is no live site of this pipeline any more.")
        if given != self.model:
            say(f"This steering was made for another model, and is forced on {given[:12]}…: its gates may be wrong.")

    @property
    def report(self) -> dict[str, dict[str, int]]:
        """What happened in the last `apply`: at each site the tokens that could be and those that were touched."""
        return {str(site): {"passed": live.passed, "touched": int(live.touched)} for site, live in self._live.items()}

    @property
    def audit(self) -> list[list[Touch]]:
        """What was done to each image of the last call of the pipeline, step by step, closed gates too.

        What was done to a prompt in a text encoder is told of all its images; where nothing else was armed, once.
        """
        touches = [touch for live in self._live.values() for touch in live.touches()]
        drawn = 1 + max((touch.image for touch in touches if touch.step >= 0), default=-1)
        texts = 1 + max((touch.image for touch in touches if touch.step < 0), default=-1)
        each = drawn // texts if drawn and texts else 1
        found: list[list[Touch]] = [[] for _ in range(max(drawn, texts))]
        for touch in sorted(touches, key=lambda one: one.step):
            first, count = (touch.image * each, each) if touch.step < 0 else (touch.image, 1)
            for image in range(first, first + count):
                found[image].append(replace(touch, image=image))
        return found

    def merge(self, other: "Steering") -> "Steering":
        """Both in one, for one model and at different sites."""
        if self.model != other.model:
            raise UsageError(f"{_other(self.model, other.model)} Merge steerings of one model.")
        if both := self.rules.keys() & other.rules.keys():
            raise UsageError(
                f"Both steerings act at '{min(map(str, both))}': make one Steering there with all the edits."
            )
        return Steering.of_rules(self.model, self.rules | other.rules, self.facts | other.facts)

    def save(self, folder: str | PathLike[str]) -> None:
        """Write the bundle into `folder`: `steering.json`, `steering.safetensors` and a model card, `README.md`."""
        tensors = {f"{site}/{name}": t for site, rule in self.rules.items() for name, t in rule.tensors().items()}
        sites = {
            str(site): {"edits": [to_json(edit) for edit in rule.edits], "gate": asdict(rule.gate)}
            | rule.facts()
            | self.facts.get(site, {"sae": {}, "receipt": {}})
            for site, rule in self.rules.items()
        }
        bundle.write(folder, {"model": self.model, "sites": sites}, tensors, shown=repr(self))

    @classmethod
    def load(cls, folder: str | PathLike[str]) -> "Steering":
        """Read a bundle from a folder that `save` has written, or from the Hub by its owner/name."""
        given, tensors = bundle.read(folder)
        try:
            rules = {Site.parse(name): _rule(entry, part(tensors, name)) for name, entry in given["sites"].items()}
            facts = {
                Site.parse(name): {key: entry[key] for key in ("sae", "receipt")}
                for name, entry in given["sites"].items()
            }
            return cls.of_rules(given["model"], rules, facts)
        except (KeyError, TypeError) as error:
            raise bundle.FORMAT.incomplete(folder, error) from error

    @classmethod
    def of_rules(
        cls, model: str, rules: dict[Site, Rule], facts: dict[Site, dict[str, Any]] | None = None
    ) -> "Steering":
        """From rules that are there already, for the model of this fingerprint."""
        steering = cls.__new__(cls)
        steering.model, steering.rules, steering.facts, steering._live = model, dict(rules), dict(facts or {}), {}
        return steering

    def __repr__(self) -> str:
        width = max((len(str(site)) for site in self.rules), default=0)
        lines = [f"Steering at {len(self.rules)} sites of the model {self.model[:12]}…"]
        return "\n".join([*lines, *(f"  {site!s:{width}}  {rule}" for site, rule in self.rules.items())])


def _windows(sigmas: Window | Mapping[Site | str, Window], features: Mapping[Site, Features]) -> dict[Site, Window]:
    """Of each site that has one of its own, or of all."""
    if not isinstance(sigmas, Mapping):
        return dict.fromkeys(features, sigmas)
    windows = {Site.parse(str(site)): window for site, window in sigmas.items()}
    for site in windows:
        if site not in features:
            nearest = did_you_mean(str(site), map(str, features))
            raise UsageError(f"sigmas= has a window for '{site}', where there are no features. {nearest}")
    return windows


def _one_token(site: Site) -> bool:
    return site.stream in ("pooled", "temb")


def _check_watch(watch: Sequence[Site], features: Mapping[Site, Features], scope: str) -> None:
    """What is watched can open a gate somewhere."""
    if missing := [site for site in watch if site not in features]:
        raise UsageError(f"There are no features for '{missing[0]}', which is to be watched: find or weigh them there.")
    if outside := [site for site in watch if site.component != "transformer"]:
        raise UsageError(
            f"'{outside[0]}' is passed before the first step, and can open no gate of a step: watch a site of the "
            "transformer, such as txt.embed or pooled.embed."
        )
    if watch and (scope != "image" or not features.keys() - set(watch)):
        raise UsageError(
            "A watched site opens the gates of other sites, of whole images: give features of one that is not watched, "
            "and scope='image'."
        )


def _check_saes(
    saes: Mapping[Site, SparseAutoencoder],
    features: Mapping[Site, Features],
    reconstructed: Sequence[Site],
    reconstruction: Mapping[Site, SparseAutoencoder] | None,
) -> None:
    """Each site with features has its SAEs; `reconstructed`: the sites whose edits need more than the directions."""
    for name, given, sites in (("saes", saes, [*features]), ("reconstruction", reconstruction, reconstructed)):
        for site in sites:
            if given is not None and site not in given:
                raise UsageError(
                    f"There are features for '{site}' and no SAE in {name}=: give the one that they were found in, or "
                    "leave the site out."
                )


def _other(made_for: str, given: str) -> str:
    return f"This steering was made for the model {made_for[:12]}… and the other one is {given[:12]}…."


def _rule(entry: Mapping[str, Any], own: Mapping[str, Tensor]) -> Rule:
    gate = build(Gate, entry["gate"], path="gate.")
    return Rule.of(own, gate, [from_json(edit) for edit in entry["edits"]], entry)
