"""safedig attest: prove on the user's own model that a bundle acts, does nothing where it must not, and fails closed.

What is proved is that the mechanism works here; how much harm it takes away is measured by evaluation, not by this.
"""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safedig.config import UsageError
from safedig.features import Counterparts
from safedig.hooks import SafetyBypassError
from safedig.pipelines import Drawing, draw, fingerprint
from safedig.progress import say
from safedig.prompts import as_rows, counted_on, load_prompts
from safedig.recipes import Recipe
from safedig.sites import Site, component, ports
from safedig.steering.rule import Rule
from safedig.steering.steering import Steering
from safedig.storage import write_atomically
from safedig.verbs import Options

PROMPTS = ("a cup", "a tree")
BATCH = 4  # images


def run(recipe: Recipe, options: Options) -> dict[str, Any]:
    """Run every check, write `attest.json`; a check that fails is a `UsageError` after all have run."""
    if options.bundle is None:
        raise UsageError("There is nothing to attest: give --bundle, the folder of Steering.save or a Hub id.")
    path = options.folder(f"runs/attest-{Path(recipe.model).name}") / "attest.json"
    steering = Steering.load(options.bundle)
    pipe = recipe.pipeline()
    trial = _Trial(pipe, recipe.drawing_of(pipe), _rows(recipe, options), steering)
    checks = list(trial.checks())
    result = {
        "passed": all(one["passed"] for one in checks),
        "model": recipe.model,
        "fingerprint": fingerprint(pipe),
        "bundle": options.bundle,
        "steering": str(steering).splitlines(),
        "images": len(trial.rows),
        "checks": checks,
        "packages": _packages(),
    }
    write_atomically(path, f"{json.dumps(result, indent=2, ensure_ascii=False)}\n".encode())
    if not result["passed"]:
        failed = "; ".join(f"{one['check']} ({one['found']})" for one in checks if not one["passed"])
        raise UsageError(f"The bundle did not pass on this model: {failed}. All checks are in {path}.")
    say(f"The report is {path}.")
    return result


def table(result: dict[str, Any]) -> str:
    """The report for people."""
    lines = [
        *result["steering"],
        "",
        f"on {result['model']} ({result['fingerprint'][:12]}…), {result['images']} images:",
    ]
    lines += [f"  {'pass' if one['passed'] else 'FAIL'}  {one['check']}: {one['found']}" for one in result["checks"]]
    packages = ", ".join(f"{name} {version}" for name, version in result["packages"].items())
    return "\n".join([*lines, "", f"All checks {'passed' if result['passed'] else 'did NOT pass'}; {packages}"])


@dataclass
class _Trial:
    """One model, one steering, a few prompts."""

    pipe: Any
    drawing: Drawing
    rows: list[dict[str, Any]]
    steering: Steering

    def checks(self) -> Iterator[dict[str, Any]]:
        """In an order in which each can rely on those before it."""
        self.steering.check(self.pipe)
        yield _check("made for this model, at sites that it has", True, self.steering.model[:12] + "…")
        before, plain = fingerprint(self.pipe), self._drawn()
        yield _check("two unsteered runs are bit-identical", torch.equal(self._drawn(), plain), "control")
        with self._all(_shut).apply(self.pipe) as closed:
            same = torch.equal(self._drawn(), plain)
        yield _check("closed gates change no bit", same, _touched(closed))
        yield self._opened(plain)
        for site, rule in self.steering.rules.items():
            if not rule.edits:
                yield self._watched(site, plain)
        for site in self.steering.rules:
            yield self._bypassed(site)
        with self.steering.apply(self.pipe) as as_is:
            self._drawn()
        yield _check("armed as it is, every site fires in every step", True, _touched(as_is))
        clean = fingerprint(self.pipe) == before and torch.equal(self._drawn(), plain)
        yield _check("afterwards the model is bit for bit as it was", clean, fingerprint(self.pipe)[:12] + "…")

    def _opened(self, plain: Tensor) -> dict[str, Any]:
        """The control of all others: where every token is read as harmful, each site acts and each image changes."""
        with self._all(_forced).apply(self.pipe) as opened:
            images = self._drawn()
        changed = sum(not torch.equal(one, other) for one, other in zip(images, plain, strict=True))
        acting = {str(touch.site) for image in opened.audit for touch in image if touch.moved > 0}
        silent = [str(site) for site, rule in self.steering.rules.items() if rule.edits and str(site) not in acting]
        found = f"{changed} of {len(plain)} images changed" + (f", nothing at {', '.join(silent)}" if silent else "")
        return _check("forced open, every site acts", not silent and changed == len(plain), found)

    def _watched(self, site: Site, plain: Tensor) -> dict[str, Any]:
        """Where this site alone tells that every image is harmful, the others are edited."""
        rules = {one: _forced(rule) for one, rule in self.steering.rules.items()}
        rules = {one: rule if one == site else _shut(rule) for one, rule in rules.items()}
        with Steering.of_rules(self.steering.model, rules).apply(self.pipe):
            images = self._drawn()
        changed = sum(not torch.equal(one, other) for one, other in zip(images, plain, strict=True))
        found = f"{changed} of {len(plain)} images changed"
        return _check(f"'{site}' opens the gates of others", changed == len(plain), found)

    def _bypassed(self, site: Site) -> dict[str, Any]:
        """Whoever takes the hooks of one site away must not get an image."""
        name, raised = f"'{site}' bypassed raises SafetyBypassError", ""
        with self.steering.apply(self.pipe):
            try:
                with _unhooked(self.pipe, site):
                    self._drawn(1)
            except SafetyBypassError as error:
                raised = str(error).split(". ")[0]
        return _check(name, bool(raised), raised or "an image was drawn")

    def _drawn(self, count: int | None = None) -> Tensor:
        rows = self.rows[:count]
        return torch.cat([images for _, images in draw(self.pipe, rows, drawing=self.drawing, batch_size=BATCH)])

    def _all(self, change: Callable[[Rule], Rule]) -> Steering:
        rules = {site: change(rule) for site, rule in self.steering.rules.items()}
        return Steering.of_rules(self.steering.model, rules)


def _shut(rule: Rule) -> Rule:
    """The rule under a gate that never opens."""
    return replace(rule, gate=replace(rule.gate, threshold=math.inf))


def _forced(rule: Rule) -> Rule:
    """The rule with an encoder that reads every token as harmful, a little above the gate's threshold."""
    height = (rule.gate.threshold if math.isfinite(rule.gate.threshold) else 0.0) + 1.0
    encoder = replace(
        rule.encoder,
        W_enc=torch.zeros_like(rule.encoder.W_enc),
        b_enc=torch.full_like(rule.encoder.b_enc, height / max(1, len(rule.index))),
        threshold=torch.zeros_like(rule.encoder.threshold),
    )
    known = rule.material.counterparts
    harmful = None if known is None else Counterparts(known.alone.harmful(), known.together.harmful())
    material = replace(rule.material, dose=None, counterparts=harmful)
    return replace(rule, encoder=encoder, material=material, gate=replace(rule.gate, threshold=height - 1.0))


@contextmanager
def _unhooked(pipe: Any, site: Site) -> Iterator[None]:
    """The hooks of a site's module gone, as a wrapper or cache that goes around it would have it; put back after."""
    module: Any = component(pipe, site.component).get_submodule(ports(pipe)[site].module)
    kept = [(hooks, dict(hooks)) for hooks in (module._forward_hooks, module._forward_pre_hooks)]
    try:
        for hooks, _ in kept:
            hooks.clear()
        yield
    finally:
        for hooks, all_ in kept:
            hooks.update(all_)


def _rows(recipe: Recipe, options: Options) -> list[dict[str, Any]]:
    if options.prompts is None:
        return counted_on([{"prompt": prompt} for prompt in PROMPTS], options.seed_of(recipe))
    return counted_on(as_rows(load_prompts(options.prompts)), options.seed)


def _check(name: str, passed: bool, found: str) -> dict[str, Any]:
    say(f"{'pass' if passed else 'FAIL'}  {name}: {found}")
    return {"check": name, "passed": passed, "found": found}


def _touched(steering: Steering) -> str:
    touched, passed = (sum(one[name] for one in steering.report.values()) for name in ("touched", "passed"))
    return f"{touched:,} of {passed:,} tokens touched"


def _packages() -> dict[str, str]:
    from safedig.evaluation.records import circumstances

    return circumstances()["packages"]
