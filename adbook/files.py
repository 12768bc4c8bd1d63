"""Files that are either complete or not there."""

import os
from collections.abc import Callable
from pathlib import Path


def write_whole(path: str | os.PathLike, write: Callable[[Path], object]) -> Path:
    """Write a file under a temporary name beside its place, and put it there in one step.

    An interrupted write leaves what was there before, and nothing else.

    Args:
        path: where the file goes; missing folders are made.
        write: writes the file; it is given the temporary path.

    Returns:
        The path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
