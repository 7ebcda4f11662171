"""Finding one file of an adapter or a model, in a folder or on the Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, HTTPError

from shadowpeft.errors import AdapterFileError
from shadowpeft.messages import shorten

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
"""The two files of an adapter."""


def find_file(adapter: str | Path, name: str) -> Path:
    """Path of one file of an adapter, from a folder or the Hub.

    Raises:
        AdapterFileError: if it is not there.
    """
    folder = Path(adapter)
    if folder.is_dir():
        if not (folder / name).is_file():
            raise AdapterFileError(f"'{folder}' has no {name}; give the folder that save_pretrained wrote")
        return folder / name
    if folder.exists() or str(adapter).count("/") != 1 or str(adapter).startswith((".", "/", "~")):
        raise AdapterFileError(f"'{adapter}' is neither a folder nor a Hub id of the form owner/name; check the path")
    try:
        return Path(hf_hub_download(str(adapter), name))
    except HFValidationError as error:
        raise AdapterFileError(
            f"'{adapter}' is neither a folder nor a Hub id ({shorten(error)}); check the path"
        ) from error
    except (EntryNotFoundError, HTTPError) as error:  # the client's own class where no answer came
        raise AdapterFileError(
            f"'{adapter}' is no local folder and {name} could not be fetched from the Hub ({type(error).__name__}); check "
            "the name and the network"
        ) from error


def at_revision(adapter: str | Path, revision: str) -> Path:
    """The folder of a Hub id at one revision: a branch, a tag or a commit.

    Raises:
        AdapterFileError: if it cannot be fetched, or ``adapter`` is a folder, which has no revisions.
    """
    if Path(adapter).is_dir():
        raise AdapterFileError(f"revision is '{revision}' but '{adapter}' is a folder; leave revision out")
    try:
        return Path(snapshot_download(str(adapter), revision=revision))
    except (HFValidationError, HTTPError, OSError, ValueError) as error:
        raise AdapterFileError(
            f"'{adapter}' at revision '{revision}' could not be fetched ({shorten(error)}); check name, revision and network"
        ) from error
