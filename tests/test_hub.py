"""What the Hub refuses is one line with the next step, for the errors that its library and diffusers really raise."""

import re

import httpx2
import huggingface_hub.errors as errors
import pytest

from safedig.__main__ import main
from safedig.config import UsageError
from safedig.hub import why_not
from safedig.pipelines import load_pipeline

NAME = "black-forest-labs/FLUX.1-dev"
RESPONSE = httpx2.Response(403, request=httpx2.Request("GET", "https://huggingface.co/x"))


def http(kind):
    return kind("403 Client Error.\nCannot access gated repo for url https://…", response=RESPONSE)


def wrapped(cause):
    """As `DiffusionPipeline.download` raises it: it asks for the model's files, then looks into the cache."""
    error = OSError(f"Cannot load model {NAME}: the model is not fully cached locally and an error occurred …")
    error.__cause__ = cause
    return error


GATED = f"'{NAME}' is gated: accept its licence at https://huggingface.co/{NAME}, log in with `hf auth login` (or set"
MISSING = f"There is no folder and no Hub model '{NAME}' (or it is private): check the spelling, log in with"
OFFLINE = f"'{NAME}' is not in the local cache and the Hub is switched off by HF_HUB_OFFLINE: unset it, or give a local"
UNREACHED = f"'{NAME}' is not in the local cache and the Hub cannot be reached: check the connection, or give a local"
RAISED = [
    (http(errors.GatedRepoError), GATED),
    (wrapped(http(errors.GatedRepoError)), GATED),
    (http(errors.RepositoryNotFoundError), MISSING),
    (wrapped(http(errors.RepositoryNotFoundError)), MISSING),
    (errors.OfflineModeIsEnabled("Cannot reach https://huggingface.co"), OFFLINE),
    (wrapped(errors.OfflineModeIsEnabled("Cannot reach https://huggingface.co")), OFFLINE),
    (errors.LocalEntryNotFoundError("Cannot find the requested files in the disk cache\nand more"), UNREACHED),
    (wrapped(httpx2.ConnectError("[Errno -3] Temporary failure in name resolution")), UNREACHED),
    (ConnectionError("reset by peer"), UNREACHED),
    (http(errors.RemoteEntryNotFoundError), f"'{NAME}' on the Hub is no diffusers pipeline (403 Client Error.)"),
    (http(errors.HfHubHTTPError), f"'{NAME}' is no local folder and could not be fetched from the Hub: 403 Client"),
    (errors.HFValidationError("Repo id must be …"), f"'{NAME}' is no local folder and could not be fetched"),
    (OSError("no *.safetensors found"), f"'{NAME}' is no local folder and could not be fetched from the Hub: no *.saf"),
]


@pytest.fixture
def raised(monkeypatch):
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    def arrange(error):
        def refuse(*args, **options):
            raise error

        monkeypatch.setattr(DiffusionPipeline, "from_pretrained", refuse)

    return arrange


@pytest.mark.parametrize(("error", "message"), RAISED, ids=lambda value: type(value).__name__)
def test_what_the_hub_refuses_is_one_line_with_the_next_step(raised, error, message):
    raised(error)
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        load_pipeline(NAME)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    assert caught.value.__cause__ is error, "the traceback still tells everything"


def test_every_refusal_has_another_next_step():
    assert len({why_not(NAME, error) for error, _ in RAISED}) >= 7


@pytest.mark.parametrize("verb", ["show", "demo"])
def test_on_the_command_line_too(raised, capsys, verb, tmp_path):
    raised(http(errors.GatedRepoError))
    out = ["--out", str(tmp_path)] if verb == "demo" else []
    assert main([verb, "flux1-dev", *out]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"safedig: {GATED}") and line.endswith("or give a local folder.")


def test_switched_off_for_real_it_says_so_without_waiting():
    """The tests run with HF_HUB_OFFLINE=1: this goes through diffusers and huggingface_hub as they are."""
    with pytest.raises(UsageError, match=re.escape("'some/model-nobody-has' is not in the local cache")):
        load_pipeline("some/model-nobody-has")


def test_our_own_mistakes_are_not_explained_away(raised):
    raised(ZeroDivisionError("ours"))
    with pytest.raises(ZeroDivisionError):
        load_pipeline(NAME)
