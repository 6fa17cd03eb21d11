"""Requests and answers. What is not as these say gets a 422 that names the field."""

from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat

MOST_ITEMS = 1_000  # candidates, items to rank, items to leave out, events: of one request
MOST_CONTEXT = 64


def _encodable(text: str) -> str:
    """A lone surrogate is legal in JSON, and no text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair, which is no character") from None
    return text


def _utc(moment: datetime) -> datetime:
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


Id = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_encodable)]
Text = Annotated[str, Field(max_length=1024), AfterValidator(_encodable)]
Name = Annotated[str, Field(max_length=64), AfterValidator(_encodable)]
Value = Text | bool | int | FiniteFloat | None
Moment = Annotated[datetime, AfterValidator(_utc)]  # in UTC where it names no zone
Items = Annotated[list[Id], Field(max_length=MOST_ITEMS)]


def text_of(value: Value) -> str | None:
    """As the canonical log has it in text: whole numbers without a point, flags as 0 and 1."""
    if isinstance(value, bool | float) and float(value).is_integer():
        value = int(value)
    return None if value is None else str(value)


class InvalidError(Exception):
    """A request is well formed and cannot be answered; `problems` has the field and the problem of each."""

    def __init__(self, problems: list[dict[str, str]]) -> None:
        super().__init__(problems)
        self.problems = problems


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Asked(Strict):
    """What every request says: who asks, in which context, and as of when."""

    user_id: Id
    context: dict[Name, Value] = Field(
        default_factory=dict, max_length=MOST_CONTEXT, description="columns of the moment, such as a page"
    )
    timestamp: Moment | None = Field(
        None, description="answer as of then; default: now. Not before the days that the bundle was tested on"
    )
    budget_ms: float | None = Field(None, gt=0, le=60_000, description="default: the service's own")


class RecommendRequest(Asked):
    k: int = Field(10, ge=1, le=200)
    candidates: int = Field(200, ge=1, le=MOST_ITEMS, description="items that recall hands to ranking")
    exclude: Items = Field(default_factory=list, description="items that must not come back")
    include_seen: bool = Field(False, description="also items that the user was shown before")


class RecallRequest(Asked):
    k: int = Field(200, ge=1, le=MOST_ITEMS)
    exclude: Items = Field(default_factory=list)
    include_seen: bool = False


class RankRequest(Asked):
    items: Items = Field(min_length=1)


class Scored(Strict):
    """None: not known.

    probability     of the ranking model's label
    expected_value  instead of it, of a model that expects an amount, as watch time
    recall_score    inner product
    """

    item_id: str
    probability: float | None
    expected_value: float | None
    recall_score: float | None


class Answer(Strict):
    """Items, best first. `degraded` says what the answer had to do without; empty if nothing."""

    user_id: str
    items: list[Scored]
    bundle: str
    ms: dict[str, float]
    degraded: list[str]


class Event(Strict):
    """Something that a user did: a row of the canonical log."""

    user_id: Id
    item_id: Id
    timestamp: Moment | None = Field(None, description="default: now")
    labels: dict[Name, bool | Annotated[float, Field(ge=0, allow_inf_nan=False)]] = Field(
        description="the log's outcomes; one that is left out is 0: it did not happen. Send an event once "
        "they are known"
    )
    context: dict[Name, Value] = Field(default_factory=dict, max_length=MOST_CONTEXT)


class EventsRequest(Strict):
    events: list[Event] = Field(min_length=1, max_length=MOST_ITEMS)


class EventsAnswer(Strict):
    """`ignored` are names in the events' context that the log has no column for: they are not kept."""

    accepted: int
    ignored: list[str] = Field(default_factory=list)


class Health(Strict):
    status: Literal["ok", "starting"]


class Version(Strict):
    bundle: str
    models: dict[str, str]
    created: str
    refused: str | None = Field(None, description="why a newer bundle was not taken")
