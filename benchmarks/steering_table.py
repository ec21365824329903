"""From finished cells to the table: rates over all held-out domains with intervals, and each line against unsteered."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from safedig.evaluation.comparison import paired
from safedig.evaluation.intervals import rate

Cell = dict[str, Any]


OURS = "ours"
APART = ("mood", "twins")  # in the names of lines that are of other prompts
BESIDE = {
    "Repel": ("Repel, reconstruction adapted", "Repel, source contrast alone"),
    "unknown tokens looked up too, no target data": ("ours, no target data",),
}
"""Lines and those that they are compared with, prompt by prompt, beside ours."""


def table(cells: Sequence[Cell]) -> dict[str, dict[str, Any]]:
    """By model and line. One image a prompt: the intervals are Wilson's, and paired differences McNemar's."""
    models = dict.fromkeys(cell["model"] for cell in cells)
    lines = dict.fromkeys(cell["line"] for cell in cells)
    found = {}
    for model in models:
        of = {line: [c for c in cells if (c["model"], c["line"]) == (model, line)] for line in lines}
        of = {line: own for line, own in of.items() if own}
        found[model] = {line: summary(own) | against(line, of) for line, own in of.items()}
    return found


def against(line: str, of: Mapping[str, Sequence[Cell]]) -> dict[str, Any]:
    """How many more target images this line leaves unsafe and draws clean than others, of the prompts of both."""
    others = [
        one
        for one in (OURS, *BESIDE.get(line, ()))
        if one in of and one != line and not any(name in line for name in APART)
    ]
    told = {}
    for other in others:
        mine, theirs = _common(of[line], of[other])
        told[other] = {name: _change(theirs, mine, letter) for name, letter in (("unsafe", "U"), ("clean", "C"))}
    return {"against": told} if told else {}


def _common(some: Sequence[Cell], more: Sequence[Cell]) -> tuple[str, str]:
    """The target's letters, fold by fold; who is measured on fewer prompts is measured on every second one."""
    halved = []
    for one, other in zip(*([cell["letters"]["target"] for cell in cells] for cells in (some, more)), strict=True):
        halved.append((one[:: -(-len(one) // len(other))], other[:: -(-len(other) // len(one))]))
    return "".join(one for one, _ in halved), "".join(other for _, other in halved)


def summary(cells: Sequence[Cell]) -> dict[str, Any]:
    """What one line does, over the folds."""
    target, source = _all(cells, "letters", "target"), _all(cells, "letters", "source")
    wording = _all(cells, "wording", "target")
    by_target = {cell["target"]: _share(cell["letters"]["target"], "U") for cell in cells}
    told: dict[str, Any] = {
        "setting": cells[0]["setting"],
        "target": _labels(target),
        "target_before": _labels(_all(cells, "before", "target")),
        "by_target": by_target,
        "clean_by_target": {cell["target"]: _share(cell["letters"]["target"], "C") for cell in cells},
        "worst_target": max(by_target.values(), key=lambda one: one["rate"]),
        "source": _labels(source),
    }
    indirect = "".join(letter for letter, kind in zip(target, wording, strict=True) if kind == "i")
    told |= {"target_indirect": _share(indirect, "U")} if indirect else {}
    for role in ("benign", "near-miss"):
        after, before = _all(cells, "letters", role), _all(cells, "before", role)
        told[role] = {
            "as_asked": _share(after, "C"),
            "as_asked_before": _share(before, "C"),
            "change": _change(before, after, "C"),
            "identical": _share(_all(cells, "same", role), "1"),
        }
    mixed = [
        (before, after)
        for role in ("target", "source")
        for before, after, kind in zip(
            _all(cells, "kept_before", role), _all(cells, "kept", role), _all(cells, "kind", role), strict=True
        )
        if kind == "m"
    ]
    if mixed:
        before, after = ("".join(side) for side in zip(*mixed, strict=True))
        told["mixed_half"] = {"kept": _share(after, "1"), "kept_before": _share(before, "1")}
        told["mixed_half"]["change"] = _change(before, after, "1")
    return told


def markdown(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A table for each model, a line for each row, in percent of images."""
    head = ["", "target unsafe", "worst domain", "indirect", "clean", "unrecognised", "source unsafe", "source clean"]
    head += ["benign as asked, change", "benign identical", "near-miss identical", "mixed half, change"]
    parts = []
    for model, lines in rows.items():
        parts += [f"**{model}**", "", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
        for name, told in lines.items():
            cells = [told["target"]["unsafe"], told["worst_target"], told.get("target_indirect")]
            cells += [told["target"]["clean"], told["target"]["unrecognised"]]
            cells += [told["source"]["unsafe"], told["source"]["clean"]]
            benign, near, mixed = told["benign"], told["near-miss"], told.get("mixed_half")
            ends = [_points(benign["change"]), _percent(benign["identical"]), _percent(near["identical"])]
            ends += [_points(mixed["change"]) if mixed else "–"]
            parts.append(f"| {' | '.join([name, *map(_percent, cells), *ends])} |")
        parts.append("")
    return "\n".join(parts)


def _percent(rate: Mapping[str, Any] | None) -> str:
    if rate is None:
        return "–"
    return f"{100 * rate['rate']:.1f} [{100 * rate['lo']:.1f}, {100 * rate['hi']:.1f}]"


def _points(change: Mapping[str, Any]) -> str:
    return f"{change['delta']:+.1f} [{change['lo']:+.1f}, {change['hi']:+.1f}]"


def _all(cells: Sequence[Cell], what: str, role: str) -> str:
    return "".join(cell[what][role] for cell in cells)


def _share(letters: str, one: str) -> dict[str, Any]:
    return dict(rate(letters.count(one), len(letters)))


def _labels(letters: str) -> dict[str, Any]:
    names = {"unsafe": "U", "unrecognised": "R", "empty": "E", "clean": "C"}
    return {name: _share(letters, letter) for name, letter in names.items()}


def _change(before: str, after: str, one: str) -> dict[str, Any]:
    """In percentage points, paired by prompt; prompts are numbered, for one may stand in several folds."""
    first, second = (_numbered(side, one) for side in (before, after))
    return dict(paired(first, second))


def _numbered(letters: str, one: str) -> dict[tuple[Hashable, Any], bool]:
    return {(at, 0): letter == one for at, letter in enumerate(letters)}
