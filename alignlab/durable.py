"""What is written stays written."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from alignlab.errors import StorageError


def sync(path: Path) -> None:
    """Make a file or folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_where_possible(path: Path) -> None:
    """The same; a file system that cannot sync such an entry (folders, on some) is not an error."""
    try:
        sync(path)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EACCES, errno.EBADF):
            raise


def write_atomic(path: Path, content: str | bytes) -> None:
    """Make ``path`` hold ``content`` (text as UTF-8), durably and all at once."""
    staged = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with staged.open("wb") as stream:
            stream.write(_bytes(content))
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(staged, path)
        sync(path.parent)
    except OSError as error:
        staged.unlink(missing_ok=True)
        raise StorageError(f"{path}: cannot be written ({error.strerror})") from None


def write_named(key: str, path: Path, content: str | bytes) -> None:
    """The same for a file that the user named with ``key``; folders on the way are made.

    A link stays a link: the file behind it is replaced.  What is no regular file (a pipe, a device) cannot be replaced
    and is written as it stands.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            path.write_bytes(_bytes(content))
            return
    except OSError as error:
        raise StorageError(f"{key}: {path} cannot be written ({error.strerror})") from None
    try:
        write_atomic(path.resolve(), content)
    except StorageError as error:
        raise StorageError(f"{key}: {error}") from None


def _bytes(content: str | bytes) -> bytes:
    return content.encode() if isinstance(content, str) else content
