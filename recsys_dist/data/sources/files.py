"""Files of a log, local or remote, streamed as chunks; every fault is a SourceError that names the file."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from recsys_dist.config import nearest
from recsys_dist.data.columns import flat, numbers, texts
from recsys_dist.data.logs import MALFORMED
from recsys_dist.data.sources.protocol import CHUNK_ROWS
from recsys_dist.errors import SourceError

URL = re.compile(r"^([a-z][a-z0-9+.\-]*)://([^?]*)(\?.*)?$")
PARQUET = (".parquet", ".pq")
CSV = (".csv", ".csv.gz", ".csv.bz2", ".csv.zst")
BLOCK_BYTES = 4 << 20  # of CSV text parsed at a time, about CHUNK_ROWS rows of a typical log


@dataclass(frozen=True)
class File:
    """`url` is what `open_file` takes; `path` is within its file system."""

    url: str
    path: str
    bytes: int


@contextmanager
def naming(url: str) -> Iterator[None]:
    """Turn what goes wrong while reading `url` into a SourceError that says so."""
    try:
        yield
    except (pa.ArrowException, OSError, EOFError, UnicodeDecodeError) as error:
        raise SourceError(f"{url}: cannot be read, {_reason(error)}") from None


def local(path: str) -> Path:
    """A path of this machine, with ~ for a home; SourceError where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise SourceError(f"{path}: there is no user of that name here; write the directory out") from None


def open_file(url: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a local path or URL (s3://, gs://, any that fsspec knows), and the path in it."""
    match = URL.match(url)
    if not match:
        return pafs.LocalFileSystem(), str(local(url).absolute())
    try:
        return pafs.FileSystem.from_uri(url)
    except pa.ArrowInvalid:
        pass  # not one of Arrow's own file systems
    except OSError as error:
        raise SourceError(f"{url}: {_reason(error)}") from None
    try:
        system, path = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:  # an unknown scheme, or its package is not installed
        raise SourceError(f"{url}: {error}") from None
    return pafs.PyFileSystem(pafs.FSSpecHandler(system)), path


def find(pattern: str, suffixes: tuple[str, ...]) -> list[File]:
    """Files that a path, a directory (searched recursively) or a glob (`*`, `**`, `?`) means, by name.

    Names that begin with `_` or `.` are skipped. Raises SourceError where nothing matches.
    """
    system, path = open_file(pattern)
    is_glob = re.search(r"[*?]", path) is not None
    base = re.split(r"[^/]*[*?]", path, maxsplit=1)[0].rstrip("/") or "/" if is_glob else path
    with naming(pattern):
        info = system.get_file_info(base)
        found = [info]
        if info.type == pafs.FileType.Directory:
            found = system.get_file_info(pafs.FileSelector(base, recursive=True))
    if info.type == pafs.FileType.NotFound:
        raise SourceError(f"{pattern}: does not exist" + _neighbours(base))
    if info.type == pafs.FileType.Directory:
        found = [f for f in found if f.is_file and _visible(f.path, base) and f.path.endswith(suffixes)]
    if is_glob:
        matches = _glob(path)
        found = [f for f in found if matches.fullmatch(f.path)]
    if not found:
        raise SourceError(f"{pattern}: no file matches; expected names that end in {' or '.join(suffixes)}")
    url = URL.match(pattern)
    before, after = (f"{url[1]}://", url[3] or "") if url else ("", "")
    return [
        File(f"{before}{f.path}{after}", f.path, f.size or 0) for f in sorted(found, key=lambda f: f.path)
    ]


def find_one(path: str, suffixes: tuple[str, ...]) -> File:
    """The only file that a path means; SourceError where it means several."""
    found = find(path, suffixes)
    if len(found) > 1:
        raise SourceError(f"{path}: {len(found)} files, where one table is read; write it as one file")
    return found[0]


def columns_of(url: str, delimiter: str = ",") -> pa.Schema:
    """Names and types of a file's columns: a Parquet footer's, or what a CSV's first lines look like."""
    system, path = open_file(url)
    if is_parquet(path):
        with naming(url), system.open_input_file(path) as stream:
            return pq.read_schema(stream)
    with naming(url), system.open_input_stream(path) as stream:
        options = csv.ReadOptions(use_threads=False, block_size=1 << 16)
        parsing = csv.ParseOptions(
            delimiter=delimiter, invalid_row_handler=lambda _: "skip", newlines_in_values=True
        )
        schema = csv.open_csv(stream, options, parsing).schema
        assert schema.names  # decoded here, where a name that is not UTF-8 is this file's fault
        return schema


def is_parquet(path: str) -> bool:
    """Whether a path's name says Parquet; anything else is taken as CSV."""
    return path.split("?")[0].endswith(PARQUET)


def row_groups(url: str) -> int:
    """Row groups of a Parquet file."""
    system, path = open_file(url)
    with naming(url), system.open_input_file(path) as stream:
        return int(pq.read_metadata(stream).num_row_groups)


def csv_chunks(
    url: str, columns: list[str], delimiter: str = ",", names: list[str] | None = None
) -> Iterator[pa.Table]:
    """The named columns of a CSV file as text, with `row`; lines of another width come as MALFORMED text.

    `names` are the file's columns where it has no header. Empty fields are null.
    """
    _refuse_our_names(url, columns)
    bad: list[csv.InvalidRow] = []

    def skip(line: csv.InvalidRow) -> str:
        bad.append(line)
        return "skip"

    system, path = open_file(url)
    with naming(url), system.open_input_stream(path) as stream:
        reader = csv.open_csv(
            stream,
            csv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES, column_names=names),
            csv.ParseOptions(delimiter=delimiter, invalid_row_handler=skip, newlines_in_values=True),
            csv.ConvertOptions(
                column_types=dict.fromkeys(columns, pa.string()),
                include_columns=columns,
                null_values=[""],
                strings_can_be_null=True,
            ),
        )
        start = 0
        for batch in reader:
            skipped = np.array([_row(line, names) for line in bad], np.int64)
            ahead = np.arange(start, start + batch.num_rows + len(skipped))
            row = np.setdiff1d(ahead, skipped, assume_unique=True)[: batch.num_rows]
            if len(row):
                start = int(row[-1]) + 1
            yield pa.Table.from_batches([batch]).append_column("row", pa.array(row))
    if bad:
        yield _malformed(bad, columns, names)


def parquet_chunks(url: str, columns: list[str], first: int = 0, last: int = -1) -> Iterator[pa.Table]:
    """The named columns of row groups first..last-1 of a Parquet file (-1: all), with `row`."""
    _refuse_our_names(url, columns)
    system, path = open_file(url)
    with naming(url), system.open_input_file(path) as stream:
        file = pq.ParquetFile(stream, page_checksum_verification=True)
        groups = range(first, file.num_row_groups if last < 0 else last)
        start = sum(file.metadata.row_group(g).num_rows for g in range(first))
        for batch in file.iter_batches(CHUNK_ROWS, list(groups), columns, use_threads=False):
            row = np.arange(start, start + batch.num_rows)
            start += batch.num_rows
            yield pa.Table.from_batches([batch]).append_column("row", pa.array(row))


def _refuse_our_names(url: str, columns: list[str]) -> None:
    for name in ("row", MALFORMED):
        if name in columns:
            raise SourceError(f"{url}: a column that is read cannot be called {name!r}; rename it")


def require(url: str, wanted: Iterable[str], have: list[str]) -> None:
    """Raise SourceError that names the file, the column it lacks and the nearest that it has."""
    for name in wanted:
        if name not in have:
            raise SourceError(f"{url}: column {name!r} is missing{nearest(name, have)}")


def read_table(url: str) -> pa.Table:
    """A small CSV (every column as text) or Parquet file as a whole."""
    system, path = open_file(url)
    if is_parquet(path):
        with naming(url), system.open_input_file(path) as stream:
            return pq.ParquetFile(stream, page_checksum_verification=True).read(use_threads=False)
    header = columns_of(url).names
    chunks = list(csv_chunks(url, header))
    for chunk in chunks:
        if MALFORMED in chunk.column_names:
            raise SourceError(
                f"{url}: row {chunk['row'][0]} does not have the {len(header)} fields of the header"
            )
    schema = pa.schema([(name, pa.string()) for name in header])
    return (
        pa.concat_tables([chunk.drop_columns(["row"]) for chunk in chunks])
        if chunks
        else schema.empty_table()
    )


def described(table: pa.Table, id_column: str, key: str, numeric: Iterable[str], url: str) -> pa.Table:
    """A users or items table: `key` as text, unique; `numeric` attributes as float64, the rest as text.

    Columns that hold lists or structs are left as they are. Raises SourceError for a null or
    repeated id, and for text in a numeric attribute.
    """
    require(url, [id_column, *numeric], table.column_names)
    if key != id_column and key in table.column_names:
        raise SourceError(f"{url}: has a column {key!r} beside its id {id_column!r}; rename or remove it")
    ids = texts(flat(table[id_column], f"{url}: {id_column}"))
    if ids.null_count:
        raise SourceError(f"{url}: {ids.null_count} rows have no {id_column}; remove or fill them")
    if len(counts := pc.value_counts(ids)) < len(ids):
        twice = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")[0]
        raise SourceError(f"{url}: {id_column} {twice} is there more than once; keep one row for each")
    columns = {key: ids}
    for name in table.column_names:
        if name != id_column:
            columns[name] = _attribute(table[name], name in set(numeric), f"{url}: {name}")
    return pa.table(columns)


def _attribute(column: pa.ChunkedArray, numeric: bool, where: str) -> pa.Array:
    if pa.types.is_nested(column.type):
        return column.combine_chunks()
    array = flat(column, where)
    if not numeric:
        return texts(array)
    parsed = numbers(array)
    bad = parsed.bad | (~parsed.missing & np.isinf(parsed.values))
    if bad.any():
        raise SourceError(f"{where} must be a finite number, row {bad.argmax()} has {array[bad.argmax()]}")
    return pa.array(parsed.values, mask=parsed.missing)


def _malformed(bad: list[csv.InvalidRow], columns: list[str], names: list[str] | None) -> pa.Table:
    data = {name: pa.nulls(len(bad), pa.string()) for name in columns}
    data[MALFORMED] = pa.array([line.text for line in bad], pa.string())
    data["row"] = pa.array([_row(line, names) for line in bad], pa.int64())
    return pa.table(data)


def _row(line: csv.InvalidRow, names: list[str] | None) -> int:
    return line.number - (2 if names is None else 1)  # Arrow counts lines from 1, the header's included


def _reason(error: BaseException) -> str:
    text = str(error).split(". Detail:")[0].strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no details'}"


def _visible(path: str, base: str) -> bool:
    return not any(part.startswith(("_", ".")) for part in path.removeprefix(base).split("/"))


def _glob(path: str) -> re.Pattern[str]:
    kinds = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    pieces = re.split(r"(\*\*/|\*\*|\*|\?)", path)
    return re.compile("".join(kinds.get(piece, re.escape(piece)) for piece in pieces))


def _neighbours(path: str) -> str:
    """For a local path that does not exist: what its nearest existing parent holds."""
    parent = next((p for p in Path(path).parents if p.is_dir()), None)
    if parent is None or parent == Path("/"):
        return ""
    names = sorted(p.name for p in parent.iterdir())[:8]
    return f"; {parent} holds {', '.join(names) or 'nothing'}"
