"""Say in one line why the Hub did not give a model, and what to do next. Nothing is fetched here."""


def why_not(name: str, error: Exception) -> str:
    """The next step, by the kind of the error or of its cause: diffusers wraps some of what the Hub raises."""
    first_line = str(error).strip().split("\n")[0]
    chain = [error, *(one for one in (error.__cause__, error.__context__) if one is not None)]
    kinds = {cls.__name__ for one in chain for cls in type(one).__mro__}
    log_in = "`hf auth login` (or set HF_TOKEN)"
    if "GatedRepoError" in kinds:
        return (
            f"'{name}' is gated: accept its licence at https://huggingface.co/{name}, log in with {log_in}, and try "
            "again; or give a local folder."
        )
    if "RepositoryNotFoundError" in kinds:
        return (
            f"There is no folder and no Hub model '{name}' (or it is private): check the spelling, log in with "
            f"{log_in}, or give a local folder."
        )
    if "OfflineModeIsEnabled" in kinds:
        return (
            f"'{name}' is not in the local cache and the Hub is switched off by HF_HUB_OFFLINE: unset it, or give a "
            "local folder."
        )
    if kinds & {"LocalEntryNotFoundError", "ConnectionError", "NetworkError", "TimeoutException"}:
        return (
            f"'{name}' is not in the local cache and the Hub cannot be reached: check the connection, or give a local "
            "folder."
        )
    if "EntryNotFoundError" in kinds:
        return f"'{name}' on the Hub is no diffusers pipeline ({first_line}): give one that has a model_index.json."
    return f"'{name}' is no local folder and could not be fetched from the Hub: {first_line}"
