"""Files that are either complete or not there, and names that tell what is in them."""

import errno
import hashlib
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_whole(path: str | os.PathLike, write: Callable[[Path], object]) -> Path:
    """Write a file under a temporary name beside its place, and put it there in one step.

    An interrupted write leaves what was there before; a process that is killed also leaves a temporary file, which
    `remove_leftovers` takes away.

    Args:
        path: where the file goes; missing folders are made.
        write: writes the file; it is given the temporary path.

    Returns:
        The path.

    Raises:
        OSError: the disk is full; the message names the file and says what to do.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        write(temporary)
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())  # else a power cut could leave the new name with nothing behind it
        os.replace(temporary, path)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        told = f"no space left to write {path}; what was finished before is intact: free some space and start again"
        raise OSError(error.errno, told) from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def check_writable(folder: Path) -> None:
    """Raise OSError if no file can be made in `folder`: to find that out before long work, not after it."""
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=folder):
        pass


def remove_leftovers(path: Path) -> None:
    """Remove what killed processes left of their attempts to write `path`; nobody may be writing it now."""
    for temporary in path.parent.glob(f".{path.name}.*.tmp"):
        temporary.unlink(missing_ok=True)


def content_hash(*parts: Any) -> str:
    """Twelve hexadecimal digits that change with any of `parts` (anything JSON can hold): the name of an artefact."""
    text = json.dumps(parts, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
