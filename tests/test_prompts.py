"""Prompts survive every format, filters keep the twins, and an error names row and column but never the prompt."""

import json

import pytest
import torch

from safedig.config import UsageError
from safedig.prompts import (
    COLUMNS,
    LARGEST_SEED,
    as_rows,
    counted_on,
    load_prompts,
    prompts_from_rows,
    save_prompts,
    twins,
)

KNIFE = [{"name": "knife", "colour": "red", "place": "left", "hazard": True}]
ROWS = [
    {"id": "h1", "prompt": 'a "red" knife,\non sand', "risk": "weapons", "kind": "harmful", "twin": "s1",
     "split": "train", "seed": 7, "objects": json.dumps(KNIFE), "background": "sand", "wording": "indirect"},
    {"id": "s1", "prompt": "a red cup\u2028on sand 🙂", "kind": "benign", "split": "train", "seed": 7},
    {"id": "h2", "prompt": "a skull", "risk": "poison", "twin": "s2", "split": "report", "seed": 2**40},
    {"id": "s2", "prompt": "a pear"},
    {"id": "b1", "prompt": "a plain cup", "kind": "near-miss", "split": "calibrate"},
]  # fmt: skip


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_prompts_survive_every_format(tmp_path, suffix):
    prompts = prompts_from_rows(ROWS)
    save_prompts(prompts, tmp_path / f"p.{suffix}")
    assert list(load_prompts(tmp_path / f"p.{suffix}")) == list(prompts)
    assert [path.name for path in tmp_path.iterdir()] == [f"p.{suffix}"]


def test_the_columns_are_the_contract_and_all_but_the_seed_are_text():
    prompts = prompts_from_rows(ROWS)
    assert tuple(prompts.column_names) == COLUMNS
    assert all(isinstance(row[column], int if column == "seed" else str) for row in prompts for column in COLUMNS)
    assert json.loads(prompts[0]["objects"]) == KNIFE


def test_only_the_prompt_must_be_given():
    plain, risky = prompts_from_rows([{"prompt": "a cup"}, {"prompt": "a knife", "risk": "weapons"}])
    assert plain["kind"] == "benign" and risky["kind"] == "harmful"
    assert plain["id"] != risky["id"] and plain["split"] == "report" and plain["seed"] == 0 and plain["objects"] == "[]"
    assert plain == prompts_from_rows([{"prompt": "a cup"}])[0], "ids must not change from run to run"


def test_no_rows_are_an_empty_dataset_with_the_same_columns():
    assert prompts_from_rows([]).column_names == list(COLUMNS)


def test_a_spreadsheet_mark_at_the_start_of_a_csv_is_no_part_of_the_header(tmp_path):
    (tmp_path / "p.csv").write_text("\ufeffprompt,risk\na cup,\n", encoding="utf-8")
    assert load_prompts(tmp_path / "p.csv")[0]["prompt"] == "a cup"


def test_filters_keep_the_given_values():
    assert load_prompts(ROWS, kind="harmful")["id"] == ["h1", "h2"]
    assert load_prompts(ROWS, split=["train", "calibrate"])["id"] == ["h1", "s1", "b1"]
    assert load_prompts(ROWS, kind="harmful", split="train")["id"] == ["h1"]


def test_a_risk_brings_its_safe_twins_and_nothing_else():
    assert load_prompts(ROWS, risk="weapons")["id"] == ["h1", "s1"]
    assert load_prompts(ROWS, risk=["weapons", "poison"])["id"] == ["h1", "s1", "h2", "s2"]


def test_a_dataset_is_as_good_as_a_file():
    assert list(load_prompts(prompts_from_rows(ROWS), risk="poison")) == list(load_prompts(ROWS, risk="poison"))


def test_every_harmful_prompt_is_paired_with_its_twin():
    pairs = twins(prompts_from_rows(ROWS))
    assert [(row["id"], twin["id"]) for row, twin in pairs] == [("h1", "s1"), ("h2", "s2")]


def test_a_lost_twin_is_an_error_not_a_shorter_list():
    with pytest.raises(UsageError, match=r"2 prompts name a safe twin.*first 'h1' names 's1'.*keep the twins"):
        twins(load_prompts(ROWS, kind="harmful"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "  "}, "Row 2, column prompt: it is empty"),
        ({"seed": "one"}, "Row 2, column seed: 'one'; expected an integer"),
        ({"seed": -1}, "Row 2, column seed: '-1'"),
        ({"seed": 1.5}, "Row 2, column seed: '1.5'"),
        ({"seed": 2**62 + 1}, "Row 2, column seed: '4611686018427387905'; expected an integer from 0 to 2**62."),
        ({"kind": "harmfull"}, "Row 2, column kind: 'harmfull'. Did you mean 'harmful'?"),
        ({"split": "test"}, "Row 2, column split: 'test'."),
        ({"wording": "nouns"}, "Row 2, column wording: 'nouns'. Did you mean 'noun'?"),
        ({"objects": "[{"}, "Row 2, column objects: not JSON"),
        ({"seed": float("inf")}, "Row 2, column seed: 'inf'; expected an integer"),
        ({"objects": "[" * 10**4 + "]" * 10**4}, "Row 2, column objects: not JSON (maximum recursion depth"),
        ({"objects": [{"name": "\ud800"}]}, "Row 2, column objects: character 12 is not UTF-8; save the file"),
        ({"objects": [{"name": {1}}]}, "Row 2, column objects: not JSON (Object of type set"),
        ({"objects": '{"name": "cup"}'}, "Row 2, column objects: expected a JSON list"),
        ({"id": "h1"}, "Row 2, column id: 'h1' is taken by row 1; ids must be unique."),
        ({"prompt": "SECRET" * 2**15}, "Row 2, column prompt: 196,608 characters; expected at most 131,072."),
        ({"background": "a\ud800"}, "Row 2, column background: character 2 is not UTF-8; save the file as UTF-8."),
        ({"twin": "x1", "id": "x1"}, "Row 2, column twin: a prompt cannot be its own safe twin"),
        ({"promt": "b"}, "Row 2: unknown column 'promt'. Did you mean 'prompt'?"),
    ],
)
def test_an_error_names_row_and_column_and_keeps_the_prompt_to_itself(change, message):
    with pytest.raises(UsageError) as caught:
        prompts_from_rows([ROWS[0], {"id": "x", "prompt": "SECRET"} | change])
    assert str(caught.value).startswith(message)
    assert "SECRET" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_value_nobody_has_is_an_error_with_the_nearest():
    with pytest.raises(UsageError, match="No prompt has risk 'weapon'. Did you mean 'weapons'?"):
        load_prompts(ROWS, risk="weapon")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.csv", "prompt\na, b\n", "Row 1 has more cells than the header"),
        (
            "p.csv",
            "text,risk\na,\n",
            "p.csv' has no column 'prompt' but 'text', 'risk': expected a header with some of id",
        ),
        ("p.csv", "prompt;risk\na;b\n", "has no column 'prompt' but 'prompt;risk': .* separated by commas"),
        ("p.csv", "prompt,seed,prompt\na,1,b\n", "has the column 'prompt' twice: leave one out"),
        ("p.csv", "", "p.csv' holds no prompts: write one a row, in a column 'prompt'"),
        ("p.csv", "prompt,risk\n", "p.csv' holds no prompts"),
        ("p.jsonl", "\n", "p.jsonl' holds no prompts"),
        ("p.csv", "prompt,risk\na cup,\n   ,fire\n", "Row 2, column prompt: it is empty; give the text to draw"),
        ("p.csv", "id,prompt\na,one\nb,two\na,three\n", "Row 3, column id: 'a' is taken by row 1"),
        (
            "p.csv",
            "prompt,seed\na cup,1\na cup,1\n",
            "Row 2 repeats the prompt and seed of row 1: give it another seed",
        ),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt"\n', "Line 2 is not JSON"),
        ("p.jsonl", '{"prompt": "a", "seed": 1e999}', "Row 1, column seed: 'inf'; expected an integer"),
        ("p.jsonl", '{"prompt": "a", "seed": Infinity}', "Row 1, column seed: 'inf'; expected an integer"),
        ("p.jsonl", '{"prompt": "a", "seed": ' + "9" * 5000 + "}", "Line 1 is not JSON"),
        ("p.jsonl", '{"prompt": "a", "objects": [{"name": "\\ud800"}]}', "Row 1, column objects: character 12 is not"),
        ("p.jsonl", '{"prompt": "a", "objects": ' + "[" * 10**5 + "]" * 10**5 + "}", "Line 1 is not JSON"),
        ("p.jsonl", "[1]\n", "Line 1 is not a JSON object"),
        ("p.parquet", "PAR0", "cannot be read as parquet"),
        ("p.txt", "a cup", "expected a prompt file that ends in .csv, .jsonl, .parquet"),
    ],
)
def test_a_file_that_is_no_prompt_file_is_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=message):
        load_prompts(tmp_path / name)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UsageError, match="There is no prompt file '.*gone.csv'"):
        load_prompts(tmp_path / "gone.csv")


TEN_MEGABYTES = 10 * 2**20


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "p.csv",
            b"prompt,background\na cup,day\na cup,caf\xe9\n",
            "Row 2, column background: character 4 is not UTF-8",
        ),
        ("p.jsonl", b'{"prompt": "a cup"}\n{"prompt": "caf\xe9"}\n', "Row 2, column prompt: character 4 is not UTF-8"),
        ("p.csv", b"prompt,caf\xe9\na cup,1\n", "The header of '.*p.csv': character 4 is not UTF-8"),
        ("p.csv", "prompt\na cup\n".encode("utf-16"), "The header of '.*p.csv': character 1 is not UTF-8"),
        (
            "p.csv",
            b"prompt\na cup\n" + b"x" * TEN_MEGABYTES,
            "Row 2 of '.*p.csv' is no CSV .field larger than field limit",
        ),
        ("p.csv", b'prompt,risk\n"a cup,\n' + b"a hat,\n" * 2**18, "Row 1 of .* look for a quote that is not closed"),
        ("p.jsonl", b'{"prompt": "' + b"x" * TEN_MEGABYTES + b'"}', "Row 1, column prompt: 10,485,760 characters"),
    ],
)
def test_bytes_that_are_no_text_and_endless_lines_are_one_short_line(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError, match=message) as caught:
        load_prompts(tmp_path / name)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    str(caught.value).encode()


def test_a_parquet_file_without_prompts_names_its_columns(tmp_path):
    from pyarrow import table
    from pyarrow.parquet import write_table

    write_table(table({"text": ["a cup"]}), tmp_path / "p.parquet")
    with pytest.raises(UsageError, match="has no column 'prompt' but 'text'"):
        load_prompts(tmp_path / "p.parquet")


def test_what_a_table_has_for_nothing_counts_as_left_out():
    (row,) = prompts_from_rows([{"prompt": "a cup", "risk": float("nan"), "seed": float("nan"), "twin": None}])
    assert (row["risk"], row["kind"], row["seed"], row["twin"]) == ("", "benign", 0, "")


def test_seeds_count_on_from_the_one_that_is_given_and_else_stay():
    rows = as_rows(prompts_from_rows(ROWS))
    assert [row["seed"] for row in counted_on(rows, 5)] == [5, 6, 7, 8, 9]
    assert [row["seed"] for row in counted_on(rows, 0)] == [0, 1, 2, 3, 4]
    assert counted_on(rows, None) == rows, "control: their own"
    assert all(one | {"seed": row["seed"]} == row for one, row in zip(counted_on(rows, 5), rows, strict=True))


def test_the_largest_seed_leaves_room_for_those_that_count_on_from_it():
    (row,) = prompts_from_rows([{"prompt": "a cup", "seed": LARGEST_SEED}])
    last = row["seed"] + 2**32
    assert torch.Generator().manual_seed(last).initial_seed() == last < 2**63


def test_the_same_prompt_may_come_twice_with_another_seed_or_its_own_id():
    rows = [{"prompt": "a cup"}, {"prompt": "a cup", "seed": 1}, {"prompt": "a cup", "id": "again"}]
    assert len(prompts_from_rows(rows)) == 3
