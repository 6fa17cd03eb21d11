"""What a model must be: one file under `models/` with a frozen `Config` and an `nn.Module` `Model`.

A model is plain single-process arithmetic over TorchRec's embedding modules; `train.sharding`
alone knows about ranks. The same class trains sharded, is exported whole, and serves.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import nn

import recsys_dist.models
from recsys_dist.batch import Batch
from recsys_dist.config import Config, nearest
from recsys_dist.errors import ConfigError
from recsys_dist.schema import Schema

Task = Literal["ranking", "recall"]


class ModelConfig(Config):
    """Base of every model's Config; `name` is the file that it lives in."""

    name: str

    @property
    def asks_occurrences(self) -> bool:
        """Whether training must count `Catalogue.occurrences`: one more pass over its rows."""
        return False

    @property
    def asks_neighbours(self) -> int:
        """How many `Catalogue.neighbours` of each item must be counted."""
        return 0


@dataclass(frozen=True)
class Catalogue:
    """What training knows of the items besides their ids. I rows of the item table, row 0 unknown.

    positives  [I] int64: how often each item was a recall positive in training
    features   name -> [I]: every encoded feature that the item alone decides and that does not change with
               time, int32 rows or float32; empty where item vectors are there already, as in a bundle
    weight     [I] float32: sum of the item's rows' weights in recall training; None, as when nothing is left
               to train, stands for its positives
    occurrences  table -> [its rows] int64: how many training rows have the id, in any feature of the table;
               there only for a model whose config asks for it
    neighbours  [I, M] int32 items that the same users were shown, 0 where there are fewer, and [I, M] float32
               their cosines; only for a model whose config asks for them
    """

    positives: torch.Tensor
    features: Mapping[str, torch.Tensor] = field(default_factory=dict)
    weight: torch.Tensor | None = None
    occurrences: Mapping[str, torch.Tensor] = field(default_factory=dict)
    neighbours: tuple[torch.Tensor, torch.Tensor] | None = None


class Model(Protocol):
    """What the training loop and the evaluator ask of every model.

    Built as `Model(cfg, schema, catalogue)`, where `schema` is what `inputs` returned, fitted, with
    `ranking_label` set to the label to learn. Embedding tables are made on the "meta" device with
    their `init_fn` set; `train.sharding` (or `materialise`) gives them memory and values.

    A recall model with `every_position = True` learns what follows each position of its one sequence
    feature: it is trained on few rows that hold each event as a target once (`data.examples.chunks`).

    A model with `counted = True` has all that it knows from its catalogue, and no loss: `train.counted`.
    """

    task: ClassVar[Task]

    @staticmethod
    def inputs(schema: Schema, cfg: Any) -> Schema:
        """The part of the schema that this model reads; ConfigError where it lacks what the model needs."""
        ...

    def loss(self, batch: Batch, step: int) -> torch.Tensor:
        """[B] loss of each row before weighting. `step` seeds whatever is sampled, alike on all workers."""
        ...

    def table_groups(self) -> Mapping[str, list[nn.Parameter]]:
        """Embedding parameters by optimizer group: `"deep"`, and `"wide"` where a model has a wide part."""
        ...


class RankModel(Model, Protocol):
    """Scores one (user, item, context) row at a time.

    predicts  the `value` label whose expected amount it predicts; None: the label's probability
    """

    predicts: str | None

    def forward(self, batch: Batch) -> torch.Tensor:
        """[B] logits."""
        ...

    def prediction(self, logit_B: torch.Tensor) -> torch.Tensor:
        """[B] what logits mean: probabilities of the ranking label, or expected amounts of `predicts`."""
        ...


@dataclass(frozen=True)
class Parts:
    """What one side of n (user, item) pairs contributes before the two meet.

    hidden  [n, H] to the first layer, before its activation
    logit   [n] to the logit itself
    """

    hidden: torch.Tensor
    logit: torch.Tensor


@runtime_checkable
class FactoredRankModel(Protocol):
    """A ranker whose first layer is a sum over user and item: many candidates of one user cost little.

    Serving computes the items' parts once, the user's once per request, and joins them per candidate.
    """

    def parts(self, batch: Batch, of_item: bool) -> Parts:
        """The user's and context's part of each row of `batch` [n], or with `of_item` the item's.

        Of dense features `batch` has those of that side alone, as `Schema.of_side` selects them.
        """
        ...

    def join(
        self,
        users: Parts,
        items: Parts,
        of: torch.Tensor,
        at: torch.Tensor,
        crosses: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """[C] logits, as `forward` gives them: row `of` [C] of users with row `at` [C] of items.

        `crosses` has the ids [C] of every feature that depends on both.
        """
        ...


class RecallModel(Model, Protocol):
    """Embeds users and items in one space; the inner product ranks the catalogue."""

    def forward(self, batch: Batch) -> torch.Tensor:
        """[B, D] user vectors."""
        ...

    def item_vectors(self) -> torch.Tensor:
        """[rows of the item table, D]; row 0 is the unknown item and is never recommended.

        With D = 0 `forward` gives the scores of all items, [B, rows of the item table], itself.
        """
        ...


# Files of `models/` that are no model.
SHARED = (
    "behaviours",
    "calibration",
    "layers",
    "losses",
    "pairs",
    "precision",
    "protocol",
    "ranking",
    "recall",
    "recurrence",
    "regularisation",
)


# Of the others those whose model has `counted = True`.
COUNTED = ("itemcf", "popularity")


def model_names(counted: bool = True) -> list[str]:
    """Every file of `models/` that defines `Config` and `Model` of its own; or those that learn by steps."""
    names = [m.name for m in pkgutil.iter_modules(recsys_dist.models.__path__)]
    return [n for n in names if n not in SHARED and (counted or n not in COUNTED)]


def model_module(name: str) -> ModuleType:
    """The module of a model: a file here by its name, or anyone's as `package.module:Model`.

    ConfigError names the nearest where there is none, and what another's module lacks.
    """
    if ":" in name:
        return _others(name)
    if name not in model_names():
        raise ConfigError(f"model {name!r} does not exist{nearest(name, model_names())}")
    return importlib.import_module(f"recsys_dist.models.{name}")


def model_schema(model: ModelConfig, schema: Schema, label: str | None) -> Schema:
    """The inputs of a model, with `label` (default: the schema's) as the one to rank by."""
    labelled = Schema.parse({**schema.model_dump(), "ranking_label": label or schema.ranking_label})
    return model_module(model.name).Model.inputs(labelled, model)


def _others(name: str) -> ModuleType:
    path, _, attribute = name.partition(":")
    if not all(path.split(".")):
        raise ConfigError(f"model {name!r}: name its module in full, as in my_models.tower:Model")
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"model {name!r}: {error}; its module must be importable here and on every worker, as from the "
            "directory that the job is started in"
        ) from None
    missing = [each for each in ("Config", "Model") if not hasattr(module, each)]
    if missing or attribute != "Model":
        raise ConfigError(
            f"model {name!r}: the module needs a `Config` and a `Model` (recsys_dist/models/protocol.py says "
            f"what they offer){f' and has no {missing[0]}' if missing else '; name it as …:Model'}"
        )
    field = module.Config.model_fields.get("name")
    if field is None or field.default != name:
        raise ConfigError(
            f"model {name!r}: its Config must say by which name a checkpoint finds it again: "
            f'`name: str = "{name}"`'
        )
    return module
