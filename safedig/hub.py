"""Say in one line why the Hub did not give a model, or take one, and what to do next. Nothing is fetched here."""

_LOG_IN = "`hf auth login` (or set HF_TOKEN)"
_UNREACHED = {"LocalEntryNotFoundError", "ConnectionError", "NetworkError", "TimeoutException"}


def why_not(name: str, error: Exception) -> str:
    """The next step, by the kind of the error or of its cause: diffusers wraps some of what the Hub raises."""
    first_line = str(error).strip().split("\n")[0]
    kinds = _kinds(error)
    if "GatedRepoError" in kinds:
        return (
            f"'{name}' is gated: accept its licence at https://huggingface.co/{name}, log in with {_LOG_IN}, and try "
            "again; or give a local folder."
        )
    if "RepositoryNotFoundError" in kinds:
        return (
            f"There is no folder and no Hub model '{name}' (or it is private): check the spelling, log in with "
            f"{_LOG_IN}, or give a local folder."
        )
    if "OfflineModeIsEnabled" in kinds:
        return (
            f"'{name}' is not in the local cache and the Hub is switched off by HF_HUB_OFFLINE: unset it, or give a "
            "local folder."
        )
    if kinds & _UNREACHED:
        return (
            f"'{name}' is not in the local cache and the Hub cannot be reached: check the connection, or give a local "
            "folder."
        )
    if "EntryNotFoundError" in kinds:
        return f"'{name}' on the Hub is no diffusers pipeline ({first_line}): give one that has a model_index.json."
    return f"'{name}' is no local folder and could not be fetched from the Hub: {first_line}"


def why_not_written(name: str, error: Exception) -> str:
    """The same for an upload to the repository `name`."""
    kinds = _kinds(error)
    if "OfflineModeIsEnabled" in kinds:
        return f"Nothing was uploaded to '{name}': the Hub is switched off by HF_HUB_OFFLINE; unset it."
    if kinds & _UNREACHED:
        return f"Nothing was uploaded to '{name}': the Hub cannot be reached; check the connection."
    first_line = str(error).strip().split("\n")[0]
    return (
        f"Nothing was uploaded to '{name}' ({first_line}): give the owner/name of a repository of yours, and log in "
        f"with {_LOG_IN}, with a token that may write."
    )


def _kinds(error: Exception) -> set[str]:
    chain = [error, *(one for one in (error.__cause__, error.__context__) if one is not None)]
    return {cls.__name__ for one in chain for cls in type(one).__mro__}
