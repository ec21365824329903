"""A steering as a folder that can be handed on: tensors, JSON and a model card, each byte vouched for. Or from the Hub.

The hashes find damage and mix-ups; they are no signature.
"""

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import UsageError
from ..hub import why_not
from ..model_folders import is_hub_id
from ..storage import Format, write_atomically

FORMAT = Format("steering", 3, "steering folder, as Steering.save writes it", "Save the steering again.")
JSON, TENSORS, CARD = "steering.json", "steering.safetensors", "README.md"
_PACKAGES = ("safedig", "torch", "diffusers", "transformers", "sae-lens")


def write(folder: str | PathLike[str], facts: Mapping[str, Any], tensors: dict[str, Tensor], shown: str) -> None:
    """Write the three files; the hash of the tensors stands in the JSON, and the JSON's own beside it."""
    from safetensors.torch import save

    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    packages = {package: version(package) for package in _PACKAGES}
    told = dict(facts) | {"packages": packages, "tensors_sha256": hashlib.sha256(save(kept)).hexdigest()}
    FORMAT.write(folder, sealed(told), kept)
    write_atomically(Path(folder) / CARD, _card(told, shown).encode())


def read(folder: str | PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `write` was given; a `UsageError` where a file is missing or a byte is not the one that was written."""
    place = _folder(folder)
    facts, tensors = FORMAT.read(place)
    found = hashlib.sha256((place / TENSORS).read_bytes()).hexdigest()
    for file, fine in ((JSON, sealed(facts) == facts), (TENSORS, found == facts.get("tensors_sha256"))):
        if not fine:
            raise UsageError(
                f"'{place / file}' is not as it was written (its SHA-256 differs): copy the bundle again, or save the "
                "steering again."
            )
    return facts, tensors


def sealed(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts with the hash of all others among them, and the format that they will be written in."""
    bare = {"format": FORMAT.version} | {key: value for key, value in facts.items() if key != "sha256"}
    return bare | {"sha256": hashlib.sha256(json.dumps(bare, sort_keys=True).encode()).hexdigest()}


def _folder(given: str | PathLike[str]) -> Path:
    """The folder itself, or what the Hub has under this id; a second time from the cache."""
    name = str(given)
    if Path(name).is_dir() or isinstance(given, PathLike) or not is_hub_id(name):
        return Path(name).expanduser()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError

    try:
        return Path(snapshot_download(name, revision=None, allow_patterns=[JSON, TENSORS, CARD]))
    except (OSError, ValueError, HTTPError) as error:
        raise UsageError(why_not(name, error)) from error


def _card(facts: Mapping[str, Any], shown: str) -> str:
    """The model card: what it does where, for which model, learnt and calibrated how."""
    return "\n".join(
        [
            "---",
            "library_name: safedig",
            "tags: [safety, steering, sparse-autoencoder, text-to-image]",
            "---",
            "",
            "# A steering of a Diffusion Transformer",
            "",
            "```",
            shown,
            "```",
            "",
            "    from safedig import load_pipeline, apply_steering",
            "",
            "    pipe = load_pipeline(MODEL)",
            "    apply_steering(pipe, FOLDER)",
            "",
            f"It fits one model alone, whose fingerprint is `{facts['model']}`; any other is refused.",
            "`safedig attest --bundle FOLDER` checks on that model that it acts, and that it is a no-op where its "
            "gates are closed.",
            "",
            "| site | encoder, SHA-256 | learnt from |",
            "|---|---|---|",
            *(
                f"| `{site}` | `{entry['sae'].get('encoder_sha256', '')[:16]}…` | "
                f"{json.dumps(entry['receipt'].get('harmful', {}), ensure_ascii=False)} |"
                for site, entry in facts["sites"].items()
            ),
            "",
            "## Calibration receipt",
            "",
            "```json",
            json.dumps({site: entry["receipt"] for site, entry in facts["sites"].items()}, indent=2),
            "```",
            "",
            f"Written by {', '.join(f'{name} {one}' for name, one in facts['packages'].items())}. "
            f"SHA-256 of {TENSORS}: `{facts['tensors_sha256']}`.",
            "",
        ]
    )
