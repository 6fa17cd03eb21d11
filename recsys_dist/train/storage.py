"""Where checkpoints lie: on a disk that all workers see, or on any file system that fsspec knows (s3://, gs://).

An object store puts a file whole or not at all and renames nothing; a checkpoint asks for no more, as its
manifest is put last. What is the same on both, `UPath` does.
"""

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from upath import UPath
from upath.implementations.cloud import CloudPath

from recsys_dist.data.output import NO_ROOM, naming, write_text
from recsys_dist.errors import CheckpointError, ConfigError, DataError, RecsysError, StoreError

AnyPath = Path | UPath


def root(url: str) -> AnyPath:
    """The directory of a URL or local path. ConfigError for a protocol that nothing here speaks."""
    try:
        if isinstance(UPath(url), Path):
            return Path(url).absolute()
        found = UPath(url)
        assert found.fs
    except (ValueError, ImportError) as error:  # ImportError names the package to install
        raise ConfigError(f"checkpoints={url!r}: {error}") from None
    return found


def below(url: str | None, run: Path) -> AnyPath:
    """Where a run keeps its checkpoints: a directory for each of its phases."""
    return run if url is None else root(url) / run.name


def _make(directory: AnyPath) -> None:
    if not isinstance(directory, CloudPath):  # it would make a bucket of a name that is misspelt
        directory.mkdir(parents=True, exist_ok=True)


def probe(url: str) -> None:
    """ConfigError where checkpoints could not be written to, read from, and deleted from `url`."""
    directory = root(url)
    file = directory / f".probe-{uuid.uuid4().hex}"  # other runs may begin just now
    try:
        _make(directory)
        file.write_bytes(b"written")
        assert file.read_bytes() == b"written"
        file.unlink()
    except RecsysError:
        raise
    except Exception as error:  # each store has errors of its own
        raise ConfigError(
            f"checkpoints={url!r} cannot be written to and read back: {type(error).__name__}: {error}; "
            "give this machine and the workers access, or name another place"
        ) from None


def writer(path: AnyPath) -> Any:
    """DCP's, for a directory that does not exist yet."""
    if isinstance(path, Path):
        return FileSystemWriter(path, sync_files=True)
    return FsspecWriter(str(path), sync_files=False, **path.storage_options)


def reader(path: AnyPath) -> Any:
    """DCP's."""
    if isinstance(path, Path):
        return FileSystemReader(path)
    return FsspecReader(str(path), **path.storage_options)


def put(text: str, path: AnyPath) -> None:
    """A small file, whole or not at all."""
    if isinstance(path, Path):
        write_text(text, path)
    else:
        _make(path.parent)
        path.write_text(text, encoding="utf-8")


def remove(path: AnyPath, first: str | None = None) -> None:
    """A directory and all in it, its file `first` before the rest, as far as that can be done now."""
    if isinstance(path, Path):
        if first is not None:
            (path / first).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(Exception):  # it goes with the next one
            if first is not None and path.fs.exists((path / first).path):
                path.fs.rm((path / first).path)
            path.fs.rm(path.path, recursive=True)


@contextmanager
def writing(path: AnyPath) -> Iterator[None]:
    """CheckpointError where the block cannot write there."""
    try:
        with naming(path):  # type: ignore[arg-type]
            yield
    except DataError as error:
        raise CheckpointError(str(error)) from None
    except Exception as error:
        # what a worker that is lost raises in the others is a RuntimeError, and not the store's fault
        if isinstance(path, Path) or isinstance(error, RecsysError | RuntimeError | MemoryError):
            raise
        raise CheckpointError(
            f"{str(path)!r} cannot be written: {type(error).__name__}: {error}; what is committed is kept, "
            "and the same command goes on from there"
        ) from None


@contextmanager
def reading(path: AnyPath) -> Iterator[None]:
    """StoreError where a store does not answer: what lies there must not be taken for torn, and deleted."""
    try:
        yield
    except (RecsysError, FileNotFoundError):
        raise
    except Exception as error:
        if (
            isinstance(path, Path) or getattr(error, "errno", None) in NO_ROOM
        ):  # this machine's disk, in `fetch`
            raise
        raise StoreError(
            f"{str(path)!r} cannot be read now: {type(error).__name__}: {error}; nothing there was changed, "
            "run the same command again when it answers"
        ) from None


def listed(path: AnyPath, prefix: str = "") -> list[AnyPath]:
    """What a directory holds whose name begins so, by name; nothing where it does not exist.

    `UPath`'s own `glob` and `iterdir` hold for empty what does not answer.
    """
    try:
        with reading(path):
            if isinstance(path, Path):
                names = [child.name for child in path.iterdir()]
            else:
                path.fs.invalidate_cache()  # other workers write there too
                names = [PurePosixPath(name).name for name in path.fs.ls(path.path, detail=False)]
    except FileNotFoundError:
        return []
    return [path / name for name in sorted(names) if name.startswith(prefix)]


def fetch(path: AnyPath, into: Path, last: str) -> Path:
    """A copy of a directory, below `into` on this machine, unless it is there; its file `last` comes last."""
    copy = into / path.name
    if not (copy / last).exists():
        copy.mkdir(parents=True, exist_ok=True)
        for file in sorted(listed(path), key=lambda file: file.name == last):
            partial = copy / f".{file.name}.partial"
            with reading(file), file.open("rb") as source, partial.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 22)
            partial.replace(copy / file.name)
    return copy
