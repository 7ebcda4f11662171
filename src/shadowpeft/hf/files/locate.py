"""Finding one file of an adapter or a model, in a folder or on the Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, HTTPError

from shadowpeft.errors import AdapterFileError
from shadowpeft.hf.files import kinds
from shadowpeft.messages import shorten

CONFIG = kinds.CONFIG
WEIGHTS = "adapter_model.safetensors"
"""The two files of an adapter."""
_OF_ADAPTERS = (CONFIG, WEIGHTS, "shadow_config.json", "tokenizer_config.json")
"""What is asked of adapters alone, not of bases."""


def find_file(adapter: str | Path, name: str) -> Path:
    """Path of one file of an adapter, from a folder or the Hub.

    Raises:
        AdapterFileError: if it is not there.
    """
    folder = Path(adapter)
    if folder.is_dir():
        if (folder / name).is_file():
            return folder / name
        if name in (CONFIG, WEIGHTS) and not (folder / CONFIG).is_file():
            raise AdapterFileError(f"'{folder}' {kinds.instead_of_adapter(folder)}")
        raise AdapterFileError(f"'{folder}' has no {name}; give the folder that save_pretrained wrote")
    if name in _OF_ADAPTERS:
        check_not_missing(folder)
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


def check_not_missing(folder: Path) -> None:
    """Refuse the name of an adapter that is missing in a folder that is there; the Hub has nothing to do with it.

    Raises:
        AdapterFileError: saying what is missing.
    """
    if kinds.unfinished_run(folder):
        raise AdapterFileError(
            f"the run in '{folder.parent}' has no adapter yet, so there is no '{folder}'; wait for its end, or go on with "
            "shadowpeft train --resume"
        )
    if not folder.exists() and folder.parent != Path() and folder.parent.is_dir():
        raise AdapterFileError(
            f"there is no '{folder}' in the folder '{folder.parent}'; check the path (a Hub id of this name is read where no "
            "such folder stands)"
        )


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
