"""What `pip install safedig` brings works outside the clone: the command, the recipes, the weights."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

CLONE = Path(__file__).parent.parent


def run(*command, folder, installed):
    environment = {**os.environ, "PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A wheel built from the clone, unpacked elsewhere."""
    folder = tmp_path_factory.mktemp("wheel")
    build = f"from hatchling.build import build_wheel; print(build_wheel({str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", build], cwd=CLONE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(folder / done.stdout.split()[-1]) as wheel:
        wheel.extractall(folder / "installed")
    return folder / "installed"


@pytest.mark.slow
def test_the_wheel_holds_code_recipes_and_every_weight(installed):
    def held(folder):
        paths = (path for path in (folder / "safedig").rglob("*") if path.is_file())
        return {str(path.relative_to(folder)) for path in paths if "__pycache__" not in path.parts}

    assert held(installed) == held(CLONE)
    assert "safedig/recipes/tiny-flux.toml" in held(installed)
    assert {path.name.split("-")[0] for path in installed.iterdir()} == {"safedig"}, "nothing but the package itself"


@pytest.mark.slow
def test_the_command_works_outside_the_clone(installed, tmp_path):
    where = run("-c", "import safedig; print(safedig.__file__)", folder=tmp_path, installed=installed)
    assert where.stdout.startswith(str(installed)), where.stderr
    helped = run("-m", "safedig", "--help", folder=tmp_path, installed=installed)
    assert helped.returncode == 0 and "tiny-flux, tiny-sd3" in helped.stdout
