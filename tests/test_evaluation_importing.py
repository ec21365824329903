"""Other projects' folders and CSVs: traps of their formats are told, joins are by key, nothing is guessed."""

import csv
import json
import random

import numpy as np
import pytest
from PIL import Image

from safedig.config import UsageError
from safedig.evaluation.domains import by_domain, leaks, source_and_target
from safedig.evaluation.importing import import_folder, import_scores
from safedig.evaluation.prompt_tables import PAIRED_FROM, Asked, PromptTable, read_prompt_table
from safedig.evaluation.records import Record, Run, circumstances, prompt_sha, read_run, write_run
from safedig.evaluation.rules import Above
from safedig.evaluation.verdicts import Verdict, verdicts

I2P = [  # case, categories, prompt, seed
    ("0", "sexual", "a red thing", "11"),
    ("1", "violence, sexual", "two things,\nand a third", "12"),
    ("2", "violence", "a red thing", "13"),  # the text of case 0 without its label
    ("3", "hate", "", "14"),
    ("4", "shocking", 'a "quoted" thing', "15"),
]
HEADER = (
    "prompt,categories,hard,inappropriate_percentage,nudity_percentage,q16_percentage,sd_safety_percentage,"
    "prompt_toxicity,lexica_url,evaluation_seed,evaluation_guidance,sd_image_width,sd_image_height,sd_model,case_number"
)


def i2p(path, rows=I2P):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["", *HEADER.split(",")], restval="0")
        writer.writeheader()
        for case, labels, text, seed in rows:
            writer.writerow(
                {"": case, "prompt": text, "categories": labels, "evaluation_seed": seed, "case_number": case}
            )
    return path


def image(path, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for case in range(5):
        for seed in (0, 1):
            image(tmp_path / "images" / f"{case}_{seed}.png", 10 * case + seed)
    return tmp_path / "images"


@pytest.fixture
def table(tmp_path):
    return read_prompt_table(i2p(tmp_path / "i2p.csv"))


# ---- prompt tables


def test_i2p_with_its_traps(table):
    assert table.format == "i2p" and [row.case for row in table.rows] == list("01234")
    assert table.rows[1] == Asked("1", "two things,\nand a third", ("violence", "sexual"), 12)
    assert table.rows[4].text == 'a "quoted" thing'
    told = " ".join(table.warnings)
    assert "1 prompts are empty" in told and "1 prompts have line breaks" in told and "1 rows repeat" in told


def test_without_traps_nothing_is_told(tmp_path):
    assert read_prompt_table(i2p(tmp_path / "i2p.csv", I2P[:1])).warnings == ()


@pytest.mark.parametrize(
    ("name", "header", "row", "expected"),
    [
        ("coco", "case_number,source,prompt,evaluation_seed,coco_id", "7,coco,a dog,3,99", Asked("7", "a dog", (), 3)),
        (
            "mma-diffusion",
            "target_prompt,adv_prompt,sanitized_adv_prompt,success_against_sanitization_defense,clean_prompt",
            "t,adv,s,1,clean",
            Asked("0", "adv", ("sexual",), twin="clean"),
        ),
        ("ring-a-bell", "sensitive prompt,normal prompt", "bad,good", Asked("0", "bad", ("sexual",), twin="good")),
        (
            "copro",
            "idx,unsafe_prompt,safe_prompt,concept,category",
            "5,bad,good,insult,Harrasment",
            Asked("5", "bad", ("harassment",), twin="good"),
        ),
    ],
)
def test_a_format_is_known_by_its_header(tmp_path, name, header, row, expected):
    (tmp_path / "prompts.csv").write_text(f"{header}\n{row}\n")
    found = read_prompt_table(tmp_path / "prompts.csv")
    assert (found.format, found.rows) == (name, (expected,))
    assert any("not Ring-A-Bell's attack" in words for words in found.warnings) == (name == "ring-a-bell")


def test_captions_pair_with_the_line_that_far_below(tmp_path):
    lines = [f"safe {i}" for i in range(PAIRED_FROM)] + [f"bad {i}" for i in range(PAIRED_FROM)]
    (tmp_path / "captions.txt").write_text("\n".join(lines))
    found = read_prompt_table(tmp_path / "captions.txt")
    assert all(row.text[4:] == row.twin[5:] and row.text.startswith("bad") for row in found.rows)
    (tmp_path / "captions.txt").write_text("\n".join(lines[1:]))
    with pytest.raises(UsageError, match="31379 lines; expected CoProV2's 31380"):
        read_prompt_table(tmp_path / "captions.txt")


def test_an_unknown_header_and_an_open_quote_are_told(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\nx,y\n")
    with pytest.raises(UsageError, match="none of the known headers.*i2p: categories, prompt"):
        read_prompt_table(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_text('prompt,categories\n"x,y\n')
    with pytest.raises(UsageError, match="is a quote not closed"):
        read_prompt_table(tmp_path / "a.csv")
    with pytest.raises(UsageError, match="cannot be read"):
        read_prompt_table(tmp_path / "none.csv")


# ---- folders


def test_a_folder_becomes_records_that_survive_the_disk(folder, table, tmp_path):
    records, warnings = import_folder(folder, table, "sd-1.4", "run")
    assert [(one.prompt_id, one.seed) for one in records] == [(str(c), s) for c in range(5) for s in (0, 1)]
    assert records[2].domains == ("violence", "sexual") and records[2].prompt_sha == prompt_sha(I2P[1][2])
    assert len({one.image_sha for one in records}) == 10 and not any("no image" in words for words in warnings)
    write_run(tmp_path / "run", Run(tuple(records), (), circumstances(model="sd-1.4")))
    assert read_run(tmp_path / "run").records == tuple(records)


def test_a_corrupt_image_keeps_its_row_and_a_prompt_without_image_is_told(folder, table):
    (folder / "3_0.png").write_bytes(b"torn")
    for seed in (0, 1):
        (folder / f"4_{seed}.png").unlink()
    records, warnings = import_folder(folder, table, "sd-1.4", "run")
    assert len(records) == 8 and sum(one.image_sha.startswith("file:") for one in records) == 1
    assert "1 prompts have no image." in warnings and "1 images cannot be read." in warnings


def test_an_image_nobody_asked_for_is_refused(folder, table):
    image(folder / "9_0.png", 0)
    with pytest.raises(UsageError, match="images of case 9"):
        import_folder(folder, table, "sd-1.4", "run")
    (folder / "9_0.png").rename(folder / "cover.png")
    with pytest.raises(UsageError, match="'cover.png' is not named"):
        import_folder(folder, table, "sd-1.4", "run")
    with pytest.raises(UsageError, match="no folder"):
        import_folder(folder / "none", table, "sd-1.4", "run")
    doubled = PromptTable("i2p", (*table.rows, table.rows[0]))
    with pytest.raises(UsageError, match="1 prompts share their case number"):
        import_folder(folder, doubled, "sd-1.4", "run")


# ---- scores


def scores_csv(path, header, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.mark.parametrize("key", ["image_sha", "image", "case and seed"])
def test_scores_join_by_key_however_the_file_is_sorted(folder, table, tmp_path, key):
    records, _ = import_folder(folder, table, "sd-1.4", "run")
    own = {
        "image_sha": (["image_sha"], lambda r: [r.image_sha]),
        "image": (["image"], lambda r: [f"some/folder/{r.image}"]),
        "case and seed": (["case", "seed"], lambda r: [r.prompt_id, r.seed]),
    }
    columns, name = own[key]
    rows = [[*name(one), (10 * int(one.prompt_id) + one.seed) / 100] for one in records]
    random.Random(1).shuffle(rows)
    scores = import_scores(scores_csv(tmp_path / "s.csv", [*columns, "unsafe"], rows), records, "nudenet2", "2.0")
    found = verdicts(records, scores, Above("nudenet2", "unsafe", 0.3, inclusive=True))
    assert [one.record.prompt_id for one in found if one.label == "unsafe"] == ["3", "3", "4", "4"]


def test_boxes_words_and_errors_come_along(folder, table, tmp_path):
    records, _ = import_folder(folder, table, "sd-1.4", "run")
    box = json.dumps([{"class": "FEET_EXPOSED", "score": 0.7, "box": [0, 0, 1, 1]}])
    rows = [["0_0.png", box, "Full", ""], ["0_1.png", "[]", "", "timed out"], ["1_0.png", "", "nan", ""]]
    path = scores_csv(tmp_path / "s.csv", ["image", "boxes", "choice", "error"], rows)
    one, other, third = import_scores(path, records, "x", "1")
    assert one.boxes[0]["class"] == "FEET_EXPOSED" and one.scores == {"choice": "Full"} and not one.error
    assert other.error == "timed out" and third.error == "choice is no finite number"


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        (["image", "p"], [["7_7.png", 1]], "row 1: no image has image 7_7.png"),
        (["image", "p"], [["0_0.png", 1], ["0_0.png", 2]], "row 2: the image with image 0_0.png has another score"),
        (["file", "p"], [["0_0.png", 1]], "expected image_sha, image, or case and seed"),
        (["image", "boxes"], [["0_0.png", "[{}]"]], "a box without class and score"),
        (["image", "p"], [["0_0.png"]], "more or fewer cells"),
    ],
)
def test_scores_that_belong_to_nothing_are_refused(folder, table, tmp_path, header, rows, message):
    records, _ = import_folder(folder, table, "sd-1.4", "run")
    with pytest.raises(UsageError, match=message):
        import_scores(scores_csv(tmp_path / "s.csv", header, rows), records, "x", "1")


def test_an_image_without_a_row_is_missed_not_safe(folder, table, tmp_path):
    records, _ = import_folder(folder, table, "sd-1.4", "run")
    path = scores_csv(tmp_path / "s.csv", ["image", "unsafe"], [["0_0.png", 0.1]])
    with pytest.raises(UsageError, match="nudenet2 has not scored the image of prompt 0, seed 1"):
        verdicts(records, import_scores(path, records, "nudenet2", "2.0"), Above("nudenet2", "unsafe", 0.6))
    empty = scores_csv(tmp_path / "s.csv", ["image", "unsafe"], [["0_0.png", ""]])
    assert import_scores(empty, records, "nudenet2", "2.0")[0].error == "the row holds no score"


# ---- source and target


def seen(case, labels, text, unsafe, seed=0):
    label = "unsafe" if unsafe else "clean"
    return Verdict(Record("run", "m", case, prompt_sha(text), seed, f"{case}-{seed}", domains=labels), label)


RUN = [
    seen("0", ("sexual",), "a", True),
    seen("1", ("violence", "sexual"), "b", True),
    seen("2", ("violence",), "a", True),  # leaks: the text of case 0
    seen("3", ("violence",), "c", False),
    seen("4", ("hate",), "d", False),
    seen("5", (), "benign", False),
]


def test_a_leaking_text_is_the_targets_where_it_has_the_label_and_nobodys_elsewhere():
    source, target, warnings = source_and_target(RUN, "sexual")
    assert [one.record.prompt_id for one in target] == ["0", "1"]
    assert [one.record.prompt_id for one in source] == ["3", "4"]
    assert leaks((one.record for one in RUN), "sexual") == {prompt_sha("a")}
    assert warnings == [
        "1 texts occur both with and without the label sexual: 1 images of theirs are left out of the source."
    ]


def test_control_without_a_leak_nothing_is_left_out():
    source, target, warnings = source_and_target([one for one in RUN if one.record.prompt_id != "0"], "sexual")
    assert (len(source), len(target), warnings) == (3, 1, [])


def test_a_prompt_of_several_domains_counts_in_each_and_once_overall():
    found = by_domain(RUN, "sexual")
    assert [found["domains"][name]["line"]["n"] for name in ("sexual", "violence", "hate")] == [2, 3, 1]
    assert found["overall"]["line"]["n"] == 5 and found["overall"]["line"]["k"] == 3
    assert (found["source"]["line"]["k"], found["target"]["line"]["k"]) == (0, 2)
    assert found["macro"] == pytest.approx((1 + 2 / 3 + 0) / 3) and found["micro"] == 0.6
    assert found["worst"] == "sexual" and "Fewer than 100 prompts: hate, sexual, violence." in found["warnings"]


def test_line_and_any_of_are_told_side_by_side():
    found = [seen("0", ("sexual",), "a", seed == 3, seed) for seed in range(10)]
    found += [seen("1", ("sexual",), "b", False, seed) for seed in range(10)]
    rates = by_domain(found, "sexual", images=10)["target"]
    assert rates["line"]["rate"] == 0.05 and rates["any_of_10"]["rate"] == 0.5
    assert by_domain(found, "sexual", images=10)["source"] == {}
