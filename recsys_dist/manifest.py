"""What a bundle says of itself, and whether its files agree with that. Needs neither torch nor faiss.

Layout of a bundle's directory:

    manifest.json             this; its checksum covers itself
    encoders/                 fitted vocabularies, scales, statistics and the schema (data.encoders)
    users.parquet             attributes that features read
    items.parquet             the same of items, and a title or name where the source has one
    catalogue.parquet         item_id, positives: the item table's rows from row 1
    recall.safetensors        weights of the recall model but for its item side
    item_vectors.safetensors  [rows, D] float32
    index.faiss               only where the index is not exact
    ranking.safetensors       weights of the ranking model
    events.parquet            each user's newest events that features can still see
    seen.parquet              user_id, items: rows that each user was shown
    golden.json               requests with their answers
    MODEL_CARD.md             for people
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Self

from pydantic import Field

from recsys_dist.config import Config, digest
from recsys_dist.errors import BundleError, ConfigError

FORMAT = 1  # of the files; raise it when a reader of the former ones could not read them
MANIFEST, GOLDEN, CARD = "manifest.json", "golden.json", "MODEL_CARD.md"
_DERIVED = (GOLDEN, CARD)  # follow from the other files, and so are no part of the version
_CHUNK_BYTES = 1 << 22


class FileEntry(Config):
    size_bytes: int
    sha256: str

    @classmethod
    def of(cls, file: Path) -> Self:
        seen = hashlib.sha256()
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                seen.update(chunk)
        return cls(size_bytes=file.stat().st_size, sha256=seen.hexdigest())


class DataSpan(Config):
    """What the models learned from and were tested on. Days are the log's own, times UTC."""

    source: str
    data_digest: str
    first_event: str | None
    last_event: str | None
    valid_from: str
    test_from: str


class IndexFacts(Config):
    """`recall_at_200`: share of the 200 items that exact search finds, for users of the test days."""

    kind: str
    items: int
    dim: int
    recall_at_200: float
    queries: int


class Manifest(Config):
    """`version` names the bundle: the digest of its files, but for those that follow from the others.

    models   task -> the model's config, name included; "ranking" and "recall"
    labels   task -> what it predicts, or counts as wanted
    metrics  task -> scorer ("model", "popularity", ...) -> metric -> value on the test days
    """

    format: int = FORMAT
    version: str = ""
    created: str
    git_commit: str
    data: DataSpan
    schema_digest: str
    vocabulary_digest: str
    models: dict[str, dict[str, Any]]
    checkpoints: dict[str, str]
    labels: dict[str, tuple[str, ...]]
    metrics: dict[str, dict[str, dict[str, float]]]
    index: IndexFacts
    files: dict[str, FileEntry] = Field(default_factory=dict)

    def sealed(self, files: dict[str, FileEntry]) -> Self:
        """With the files entered, and the version that follows from them."""
        version = digest({name: entry.sha256 for name, entry in files.items() if name not in _DERIVED})
        return type(self).parse({**self.model_dump(), "files": files, "version": version})

    def save(self, directory: Path) -> None:
        values = self.model_dump(mode="json")
        text = json.dumps({**values, "checksum": digest(values)}, indent=1, allow_nan=False)
        (directory / MANIFEST).write_text(text + "\n")


def entries(directory: Path) -> dict[str, FileEntry]:
    """Every file below `directory` but the manifest, by its relative name."""
    files = sorted(file for file in directory.rglob("*") if file.is_file() and file.name != MANIFEST)
    return {file.relative_to(directory).as_posix(): FileEntry.of(file) for file in files}


def read(directory: Path) -> Manifest:
    """The manifest alone; BundleError where it is missing, damaged, or of another format."""
    file = directory / MANIFEST
    try:
        values = dict(json.loads(file.read_bytes()))
        checksum, found = values.pop("checksum"), values["format"]
    except FileNotFoundError:
        raise BundleError(
            f"{str(directory)!r} is no bundle: it has no {MANIFEST}; make one with: python -m jobs.export"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{str(file)!r} cannot be read: {type(error).__name__}: {error}") from None
    if found != FORMAT:
        raise BundleError(
            f"{str(file)!r} is of format {found}, this program reads format {FORMAT}; export the bundle anew"
        )
    if checksum != digest(values):
        raise BundleError(f"{str(file)!r} was changed: its checksum is not that of its content")
    try:
        return Manifest.parse(values)
    except ConfigError as error:
        raise BundleError(f"{str(file)!r}: {error}") from None


def verify(directory: Path) -> Manifest:
    """The manifest of a whole bundle; BundleError names the file that is missing or not as it was."""
    manifest = read(directory)
    for name, entry in manifest.files.items():
        file = directory / name
        size = file.stat().st_size if file.is_file() else None
        if size != entry.size_bytes:
            found = "is missing" if size is None else f"has {size} bytes instead of {entry.size_bytes}"
            raise BundleError(f"bundle {str(directory)!r}: {name} {found}; export or download it anew")
        if FileEntry.of(file) != entry:
            raise BundleError(
                f"bundle {str(directory)!r}: {name} was changed, its sha256 is not the manifest's; export or "
                "download it anew"
            )
    if manifest.sealed(manifest.files).version != manifest.version:
        raise BundleError(f"bundle {str(directory)!r}: version {manifest.version!r} is not that of its files")
    return manifest
