"""Every attack on every victim, prompt by prompt, within one budget; a finished one is a line of JSON, never run again.

Prompts that break one victim are handed on to the others, which is why what is transferred comes last.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safedig.evaluation.attacks import ATTACKS, Attack, Victim, attacked
from safedig.evaluation.intervals import Rate, rate
from safedig.evaluation.records import Record, Run, Score, prompt_sha, row_of
from safedig.progress import track
from safedig.storage import append, whole_lines

Row = dict[str, Any]
LINES = "attacks.jsonl"
HANDED_ON = "transferred"
BLIND, ANY = "any without weights", "any of them"


@dataclass(frozen=True, eq=False)
class Siege:
    """`key` is what makes one siege another: lines with another key are passed over."""

    victims: Mapping[str, Victim]
    attacks: Sequence[Attack]
    rows: Sequence[Row]
    budget: int
    """Rows that may pass the transformer, for each attack on each prompt."""
    out: Path
    key: str

    def run(self) -> list[dict[str, Any]]:
        """A line for each victim, attack and prompt."""
        file = self.out / LINES
        lines = [json.loads(line) for line in whole_lines(file)]
        done = {(one["victim"], one["attack"], one["id"]): one for one in lines if one["key"] == self.key}
        ordered = sorted(self.attacks, key=lambda one: one.name == HANDED_ON)
        for attack in ordered:
            for name, victim in self.victims.items():
                victim.pool = _handed_on(done, name)
                missing = [row for row in self.rows if (name, attack.name, row["id"]) not in done]
                for row in track(missing, f"{attack.name} on {name}") if missing else ():
                    found = attacked(victim, attack, row, self.budget)
                    line = {"key": self.key, "victim": name, "attack": attack.name, "id": row["id"]} | asdict(found)
                    text = json.dumps(line, ensure_ascii=False)
                    done[name, attack.name, row["id"]] = json.loads(text)  # as the next run reads it
                    append(file, f"{text}\n".encode())
        wanted = {(name, attack.name, row["id"]) for name in self.victims for attack in ordered for row in self.rows}
        return [line for at, line in done.items() if at in wanted]


def as_run(lines: Sequence[Mapping[str, Any]], rows: Sequence[Row], manifest: Mapping[str, Any]) -> Run:
    """A record and the scores for the last image of every attack; of prompts only hashes."""
    asked = {row["id"]: row for row in rows}
    records, scores = [], {}
    for line in lines:
        seen = [row_of(Score, one) for one in line["seen"]]
        scores |= {(one.detector, one.image_sha): one for one in seen}
        for image in {one.image_sha: None for one in seen}:
            record = Record(
                run_id=manifest["run_id"],
                method=line["victim"],
                prompt_id=line["id"],
                prompt_sha=prompt_sha(line["prompt"] or asked[line["id"]]["prompt"]),
                seed=line["seed"],
                image_sha=image,
                role=f"adversarial:{line['attack']}",
                domains=(asked[line["id"]]["risk"],) if asked[line["id"]]["risk"] else (),
            )
            records.append(record)
    return Run(tuple(records), tuple(scores.values()), dict(manifest))


def broken(lines: Sequence[Mapping[str, Any]], budget: int) -> dict[str, dict[str, dict[str, bool]]]:
    """Victim → attack → prompt → whether it was broken within the budget; then by any attack of a sort, and by any."""
    found: dict[str, dict[str, dict[str, bool]]] = {}
    blind = {name for name, one in ATTACKS.items() if not one.white_box}
    for line in lines:
        hit = line["success"] and line["passes"] <= budget
        one = found.setdefault(line["victim"], {})
        for name in (line["attack"], *([BLIND] if line["attack"] in blind else []), ANY):
            hits = one.setdefault(name, {})
            hits[line["id"]] = hits.get(line["id"], False) or hit
    unions = (BLIND, ANY)
    return {
        name: {at: one[at] for at in (*(at for at in one if at not in unions), *(at for at in unions if at in one))}
        for name, one in found.items()
    }


def success(lines: Sequence[Mapping[str, Any]], budget: int) -> dict[str, dict[str, Rate]]:
    """Victim → attack → share of the prompts broken, with Wilson's interval over prompts."""
    return {
        name: {attack: rate(sum(hits.values()), len(hits)) for attack, hits in one.items()}
        for name, one in broken(lines, budget).items()
    }


def curves(lines: Sequence[Mapping[str, Any]], budget: int, points: int = 20) -> dict[str, dict[str, list]]:
    """Victim → attack → [(budget, rate)] at equal distances up to the whole; it never falls."""
    grid = [max(1, round(budget * at / points)) for at in range(1, points + 1)]
    at_each = [(one, success(lines, one)) for one in grid]
    whole = at_each[-1][1]
    return {
        name: {attack: [(one, found[name][attack]) for one, found in at_each] for attack in attacks}
        for name, attacks in whole.items()
    }


def _handed_on(done: Mapping[tuple[str, str, str], Mapping[str, Any]], to: str) -> dict[str, list[str]]:
    """What words alone have done to the other victims."""
    pool: dict[str, list[str]] = {}
    for (victim, attack, identity), line in done.items():
        if victim != to and attack != HANDED_ON and line["success"] and line["prompt"]:
            pool.setdefault(identity, []).append(line["prompt"])
    return pool
