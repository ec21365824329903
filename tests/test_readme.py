"""The README is short, says only what is so, and its Python runs."""

import ast
import re
import shlex
from pathlib import Path

import pytest

import safedig
from safedig.__main__ import FLAGS
from safedig.recipes import names
from safedig.verbs import VERBS

CLONE = Path(__file__).parent.parent
README = (CLONE / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def names_used(code: str) -> set[str]:
    """What a block takes from the package: `from safedig import x` and `safedig.x`."""
    tree = ast.parse(code)
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    attributes = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "safedig"
    }
    return imported | attributes


def missing_targets(text: str, make: str) -> list[str]:
    return [
        target for target in re.findall(r"make ([a-z-]+)", text) if not re.search(f"^{target}:", make, re.MULTILINE)
    ]


def unknown_commands(text: str) -> list[str]:
    """Command lines that name a verb, a recipe or a flag that does not exist."""
    given = (shlex.split(line, comments=True) for line in re.findall(r"^    safedig (.*)$", text, flags=re.MULTILINE))
    lines = [without_prompt(line) for line in given]
    known = {*VERBS, *names(), *FLAGS}
    return [
        word for line in lines for word in line if (word in line[:2] or word.startswith("--")) and word not in known
    ]


def without_prompt(line: list[str]) -> list[str]:
    verb = VERBS.get(line[0])
    return [line[0], *line[2:]] if verb is not None and verb.takes_prompt else line


def missing_files(text: str) -> list[str]:
    return [link for link in re.findall(r"\]\(([^)#]+)\)", text) if not (CLONE / link).exists()]


def test_it_is_short():
    assert len(README.splitlines()) <= 150


def test_every_python_block_uses_public_names_only():
    assert BLOCKS
    for block in BLOCKS:
        assert names_used(block) <= {*safedig.__all__, "tiny", "sites"}


def test_every_name_in_the_table_is_public():
    cells = re.findall(r"^\| (`.*?) \|", README, flags=re.MULTILINE)
    assert {name for cell in cells for name in re.findall(r"`(\w+)\(", cell)} <= set(safedig.__all__)


def test_every_command_target_and_link_exists():
    assert missing_targets(README, (CLONE / "Makefile").read_text()) == []
    assert unknown_commands(README) == []
    assert missing_files(README) == []


def test_control_what_does_not_exist_is_found():
    assert names_used("import safedig\nfrom safedig import Repell\nsafedig.recrod(1)") == {"Repell", "recrod"}
    assert missing_targets("make dmeo", "demo:\n") == ["dmeo"]
    assert unknown_commands("    safedig demoo tiny-flx --jsn\n") == ["demoo", "tiny-flx", "--jsn"]
    assert unknown_commands('    safedig generate "a cup" tiny-flx --jsn\n') == ["tiny-flx", "--jsn"]
    assert missing_files("[a](gone.md)") == ["gone.md"]


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS)
def test_every_python_block_runs(block):
    scope = {}
    exec(compile(block, "README.md", "exec"), scope)
    assert scope["images"].shape == (16, 3, 64, 64)
