"""Files appear whole or not at all, so that an interrupted run leaves no half-written artifact."""

import json
import os
import tempfile
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from .config import UsageError


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` beside `path` and rename it into place; folders on the way are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def append(path: Path, data: bytes) -> None:
    """Add `data` at the end of the file, whole lines of it; on disk when it returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        while data:
            data = data[os.write(file, data) :]
        os.fsync(file)
    finally:
        os.close(file)


def whole_lines(path: Path) -> list[str]:
    """What `append` has written; a last line that was torn is cut off, so that the next one begins anew."""
    data = path.read_bytes() if path.is_file() else b""
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    return whole.decode().split("\n")[:-1]


def check_writable(folder: Path, flag: str) -> None:
    """Make the folder that `flag` names; a `UsageError` where nothing can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"{flag} {folder} cannot be written ({error.strerror}): give a folder that can.") from error


def check_can_be_made(folder: Path) -> None:
    """A `UsageError` where a folder that nobody named could not be written to; it is not made before it is needed."""
    there = next(one for one in (folder, *folder.absolute().parents) if os.path.lexists(one))
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UsageError(
            f"'{folder}' cannot be written ({error.strerror}: '{there}'): give a folder with --out."
        ) from error


@dataclass(frozen=True)
class Format:
    """What a folder of `<name>.json` and `<name>.safetensors` holds, its version, and what to do where it is torn."""

    name: str
    version: int
    called: str
    """As an error says it: "'DIR' is no {called}"."""
    remedy: str

    def write(self, folder: str | PathLike[str], facts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Write both files; the tensors' names lead with the name of the site or part they belong to."""
        kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        write_atomically(Path(folder) / f"{self.name}.safetensors", save(kept))
        text = json.dumps({"format": self.version} | facts, indent=2)
        write_atomically(Path(folder) / f"{self.name}.json", text.encode())

    def read(self, folder: str | PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Both again; a `UsageError` where they are missing, torn or of another version."""
        try:
            facts = json.loads((Path(folder) / f"{self.name}.json").read_text(encoding="utf-8"))
            tensors = load_file(Path(folder) / f"{self.name}.safetensors")
        except (OSError, ValueError, RecursionError, SafetensorError) as error:
            raise UsageError(f"'{folder}' is no {self.called} ({error}).") from error
        if not isinstance(facts, dict):
            raise UsageError(f"'{folder}' is no {self.called} ({self.name}.json is no JSON object). {self.remedy}")
        if facts.get("format") != self.version:
            raise UsageError(f"'{folder}' has format {facts.get('format')}; this version reads format {self.version}.")
        return facts, tensors

    def incomplete(self, folder: str | PathLike[str], error: Exception) -> UsageError:
        """For what turns out to be missing when the parts are put together."""
        return UsageError(f"'{folder}' is incomplete: {error} is missing. {self.remedy}")


def part(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors that belong to `name`, by their own names."""
    return {key.removeprefix(f"{name}/"): tensor for key, tensor in tensors.items() if key.startswith(f"{name}/")}
