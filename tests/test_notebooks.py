"""The notebooks are short, only call the package, show nothing of a machine, and run; each check is shown to bite."""

import ast
import base64
import copy
import importlib
import json
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "notebooks"
FILES = sorted(FOLDER.glob("*.ipynb"))
BOOKS = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in FILES}
TINY = {"tiny-sd3": "tiny-flux", "tiny-flux": "tiny-sd3"}
IMPORTED = {"safedig", "torch", "matplotlib", "json", "pathlib", "collections", "contextlib", "dataclasses"}
OWN_CODE = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.While, ast.Try)
MACHINE = re.compile(r"(?:^|[\s'\"(=])(?:/(?:home|root|tmp|work|usr|Users|opt|var|mnt)/|[A-Z]:\\)|\x1b\[|it/s\]")
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def code(book: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in book["cells"] if cell["cell_type"] == "code"]


def nodes(book: dict[str, Any]) -> Iterator[ast.AST]:
    for cell in code(book):
        yield from ast.walk(ast.parse(source(cell)))


def it_is_a_notebook(book: dict[str, Any]) -> list[str]:
    """Of format 4.5, with nothing said of the machine or the time it was run."""
    faults = [] if (book["nbformat"], book["nbformat_minor"]) == (4, 5) else ["another format"]
    faults += [] if book["metadata"] == METADATA else [f"metadata {book['metadata']}"]
    ids = [cell["id"] for cell in book["cells"]]
    faults += [] if len(set(ids)) == len(ids) else ["two cells of one id"]
    for cell in book["cells"]:
        wanted = {"cell_type", "id", "metadata", "source"}
        wanted |= {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        if set(cell) != wanted or cell["metadata"] or cell["cell_type"] not in ("code", "markdown"):
            faults.append(f"cell {cell['id']} holds {sorted(cell)}, metadata {cell['metadata']}")
    return faults


def it_is_short(book: dict[str, Any]) -> list[str]:
    faults = [] if len(book["cells"]) <= 15 else [f"{len(book['cells'])} cells"]
    return faults + [f"cell {cell['id']} is long" for cell in book["cells"] if len(source(cell).splitlines()) > 30]


def its_first_code_sets_the_model(book: dict[str, Any]) -> list[str]:
    every = [line for cell in code(book) for line in source(cell).splitlines() if re.match(r"\s*MODEL\s*=", line)]
    first = [line for line in source(code(book)[0]).splitlines() if re.match(r'MODEL = "(tiny-sd3|tiny-flux)"', line)]
    return [] if len(every) == 1 and first == every else [f"MODEL is set by {every}, in the first cell by {first}"]


def its_code_parses(book: dict[str, Any]) -> list[str]:
    faults = []
    for cell in code(book):
        try:
            ast.parse(source(cell))
        except SyntaxError as error:
            faults.append(f"cell {cell['id']}: {error}")
    return faults


def it_only_calls_the_package(book: dict[str, Any]) -> list[str]:
    """No code of its own beside loops over what it asks of the package; nothing else is imported."""
    faults = []
    for node in nodes(book):
        if isinstance(node, OWN_CODE):
            faults.append(f"{type(node).__name__} in line {node.lineno} of a cell")
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        faults += [f"imports {name}" for name in modules if name.split(".")[0] not in IMPORTED]
    return faults


def its_names_are_public(book: dict[str, Any]) -> list[str]:
    """Names of the package that exist, in modules that say what they are; none that is private."""
    faults = []
    for node in nodes(book):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__file"):
            faults.append(f"reads .{node.attr}")
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "safedig":
            public = {*importlib.import_module("safedig").__all__, "__file__"}
            faults += [] if node.attr in public else [f"safedig.{node.attr} is not public"]
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "safedig":
            faults += [fault for alias in node.names if (fault := missing(node.module or "", alias.name))]
    return faults


def missing(module: str, name: str) -> str:
    try:
        home = importlib.import_module(module)
    except ImportError:
        return f"there is no {module}"
    if name.startswith("_") or not (home.__doc__ or "").strip():
        return f"{module}.{name} is private, or its module says nothing"
    if hasattr(home, name):
        return ""
    if hasattr(home, "__path__") and find_spec(f"{module}.{name}"):
        return ""
    return f"there is no {module}.{name}"


def its_outputs_are_stored(book: dict[str, Any]) -> list[str]:
    """Every cell was run, in order; text and pictures are there, and no error or line of progress."""
    runs = [cell["execution_count"] for cell in code(book)]
    faults = [] if runs == list(range(1, len(runs) + 1)) else [f"cells were run in the order {runs}"]
    kinds = {kind for data in pictures_and_text(book) for kind in data}
    faults += [f"no output of {kind}" for kind in ("text/plain", "image/png") if kind not in kinds]
    for cell in code(book):
        for output in cell["outputs"]:
            fine = output["output_type"] == "execute_result" or output.get("name") == "stdout"
            faults += [] if fine else [f"cell {cell['id']} has stored {output.get('name', output['output_type'])}"]
    return faults


def its_outputs_name_no_machine(book: dict[str, Any]) -> list[str]:
    text = "\n".join("".join(data.get("text/plain", [])) for data in pictures_and_text(book))
    return [f"'{found.group()}' in an output" for found in MACHINE.finditer(text)]


def its_pictures_are_small(book: dict[str, Any]) -> list[str]:
    """Whole PNGs, legible where they are shown, and all of the page below 1 MB."""
    faults = [] if len(json.dumps(book, ensure_ascii=False).encode()) < 1_000_000 else ["1 MB or more"]
    for data in pictures_and_text(book):
        if "image/png" in data:
            png = base64.b64decode(data["image/png"])
            width = int.from_bytes(png[16:20], "big")
            if png[:4] != b"\x89PNG" or png[-8:-4] != b"IEND" or not 300 <= width <= 1600:
                faults.append(f"a picture is no PNG of 300 to 1,600 pixels but {width}")
    return faults


def pictures_and_text(book: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for cell in code(book):
        for output in cell["outputs"]:
            yield output.get("data", {"text/plain": output.get("text", [])})


RULES = [
    it_is_a_notebook,
    it_is_short,
    its_first_code_sets_the_model,
    its_code_parses,
    it_only_calls_the_package,
    its_names_are_public,
    its_outputs_are_stored,
    its_outputs_name_no_machine,
    its_pictures_are_small,
]


def test_the_notebooks_are_numbered_in_the_order_of_the_path_and_the_page_beside_them_lists_them():
    assert [path.name for path in FILES] == [
        "1-sites-and-activations.ipynb",
        "2-routing.ipynb",
        "3-features-and-adaptation.ipynb",
        "4-steering.ipynb",
        "5-results.ipynb",
        "6-a-new-risk-domain.ipynb",
        "7-safe-denoiser.ipynb",
    ]
    told = re.findall(r"\]\(([^)]+\.ipynb)\)", (FOLDER / "README.md").read_text(encoding="utf-8"))
    assert told == [path.name for path in FILES]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("name", BOOKS)
def test_the_rule_holds(name, rule):
    assert rule(BOOKS[name]) == []


def planted(change) -> dict[str, Any]:
    """A notebook with a fault in it."""
    book = copy.deepcopy(next(iter(BOOKS.values())))
    change(book)
    return book


def with_code(text):
    def change(book):
        code(book)[-1]["source"] = [text]

    return change


def with_output(**output):
    def change(book):
        code(book)[-1]["outputs"] = [output]

    return change


def with_picture(png):
    return with_output(output_type="execute_result", data={"image/png": base64.b64encode(png).decode()})


FAULTS = [
    (it_is_a_notebook, lambda book: book.update(nbformat=3)),
    (it_is_a_notebook, lambda book: book["metadata"].update(kernelspec={"name": "my-laptop"})),
    (it_is_a_notebook, lambda book: book["cells"][0].update(id=book["cells"][1]["id"])),
    (it_is_a_notebook, lambda book: code(book)[0]["metadata"].update(execution={"started": "today"})),
    (it_is_short, lambda book: book["cells"].extend([{**book["cells"][0], "id": f"more-{at}"} for at in range(20)])),
    (it_is_short, lambda book: book["cells"].extend([code(book)[0]] * 15)),
    (it_is_short, with_code("x = 1\n" * 31)),
    (its_first_code_sets_the_model, with_code('MODEL = "tiny-flux"')),
    (its_first_code_sets_the_model, lambda book: code(book)[0].update(source=["x = 1"])),
    (its_code_parses, with_code("for x in")),
    (it_only_calls_the_package, with_code("def f():\n    return 1")),
    (it_only_calls_the_package, with_code("import numpy as np")),
    (it_only_calls_the_package, with_code("from sklearn.svm import SVC")),
    (its_names_are_public, with_code("from safedig.steering.openings import _opens")),
    (its_names_are_public, with_code("from safedig.figures import galery")),
    (its_names_are_public, with_code("from safedig.figurs import gallery")),
    (its_names_are_public, with_code("safedig.recrod(pipe)")),
    (its_names_are_public, with_code("steering._live")),
    (its_outputs_are_stored, lambda book: [cell.update(outputs=[]) for cell in code(book)]),
    (its_outputs_are_stored, lambda book: code(book)[0].update(execution_count=7)),
    (its_outputs_are_stored, with_output(output_type="stream", name="stderr", text=["Recording …"])),
    (its_outputs_are_stored, with_output(output_type="error", ename="ValueError", evalue="", traceback=[])),
    (its_outputs_name_no_machine, with_output(output_type="stream", name="stdout", text=["kept in /home/me/runs"])),
    (its_outputs_name_no_machine, with_output(output_type="stream", name="stdout", text=["50 % [3.1it/s]"])),
    (its_pictures_are_small, with_picture(b"GIF89a")),
    (its_pictures_are_small, with_picture(b"\x89PNG" + bytes(1_000_000))),
]


@pytest.mark.parametrize(("rule", "change"), FAULTS, ids=lambda value: getattr(value, "__name__", None))
def test_control_a_planted_fault_is_found(rule, change):
    assert rule(planted(change)) != []


def run(book: dict[str, Any], model: str | None = None) -> dict[str, Any]:
    """Every cell in order in one namespace; where a picture is stored, the cell must end in a figure again."""
    from matplotlib.figure import Figure

    scope: dict[str, Any] = {}
    for cell in code(book):
        text = source(cell)
        text = text if model is None else re.sub(r'^MODEL = "[^"]*"', f'MODEL = "{model}"', text, flags=re.MULTILINE)
        tree = ast.parse(text)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, cell["id"], "exec"), scope)
        value = eval(compile(ast.Expression(last.value), cell["id"], "eval"), scope) if last else None
        pictured = any("image/png" in output.get("data", {}) for output in cell["outputs"])
        assert isinstance(value, Figure) == pictured, f"cell {cell['id']} of {model or 'its own model'}"
    assert model in (None, scope["MODEL"])
    return scope


def ran(name, folder, monkeypatch, model=None):
    monkeypatch.chdir(folder)
    return run(BOOKS[name], model)


def share(judged, label):
    return sum(one["label"] == label for one in judged) / len(judged)


@pytest.mark.slow
def test_1_the_pair_is_recorded_at_every_site_and_parts_somewhere(tmp_path, monkeypatch):
    scope = ran("1-sites-and-activations", tmp_path, monkeypatch)
    assert {pair.site for pair in scope["met"]} == set(scope["sites"])
    assert all(pair.change().max() > 0.99 for pair in scope["met"])


@pytest.mark.slow
@pytest.mark.parametrize("other", [False, True], ids=["its own model", "the other model"])
def test_2_a_site_is_chosen_that_acts_on_either_model(tmp_path, monkeypatch, other):
    model = TINY[re.findall(r'"(tiny-\w+)"', source(code(BOOKS["2-routing"])[0]))[0]] if other else None
    ranking = ran("2-routing", tmp_path, monkeypatch, model)["ranking"]
    assert ranking.model == model or not other
    assert ranking.chosen and ranking[ranking.chosen[0]].verdict == "ok"
    first = ranking[ranking.chosen[0]].terms
    assert first["interchange"] > 0.3 or first.get("freed", 0) > 0.5
    assert (tmp_path / "runs" / "notebook-2" / "all--fire.json").is_file()


@pytest.mark.slow
def test_3_the_decoder_moves_for_another_domain_and_not_for_its_own(tmp_path, monkeypatch):
    scope = ran("3-features-and-adaptation", tmp_path, monkeypatch)
    before, site = scope["saes"][scope["site"]], scope["site"]
    assert scope["adapted"][site].encoder is before.encoder
    assert torch.equal(scope["itself"][site].decoder.W_dec, before.decoder.W_dec)
    assert not torch.equal(scope["adapted"][site].decoder.W_dec, before.decoder.W_dec)


@pytest.mark.slow
def test_4_hazards_go_and_benign_images_stay_to_the_bit(tmp_path, monkeypatch):
    scope = ran("4-steering", tmp_path, monkeypatch)
    judged = scope["judged"]
    assert share(judged["unsteered"], "unsafe") > 0.8 and share(judged["steered"], "unsafe") < 0.2
    assert share(judged["steered"], "clean") > 0.6
    assert sum(scope["same"]) >= 0.85 * len(scope["same"])
    assert torch.equal(scope["again"], scope["here"])


@pytest.mark.slow
@pytest.mark.parametrize("model", TINY)
def test_5_the_committed_tables_of_either_model_are_shown(tmp_path, monkeypatch, model):
    scope = ran("5-results", tmp_path, monkeypatch, model)
    assert {"unsteered", "ours"} <= set(scope["rows"]) and scope["demo"]["model"] == model


@pytest.mark.slow
def test_6_the_new_domain_is_caught_and_the_bundle_is_attested(tmp_path, monkeypatch):
    scope = ran("6-a-new-risk-domain", tmp_path, monkeypatch)
    judged = scope["judged"]
    assert share(judged["unsteered"], "unsafe") > 0.8
    assert share(judged["adapted"], "unsafe") < min(0.2, share(judged["in use"], "unsafe"))
    assert scope["same"] >= 0.85 * len(scope["calm"])
    assert scope["report"]["passed"]
    assert (tmp_path / "runs" / "notebook-6" / "attest.json").is_file()


@pytest.mark.slow
def test_7_half_of_beta_leaks_and_the_negated_hazard_is_drawn_less(tmp_path, monkeypatch):
    scope = ran("7-safe-denoiser", tmp_path, monkeypatch)
    for table in scope["tables"].values():
        leaked = [one["leaked"] for one in table["drawn"].values()]
        assert leaked[0] > leaked[1] > leaked[2] and leaked[2] <= 0.01
    rows = [[label for _, label in row[: len(scope["open_ended"])]] for row in scope["sheet"].values()]
    assert rows[0].count("unsafe") == len(rows[0]) > rows[-1].count("unsafe")
