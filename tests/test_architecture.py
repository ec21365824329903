"""Imports point down, heavy libraries have one door each, files stay small; each rule is shown to bite."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "safedig"
SOURCES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in sorted(ROOT.rglob("*.py"))}

LAYERS = [  # from the ground up; a room may import rooms of its own row and of those above it in this list
    ("config", "exit_codes", "progress", "shadow", "storage"),
    ("blocks", "architectures"),
    ("sites",),
    ("taps", "detours"),
    ("hooks",),
    ("prompts", "hub", "model_folders"),
    ("tiny", "pipelines", "skeleton"),
    ("activations",),
    ("routing",),
    ("sae",),
    ("features",),
    ("adaptation",),
    ("steering", "denoiser", "rl"),
    ("evaluation",),
    (
        "figures",
        "activation_figures",
        "routing_figures",
        "evaluation_figures",
        "calibration_figures",
        "denoiser_figures",
    ),
    ("recipes",),
    ("estimate",),
    ("verbs", "explorer"),
    ("__main__", "__init__"),
]
RANK = {room: rank for rank, row in enumerate(LAYERS) for room in row}
GROUND = {"evaluation/records.py", "evaluation/intervals.py"}  # these know nothing above the hooks

FREE = {"torch", "einops", "jaxtyping", "safetensors", "numpy"}  # what torch brings anyway, and featherweights
DOORS = {
    "matplotlib": (
        "figures.py",
        "activation_figures.py",
        "routing_figures.py",
        "evaluation_figures.py",
        "calibration_figures.py",
        "denoiser_figures.py",
    ),
    "transformers": ("tiny/", "pipelines.py", "skeleton.py", "evaluation/"),
    "tokenizers": ("tiny/",),
    "diffusers": ("tiny/", "pipelines.py", "skeleton.py", "evaluation/judges/safety_checker.py"),
    "nudenet": ("evaluation/judges/nudenet.py",),
    "torchmetrics": ("evaluation/similarity.py", "evaluation/distances.py"),
    "huggingface_hub": ("pipelines.py", "sae/hub.py", "steering/bundle.py"),
    "sae_lens": ("sae/",),
    "datasets": ("prompts.py",),
    "pyarrow": ("prompts.py", "activations/"),
    "fsspec": ("activations/address.py",),
    "xxhash": ("activations/",),
    "scipy": (
        "adaptation/codes.py",
        "evaluation/intervals.py",
        "evaluation/comparison.py",
        "evaluation/beta_binomial.py",
        "evaluation/power.py",
        "features/contrast.py",
        "steering/conformal.py",
        "denoiser/theory.py",
    ),
    "sklearn": ("routing/", "evaluation/agreement.py", "evaluation/latent_region.py", "denoiser/calibrate.py"),
    "rich": ("progress.py",),
    "PIL": ("tiny/", "pipelines.py", "figures.py", "evaluation/pictures.py", "denoiser/pictures.py"),
    "accelerate": ("activations/processes.py", "pipelines.py"),
}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
FORBIDDEN = {"utils", "util", "helpers", "helper", "common", "base", "core", "misc"}


def room(path: str) -> str:
    """The room a file belongs to: its folder, or its own name where it lies on the ground floor."""
    return path.split("/")[0].removesuffix(".py")


def imports(path: str, text: str) -> Iterator[tuple[str, int, bool]]:
    """Every imported name in full, its line, and whether it happens at import time; types alone cost nothing."""
    tree = ast.parse(text)
    late = {inner for node in ast.walk(tree) if isinstance(node, FUNCTIONS) for inner in ast.walk(node)}
    typing_only = {inner for node in ast.walk(tree) if _is_for_types(node) for inner in ast.walk(node)}
    package = ["safedig", *path.split("/")[:-1]]
    for node in (node for node in ast.walk(tree) if node not in typing_only):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno, node not in late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            anchor = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (anchor, node.module) if part)
            yield from ((f"{module}.{alias.name}", node.lineno, node not in late) for alias in node.names)


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def ours(path: str, text: str) -> Iterator[tuple[str, int]]:
    """The rooms of this package that a file imports."""
    for name, line, _ in imports(path, text):
        parts = name.split(".")
        if parts[0] == "safedig":
            yield (parts[1] if len(parts) > 1 and parts[1] in RANK else "__init__"), line


def imports_point_down(sources: dict[str, str]) -> list[str]:
    faults = [f"{path}: the room '{room(path)}' has no layer" for path in sources if room(path) not in RANK]
    for path, text in sources.items():
        top = RANK["hooks"] if path in GROUND else RANK.get(room(path), len(LAYERS))
        for target, line in ours(path, text):
            version_only = target == "__init__" and path == "__main__.py"
            if (RANK[target] > top and target != room(path)) or (target == "__init__" and not version_only):
                faults.append(f"{path}:{line} imports '{target}', which lies above it")
    return faults


def routing_knows_no_world_and_no_judge(sources: dict[str, str]) -> list[str]:
    """It ranks real models as well: what it learns of an image comes from the caller."""
    return [
        f"{path}:{line} imports '{target}'"
        for path, text in sources.items()
        for target, line in ours(path, text)
        if room(path) == "routing" and target == "tiny"
    ]


def no_room_waits_for_itself(sources: dict[str, str]) -> list[str]:
    """No cycle of rooms, not even one broken by a late import."""
    needs = {room(path): set() for path in sources}
    for path, text in sources.items():
        needs[room(path)] |= {target for target, _ in ours(path, text) if target not in (room(path), "__init__")}
    while leaves := [name for name, targets in needs.items() if not targets & needs.keys()]:
        for name in leaves:
            del needs[name]
    return [f"{name} needs {', '.join(sorted(targets & needs.keys()))}" for name, targets in needs.items()]


def heavy_libraries_have_one_door(sources: dict[str, str]) -> list[str]:
    faults = []
    for path, text in sources.items():
        for name, line, at_import in imports(path, text):
            library = name.split(".")[0]
            if library in sys.stdlib_module_names or library in FREE or library == "safedig":
                continue
            if not path.startswith(DOORS.get(library, ())):
                faults.append(f"{path}:{line} imports {library}, whose door is {DOORS.get(library, 'not built')}")
            elif at_import:
                faults.append(f"{path}:{line} imports {library} at import time; move it into the function")
    return faults


def names_are_computed_only_at_the_front(sources: dict[str, str]) -> list[str]:
    front = ("__init__.py", "__main__.py")
    return [
        path
        for path, text in sources.items()
        if path not in front and ("import_module(" in text or "__import__(" in text)
    ]


def files_are_named_for_an_idea(sources: dict[str, str]) -> list[str]:
    return [path for path in sources if FORBIDDEN & {part.removesuffix(".py") for part in path.split("/")}]


def files_and_functions_are_small(sources: dict[str, str]) -> list[str]:
    faults = [
        f"{path} has {len(text.splitlines())} lines" for path, text in sources.items() if len(text.splitlines()) > 300
    ]
    for path, text in sources.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno + 1 > 60:
                faults.append(f"{path}:{node.lineno} {node.name} has more than 60 lines")
    return faults


def every_file_says_its_idea_first(sources: dict[str, str]) -> list[str]:
    return [path for path, text in sources.items() if text.strip() and not ast.get_docstring(ast.parse(text))]


def nothing_is_left_for_later(sources: dict[str, str]) -> list[str]:
    return [
        path for path, text in sources.items() if any(word in text for word in ("TODO", "FIXME", "NotImplementedError"))
    ]


def no_exception_is_swallowed(sources: dict[str, str]) -> list[str]:
    faults = []
    for path, text in sources.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ExceptHandler):
                broad = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
                silent = all(isinstance(statement, ast.Pass) for statement in node.body)
                if silent or (broad and not any(isinstance(inner, ast.Raise) for inner in ast.walk(node))):
                    faults.append(
                        f"{path}:{node.lineno} swallows {ast.unparse(node.type) if node.type else 'everything'}"
                    )
    return faults


def nothing_is_unpickled(sources: dict[str, str]) -> list[str]:
    banned = ("pickle.load", "Unpickler(", "joblib.load(", "weights_only=False", "trust_remote_code=True")
    faults = [f"{path}: {word}" for path, text in sources.items() for word in banned if word in text]
    for path, text in sources.items():
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.Call) or ast.unparse(node.func) != "torch.load":
                continue
            if "weights_only=True" not in map(ast.unparse, node.keywords):
                faults.append(f"{path}:{node.lineno} torch.load without weights_only=True")
    return faults


PLANTED = [
    (imports_point_down, "sites.py", "from .steering import Gate"),
    (imports_point_down, "sae/model.py", "def f():\n    from ..features import find_features"),
    (imports_point_down, "hooks.py", "import safedig.pipelines"),
    (imports_point_down, "features.py", "from safedig import load_prompts"),
    (imports_point_down, "evaluation/records.py", "from ..prompts import COLUMNS"),
    (imports_point_down, "attic.py", "x = 1"),
    (imports_point_down, "routing/scores.py", "def f():\n    from ..sae.model import SparseAutoencoder"),
    (imports_point_down, "routing/causal.py", "from ..steering.edits import Repel"),
    (routing_knows_no_world_and_no_judge, "routing/judged.py", "def f():\n    from ..tiny.judge import judge"),
    (no_room_waits_for_itself, "config.py", "def f():\n    from .progress import say\n"),
    (heavy_libraries_have_one_door, "sites.py", "def f():\n    import diffusers"),
    (heavy_libraries_have_one_door, "pipelines.py", "from diffusers import FluxPipeline"),
    (heavy_libraries_have_one_door, "pipelines.py", "class A:\n    import diffusers"),
    (heavy_libraries_have_one_door, "pipelines.py", "def f():\n    import requests"),
    (names_are_computed_only_at_the_front, "sites.py", "importlib.import_module('diffusers')"),
    (files_are_named_for_an_idea, "tiny/utils.py", ""),
    (files_are_named_for_an_idea, "core/sites.py", ""),
    (files_and_functions_are_small, "sites.py", "x = 1\n" * 301),
    (files_and_functions_are_small, "sites.py", "def f():\n" + "    x = 1\n" * 60),
    (every_file_says_its_idea_first, "sites.py", "x = 1"),
    (nothing_is_left_for_later, "sites.py", "x = 1  # TODO"),
    (no_exception_is_swallowed, "sites.py", "try:\n    f()\nexcept ValueError:\n    pass"),
    (no_exception_is_swallowed, "sites.py", "try:\n    f()\nexcept Exception:\n    x = 1"),
    (nothing_is_unpickled, "sites.py", "torch.load('x')"),
    (nothing_is_unpickled, "sites.py", "import pickle\npickle.loads(b'')"),
]
RULES = list(dict.fromkeys(rule for rule, _, _ in PLANTED))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_rule_holds(rule):
    assert rule(SOURCES) == []


@pytest.mark.parametrize(("rule", "path", "text"), PLANTED, ids=lambda value: getattr(value, "__name__", None))
def test_control_a_planted_violation_is_found(rule, path, text):
    planted = {path: text, "progress.py": '"""Says."""\nfrom .config import UsageError\n'}
    assert rule(planted) != []


def test_control_what_is_allowed_is_not_found():
    fine = {
        "pipelines.py": '"""Loads."""\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import diffusers\n'
        "def f():\n    from diffusers import FluxPipeline\n    from .tiny import judge\n",
        "tiny/judge.py": '"""Judges."""\nimport torch\nfrom ..config import UsageError\n',
        "sae/importers.py": '"""Reads tensors."""\nimport torch\ntorch.load("x", weights_only=True)\n',
    }
    assert [fault for rule in RULES for fault in rule(fine)] == []


HEAVY = ("diffusers", "transformers", "sae_lens", "datasets", "matplotlib", "sklearn", "scipy", "rich", "torch")


def loaded_by(statement: str) -> list[str]:
    code = f"import sys\n{statement}\nprint(*sorted(set(sys.modules) & {set(HEAVY)!r}))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_importing_safedig_loads_nothing_heavy_and_its_help_only_torch():
    assert loaded_by("import safedig") == []
    helped = (
        "import contextlib, safedig.__main__ as main\nwith contextlib.redirect_stdout(sys.stderr): main.main(['-h'])"
    )
    assert set(loaded_by(helped)) <= {"torch"}


def test_control_a_heavy_import_is_seen():
    assert "matplotlib" in loaded_by("import safedig, matplotlib")


def test_every_public_name_exists_and_loads_on_first_use():
    import safedig

    assert len(set(safedig.__all__)) == len(safedig.__all__)
    for name in safedig.__all__:
        assert getattr(safedig, name).__module__.startswith("safedig.")
        assert name in dir(safedig)


def test_a_wrong_name_is_an_attribute_error_that_lists_the_right_ones():
    import safedig

    with pytest.raises(AttributeError, match="has no attribute 'recrod'.*record"):
        _ = safedig.recrod  # pyright: ignore[reportAttributeAccessIssue]
