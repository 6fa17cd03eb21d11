"""The kinds of features that a schema is made of.

A `column` names where a raw value comes from: `"tab"` is a column of the event itself,
`"users.gender"` and `"items.author_id"` are columns of the user and item tables.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from recsys_dist.config import Config

Side = Literal["user", "item", "context"]


def _unset(value: object) -> bool:
    return value is None


class Feature(Config):
    """A named model input. `rows` is its table's size, known once the vocabularies are fitted."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")


class Categorical(Feature):
    """One id per row: a vocabulary of values seen ≥ `min_count` times in training, or hash buckets.

    Row 0 means unknown: null, rare, evicted by `max_age_days` or `max_rows`, or never seen in training.
    """

    kind: Literal["categorical"] = "categorical"
    column: str
    min_count: int = Field(1, ge=1)
    # limits that are not set are left out where a schema is written: digests stay what they were without
    max_age_days: int | None = Field(
        None, ge=1, exclude_if=_unset, description="keep values seen in the last so many days of training"
    )
    max_rows: int | None = Field(
        None, ge=2, exclude_if=_unset, description="of the table, row 0 included: keeps the most frequent"
    )
    hash_buckets: int | None = Field(None, ge=2, description="hash instead of keeping a vocabulary")
    rows: int | None = None

    @model_validator(mode="after")
    def _limits_are_of_a_vocabulary(self) -> Self:
        limits = [name for name in ("max_age_days", "max_rows") if getattr(self, name) is not None]
        if limits and self.hash_buckets is not None:
            raise ValueError(
                f"feature {self.name!r}: {limits[0]} is of a vocabulary, and hash_buckets keeps none; leave "
                "one of them out"
            )
        return self


class Bucketed(Feature):
    """A number as one id per row: quantile buckets fitted on training days; row 0 = missing."""

    kind: Literal["bucketed"] = "bucketed"
    column: str
    buckets: int = Field(20, ge=2, le=10_000)
    rows: int | None = None


class Time(Feature):
    """Hour of day or weekday of the event in the schema's time zone, as one id per row."""

    kind: Literal["time"] = "time"
    part: Literal["hour", "weekday"]
    rows: int | None = None


class Cross(Feature):
    """Cross-product of id features, hashed into buckets (Wide & Deep, arXiv 1606.07792, eq. 1)."""

    kind: Literal["cross"] = "cross"
    of: tuple[str, ...] = Field(min_length=2)
    hash_buckets: int = Field(100_000, ge=2)
    rows: int | None = None


class Sequence(Feature):
    """The user's last `max_length` items strictly before the event, oldest first.

    `of` names the item feature whose ids the list holds (they share its table); `where` the
    label that was positive for an item to count, or None for every exposure.

    `others_only` is for logs without times, where all of a user's items are the history of each: an
    event's own item is left out, as it is of the history of a user who is asked for new items.
    """

    kind: Literal["sequence"] = "sequence"
    of: str
    where: str | None = None
    max_length: int = Field(50, ge=1)
    others_only: bool = Field(False, description="leave out the event's own item")
    rows: int | None = None


class Sessions(Feature):
    """For each event of the sequences of this `where` and `max_length`, the number of its session.

    Numbered back from the newest, which is 1, to `sessions`, which stands for all older ones too. A session
    ends where the next of these events is more than `gap_minutes` later (DSIN, arXiv 1905.06482).
    """

    kind: Literal["sessions"] = "sessions"
    where: str | None = None
    max_length: int = Field(50, ge=1)
    gap_minutes: float = Field(30.0, gt=0)
    sessions: int = Field(5, ge=1)

    @property
    def rows(self) -> int:
        """One more than the largest number, as of a table."""
        return self.sessions + 1


class Searches(Feature):
    """Words and pairs of adjacent words of the user's last `max_length` searches strictly before the event.

    `column` is the event's text that its user searched for; the same in several events on end, but for case
    and surrounding space, is one search. Hashed into a table of its own (Covington et al. 2016, §3.3).
    """

    kind: Literal["searches"] = "searches"
    column: str
    bigrams: bool = True
    max_length: int = Field(10, ge=1, description="searches, of however many words")
    hash_buckets: int = Field(100_000, ge=2)
    rows: int | None = None


class Numeric(Feature):
    """One float per row, standardised by the training days' mean and deviation; missing is the mean.

    With `quantile` it is the share of the training days' values that lie below, in [0, 1], to the given
    `power`; missing is the median. A model given x, x² and √x can draw curves of x (Covington et al. 2016,
    §4.1: three features over one column).
    """

    kind: Literal["numeric"] = "numeric"
    column: str
    log: bool = Field(False, description="log1p before standardising; for counts and durations")
    quantile: bool = False
    power: float = Field(1.0, gt=0, description="of a quantile")

    @model_validator(mode="after")
    def _compatible(self) -> Self:
        if self.power != 1 and not self.quantile:
            raise ValueError(
                f"feature {self.name!r}: power={self.power:g} is of a quantile; set quantile too"
            )
        if self.log and self.quantile:
            raise ValueError(f"feature {self.name!r}: log changes no quantile; leave one of them out")
        return self


class Statistic(Feature):
    """How often `key` was seen before (`label=None`: log1p, standardised) or its smoothed label rate.

    `key` is a column of the event or item, or `user_id`. Counted are the whole days before the event's
    day, and never test days: within a day, and over days that no model was trained on, a user's running
    rate tells what she has just done more than what she likes (on KuaiRand it costs .03 GAUC).
    The rate is (positives + smoothing x prior) / (events + smoothing), as log-odds, standardised.
    """

    kind: Literal["statistic"] = "statistic"
    key: str
    label: str | None = None
    smoothing: float = Field(20.0, gt=0)


SingleId = Categorical | Bucketed | Time | Cross
Bag = Sequence | Searches  # any number of ids per row, looked up in a table
IdFeature = SingleId | Bag
DenseFeature = Numeric | Statistic
ListFeature = Bag | Sessions  # a list of numbers per row, all of the user's past
AnyFeature = Annotated[IdFeature | Sessions | DenseFeature, Field(discriminator="kind")]


def column_of(feature: Feature) -> str | None:
    """The raw column that a feature reads; None where it reads other features, or when and what happened."""
    found: str | None = getattr(feature, "column", getattr(feature, "key", None))
    return found


def side(column: str) -> Side:
    """Which table a raw column belongs to."""
    if column == "user_id" or column.startswith("users."):
        return "user"
    if column == "item_id" or column.startswith("items."):
        return "item"
    return "context"
