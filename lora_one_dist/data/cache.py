"""The folder in which `datasets` keeps what it makes of the data: named when it cannot be written to.

In: what reads data, as a block.  Out: an error that names the folder instead of the data file.  Runs on any rank, not
collective.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)  # pyarrow's errors have a number and no file name


class CacheError(ValueError):
    """The cache cannot take what is made of the data: folder, cause, remedy."""


@contextlib.contextmanager
def writable_cache() -> Iterator[None]:
    """The cache is tried before the block; a failure in it that is the cache's is told as such.

    Raises CacheError.
    """
    from datasets import config

    folder = Path(config.HF_DATASETS_CACHE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"tried")
    except OSError as error:
        raise _cannot_write(folder, error) from error
    try:
        yield
    except Exception as error:  # `datasets` and whoever calls it wrap what happened in errors of their own
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, OSError) and (cause.errno in FULL or _is_in(folder, cause.filename)):
                raise _cannot_write(folder, cause) from error
            cause = cause.__cause__ or cause.__context__
        raise


def _is_in(folder: Path, name: object) -> bool:
    return isinstance(name, str) and Path(name).is_relative_to(folder)


def _cannot_write(folder: Path, error: OSError) -> CacheError:
    return CacheError(
        f"HF_DATASETS_CACHE = {folder}: cannot be written to on {socket.gethostname()} ({error}); what is read and "
        "tokenised is kept there. Make room or set its permissions, or set HF_DATASETS_CACHE (or HF_HOME, in which it "
        "is by default) to a folder that can be."
    )
