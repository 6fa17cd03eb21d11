"""What is known of users and candidates → model inputs, by the functions that made the training rows.

What depends on the item alone is computed once for the whole catalogue; per request only the user's side,
and where both meet (crosses) their product.

R requests, C candidates of all requests, P positions of items (`World.items`; 0 is one we know nothing of)
"""

from collections.abc import Collection, Iterator
from dataclasses import replace
from functools import cached_property
from typing import Self

import numpy as np
import pyarrow as pa

from recsys_dist.bundle import Bundle, Served
from recsys_dist.data import transforms
from recsys_dist.data.examples import STATE, World, features, sort_events
from recsys_dist.data.logs import LogSpec
from recsys_dist.feature_kinds import Sequence
from recsys_dist.schema import Schema

_BLOCK_ROWS = 16_384
REQUEST = "_request"  # which request a row asks for


class Features:
    """The features named `read`; immutable, and safe to use from several threads."""

    def __init__(self, world: World, read: Collection[str]) -> None:
        self.world = world
        self.schema = world.encoders.schema
        wanted = [feature for feature in self.schema.features if feature.name in read]
        self._frozen_us = (world.encoders.freeze_day + 1) * transforms.DAY_US  # in every time zone
        # crosses of the item's side with another: known only once both are
        self._met = [f for f in self.schema.crosses if f in wanted and {"item"} < self.schema.sides(f)]
        self._of_item = [f.name for f in wanted if self.schema.sides(f) == {"item"}]
        self._of_user = [f.name for f in wanted if "item" not in self.schema.sides(f)]
        listed = {f.of for f in wanted if isinstance(f, Sequence)}
        self._world = _reading(world, {*self._of_user, *listed})

    @classmethod
    def of(cls, bundle: Bundle, *read_by: Served) -> Self:
        """What these models of the bundle read."""
        read = {feature.name for served in read_by for feature in served.schema.features}
        return cls(World(bundle.encoders, bundle.users, bundle.items), read)

    def users(self, past: pa.Table, asked: pa.Table) -> pa.Table:
        """A row for each of `asked` [R]: every feature that does not depend on the item.

        `asked` has user_id, timestamp and the context columns of each request; `past` the events of these
        users, of which those before the request's timestamp count.
        """
        states = asked.append_column(STATE, pa.array(np.ones(len(asked), bool)))
        states = states.append_column(REQUEST, pa.array(np.arange(len(asked))))
        both = sort_events(pa.concat_tables([past, states], promote_options="default"))
        of = np.flatnonzero(np.asarray(both[STATE].is_valid()))
        found = features(both, self._world, of)
        back = np.argsort(both[REQUEST].take(pa.array(of)).to_numpy())
        return pa.table({name: found[name] for name in self._of_user}).take(pa.array(back))

    def rows(self, users: pa.Table, of: np.ndarray, positions: np.ndarray) -> pa.Table:
        """[C] rows as a training shard has them: the item at `positions` [C] for row `of` [C] of `users`."""
        columns: dict[str, pa.Array | pa.ChunkedArray | np.ndarray] = {
            name: users[name].take(pa.array(of)) for name in users.column_names
        }
        columns |= {name: values[positions] for name, values in self._catalogue.items()}
        return pa.table({**columns, **self.crosses(users, of, positions)})

    def crosses(self, users: pa.Table, of: np.ndarray, positions: np.ndarray) -> dict[str, np.ndarray]:
        """Ids [C] of each feature that depends on user and item both; `of` and `positions` as in `rows`."""

        def ids(name: str) -> np.ndarray:
            own = self._catalogue.get(name)
            return users[name].to_numpy()[of] if own is None else own[positions]

        return {f.name: transforms.cross([ids(name) for name in f.of], f.hash_buckets) for f in self._met}

    def of_every_item(self) -> Iterator[pa.Table]:
        """Rows of all items by position [P], a block at a time, for a user of whom nothing is known."""
        context = LogSpec.from_schema(self.schema).arrow_schema()
        asked = pa.table({name: pa.nulls(1, context.field(name).type) for name in context.names})
        moment = pa.array([self._frozen_us], pa.timestamp("us", "UTC"))
        asked = asked.set_column(asked.schema.get_field_index("timestamp"), "timestamp", moment)
        nobody = self.users(asked.slice(0, 0), asked)
        count = len(self.world.items) + 1
        for start in range(0, count, _BLOCK_ROWS):
            positions = np.arange(start, min(start + _BLOCK_ROWS, count))
            yield self.rows(nobody, np.zeros(len(positions), np.int64), positions)

    def with_unknown_item(self, users: pa.Table, schema: Schema) -> pa.Table:
        """[R] rows as `schema` has them, for a part of a model that does not look at the item."""
        for name in (f.name for f in schema.features if f.name in self._catalogue):
            users = users.append_column(name, pa.array(np.repeat(self._catalogue[name][:1], len(users))))
        return users

    @cached_property
    def _catalogue(self) -> dict[str, np.ndarray]:
        """Each feature of the item alone, by position [P]; past statistics as they stand once frozen."""
        world = _reading(self.world, self._of_item)
        count = len(world.items) + 1
        asked = {
            "user_id": pa.array([""] * count),
            "item_id": pa.concat_arrays([pa.nulls(1, pa.string()), world.items.ids]),
            "timestamp": pa.array(np.full(count, self._frozen_us), pa.timestamp("us", "UTC")),
            STATE: pa.array(np.ones(count, bool)),
        }
        found = features(pa.table(asked), world, np.arange(count))
        return {name: np.asarray(found[name]) for name in self._of_item}


def _reading(world: World, names: Collection[str]) -> World:
    schema = world.encoders.schema.select(names)
    return World(replace(world.encoders, schema=schema), world.users, world.items)
