"""What the columns mean: features, labels, and the digest that data, checkpoints and bundles share."""

from collections.abc import Iterable
from typing import Literal, Self

from pydantic import Field, model_validator

from recsys_dist.config import Config, digest, nearest
from recsys_dist.errors import ConfigError
from recsys_dist.feature_kinds import (
    AnyFeature,
    Bag,
    Bucketed,
    Categorical,
    Cross,
    DenseFeature,
    IdFeature,
    ListFeature,
    Numeric,
    Searches,
    Sequence,
    Sessions,
    Side,
    SingleId,
    Statistic,
    Time,
    column_of,
    side,
)

# Columns that prepared data has beside features and labels.
RESERVED = frozenset(
    {"user_id", "item_id", "timestamp", "row_id", "weight", "truth", "seen", "bayes_probability"}
)
# Columns that the canonical log has beside labels and context, or that reading it adds.
LOG_COLUMNS = frozenset({"date", "history", "row"})
# Names no table can have: PyTorch's ModuleDict has such attributes itself, and "wide" is the linear part's.
# fmt: off
_NOT_TABLES = frozenset({
    "add_module", "apply", "bfloat16", "buffers", "children", "clear", "compile", "cpu", "cuda", "double",
    "eval", "float", "forward", "half", "ipu", "items", "keys", "modules", "mtia", "parameters", "pop",
    "to", "train", "training", "type", "update", "values", "xpu", "wide",
})
# fmt: on


class Label(Config):
    """An outcome column of the log: `binary` (0/1) or `value` (a non-negative amount, as watch time)."""

    name: str
    kind: Literal["binary", "value"] = "binary"


class Schema(Config):
    """All features and labels of a data set. Immutable; `digest()` tells two schemas apart."""

    features: tuple[AnyFeature, ...]
    labels: tuple[Label, ...]
    ranking_label: str = Field(description="the label that ranking models predict unless told otherwise")
    recall_positive: tuple[str, ...] = Field(
        min_length=1, description="an event with any of these labels is an item the user wanted"
    )
    recall_exposure_weight: float = Field(
        0.0,
        ge=0,
        le=1,
        description="weight in recall training of an event without such a label, beside 1 with one: where a "
        "recommender chose what to show, being shown an item tells of interest too; 0 leaves these out",
    )
    recall_repeats: bool = Field(
        False, description="learn to recall items that the user was shown before; recall leaves those out"
    )
    utc_offset_hours: float = Field(0.0, ge=-12, le=14, description="local time of hour, weekday and day")

    @model_validator(mode="after")
    def _references_resolve(self) -> Self:
        names = [feature.name for feature in self.features]
        labels = [label.name for label in self.labels]
        reserved = sorted(RESERVED & {*names, *labels})
        if reserved:
            raise ValueError(f"name {reserved[0]!r} is a column of the prepared data itself; choose another")
        if taken := sorted(_NOT_TABLES & {feature.name for feature in self.ids}):
            raise ValueError(f"feature {taken[0]!r}: tables cannot have this name; choose another")
        read = {column for feature in self.features if (column := column_of(feature)) is not None}
        if taken := sorted(LOG_COLUMNS & {*labels, *read}):
            raise ValueError(
                f"{taken[0]!r} is a column of the log itself; call the label or context otherwise"
            )
        if outcomes := sorted(read & {*labels, "timestamp"}):
            raise ValueError(
                f"a feature reads {outcomes[0]!r}, which is not known when the item is shown; a statistic or "
                "a sequence reads what was known before, a time feature the hour or the weekday"
            )
        duplicated = {name for name in names if names.count(name) > 1} | (set(names) & set(labels))
        if duplicated:
            raise ValueError(f"name {sorted(duplicated)[0]!r} is used twice among features and labels")
        binary = [label.name for label in self.labels if label.kind == "binary"]
        for name in (self.ranking_label, *self.recall_positive):
            if name not in binary:
                raise ValueError(f"label {name!r} is not a binary label of the schema{nearest(name, binary)}")
        for feature in self.features:
            self._check(feature, labels)
        return self

    def _check(self, feature: AnyFeature, labels: list[str]) -> None:
        by_name = {f.name: f for f in self.features}
        where = feature.where if isinstance(feature, Sequence | Sessions) else None
        label = feature.label if isinstance(feature, Statistic) else None
        for name in filter(None, (where, label)):
            if name not in labels:
                raise ValueError(f"feature {feature.name!r}: no label {name!r}{nearest(name, labels)}")
        if isinstance(feature, Statistic):
            self._check_statistic(feature)
        if isinstance(feature, Searches):
            self._check_searches(feature)
        if isinstance(feature, Categorical) and feature.column == "item_id" and feature.hash_buckets:
            raise ValueError(
                f"feature {feature.name!r}: items are recommended by the rows of their own id; leave out "
                f"hash_buckets={feature.hash_buckets}"
            )
        parents: tuple[str, ...] = ()
        if isinstance(feature, Cross | Sequence):
            parents = (feature.of,) if isinstance(feature.of, str) else feature.of
        for parent in parents:
            known = by_name.get(parent)
            if known is None:
                near = nearest(parent, list(by_name))
                raise ValueError(f"feature {feature.name!r}: no feature {parent!r}{near}")
            if isinstance(feature, Cross) and not isinstance(known, Categorical | Bucketed | Time):
                raise ValueError(f"cross {feature.name!r}: {parent!r} is {known.kind}, not one id per row")
            if isinstance(feature, Sequence) and not (
                isinstance(known, Categorical | Bucketed) and side(known.column) == "item"
            ):
                raise ValueError(f"sequence {feature.name!r}: {parent!r} is not an id feature of the item")

    def _check_searches(self, feature: Searches) -> None:
        if side(feature.column) != "context":
            raise ValueError(
                f"searches {feature.name!r}: {feature.column!r} is not a column of the event itself, as the "
                "text is that its user searched for"
            )
        if any(f.column == feature.column for f in self.features if isinstance(f, Numeric | Bucketed)):
            raise ValueError(
                f"searches {feature.name!r}: another feature reads numbers from column {feature.column!r}, "
                "where no text can be then; take another column for either"
            )

    def _check_statistic(self, feature: Statistic) -> None:
        if feature.key.startswith("users."):
            raise ValueError(
                f"statistic {feature.name!r}: key {feature.key!r} is not user_id, an item or context column"
            )
        binary = [label.name for label in self.labels if label.kind == "binary"]
        if feature.label is not None and feature.label not in binary:
            raise ValueError(
                f"statistic {feature.name!r}: label {feature.label!r} is an amount, which has no rate; take "
                f"a binary one ({', '.join(binary)}), or make one of the amount in the log"
            )

    @property
    def ids(self) -> tuple[IdFeature, ...]:
        """Features looked up in embedding tables, in schema order."""
        return tuple(f for f in self.features if isinstance(f, IdFeature))

    @property
    def keys(self) -> tuple[IdFeature | Sessions, ...]:
        """The keys of `Batch.sparse`, in schema order: the ids, and sessions, which no table knows."""
        return tuple(f for f in self.features if isinstance(f, IdFeature | Sessions))

    @property
    def singles(self) -> tuple[SingleId, ...]:
        """Id features with exactly one id per row."""
        return tuple(f for f in self.features if isinstance(f, SingleId))

    @property
    def bags(self) -> tuple[Bag, ...]:
        """Id features with any number of ids per row."""
        return tuple(f for f in self.features if isinstance(f, Bag))

    @property
    def crosses(self) -> tuple[Cross, ...]:
        return tuple(f for f in self.features if isinstance(f, Cross))

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        return tuple(f for f in self.features if isinstance(f, Sequence))

    @property
    def item_sequences(self) -> tuple[Sequence, ...]:
        """Sequences of the items' own ids."""
        return tuple(f for f in self.sequences if f.of == self.item_id.name)

    @property
    def sessions(self) -> tuple[Sessions, ...]:
        return tuple(f for f in self.features if isinstance(f, Sessions))

    @property
    def lists(self) -> tuple[ListFeature, ...]:
        """Features of past events: a number for each, or words."""
        return tuple(f for f in self.features if isinstance(f, ListFeature))

    @property
    def dense(self) -> tuple[DenseFeature, ...]:
        """Float features, in schema order: the columns of `Batch.dense`."""
        return tuple(f for f in self.features if isinstance(f, DenseFeature))

    @property
    def item_id(self) -> Categorical:
        """The feature over the item's own id, whose table the catalogue is."""
        for feature in self.features:
            if isinstance(feature, Categorical) and feature.column == "item_id":
                return feature
        raise ConfigError("the schema has no categorical feature over column 'item_id'; recall needs one")

    def __getitem__(self, name: str) -> AnyFeature:
        for feature in self.features:
            if feature.name == name:
                return feature
        known = [f.name for f in self.features]
        raise ConfigError(f"the schema has no feature {name!r}{nearest(name, known)}")

    def table(self, feature: IdFeature) -> str:
        """Name of the embedding table that `feature` is looked up in."""
        return feature.of if isinstance(feature, Sequence) else feature.name

    def sides(self, feature: AnyFeature) -> frozenset[Side]:
        """What a feature depends on: a user tower takes `{"user", "context"}`, an item tower `{"item"}`."""
        match feature:
            case Time():
                return frozenset({"context"})
            case Sequence() | Searches() | Sessions():
                return frozenset({"user"})
            case Cross():
                return frozenset().union(*(self.sides(self[name]) for name in feature.of))
            case Statistic():
                return frozenset({side(feature.key)})
            case _:
                return frozenset({side(feature.column)})

    def select(self, names: Iterable[str]) -> Self:
        """The schema with only the named features (in schema order), and what those refer to kept valid."""
        wanted = set(names)
        for name in wanted:
            self[name]  # raises for an unknown name
        kept = [f.model_dump() for f in self.features if f.name in wanted]
        return type(self).parse({**self.model_dump(), "features": kept})

    def of_side(self, item: bool) -> Self:
        """The schema with the features of the item alone, or with those of user and context alone.

        An item's id feature that a sequence lists stays with the sequence.
        """
        sides = {f.name: self.sides(f) for f in self.features}
        chosen = {name for name, of in sides.items() if (of == {"item"} if item else "item" not in of)}
        return self.select(chosen | {f.of for f in self.sequences if f.name in chosen})

    def fitted(self, rows: dict[str, int]) -> Self:
        """The schema with each id feature's table size filled in, `rows` keyed by table name."""
        filled = [
            {**f.model_dump(), "rows": rows[self.table(f)]} if isinstance(f, IdFeature) else f.model_dump()
            for f in self.features
        ]
        return type(self).parse({**self.model_dump(), "features": filled})

    def digest(self) -> str:
        """Identity of the columns' meaning, table sizes included."""
        return digest(self.model_dump(mode="json"))
