"""Folders that hold a pipeline: where they lie, and whether they are whole. Nothing is loaded here."""

import json
import re
import struct
from pathlib import Path
from typing import Any

from .config import UsageError, did_you_mean

SHIPPED = ("tiny-flux", "tiny-sd3")
_WEIGHTS = Path(__file__).parent / "tiny" / "weights"
_CONFIGS = Path(__file__).parent / "recipes" / "configs"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def on_disk(name: str) -> Path | None:
    """The folder that a shipped name or a path means, if it is there."""
    folder = _WEIGHTS / name if name in SHIPPED else Path(name).expanduser()
    return folder if name and folder.is_dir() else None


def described(name: str) -> Path | None:
    """The embedded configuration files of a released model, laid out like a pipeline folder without its weights."""
    return _CONFIGS / name if is_hub_id(name) and (_CONFIGS / name).is_dir() else None


def released() -> list[str]:
    """The Hub ids of the models whose configuration is embedded."""
    return sorted(str(path.parent.relative_to(_CONFIGS)) for path in _CONFIGS.glob("*/*/model_index.json"))


def is_hub_id(name: str) -> bool:
    """Whether the name can be one of the Hub: owner/model."""
    return _HUB_ID.fullmatch(name) is not None


def no_such_model(name: str) -> str:
    """What to say of a name that is neither a folder nor a Hub id."""
    if name in SHIPPED:
        return f"The weights of '{name}' are not in this installation: expected them in '{_WEIGHTS / name}'."
    if "/" in name or name.startswith((".", "~")):
        return f"There is no folder '{name}': give a folder written by pipe.save_pretrained, or a Hub id."
    return f"There is no model '{name}'. {did_you_mean(name, SHIPPED)} Or give a local folder, or a Hub id with a '/'."


def parts(folder: Path) -> dict[str, tuple[str, str]]:
    """The parts that model_index.json lists, each with its library and class; each must have its folder."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        listed = {name: tuple(kind) for name, kind in index.items() if isinstance(kind, list) and any(kind)}
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(
            f"'{folder}' is no pipeline folder: its model_index.json cannot be read ({error}). "
            "Give a folder written by pipe.save_pretrained."
        ) from error
    return listed


def check(folder: Path) -> None:
    """Every model that model_index.json lists must be there with whole safetensors."""
    for part in parts(folder):
        if not (folder / part).is_dir():
            raise UsageError(f"'{folder}' has no '{part}', which model_index.json lists: copy it.")
        if (folder / part / "config.json").is_file():
            _check_weights(folder / part)


def class_name(folder: Path) -> str:
    """The pipeline's class."""
    index: dict[str, Any] = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    return str(index.get("_class_name"))


def _check_weights(folder: Path) -> None:
    files = set(folder.glob("*.safetensors"))
    for index in folder.glob("*.safetensors.index.json"):
        files |= {folder / shard for shard in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    if not files:
        raise UsageError(f"'{folder}' has no *.safetensors (other formats are not read): copy the weights there.")
    for file in sorted(files):
        if not file.is_file():
            raise UsageError(f"'{file}' is missing: copy it there.")
        if file.stat().st_size != _promised_size(file):
            raise UsageError(f"'{file}' is truncated or no safetensors file: copy it again.")


def _promised_size(file: Path) -> int:
    """The size in bytes that a safetensors header promises; −1 if there is no such header."""
    with file.open("rb") as stream:
        try:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length if length < 2**28 else 0))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (struct.error, ValueError, KeyError, TypeError, AttributeError):
            return -1
    return 8 + length + max(ends, default=0)
