"""Files that belong together say so, and a mixture of two saves is refused: its shapes may fit, its answers are nobody's.

An adapter's configuration records a digest of its weights; only of these, so that the other keys can be edited. A folder that
is made to be carried to other machines (an edge model, an export) has one of every file, in the form of ``sha256sum``.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import torch

from shadowpeft.errors import AdapterFileError, ConfigError
from shadowpeft.hf.files.locate import CONFIG, WEIGHTS
from shadowpeft.hf.files.reading import MAX_CONFIG_BYTES, read_header, read_json, read_values
from shadowpeft.messages import quote

KEY = "weights_sha256"
"""Where an adapter's configuration records :func:`tensors_sha256` of the weights it was saved with."""
SUMS = "shadowpeft-files.sha256"
"""The list of a folder's digests; ``sha256sum --check`` reads it too."""
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


def tensors_sha256(path: Path) -> str:
    """Digest of the names, dtypes, shapes and values in a safetensors file, whatever their order and the header's comments.

    Raises:
        AdapterFileError: if the file is damaged.
    """
    whole = hashlib.sha256()
    for name, value in read_values(path, sorted(read_header(path))):
        whole.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        whole.update(value.contiguous().view(-1).view(torch.uint8).numpy())
    return whole.hexdigest()


def check_weights_digest(path: Path, recorded: str | None) -> None:
    """The tensors in ``path`` are those that the configuration beside it was saved with; None: it does not say which.

    Raises:
        AdapterFileError: if they are others.
    """
    if recorded is not None and tensors_sha256(path) != recorded:
        raise AdapterFileError(
            f"{path} does not hold the weights that {CONFIG} beside it was saved with, so the two are of different adapters or "
            f"a copy was cut short; copy the whole folder again, or delete {KEY} from {CONFIG} if you changed the weights on "
            "purpose"
        )


def check_adapters(folder: Path) -> None:
    """The same for every adapter in a checkpoint's folder, which is the folder itself or one inside it.

    Raises:
        AdapterFileError: if one is mixed or damaged.
    """
    for config in (folder / CONFIG, *folder.glob(f"*/{CONFIG}")):
        if config.is_file() and config.with_name(WEIGHTS).is_file():
            check_weights_digest(config.with_name(WEIGHTS), read_json(config).get(KEY))


def write_sums(folder: Path) -> None:
    """List the digest of every file in ``folder``, which nobody else writes to."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SUMS)
    lines = [f"{_sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def check_sums(folder: Path, what: str) -> None:
    """Every file that the list in ``folder`` names is there and is the one that was saved; without a list, all are right.

    Raises:
        ConfigError: naming the first file that is not; ``what`` is how the message calls the folder.
    """
    if not (folder / SUMS).is_file():
        return
    whole = (folder / SUMS).stat().st_size <= MAX_CONFIG_BYTES
    for line in (folder / SUMS).read_text(encoding="utf-8", errors="replace").splitlines() if whole else ["too long"]:
        entry = _LINE.fullmatch(line)
        if entry is None or Path(entry[2]).is_absolute() or ".." in Path(entry[2]).parts:
            raise ConfigError(
                f"{what} has a damaged list of its files ({SUMS}: {quote(line)}); copy the whole folder again"
            )
        digest, name = entry.groups()
        if not (folder / name).is_file() or _sha256(folder / name) != digest:
            raise ConfigError(
                f"{what} was saved with another {name} than it has now, so it mixes two models or a copy was cut short; copy "
                f"the whole folder again, or delete that file's line from {SUMS} if you changed it on purpose"
            )


def _sha256(path: Path) -> str:
    whole = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            whole.update(block)
    return whole.hexdigest()
