"""Files that are whole or do not exist, in a directory that one process at a time writes."""

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from recsys_dist.errors import DataError

LOCK = ".lock"
PARTIALS = ".*.partial"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
log = logging.getLogger(__name__)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write to, renamed to `path` once the block is done; what fails leaves `path` as it was.

    Raises DataError that names the path where it cannot be written, such as on a full disk.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a DataError about `path`."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise DataError(
            f"{str(path)!r} cannot be written: {reason}; make room or choose another directory, and run the "
            "same command again: it continues"
        ) from None


def write_parquet(table: pa.Table, path: Path) -> None:
    """Whole or not at all. Integers are plain and lightly compressed: readers decode them every epoch."""
    with replacing(path) as partial:
        pq.write_table(table, partial, compression="lz4", use_dictionary=False, write_page_checksum=True)
        sync(partial)  # or a power cut might leave a manifest of files that are empty


def write_text(text: str, path: Path) -> None:
    """Whole or not at all, also after a power cut."""
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    sync(path.parent)  # a rename is an entry of its directory


def sync(path: Path) -> None:
    """On return a file's content, or a directory's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_partials(directory: Path) -> None:
    """Of earlier writers, below a directory that is one's own and that nobody else writes at the moment."""
    for partial in directory.rglob(PARTIALS):
        partial.unlink(missing_ok=True)


@contextmanager
def sole_writer(directory: Path) -> Iterator[None]:
    """Hold the directory, made where missing; waits while another process does.

    The lock goes with the process that holds it, however that ends.
    """
    with naming(directory):
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("%s is being written by another process; waiting for it", directory)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
