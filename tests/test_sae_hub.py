"""What is pushed comes back as it was; only tensors and JSON travel; what the Hub refuses is one line."""

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

import httpx2
import huggingface_hub
import huggingface_hub.errors as errors
import pytest
import torch

from safedig.config import UsageError
from safedig.sae.checkpoint import load_sae, save_sae
from safedig.sae.hub import from_hub, push_to_hub
from safedig.sae.model import Decoder, SparseAutoencoder, TopKEncoder
from tests.test_sae_importers import SPARSIFY, K, inputs, linear_tensors, normal, sparsify_folder, unbox_folder

RESPONSE = httpx2.Response(403, request=httpx2.Request("POST", "https://huggingface.co/x"))


def random_sae(seed=0):
    encoder = TopKEncoder(normal(12, 36, seed=seed), normal(36, seed=seed), K)
    return SparseAutoencoder(encoder, Decoder(normal(36, 12, seed=seed), normal(12, seed=seed)), {"site": "txt.embed"})


class Hub:
    """A local stand-in: a repository is a folder; patterns mean what they mean on the Hub."""

    def __init__(self, root):
        self.root, self.private = root, {}

    def create_repo(self, repo_id, *, private, exist_ok):
        assert exist_ok
        self.private[repo_id] = private

    def upload_folder(self, *, repo_id, folder_path, path_in_repo, commit_message, allow_patterns):
        for file in Path(folder_path).rglob("*"):
            name = file.relative_to(folder_path).as_posix()
            if file.is_file() and any(fnmatch(name, pattern) for pattern in allow_patterns):
                target = self.root / repo_id / (path_in_repo or "") / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, target)
        return f"https://huggingface.co/{repo_id}/commit/1"

    def snapshot_download(self, repo_id, *, revision, allow_patterns):
        cache = self.root / "cache" / repo_id
        cache.mkdir(parents=True, exist_ok=True)
        for file in (self.root / repo_id).rglob("*"):
            name = file.relative_to(self.root / repo_id).as_posix()
            if file.is_file() and any(fnmatch(name, pattern) for pattern in allow_patterns):
                (cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, cache / name)
        return str(cache)

    def files(self, repo_id):
        return sorted(
            f.relative_to(self.root / repo_id).as_posix() for f in (self.root / repo_id).rglob("*") if f.is_file()
        )


@pytest.fixture
def hub(tmp_path, monkeypatch):
    stand_in = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: stand_in)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", stand_in.snapshot_download)
    return stand_in


def assert_same(one, other):
    assert torch.equal(one.encode(inputs()), other.encode(inputs()))
    assert torch.equal(one.decoder.W_dec, other.decoder.W_dec) and torch.equal(one.decoder.b_dec, other.decoder.b_dec)


@pytest.mark.parametrize("subfolder", ["", "tiny-flux/txt.embed/violence"])
def test_what_is_pushed_comes_back_as_it_was(hub, subfolder):
    sae = random_sae()
    assert push_to_hub(sae, "someone/saes", subfolder) == "https://huggingface.co/someone/saes/commit/1"
    loaded = from_hub("someone/saes", subfolder)
    assert_same(loaded, sae)
    assert loaded.metadata == sae.metadata | {"imported_from": "sae-lens"}


def test_a_tree_of_folders_is_pushed_and_nothing_else(hub, tmp_path):
    for seed, name in enumerate(("violence", "violence--hate.contrast")):
        save_sae(random_sae(seed), tmp_path / "tree" / "txt.embed" / name)
    (tmp_path / "tree" / "README.md").write_text("# SAEs")
    (tmp_path / "tree" / "prompts.csv").write_text("private")
    (tmp_path / "tree" / "txt.embed" / "trainer_state.pt").write_text("a pickle")
    push_to_hub(tmp_path / "tree", "someone/saes", private=True)
    assert hub.files("someone/saes") == [
        "README.md",
        *(
            f"txt.embed/{name}/{file}"
            for name in ("violence--hate.contrast", "violence")
            for file in ("cfg.json", "sae_weights.safetensors")
        ),
    ]
    assert hub.private == {"someone/saes": True}
    assert_same(from_hub("someone/saes", "txt.embed/violence--hate.contrast/"), random_sae(1))


def test_the_input_scale_of_an_unfinished_training_travels_along(hub, tmp_path):
    save_sae(random_sae(), tmp_path / "saes")
    config = tmp_path / "saes" / "cfg.json"
    theirs = {"metadata": {}, "normalize_activations": "expected_average_only_in"}
    config.write_text(json.dumps(json.loads(config.read_text()) | theirs))
    (tmp_path / "saes" / "activation_scaler.json").write_text('{"scaling_factor": 3.0}')
    push_to_hub(tmp_path / "saes", "someone/saes")
    there = from_hub("someone/saes")
    assert torch.equal(there.decoder.W_dec, load_sae(tmp_path / "saes").decoder.W_dec)
    assert not torch.equal(there.decoder.W_dec, random_sae().decoder.W_dec)


def test_only_the_files_of_one_autoencoder_are_fetched(hub, tmp_path):
    push_to_hub(random_sae(0), "someone/saes", "a")
    push_to_hub(random_sae(1), "someone/saes", "b")
    assert_same(from_hub("someone/saes", "b"), random_sae(1))
    assert not (hub.root / "cache" / "someone/saes" / "a").exists()


@pytest.mark.parametrize(("make", "name"), [(sparsify_folder, "sparsify"), (unbox_folder, "sdxl-unbox")])
def test_repositories_of_other_projects_are_read_in_their_own_formats(hub, make, name):
    make(hub.root / "other" / "project" / "layer")
    sae = from_hub("other/project", "layer", site="txt.embed")
    assert sae.metadata == {"imported_from": name, "site": "txt.embed"}


def test_a_format_that_is_named_is_the_one_taken(hub):
    sparsify_folder(hub.root / "other" / "project", SPARSIFY, linear_tensors())
    assert from_hub("other/project", format="saeuron").metadata["imported_from"] == "saeuron"


def test_a_folder_without_an_autoencoder_is_told_before_anything_is_sent(hub, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no SAE: expected cfg.json and sae_weights.safetensors"):
        push_to_hub(tmp_path / "empty", "someone/saes")
    assert hub.private == {}


def test_a_subfolder_that_is_not_there_is_told(hub):
    push_to_hub(random_sae(), "someone/saes", "a")
    with pytest.raises(
        UsageError, match="'someone/saes' on the Hub has no SAE in its folder 'b': look at https://hugg"
    ):
        from_hub("someone/saes", "b")


@pytest.mark.parametrize(
    ("error", "fetching", "pushing"),
    [
        (errors.RepositoryNotFoundError("401", response=RESPONSE), "no Hub model 'a/b'", "a token that may write"),
        (errors.HfHubHTTPError("403 Forbidden: no", response=RESPONSE), "403 Forbidden", r"\(403 Forbidden: no\)"),
        (errors.OfflineModeIsEnabled("off"), "HF_HUB_OFFLINE", "switched off by HF_HUB_OFFLINE; unset it"),
        (httpx2.ConnectError("no route"), "cannot be reached", "cannot be reached; check the connection"),
        (
            errors.HFValidationError("Repo id must be …"),
            "Repo id must be",
            "give the owner/name of a repository of yours",
        ),
    ],
)
def test_what_the_hub_refuses_is_one_line(hub, monkeypatch, error, fetching, pushing):
    def refuse(*args, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(Hub, "create_repo", refuse)
    with pytest.raises(UsageError, match=fetching):
        from_hub("a/b")
    with pytest.raises(UsageError, match=f"Nothing was uploaded to 'a/b'.*{pushing}"):
        push_to_hub(random_sae(), "a/b")


def test_switched_off_for_real_it_says_so_without_waiting():
    """The tests run with HF_HUB_OFFLINE=1: this goes through huggingface_hub as it is."""
    with pytest.raises(UsageError, match="'some/repo-nobody-has' is not in the local cache"):
        from_hub("some/repo-nobody-has")
    with pytest.raises(UsageError, match="Nothing was uploaded to 'some/repo-nobody-has'"):
        push_to_hub(random_sae(), "some/repo-nobody-has")


def test_our_stand_in_takes_the_names_that_the_real_one_has():
    """Every keyword that is used exists in huggingface_hub itself."""
    import inspect

    for real, fake in (
        (huggingface_hub.HfApi.create_repo, Hub.create_repo),
        (huggingface_hub.HfApi.upload_folder, Hub.upload_folder),
        (huggingface_hub.snapshot_download, Hub.snapshot_download),
    ):
        assert set(inspect.signature(fake).parameters) - {"self"} <= set(inspect.signature(real).parameters)


def test_the_pushed_folder_is_one_that_load_sae_reads(hub):
    push_to_hub(random_sae(), "someone/saes")
    assert_same(load_sae(hub.root / "someone" / "saes", site="txt.embed"), random_sae())
