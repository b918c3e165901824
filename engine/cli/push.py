"""Upload a directory with a model to a hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError  # the second: of whichever httpx the hub is used by
from huggingface_hub.utils import validate_repo_id

HUB_ERRORS = (HTTPError, OSError)  # what the hub answers, or no connection; no key, or offline by HF_HUB_OFFLINE


def check_repository(key: str, name: str) -> None:
    """Raise ValueError naming the key unless a hub can have a repository of this name."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"{key}: {name!r} given: expected ORGANISATION/NAME: {error}") from error
    if "/" not in name:
        raise ValueError(f"{key}: {name!r} given: expected ORGANISATION/NAME")


def push_directory(folder: Path, name: str) -> str:
    """Upload all files of a folder as one commit, and return a line that says where they are.

    The repository is made if it is not there, as a private one. The hub is that of HF_ENDPOINT, the key that of
    HF_TOKEN or of `hf auth login`. Raises OSError with the reason if there is no key, or the hub refuses or is out of
    reach.
    """
    hub = HfApi()
    try:
        made = hub.create_repo(name, private=True, exist_ok=True)
        hub.upload_folder(repo_id=name, folder_path=folder, commit_message="Export by mgrpo")
    except HUB_ERRORS as error:
        again = f"the model is in {folder}, `hf upload {name} {folder}` uploads it later"
        raise OSError(f"--push: {name} is not uploaded: {_reason(error)}: {again}") from error
    return f"{made.url}: uploaded"


def _reason(error: Exception) -> str:
    """Return what the hub says, or what stands in its way, in one line."""
    said = getattr(error, "server_message", None) or str(error)
    status = getattr(getattr(error, "response", None), "status_code", None)
    text = " ".join(said.split())
    hint = " (set HF_TOKEN to a key that may write there, or call `hf auth login`)" if status in (401, 403) else ""
    return (f"{status}: " if status else "") + text + hint
