"""Autoencoders to and from the Hugging Face Hub. The door to `huggingface_hub`; only JSON and tensors travel."""

from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..config import UsageError
from ..hub import why_not, why_not_written
from .checkpoint import CONFIG, WEIGHTS, save_sae
from .description import SCALER
from .importers import FILES, import_sae
from .model import SparseAutoencoder


def push_to_hub(
    sae: SparseAutoencoder | str | PathLike[str], repo_id: str, subfolder: str = "", *, private: bool = False
) -> str:
    """Upload an autoencoder, a folder of `save_sae`, or a tree of such folders, and return the commit's address.

    The repository is made if it is not there, `private` if asked for. Beside the autoencoders only `*.md` is taken.
    """
    if isinstance(sae, SparseAutoencoder):
        with TemporaryDirectory() as folder:
            save_sae(sae, folder)
            return push_to_hub(folder, repo_id, subfolder, private=private)
    if not any(Path(sae).rglob(WEIGHTS)):
        raise UsageError(f"'{sae}' holds no SAE: expected {CONFIG} and {WEIGHTS} in it or below it (save_sae).")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    api, names = HfApi(), (CONFIG, WEIGHTS, SCALER, "*.md")
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=str(sae),
            path_in_repo=subfolder or None,
            commit_message="Upload sparse autoencoders",
            allow_patterns=[pattern for name in names for pattern in (name, f"*/{name}")],
        )
    except (OSError, ValueError, HTTPError) as error:
        raise UsageError(why_not_written(repo_id, error)) from error
    return str(commit)


def from_hub(
    repo_id: str, subfolder: str = "", *, revision: str | None = None, format: str | None = None, **metadata: Any
) -> SparseAutoencoder:
    """Download the files of one autoencoder and read them as `import_sae` does; a second time from the cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError

    where = subfolder.strip("/")
    patterns = [f"{where}/{name}".lstrip("/") for name in FILES]
    try:
        root = Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError, HTTPError) as error:
        raise UsageError(why_not(repo_id, error)) from error
    if not any((root / pattern).is_file() for pattern in patterns):
        raise UsageError(
            f"'{repo_id}' on the Hub has no SAE in its folder '{where}': look at "
            f"https://huggingface.co/{repo_id}/tree/{revision or 'main'} and give subfolder= the path of one."
        )
    return import_sae(root / where, format, **metadata)
