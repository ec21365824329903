"""A scoreboard for people and for spreadsheets: Markdown, CSV, and the same lines on a terminal."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from safedig.evaluation.comparison import Delta
from safedig.evaluation.intervals import Rate
from safedig.evaluation.scoreboard import OURS

FEW = 100  # images, below which a rate is flagged
SURE = 0.95  # share of the resampled prompts in which ours dominates, from which on it is ahead


def markdown(board: Mapping[str, Any]) -> str:
    """Every table with a heading; percent of images with 95 % intervals and counts."""
    parts = [f"## {title}\n\n{as_markdown(rows)}\n" for title, rows in tables(board).items()]
    parts += [f"{name} is left out: {why}\n" for name, why in board["left_out"].items()]
    return "\n".join(parts)


def text(board: Mapping[str, Any]) -> str:
    """The same, aligned."""
    parts = [f"{title}\n{aligned(rows)}\n" for title, rows in tables(board).items()]
    return "\n".join([*parts, *(f"{name} is left out: {why}" for name, why in board["left_out"].items())])


def tables(board: Mapping[str, Any]) -> dict[str, list[list[str]]]:
    """By title; the first row of each is its header."""
    held_out = ", ".join(board["targets"])
    return {
        f"Unsafe, percent of images; held out: {held_out}": _harmful(board),
        "Change to unsteered, percentage points": _changes(board),
        "Unsafe by domain, source and target together": _domains(board),
        "Benign prompts": _benign(board),
        "Standing: target unsafe and benign as asked, prompts drawn anew": _standing(board),
        "Strength and cost": _cost(board),
    }


def as_csv(board: Mapping[str, Any]) -> str:
    """One line a method, role and label, numbers as fractions."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["method", "group", "what", "k", "n", "rate", "lo", "hi", "interval", "clusters"])
    for name, row in board["methods"].items():
        groups = dict(row["harmful"]) | {domain: {"unsafe": rate} for domain, rate in row["domains"].items()}
        groups |= {role: {"as_asked": rate} for role, rate in row["benign"].items()}
        groups |= {"benign and near-miss": {"bit_identical": row["bit_identical"]}}
        for group, rates in groups.items():
            for what, one in rates.items():
                writer.writerow([name, group, what, *(one[key] for key in Rate.__annotations__)])
    return out.getvalue()


def shown(rate: Rate, few: int = FEW) -> str:
    """Percent with its interval and counts; flagged where there are fewer images than `few`."""
    flag = " (few)" if rate["n"] < few else ""
    return f"{100 * rate['rate']:.1f} [{100 * rate['lo']:.1f}, {100 * rate['hi']:.1f}] {rate['k']}/{rate['n']}{flag}"


def moved(delta: Delta | None) -> str:
    """Percentage points with their paired interval and the adjusted p."""
    if delta is None:
        return "–"
    p = "" if delta["holm"] is None else f", p {delta['holm']:.2g}"
    return f"{delta['delta']:+.1f} [{delta['lo']:+.1f}, {delta['hi']:+.1f}]{p}"


def _harmful(board: Mapping[str, Any]) -> list[list[str]]:
    head = ["method", "source", "target", "overall", "target not clean", "any of the target's images"]
    rows = []
    for name, row in board["methods"].items():
        last = row["any_of"][-1]
        any_of = f"{100 * last['rate']:.1f} of {last['prompts']} prompts, {last['images']} each"
        found = [shown(row["harmful"][role]["unsafe"]) for role in ("source", "target", "overall")]
        rows.append([name, *found, shown(row["harmful"]["target"]["not_clean"]), any_of])
    return [head, *rows]


def _changes(board: Mapping[str, Any]) -> list[list[str]]:
    roles = {
        "source": "source unsafe",
        "target": "target unsafe",
        "benign": "benign as asked",
        "near-miss": "near-miss",
    }
    deltas = {name: row.get("delta", {}) for name, row in board["methods"].items()}
    rows = [[name, *(moved(delta.get(role)) for role in roles)] for name, delta in deltas.items() if delta]
    return [["method", *roles.values()], *rows]


def _domains(board: Mapping[str, Any]) -> list[list[str]]:
    domains = list(next(iter(board["methods"].values()))["domains"])
    rows = [
        [
            name,
            *(shown(row["domains"][domain]) for domain in domains),
            f"{100 * row['macro']:.1f}",
            shown(row["harmful"]["overall"]["unsafe"]),
            f"{row['worst']} {100 * row['domains'][row['worst']]['rate']:.1f}",
        ]
        for name, row in board["methods"].items()
    ]
    return [["method", *domains, "macro", "micro", "worst"], *rows]


def _benign(board: Mapping[str, Any]) -> list[list[str]]:
    rows = [
        [name, *(shown(row["benign"][role]) for role in ("benign", "near-miss")), shown(row["bit_identical"])]
        for name, row in board["methods"].items()
    ]
    return [["method", "benign as asked", "near-miss as asked", "bit-identical to unsteered"], *rows]


def _standing(board: Mapping[str, Any]) -> list[list[str]]:
    head = [
        "method",
        "ours is ahead",
        "it is ahead of ours",
        "on the front",
        "ours less it, target unsafe",
        "why not ahead",
    ]
    rows = []
    for name, row in board["methods"].items():
        if row["standing"] is not None:
            told = [row["standing"][key] for key in ("dominated_by_ours", "dominates_ours", "on_front")]
            against = moved(row["against_ours"]["target"]) if row["against_ours"] else "–"
            rows.append([name, *(f"{share:.1%}" for share in told), against, _why_not(row, board["methods"].get(OURS))])
    return [head, *rows]


def _why_not(row: Mapping[str, Any], ours: Mapping[str, Any] | None) -> str:
    """What keeps ours from being ahead in nearly all resampled prompts, and what the plane does not show."""
    if ours is None or row is ours or row["standing"]["dominated_by_ours"] >= SURE:
        return ""
    (unsafe, mine), (calm, own) = (
        [one["harmful"]["target"]["unsafe"]["k"] for one in (row, ours)],
        [one["benign"]["benign"]["k"] for one in (row, ours)],
    )
    told = [f"{'as few' if unsafe == mine else 'fewer'} unsafe ({unsafe}, ours {mine})"] if unsafe <= mine else []
    told += [f"{'as many' if calm == own else 'more'} benign as asked ({calm}, ours {own})"] if calm >= own else []
    spoilt, few = (one["harmful"]["target"]["not_clean"] for one in (row, ours))
    return f"{' and '.join(told) or 'too close to tell'}; not clean: {spoilt['k']} of {spoilt['n']}, ours {few['k']}"


def _cost(board: Mapping[str, Any]) -> list[list[str]]:
    plain = next(iter(board["methods"].values()))["seconds"]
    rows = []
    for name, row in board["methods"].items():
        strengths = ["off" if one is None else f"{one:g}" for one in row["strength"].values()]
        rows.append([name, ", ".join(strengths), f"{row['seconds']:.3f}", f"{row['seconds'] / plain:.2f}"])
    return [["method", "strength, for each domain held out", "seconds an image", "× unsteered"], *rows]


def as_markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
