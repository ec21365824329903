"""Read the JSON and the safetensors of an autoencoder's folder; what is missing or damaged is told in one line."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config import UsageError


def read_config(file: Path) -> dict[str, Any]:
    """A JSON object."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise _no_folder(file, error) from error
    except ValueError as error:
        raise UsageError(f"'{file}' is no JSON ({error}): copy it again.") from error
    if not isinstance(config, dict):
        raise UsageError(f"'{file}' is not a JSON object: copy it again.")
    return config


def read_tensors(file: Path, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or those of these names that it has."""
    try:
        with safe_open(file, framework="pt") as opened:
            wanted = [name for name in opened.keys() if names is None or name in names]  # noqa: SIM118
            return {name: opened.get_tensor(name) for name in wanted}
    except OSError as error:
        raise _no_folder(file, error) from error
    except SafetensorError as error:
        raise UsageError(f"'{file}' is damaged or was copied in part ({error}): copy it again.") from error


def _no_folder(file: Path, error: OSError) -> UsageError:
    return UsageError(
        f"'{file.parent}' is no SAE folder: {file.name} cannot be read ({error.strerror or error}). Expected what "
        "save_sae or sae-lens writes; import_sae reads other formats."
    )
