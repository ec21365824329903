"""Each arm of the Safe Denoiser's table, measured: a finished one is a line of JSON and is never measured again."""

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from denoiser_together import beside
from denoiser_world import Drawn, World, along, opens, shows

from safedig.denoiser import NegationSet, SafeDenoiser, Semantic, Tempered, Thresholds
from safedig.denoiser.calibrate import Seen, thresholds
from safedig.denoiser.kernels import Kernel, log_density
from safedig.denoiser.threshold import evidence
from safedig.progress import say
from safedig.storage import append, whole_lines
from safedig.tiny.captions import POSTCARD
from safedig.tiny.concepts import BACKGROUNDS
from safedig.tiny.scenes import render_many

Cell = dict[str, Any]
MEMORISED = "memorised scene"
WITHIN, WIDTH = Tempered(0.15), 0.1  # of latents and of probabilities; looked for on the split `calibrate`


class Lab:
    """One model's arms, in order; what several of them need is made once."""

    def __init__(self, world: World, file: Path):
        self.world, self.budget, self.file = world, world.budget, file
        self.semantic = Semantic(world.hazards, WIDTH, WITHIN)
        self.of_objects = Semantic(world.objects, 10 * WIDTH, WITHIN)

    def cell(self, arm: str, measured: Callable[[], dict[str, Any]]) -> Cell:
        """The finished cell of this arm, measured now if there is none."""
        key = self.world.key(arm)
        known = map(json.loads, whole_lines(self.file))
        found = next((cell for cell in known if cell.items() >= key.items()), None)
        if found is None:
            started = time.perf_counter()
            found = key | measured()
            found["seconds"] = round(time.perf_counter() - started, 1)
            line = json.dumps(found, ensure_ascii=False)
            append(self.file, f"{line}\n".encode())
            found = json.loads(line)  # as a later run reads it
            say(f"{self.world.model}: {arm} in {found['seconds']:.0f} s")
        return found

    def arm(self, name: str, measured: Callable[[], dict[str, Any]]) -> Cell:
        """The cell of an arm at the strength and floor that were chosen."""
        strength, floor = self.chosen
        return self.cell(f"{name}, strength {strength:g}, floor {floor:g}", measured)

    # ---- what the arms are made of

    def negatives(self, hazard: str, count: int | None = None) -> NegationSet:
        place = (hazard, count or self.budget.negatives)
        if place not in self._negatives:
            self._negatives[place] = self.world.negatives(*place)
        return self._negatives[place]

    @cached_property
    def _negatives(self) -> dict[tuple[str, int], NegationSet]:
        return {}

    @cached_property
    def halves(self) -> tuple[Drawn, Drawn]:
        """What was drawn to calibrate on, calm pictures too, every other one in either half."""
        both = [self.world.undenoised(name) for name in ("calibrate", "calm")]
        return tuple(joined([every_other(one, start) for one in both]) for start in (0, 1))  # type: ignore[return-value]

    @cached_property
    def reference(self) -> NegationSet:
        """Pictures of the first half that show no hazard: what may be drawn, as this model draws it."""
        drawn = self.halves[0]
        fine = [not any(shows(one, hazard)[0] for hazard in self.budget.hazards) for one in drawn.judged]
        last = drawn.seen.moments[-1]
        return NegationSet(last.x0[torch.tensor(fine)].unflatten(1, last.shape))

    def calibrated(self, kernel: Kernel, count: int | None = None, against: bool = True) -> Thresholds:
        """One calibration for the sets of all hazards, from the second half."""
        drawn, reference = self.halves[1], self.reference if against else None
        near, unsafe = [], []
        for hazard in self.budget.hazards:
            negation = self.negatives(hazard, count)
            rows = [evidence(log_density(kernel, negation, at), kernel, reference, at) for at in drawn.seen.moments]
            near.append(torch.stack(rows))
            unsafe += [shows(one, hazard)[0] for one in drawn.judged]
        sigmas = [at.mixing.sigma for at in drawn.seen.moments]
        return thresholds(sigmas, torch.cat(near, 1), torch.tensor(unsafe), reference)

    def made(self, hazard: str, strength: float, **options: Any) -> SafeDenoiser:
        return self.made_of(self.negatives(hazard, options.pop("count", None)), strength, **options)

    def made_of(self, negation: NegationSet, strength: float, **options: Any) -> SafeDenoiser:
        return SafeDenoiser(negation, strength, **({"kernel": self.semantic, "threshold": self.usual} | options))

    def of_postcard(self, strength: float, **which: Any) -> SafeDenoiser:
        return SafeDenoiser(self.world.postcard(**which), strength, kernel=Tempered(0.3))

    @cached_property
    def usual(self) -> Thresholds:
        return self.calibrated(self.semantic)

    # ---- what is measured

    def hazards(
        self, name: str, make: Callable[[str], SafeDenoiser] | None, steps: int | None = None, few: int | None = None
    ) -> dict[str, Any]:
        """Every hazard negated by itself, on all rows: what either eye and the second check see, before and after."""
        drawn = self.world.undenoised(name, steps)
        if few is not None:
            drawn = first(drawn, few)
        named = Counter(name for one in drawn.judged for name in _names(one))
        found: dict[str, Any] = {"n": len(drawn.rows), "objects": dict(named), "of": {}}
        for hazard in self.budget.hazards:
            before = [shows(one, hazard) for one in drawn.judged]
            told = {"before": _places(before, 0), "before_second": _places(before, 1)}
            if make is not None:
                made = make(hazard)
                again = self.world.denoised(made, drawn, opens(made, drawn.seen), name, steps)
                after = list(before)
                for at, one, _ in again:
                    after[at] = shows(one, hazard)
                told |= {"after": _places(after, 0), "after_second": _places(after, 1)}
                told["drawn"] = {
                    at: [drawn.judged[at]["label"], one["label"], _names(drawn.judged[at]), _names(one)]
                    for at, one, _ in again
                }
            found["of"][hazard] = told
        return found

    def trial(self, strength: float, floor: float) -> dict[str, Any]:
        """On the split `calibrate`: how far the hazards fall, and what the calm pictures lose."""
        found = self.hazards("calibrate", lambda hazard: self.made(hazard, strength, floor=floor))
        return found | {"calm": self.benign("calm", strength, floor)}

    @cached_property
    def chosen(self) -> tuple[float, float]:
        """Strength and floor: the furthest fall at no more than the loss, of equals the gentlest."""
        tried = {}
        for strength, floor in product(self.budget.strengths, self.budget.floors):
            cell = self.cell(f"tried, strength {strength:g}, floor {floor:g}", partial(self.trial, strength, floor))
            tried[strength, floor] = (fall(cell), lost(cell["calm"]))
        fine = [one for one, (_, loss) in tried.items() if loss <= self.budget.loss]
        fine = fine or [min(tried, key=lambda one: tried[one][1])]
        return max(fine, key=lambda one: (tried[one][0], -one[0], one[1]))

    def benign(self, name: str, strength: float, floor: float) -> dict[str, Any]:
        """Benign prompts under each hazard's denoiser in turn: drawn as asked, before and after."""
        drawn = self.world.undenoised(name)
        before = [one["label"] == "clean" for one in drawn.judged]
        told = {}
        for hazard in self.budget.hazards:
            made, after = self.made(hazard, strength, floor=floor), list(before)
            again = self.world.denoised(made, drawn, opens(made, drawn.seen), name)
            for at, one, _ in again:
                after[at] = one["label"] == "clean"
            told[hazard] = {"clean": _where(after), "opened": len(again)}
        return {"n": len(before), "clean": _where(before), "of": told}

    def naming(self, strength: float, floor: float) -> dict[str, Any]:
        """Prompts that name a hazard, under the denoiser of that hazard."""
        drawn, found = self.world.undenoised("naming"), []
        for hazard in self.budget.hazards:
            mine = torch.tensor([hazard in row["objects"] for row in drawn.rows])
            made = self.made(hazard, strength)
            again = {
                at: one for at, one, _ in self.world.denoised(made, drawn, opens(made, drawn.seen) & mine, "naming")
            }
            for at in mine.nonzero()[:, 0].tolist():
                before, after = drawn.judged[at], again.get(at, drawn.judged[at])
                found.append(
                    [hazard, shows(before, hazard)[0], shows(after, hazard)[0], before["label"], after["label"]]
                )
        return {"n": len(found), "pictures": found}

    def memorised(self) -> dict[str, Any]:
        """The planted scene, at the gentlest strength that no longer draws it from any of other seeds."""
        for strength in (1.0, 2.0, 4.0, 8.0):
            if not self.postcard("postcard tried", strength)["after"]["reproduced"]:
                break
        everywhere = self.postcard("postcard", strength, backgrounds=BACKGROUNDS)
        return self.postcard("postcard", strength) | {"strength": strength, "every_background": everywhere["after"]}

    def postcard(self, name: str, strength: float, **which: Any) -> dict[str, Any]:
        """How far the picture is from its render, with nothing negated and with that one image, or some like it."""
        drawn = self.world.undenoised(name)
        made = self.of_postcard(strength, **which)
        target = torch.from_numpy(render_many([POSTCARD])[0]).permute(2, 0, 1) / 255
        again = {at: (one, image) for at, one, image in self.world.denoised(made, drawn, opens(made, drawn.seen), name)}
        before = list(zip(drawn.judged, drawn.seen.images, strict=True))
        after = [again.get(at, one) for at, one in enumerate(before)]

        def told(pictures: list[Any]) -> dict[str, Any]:
            return {
                "rms": [round(float((image - target).square().mean().sqrt()), 4) for _, image in pictures],
                "reproduced": _where([_is_postcard(one) for one, _ in pictures]),
                "objects": _where([_has_its_objects(one) for one, _ in pictures]),
                "labels": [one["label"] for one, _ in pictures],
            }

        return {"n": len(before), "before": told(before), "after": told(after)}


def fall(cell: Cell, which: str = "") -> float:
    """By which share of itself a hazard's share falls, over all hazards together."""
    before, after = (sum(len(one[f"{when}{which}"]) for one in cell["of"].values()) for when in ("before", "after"))
    return 1 - after / before if before else 0.0


def lost(calm: Cell) -> float:
    """Calm pictures that are no longer as asked, under each hazard's denoiser in turn, as a share of all."""
    kept = sum(len(one["clean"]) for one in calm["of"].values()) / len(calm["of"])
    return (len(calm["clean"]) - kept) / calm["n"]


def first(drawn: Drawn, n: int) -> Drawn:
    return taken(drawn, slice(0, n))


def every_other(drawn: Drawn, start: int) -> Drawn:
    return taken(drawn, slice(start, None, 2))


def taken(drawn: Drawn, which: slice) -> Drawn:
    """Some of what was drawn."""
    moments = [replace(at, x=at.x[which], x0=at.x0[which]) for at in drawn.seen.moments]
    return Drawn(drawn.rows[which], Seen(moments, drawn.seen.images[which]), drawn.judged[which])


def joined(parts: list[Drawn]) -> Drawn:
    """All that was drawn, by the same steps."""
    rows, judged = ([entry for one in parts for entry in getattr(one, name)] for name in ("rows", "judged"))
    return Drawn(rows, along([one.seen for one in parts]), judged)


def _names(judgement: dict[str, Any]) -> list[str]:
    return sorted(one["name"] for one in judgement["objects"])


def _places(seen: list[tuple[bool, bool]], eye: int) -> list[int]:
    return _where([one[eye] for one in seen])


def _where(hits: list[bool]) -> list[int]:
    return [at for at, hit in enumerate(hits) if hit]


def _is_postcard(judgement: dict[str, Any]) -> bool:
    """The objects of the scene before its background, as either eye sees them."""
    return any(
        _has_its_objects(eye) and eye["background"] == POSTCARD.background for eye in (judgement, judgement["second"])
    )


def _has_its_objects(seen: dict[str, Any]) -> bool:
    """In their colours and places, before whatever."""
    wanted = {(one.name, one.colour, one.place) for one in POSTCARD.objects}
    return {(one["name"], one["colour"], one["place"]) for one in seen["objects"]} == wanted


def arms(lab: Lab) -> dict[str, Cell]:
    """Every arm of the table at the strength that was chosen, in an order that has the main one first."""
    budget = lab.budget
    strength, floor = lab.chosen
    made = partial(lab.made, strength=strength, floor=floor)
    found: dict[str, Cell] = {"chosen": {"strength": strength, "floor": floor}}

    def arm(name: str, measured: Callable[[], dict[str, Any]]) -> None:
        found[name] = lab.arm(name, measured)

    arm("report", lambda: lab.hazards("report", made))
    arm("benign", lambda: lab.benign("benign", strength, floor))
    arm(MEMORISED, lab.memorised)
    arm("naming", lambda: lab.naming(strength, floor))
    arm("28 steps", lambda: lab.hazards("long", made, steps=28))
    few = min(480, budget.report)
    for count in (8, 16, 32):
        arm(
            f"{count} negatives",
            lambda c=count: _with(made, lab, few, count=c, threshold=lab.calibrated(lab.semantic, c)),
        )
    for other in (0.01, 0.05, 0.2, 0.5):
        if other != floor:
            arm(f"gate from β = {other:g} on", lambda f=other: _with(made, lab, few, floor=f))
    for other in (1.0, 2.0, 4.0):
        if other != strength:
            arm(f"strength {other:g}", lambda s=other: _with(made, lab, few, strength=s))
    arm(
        "no reference",
        lambda: _with(made, lab, few, threshold=lab.calibrated(lab.semantic, against=False)),
    )
    arm(
        "features of all objects",
        lambda: _with(made, lab, few, kernel=lab.of_objects, threshold=lab.calibrated(lab.of_objects)),
    )
    arm(
        "latents alone",
        lambda: _with(made, lab, few, kernel=WITHIN, threshold=lab.calibrated(WITHIN)),
    )
    arm("no prompt", lambda: lab.hazards("empty", made))
    arm("renoise-only", lambda: _released(lab, "renoise-only", 0.0, few))
    arm("released", lambda: _released(lab, "released", 0.03, few))
    arm("spell", lambda: _released(lab, "spell", 1.0, few))
    found["together"] = beside(lab, strength, floor)
    return found


def _with(made: Callable[..., SafeDenoiser], lab: Lab, few: int, **options: Any) -> dict[str, Any]:
    return lab.hazards("report", partial(made, **options), few=few)


def _released(lab: Lab, mode: Any, strength: float, few: int) -> dict[str, Any]:
    """Modes without a gate act on every picture; the authors' window, and a few hazards, for time."""
    hazards = lab.budget.hazards[::4] if mode != "renoise-only" else lab.budget.hazards[:1]
    drawn = first(lab.world.undenoised("report"), few // 2)
    found: dict[str, Any] = {"n": len(drawn.rows), "of": {}, "labels": {"before": [], "after": []}}
    for hazard in hazards:
        radius = {"threshold": 0.45} if mode == "spell" else {}
        window = {} if mode == "spell" else {"sigmas": (0.78, 1.0)}
        made = SafeDenoiser(lab.negatives(hazard), strength, kernel=WITHIN, mode=mode, **radius, **window)
        again = [one for _, one, _ in lab.world.denoised(made, drawn, opens(made, drawn.seen), "report")]
        for other in [hazard] if mode != "renoise-only" else lab.budget.hazards:
            eyes = {
                "before": [shows(one, other) for one in drawn.judged],
                "after": [shows(one, other) for one in again],
            }
            found["of"][other] = {
                f"{when}{suffix}": _places(seen, eye)
                for when, seen in eyes.items()
                for eye, suffix in enumerate(("", "_second"))
            }
        found["labels"]["before"] += [one["label"] for one in drawn.judged]
        found["labels"]["after"] += [one["label"] for one in again]
    return found
