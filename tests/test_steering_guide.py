"""The page on steering says what is so: its table is that of the proof, its links lead somewhere, its Python runs."""

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "steering.md").read_text(encoding="utf-8")
sys.path.insert(0, str(ROOT / "benchmarks"))

from steering_table import markdown, table  # noqa: E402


def rows():
    return json.loads((ROOT / "benchmarks" / "steering.json").read_text(encoding="utf-8"))["rows"]


def test_the_table_on_the_page_is_that_of_the_proof():
    said = re.findall(r"^\|.*\|$", PAGE, flags=re.MULTILINE)
    assert said and said == re.findall(r"^\|.*\|$", markdown(rows()), flags=re.MULTILINE)


def test_the_table_of_the_proof_is_that_of_its_cells():
    for model, lines in rows().items():
        file = ROOT / "benchmarks" / f"steering.{model}.jsonl"
        cells = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        again = table([cell for cell in cells if cell.get("line") in lines])[model]
        assert json.loads(json.dumps({name: again[name] for name in lines})) == lines


def test_control_another_outcome_would_be_noticed():
    told = rows()
    model = next(iter(told))
    told[model]["ours"]["target"]["unsafe"] = told[model]["unsteered"]["target"]["unsafe"]
    assert markdown(told) != markdown(rows())


def test_every_link_leads_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", PAGE)
    assert links and all((ROOT / "docs" / link).exists() for link in links)


@pytest.mark.slow
@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL))
def test_every_python_block_runs(block):
    scope = {}
    exec(compile(block, "steering.md", "exec"), scope)
    assert "Replace" in repr(scope["steering"]) and "watches" in repr(scope["steering"]) and len(scope["known"]) == 2
