"""New behaviour: events as clients send them → rows of the canonical log, by the log's own rules."""

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import yaml

from recsys_dist.bundle import Bundle
from recsys_dist.config import nearest
from recsys_dist.data import logs
from recsys_dist.data.logs import LogSpec
from recsys_dist.data.output import write_parquet, write_text
from recsys_dist.serve.api import Event, InvalidError, text_of
from recsys_dist.serve.stored import complete


def canonical(events: list[Event], spec: LogSpec) -> pa.Table:
    """Rows of the canonical log; all of the events, or InvalidError says which are wrong."""
    labels = [label.name for label in spec.labels]
    unknown = [
        {
            "field": f"events.{i}.labels.{name}",
            "problem": f"the log has no such outcome{nearest(name, labels)}",
        }
        for i, event in enumerate(events)
        for name in event.labels
        if name not in labels
    ]
    if unknown:
        raise InvalidError(unknown)
    now = datetime.now(UTC)
    columns: dict[str, list[object]] = {
        "user_id": [event.user_id for event in events],
        "item_id": [event.item_id for event in events],
        "timestamp": [event.timestamp or now for event in events],
    }
    columns |= {name: [float(event.labels.get(name, 0)) for event in events] for name in labels}
    for name in spec.context:
        columns[name] = [text_of(event.context.get(name)) for event in events]
    types = {"timestamp": pa.timestamp("us", "UTC"), **dict.fromkeys(labels, pa.float64())}
    table = pa.table(
        {name: pa.array(values, types.get(name, pa.string())) for name, values in columns.items()}
    )
    checked = logs.validate(table.append_column("row", pa.array(np.arange(len(table)))), spec, "events")
    if len(checked.quarantined):
        refused = checked.quarantined.select(["row", "reason"]).to_pylist()
        raise InvalidError([{"field": f"events.{r['row']}", "problem": r["reason"]} for r in refused])
    return checked.kept


def describe_log(bundle: Bundle, directory: Path) -> None:
    """Make what is recorded in `directory`, also for former bundles, a log for `jobs.prepare parquet`."""
    spec = LogSpec.from_schema(bundle.encoders.schema)
    complete(directory, spec.arrow_schema(), [label.name for label in spec.labels])
    write_parquet(bundle.users.attributes, directory / "users.parquet")
    write_parquet(bundle.items.attributes, directory / "items.parquet")
    write_text(log_yaml(bundle), directory / "log.yaml")


def log_yaml(bundle: Bundle) -> str:
    """What makes the recorded events a log of their own for `jobs.prepare parquet`."""
    schema = bundle.encoders.schema
    spec = LogSpec.from_schema(schema)
    features = [feature.model_dump(mode="json", exclude={"rows"}) for feature in schema.features]
    values = {
        "kind": "parquet",
        "events": "events/",
        "users": {"path": "users.parquet", "id": "user_id"},
        "items": {"path": "items.parquet", "id": "item_id"},
        "columns": {
            "date": "date",
            "labels": {label.name: {"column": label.name, "kind": label.kind} for label in schema.labels},
            "context": list(spec.context),
        },
        "timestamp_unit": "us",
        "utc_offset_hours": schema.utc_offset_hours,
        "features": features,
        "ranking_label": schema.ranking_label,
        "recall_positive": list(schema.recall_positive),
        "recall_exposure_weight": schema.recall_exposure_weight,
        "recall_repeats": schema.recall_repeats,
    }
    return yaml.safe_dump(values, sort_keys=False)
