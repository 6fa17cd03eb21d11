"""Small logs in the published files' formats, and what the pipeline makes of them, without Ray."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from recsys_dist.data import encoders as fitting
from recsys_dist.data.counts import Counts
from recsys_dist.data.entities import Entities
from recsys_dist.data.examples import World, examples, sort_events, user_states
from recsys_dist.data.logs import LogSpec, duplicates, validate
from recsys_dist.data.sources.protocol import Source
from recsys_dist.data.split import SPLITS, Split

REAL = Path(__file__).parents[4] / "shared" / "data"
USERS = "30::F::1::10::48067\n10::M::56::16::70072\n20::M::25::15::55117\n"
FILMS = "".join(f"{number}::Film {number} (19{number})::Drama\n" for number in range(51, 58))

FRAPPE = [
    "1 0:1 10:1 20:1 30:1 40:1 50:1 60:1 70:1 80:1 90:1",
    "-1 0:1 11:1 20:1 30:1 40:1 50:1 60:1 70:1 80:1 90:1",
    "-1 0:1 11:1 20:1 30:1 40:1 50:1 60:1 70:1 80:1 90:1",  # a negative may be drawn twice
    "-1 2:1 10:1 21:1 31:1 41:1 51:1 61:1 71:1 81:1 91:1",
]


def frappe(path: Path) -> dict[str, Any]:
    for name in ("train", "validation", "test"):
        (path / f"frappe.{name}.libfm").write_text("\n".join(FRAPPE) + "\n")
    return {"path": str(path)}


def gowalla(path: Path) -> dict[str, Any]:
    """User u visited ten of twenty items; in test.txt one more, user 2 none."""
    lines = [f"{user} {' '.join(str((user + 2 * n) % 20) for n in range(10))}" for user in range(4)]
    (path / "train.txt").write_text("\n".join(lines) + "\n")
    (path / "test.txt").write_text("0 1\n1 0\n2 \n3 2 4 \n")
    return {"path": str(path)}


def ml1m_ctr(path: Path) -> dict[str, Any]:
    described(path)
    rows = {  # days at UTC+8: the last of training, the first and last of dev, the first of test
        "train": [(10, 51, 1028563199, 5), (20, 51, 1028500000, 3), (10, 52, 1028563190, 2)],
        "dev": [(10, 53, 1028563200, 4), (20, 52, 1037548799, 1)],
        "test": [(10, 54, 1037548800, 4)],
    }
    for name, of in rows.items():
        user, film, timestamp, rating = (list(column) for column in zip(*of, strict=True))
        label = [int(stars >= 4) for stars in rating]
        write_ctr(path, name, user, film, timestamp, label, rating)
    return {"path": str(path)}


def write_ctr(path: Path, name: str, *columns: list[int]) -> None:
    folder = path / "splits" / "ctr_by_day"
    folder.mkdir(parents=True, exist_ok=True)
    names = ["user_id", "movie_id", "timestamp", "label", "rating"]
    pq.write_table(pa.table(dict(zip(names, columns, strict=True))), folder / f"{name}.parquet")


SEQUENCES = {"30": [51, 52, 53, 54, 55], "10": [52, 51, 56, 53], "20": [55, 56, 54, 51, 52]}


def ml1m_leave_one_out(path: Path) -> dict[str, Any]:
    """The split numbers users 30, 10, 20 as 1, 2, 3 and film 5n as n; the first has a film to validate on."""
    described(path)
    rated = [(user, film) for user, films in SEQUENCES.items() for film in [*films, 57]]  # 57 is left out
    (path / "ratings.dat").write_text("".join(f"{user}::{film}::3::978300000\n" for user, film in rated))
    folder = path / "splits" / "leave_one_out"
    folder.mkdir(parents=True)
    texts = {
        "train_input": "1 2\n2 1\n5 6 4\n",
        "val_input": "1 2 3\n",
        "val_output": "4\n",
        "test_output": "5\n3\n2\n",
        "sas_to_original_users": "1 30\n2 10\n3 20\n",
        "sas_to_original_items": "".join(f"{n} 5{n}\n" for n in range(1, 7)),
    }
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    return {"path": str(path)}


def described(path: Path) -> None:
    (path / "users.dat").write_text(USERS)
    (path / "movies.dat").write_text(FILMS)


@dataclass(frozen=True)
class Made:
    """Events, sorted; examples by split, and users' states by split, with item rows as ids again."""

    events: pa.Table
    split: Split
    examples: dict[str, list[dict[str, Any]]]
    states: dict[str, dict[str, dict[str, Any]]]


def events_of(source: Source, parts: Iterable[str] | None = None) -> pa.Table:
    """Every row of the source (or of these parts), none of which may be refused or repeated."""
    spec = LogSpec.from_schema(source.schema())
    kept = []
    for part in source.parts():
        for chunk in source.read(part) if parts is None or part.name in parts else ():
            checked = validate(chunk, spec, part.name, source.timestamp_unit)
            assert checked.quarantined.num_rows == 0, checked.quarantined.to_pylist()[:3]
            kept.append(checked.kept)
    events = pa.concat_tables(kept)
    assert not duplicates(events).any()
    return events


def make(source: Source) -> Made:
    """What the steps of the pipeline make of a small log."""
    schema, split, events = source.schema(), source.default_split(), sort_events(events_of(source))
    assert isinstance(split, Split)
    counts = Counts.of(events, schema, split)
    users, items = (
        Entities.of(table, key, counts.by_column[key]["value"].unique())
        for table, key in ((source.users(), "user_id"), (source.items(), "item_id"))
    )
    freeze = (split.test_from - date(1970, 1, 1)).days
    encoders, _ = fitting.fit(schema, counts, users, items, freeze)
    world = World(encoders, users, items)
    ids = [None, *world.encoders.vocabularies[schema.item_id.name].values.to_pylist()]
    listed = [f.name for f in schema.sequences if f.of == schema.item_id.name] + ["truth", "seen"]

    def named(table: pa.Table) -> list[dict[str, Any]]:
        rows = table.to_pylist()
        return [r | {name: [ids[at] for at in r[name]] for name in listed if name in r} for r in rows]

    made = named(examples(events, world, split))
    states = {
        name: {row["user_id"]: row for row in named(user_states(events, world, split, name))}
        for name in ("valid", "test")
    }
    by_split = {name: [r for r in made if r["_split"] == at] for at, name in enumerate(SPLITS)}
    return Made(events, split, by_split, states)
