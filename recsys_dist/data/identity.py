"""Which raw log this is: by its content, so that a copy, or a file with a new date, is still the same log."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs

from recsys_dist.config import digest
from recsys_dist.data.sources.files import naming, open_file
from recsys_dist.data.sources.protocol import Source

State = list[int | str | None]  # of a file: size, time of change (ns), digest of its bytes where local
Seen = dict[str, State]


def look(source: Source, before: Seen) -> tuple[str, Seen]:
    """Digest of all that a source reads, and what each file was like.

    Local files count by their bytes; one whose size and time of change are as `before` is not read
    again. Remote ones count by size and time of change, as far as their file system tells.
    """
    parts = source.parts()
    files = sorted({part.file for part in parts if part.file})
    with ThreadPoolExecutor() as threads:  # hashing does not hold the interpreter's lock
        seen = dict(zip(files, threads.map(lambda file: state(file, before.get(file)), files), strict=True))
    contents = [of[2] or of for of in seen.values()]
    tables = [_table_digest(table) for table in (source.users(), source.items())]
    return digest([[part.name for part in parts], contents, tables]), seen


def remembered(file: Path) -> Seen:
    """What an earlier preparation noted in `file`; nothing where there is no such note."""
    try:
        seen = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return seen if isinstance(seen, dict) else {}


def state(url: str, before: State | None = None) -> State:
    """What a file is like now; `before` again, unread, where its size and time are the same."""
    system, path = open_file(url)
    with naming(url):
        info = system.get_file_info(path)
    stat = [info.size, info.mtime_ns]
    if before is not None and before[:2] == stat:
        return before
    if not isinstance(system, pafs.LocalFileSystem):
        return [*stat, None]
    try:
        with Path(path).open("rb") as stream:
            return [*stat, hashlib.file_digest(stream, "sha256").hexdigest()]
    except OSError:  # reading the log says so, and refuses this file alone
        return [*stat, None]


def _table_digest(table: pa.Table | None) -> str:
    seen = hashlib.sha256()
    for batch in table.to_batches() if table is not None else ():
        seen.update(batch.serialize())
    return seen.hexdigest()
