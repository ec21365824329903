"""safedig VERB RECIPE [key=value …]: the command line. Results on stdout, everything else on stderr.

What is heavy is imported within `main`, where an interruption is told in one line.
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from . import __version__
from .config import UsageError, did_you_mean, keys_of
from .exit_codes import exit_code
from .prompts import check_seed
from .verbs import VERBS, Options, Verb

DEFAULT_RECIPE = "tiny-flux"
USAGE = (
    'safedig VERB ["PROMPT"] [RECIPE] [key=value …] [--out DIR] [--prompts FILE] [--store PLACE] [--bundle DIR] '
    "[--negation DIR] [--sae DIR] [--feature N] [--seed N] [--json] [--quick]"
)
_VALUES, _SWITCHES = (
    ("out", "prompts", "store", "seed", "bundle", "negation", "sae", "feature"),
    ("quick", "quality", "sites", "compare"),
)
FLAGS = tuple(f"--{name}" for name in (*_VALUES, *_SWITCHES, "json", "help", "version"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Exit code 0 is success; 2, the caller's mistake, and 130, an interruption, with one line."""
    for library in ("DIFFUSERS", "TRANSFORMERS"):  # notes on packages that are missing, before any of our own lines
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    words = sys.argv[1:] if argv is None else list(argv)
    again = next((VERBS[word].again for word in words if word in VERBS), Verb.again)
    return exit_code(lambda: _run(words), "safedig", again)


def _run(argv: list[str]) -> None:
    answer = _answer(argv)
    if answer is not None:
        print(answer)


def _answer(argv: list[str]) -> str | None:
    """What the command prints on stdout; whatever a library prints while it works goes to stderr."""
    given, strangers = _parser().parse_known_intermixed_args(argv)
    for stranger in strangers:
        raise UsageError(f"Unknown flag '{stranger}'. {did_you_mean(stranger.split('=')[0], FLAGS)}")
    if given.version:
        return __version__
    if given.help or not given.words:
        return _help()
    name, prompt, recipe, overrides = _words(given)
    overrides = [f"{name}.{one}" if one.partition("=")[0].strip() in VERBS[name].short else one for one in overrides]
    keys = tuple(key for one in overrides for key in keys_of(one))
    options = _options(name, given, prompt, keys)
    from .recipes import load

    _check_read(name, keys)
    settings = load(recipe, overrides)
    verb = import_module(VERBS[name].module)
    with contextlib.redirect_stdout(sys.stderr):
        result: dict[str, Any] = verb.run(settings, options)
    if os.environ.get("RANK", "0") != "0":  # under `accelerate launch` the first process speaks for all
        return None
    return json.dumps(result, indent=2, ensure_ascii=False) if given.json else verb.table(result)


def _words(given: argparse.Namespace) -> tuple[str, str | None, str, list[str]]:
    """The verb, the prompt if it takes one, the recipe (the tiny FLUX where none is named) and the overrides."""
    name, *rest = given.words
    if name not in VERBS:
        raise UsageError(f"Unknown verb '{name}'. {did_you_mean(name, VERBS)}")
    prompt = rest.pop(0) if VERBS[name].takes_prompt and given.prompts is None and rest else None
    if prompt is not None and (not rest or "=" in rest[0]):
        _check_prompt(prompt, name)
    recipe = rest.pop(0) if rest and "=" not in rest[0] else DEFAULT_RECIPE
    return name, prompt, recipe, rest


def _options(name: str, given: argparse.Namespace, prompt: str | None, keys: tuple[str, ...]) -> Options:
    """The verb's flags, checked before any work begins."""
    flags = {flag: getattr(given, flag) for flag in (*_VALUES, *_SWITCHES)}
    for flag, value in flags.items():
        if value not in (None, False) and flag not in VERBS[name].flags:
            takes = ", ".join(f"--{one}" for one in (*VERBS[name].flags, "json"))
            raise UsageError(f"'{name}' takes no --{flag}: it takes {takes}.")
    check_seed(given.seed or 0, "--seed ")
    if given.prompts is not None and not given.prompts.is_file():
        raise UsageError(f"--prompts {given.prompts}: there is no such file; give a CSV, JSONL or Parquet file.")
    if given.out is not None:
        flags |= _place(name, given.out)
    return Options(**flags, prompt=prompt, given=keys)


def _place(name: str, out: str) -> dict[str, Any]:
    """What --out names: a folder that can be written, or the store of a recording elsewhere."""
    from .storage import check_writable

    if "://" not in out:
        check_writable(Path(out), "--out")
        return {"out": Path(out)}
    if not VERBS[name].stores:
        raise UsageError(f"--out {out}: '{name}' writes to a folder of this machine alone; give one.")
    return {"out": None, "store": out}


def _check_prompt(prompt: str, verb: str) -> None:
    """The only word is a prompt; where it is a recipe's name, the prompt has been forgotten."""
    from .recipes import names

    if prompt in names() or prompt.endswith(".toml"):
        raise UsageError(
            f"'{prompt}' is a recipe, and there is no prompt: give one before it, safedig {verb} "
            f'"a cup on a table" {prompt} …, or --prompts FILE.'
        )


def _check_read(name: str, keys: Sequence[str]) -> None:
    """A key that the verb does not read must not look as if it did something; inside a section the recipe tells."""
    from .recipes import Recipe

    reads, known = VERBS[name].reads, {one.name for one in fields(Recipe)}
    for key in (key.partition(".")[0] for key in keys):
        if key not in known:
            raise UsageError(f"Unknown key '{key}'. {did_you_mean(key, known.union(VERBS[name].short))}")
        if reads and key not in reads:
            raise UsageError(f"'{name}' does not read '{key}': of a recipe it reads {', '.join(reads)}; leave it out.")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message[:1].upper()}{message[1:]}. Usage: {USAGE}")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="safedig", add_help=False, allow_abbrev=False)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--out")
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--store")
    parser.add_argument("--bundle")
    parser.add_argument("--negation", type=Path)
    parser.add_argument("--sae", type=Path)
    parser.add_argument("--feature", type=int)
    parser.add_argument("--seed", type=int)
    for flag in (*_SWITCHES, "json", "version"):
        parser.add_argument(f"--{flag}", action="store_true")
    parser.add_argument("-h", "--help", action="store_true")
    return parser


def _help() -> str:
    from .recipes import names

    verbs = [f"  {name:8} {verb.does}" for name, verb in VERBS.items()]
    return "\n".join([f"Usage: {USAGE}", "", *verbs, "", f"Recipes: {', '.join(names())}, or a path to a TOML file."])


if __name__ == "__main__":
    sys.exit(main())
