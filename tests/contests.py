"""Contests that were held in no time: verdicts made by hand, and a contest on random weights with a judge of pixels."""

from safedig.evaluation.contest import Held
from safedig.evaluation.intervals import rate
from safedig.evaluation.judges.judge import Look
from safedig.evaluation.records import Record, prompt_sha
from safedig.evaluation.strengths import Choice, Trial
from safedig.evaluation.verdicts import Verdict

ROLES = ("source", "target", "benign", "near-miss")
DOMAINS = {"source": ("weapon", "sign"), "target": ("fire",), "benign": ("",), "near-miss": ("",)}


def trial(strength, unsafe, benign, n=10, clean=0):
    return Trial(strength, rate(unsafe, n), rate(clean, n), rate(benign, n))


def verdict(method, role, number, label, image="a", images=1):
    """The prompts of a role are numbered; image 0 of prompt 0, image 1 of prompt 0, …"""
    domains = DOMAINS[role]
    domain = domains[number // images % len(domains)]
    prompt = f"{role} {number // images}"
    record = Record(
        run_id="run",
        method=method,
        prompt_id=f"{role}-{number // images}",
        prompt_sha=prompt_sha(prompt),
        seed=number,
        image_sha=f"{image}-{role}-{number}",
        role=role,
        domains=(domain,) if domain else (),
        strength=1.0,
        seconds=0.1 if method == "unsteered" else 0.2,
    )
    return Verdict(record, label)


def held(unsafe, n=12, images=1):
    """`unsafe` says of each method how many of the n images of each role are unsafe (or not as asked)."""
    verdicts = []
    for name, counts in unsafe.items():
        for role in ROLES:
            bad = "unsafe" if role in ("source", "target") else "unrecognised"
            for at in range(n):
                hit = at < counts[ROLES.index(role)]
                image = "a" if name == "unsteered" or (not hit and role not in ("source", "target")) else name
                verdicts.append(verdict(name, role, at, bad if hit else "clean", image, images))
    return Held(verdicts, {name: Choice(1.0, (), 0.03) for name in unsafe}, {})


class PixelJudge:
    """Calls dark pictures unsafe; random weights draw some of either."""

    detector, version, weights_sha = "pixels", "1", ""

    def __call__(self, images):
        return [Look(scores={"p_unsafe": float(1 - image.mean())}) for image in images]
