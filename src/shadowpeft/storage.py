"""Files and folders that are whole or not there: written beside in a workspace, on disk, then renamed.

A workspace has a name that nobody would choose, and its process holds a lock on it (``flock``), which the system takes back
when the process ends, however it ends. So whoever writes next can tell a workspace that is in use from one that was left
behind, and nothing but the latter is ever deleted. Where the file system has no such locks, leftovers stay.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import threading
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from safetensors import SafetensorError

from shadowpeft.errors import ConfigError, ShadowPeftError

_TEMPORARY = re.compile(r"\.shadowpeft-[0-9a-f]{32}")
_REPLACED = "replaced"
LOCK = ".shadowpeft-lock"
"""What :func:`exclusive` locks; a killed process leaves it, unlocked."""
WRITE_ERRORS = (OSError, SafetensorError, RuntimeError)
"""What a full disk raises: plain files OSError, safetensors its own error, ``torch.save`` a RuntimeError. Whoever catches them
asks :func:`is_write_error`, for most RuntimeErrors are something else."""
_TORCH_SAVE = ("PytorchStreamWriter", "inline_container")


class TakenError(FileExistsError):
    """Another process has written under a name that was free, or was another's, when the work on it began."""


# ----------------------------------------------------------------------------------------------------------------- writing


def write_text(path: Path, content: str) -> None:
    """Text: whoever reads sees the old or the new one, whole."""
    with whole(path) as beside:
        beside.write_text(content, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """JSON, in the same way."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def whole(path: Path, *, folder: bool = False, replace: bool = True) -> Iterator[Path]:
    """A place to write to, which takes the name ``path`` when all is written and on disk; on an error nothing is left.

    Args:
        folder: the place is a new folder; else the caller makes a file of that name.
        replace: False: never takes the place of something else.

    Raises:
        TakenError: if another process has made or replaced ``path`` meanwhile; its work is kept.
        OSError: if it cannot be written; what was there before is untouched.
    """
    path = Path(os.path.realpath(path))  # a link stays a link
    with workspace(path.parent) as space:
        before = _identity(path)
        if before is not None and not replace:
            raise TakenError(f"'{path}' exists")
        beside = space / path.name
        if folder:
            beside.mkdir()
        yield beside
        share(beside, space)
        sync_tree(beside)
        with _locked(path.parent):
            if (folder or not replace) and _identity(path) != before:
                raise TakenError(f"another process has written '{path}' meanwhile")
            take_name(beside, path, space, replace)
        sync(path.parent)


def share(beside: Path, space: Path) -> None:
    """Let those read the files written in a workspace who may read the workspace: safetensors 0.8 lets the owner alone."""
    readers = space.stat().st_mode & 0o666  # a new folder has all that the process's mask leaves
    for part in [*beside.rglob("*"), beside]:
        if not part.is_file() or part.is_symlink():
            continue
        found = part.stat()
        if found.st_nlink == 1 and found.st_mode | readers != found.st_mode:  # a linked file is somebody's own too
            part.chmod(found.st_mode | readers)


def take_name(beside: Path, path: Path, space: Path, replace: bool = True) -> None:
    """Rename what was written in a workspace; what stood there goes into the workspace, and back if that fails."""
    new, aside = _identity(path) is None, space / _REPLACED
    if beside.is_dir() and new:
        os.rename(beside, path)  # refused where a file or a filled folder stands
    elif beside.is_dir():
        aside.mkdir()
        os.rename(path, aside / path.name)
        try:
            os.rename(beside, path)
        except OSError:
            os.rename(aside / path.name, path)
            raise
    elif not replace:
        try:
            os.link(beside, path)  # refused where anything stands
        except FileExistsError as error:
            raise TakenError(f"another process has written '{path}' meanwhile") from error
        except OSError:  # no hard links on this file system
            os.replace(beside, path)
    else:
        os.replace(beside, path)


@contextmanager
def written_whole(
    path: Path,
    what: str = "it",
    remedy: str = "free some space and resume from the newest checkpoint",
    *,
    folder: bool = True,
    replace: bool = True,
) -> Iterator[Path]:
    """:func:`whole`, with a sentence for what goes wrong.

    Raises:
        ShadowPeftError: if it cannot be written, or another process has written it meanwhile.
    """
    try:
        with whole(path, folder=folder, replace=replace) as beside:
            yield beside
    except TakenError as error:
        raise ShadowPeftError(
            f"{what} was not written to '{path}': another process has written there meanwhile, and that was kept; choose "
            "another name"
        ) from error
    except WRITE_ERRORS as error:
        if not is_write_error(error):
            raise
        raise ShadowPeftError(
            f"{what} could not be written to '{path}' ({reason(error)}); what was there before is untouched, {remedy}"
        ) from error


def require_writable(place: Path) -> None:
    """Whether the folder ``place`` can be written to, or made and written to; asked before long work, it leaves nothing.

    Raises:
        ConfigError: saying what is in the way.
    """
    nearest = place
    while not os.path.lexists(nearest):
        nearest = nearest.parent
    if not nearest.is_dir():
        raise ConfigError(f"'{nearest}' is no folder, but what is made goes into '{place}'; choose another place")
    try:
        with workspace(nearest):
            pass
    except OSError as error:
        raise ConfigError(f"the folder '{nearest}' cannot be written to ({reason(error)}); choose another place") from error


def is_write_error(error: BaseException) -> bool:
    """Whether one of ``WRITE_ERRORS`` is about a file: not an exhausted memory, tensors that share theirs, a lost process."""
    return not isinstance(error, RuntimeError) or any(mark in str(error) for mark in _TORCH_SAVE)


def reason(error: BaseException) -> str:
    """Why a write failed, in a few words."""
    text = str(getattr(error, "strerror", None) or error).strip()
    return text.splitlines()[0] if text else type(error).__name__


# -------------------------------------------------------------------------------------------------------------- workspaces


def temporary_name() -> str:
    """A name for a workspace."""
    return f".shadowpeft-{uuid.uuid4().hex}"


def is_temporary(name: str) -> bool:
    """Whether a name is that of a workspace."""
    return _TEMPORARY.fullmatch(name) is not None


@contextmanager
def workspace(parent: Path, name: str | None = None) -> Iterator[Path]:
    """A new folder in ``parent`` for this process, gone afterwards, also after SIGTERM; leftovers of others go first."""
    parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(parent)
    with _removed_on_sigterm(), ExitStack() as stack:
        while True:
            space = parent / (name or temporary_name())
            space.mkdir()
            if stack.enter_context(_locked(space)):
                break  # else another process saw it before it was locked and took it for a leftover
        stack.callback(shutil.rmtree, space, ignore_errors=True)
        yield space


def clear_leftovers(folder: Path) -> None:
    """Delete the workspaces in ``folder`` whose processes are gone; what one had moved aside goes back to its place."""
    for space in [path for path in folder.iterdir() if is_temporary(path.name)]:
        with suppress(OSError), _locked(space, wait=False):  # in use, gone, or there are no locks here
            for replaced in (space / _REPLACED).glob("*"):
                if not (folder / replaced.name).exists():
                    os.rename(replaced, folder / replaced.name)
            shutil.rmtree(space, ignore_errors=True)


def discard(path: Path) -> None:
    """Delete a folder; it loses its name first, so that a kill never leaves half of it under that name."""
    aside = path.with_name(temporary_name())
    os.replace(path, aside)
    shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold ``folder`` against every other process that asks for it so; the lock is a file in it, which goes afterwards.

    Raises:
        ConfigError: if another process holds it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"the folder '{folder}' cannot be made ({reason(error)}); choose another place") from error
    lock = folder / LOCK
    with _removed_on_sigterm(), ExitStack() as stack:
        try:
            while True:
                lock.touch()
                if stack.enter_context(_locked(lock, wait=False)):
                    break
        except BlockingIOError as error:
            raise ConfigError(
                f"another process is writing to '{folder}'; wait for its end, or choose another folder"
            ) from error
        except OSError:  # no locks on this file system
            pass
        stack.callback(lock.unlink, missing_ok=True)
        yield


# ------------------------------------------------------------------------------------------------------------- small parts


def sync(path: Path) -> None:
    """Ask the system to have a file, or the names in a folder, on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(path: Path) -> None:
    """The same for a file, or a folder and all that is in it."""
    for part in [*path.rglob("*"), path]:
        sync(part)


def between(text: str, marks: tuple[str, str], content: str) -> str | None:
    """``text`` with ``content`` as the lines between its two marks; None if it does not have them."""
    before, begin, rest = text.partition(marks[0])
    _, end, after = rest.partition(marks[1])
    return f"{before}{begin}\n{content}\n{end}{after}" if begin and end else None


def _identity(path: Path) -> tuple[int, ...] | None:
    """What stands under a name now, for comparison; None: nothing, or an empty folder."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return None
    facts = path.stat()
    return facts.st_dev, facts.st_ino, facts.st_ctime_ns


@contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock on a file or folder, if the file system has locks; False if it no longer stands there under its name.

    Raises:
        OSError: without ``wait``, if there are no locks; BlockingIOError: if another process holds it.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        yield False
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            if not wait:
                raise
        yield path.exists() and os.path.samestat(os.fstat(handle), path.stat())
    finally:
        os.close(handle)


class _Terminated(BaseException):
    pass


@contextmanager
def _removed_on_sigterm() -> Iterator[None]:
    """SIGTERM, where nobody else handles it, ends the process after what stands in the ``with`` has cleaned up."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise _Terminated

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except _Terminated:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
