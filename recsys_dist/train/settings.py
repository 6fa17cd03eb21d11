"""What one training run is: a frozen config, checked as a whole before anything starts."""

from typing import Annotated, Any, Literal

from pydantic import Field, SerializeAsAny, field_validator

from recsys_dist.config import Config, Seed, digest
from recsys_dist.data.order import evenly
from recsys_dist.data.prepared import Prepared
from recsys_dist.errors import ConfigError
from recsys_dist.models.protocol import ModelConfig, Task, model_module, model_schema
from recsys_dist.schema import Schema
from recsys_dist.train import pretrained
from recsys_dist.train.calibrate import Kind as CalibrationKind
from recsys_dist.train.optim import OptimizerConfig
from recsys_dist.train.placement import ShardingConfig
from recsys_dist.train.warm_start import Former

# Metrics to choose an epoch by, the default first; those of recall are at a cut, as in ndcg@20.
TASK_METRICS: dict[Task, tuple[str, ...]] = {
    "ranking": ("auc", "gauc", "logloss"),
    "recall": ("recall", "user_recall", "ndcg"),
}
_RECALL_AT = 100  # the default cut
Count = Annotated[int, Field(ge=1)]

# What may change between two starts of one run: where and how it computes, not what.
_NOT_IDENTITY = (
    "data",
    "num_workers",
    "elastic_batch",
    "resize_every_s",
    "threads_per_worker",
    "use_gpu",
    "sharding",
    "timeout_s",
    "max_failures",
    "skip_steps",
    "max_rollbacks",
    "checkpoints",
    "checkpoint_every_s",
    "checkpoint_increments",
    "profile",
    "item_vectors",  # told apart by what they are, see identity()
    "item_vectors_std",
    "warm_start",
)


class TrainConfig(Config):
    """One model trained on one prepared data set. `batch_rows` is global, whatever the number of workers."""

    data: str = Field(description="directory of the prepared data")
    model: SerializeAsAny[ModelConfig]
    label: str | None = Field(None, description="binary label to rank by; default: the schema's")
    seed: Seed = 0
    batch_rows: int = Field(4096, ge=1, description="rows of a global batch, over all workers")
    newest_fraction: float = Field(
        1.0, gt=0, le=1, description="train on the newest part of the training rows only, as cheap trials do"
    )
    epochs: int = Field(5, ge=1, description="at most; the best one on the validation days is kept")
    patience: int = Field(1, ge=1, description="epochs without a better metric before stopping")
    metric: str | None = Field(
        None,
        pattern=r"^(auc|gauc|logloss|(recall|user_recall|ndcg)@[1-9]\d{0,3})$",
        description="chooses the epoch; default: auc for ranking, recall@100 (any cut to 9999) for recall",
    )
    refit: bool = Field(True, description="train anew on train + validation days for the chosen epochs")
    calibration: CalibrationKind = Field(
        "platt",
        description="of a ranker's probabilities, fitted on the validation days that chose the epoch; it "
        "changes no order",
    )
    item_vectors: str | None = Field(
        None,
        description="directory of a finished recall run on the same data, such as item2vec's: the model's "
        "tables of items of the same dimension start from its item vectors",
    )
    item_vectors_std: float | None = Field(
        None, gt=0, description="scales them to this root mean square; default: that of the table's own start"
    )
    warm_start: str | None = Field(
        None,
        description="directory of a finished run, such as yesterday's: the weights that the model has in "
        "common with it start from there, table rows by the values that they stand for",
    )
    optimizer: OptimizerConfig = OptimizerConfig()
    autocast: Literal["bf16"] | None = Field(
        None,
        description="matrix products in training take operands of 16 bits, which GPUs multiply faster; "
        "weights, tables, statistics and losses stay in 32, and so does all that validates and serves",
    )
    sharding: ShardingConfig = ShardingConfig()
    num_workers: Annotated[int, Field(ge=0)] | tuple[Count, Count] = Field(
        1,
        description="how many; or [fewest, most]: as many as the cluster has room for, fewer after a lost "
        "node, more when one joins; 0 trains in the process that asks for it, as a debugger likes it, and "
        "restarts nothing",
    )
    elastic_batch: Literal["global", "per_worker"] = Field(
        "global",
        description="what stays with fewer workers than the most: the global batch, and so what is learned; "
        "or each worker's part of it, and every learning rate is multiplied by the square root of what the "
        "global batch is (arXiv 2205.10287)",
    )
    resize_every_s: float = Field(
        60.0, ge=0, description="seconds between two looks for room for more workers, up to the most"
    )
    threads_per_worker: int = Field(1, ge=1, description="CPU threads, and CPUs reserved, of each worker")
    use_gpu: bool = False
    timeout_s: int = Field(60, ge=1, description="a collective that takes longer is a lost worker")
    checkpoints: str | None = Field(
        None,
        description="directory or URL (s3://, gs://, any that fsspec knows) below which runs keep their "
        "checkpoints; default: in the run's own directory",
    )
    checkpoint_every_s: float | None = Field(
        60.0,
        ge=0,
        description="seconds between checkpoints within an epoch, from which a lost run goes on; 0: after "
        "every step; none (null): after each epoch alone",
    )
    checkpoint_increments: float = Field(
        0.3,
        ge=0,
        le=1,
        description="a checkpoint within an epoch holds only the table rows that were looked up since the "
        "last full one, where that is at most such a share of its bytes; 0: all are full",
    )
    max_failures: int = Field(3, ge=0, description="restarts from the newest checkpoint after lost workers")
    skip_steps: int = Field(
        0,
        ge=0,
        description="steps in a row whose loss is not finite and that are left out; 0 saves the workers to "
        "ask each other before every backward pass",
    )
    max_rollbacks: int = Field(
        0,
        ge=0,
        description="times that training, where one more step is not finite, goes back to the newest "
        "checkpoint and on with half the learning rates, before it ends",
    )
    profile: bool = Field(False, description="write a trace of worker 0's steps 5 to 10 after each start")

    @field_validator("num_workers")
    @classmethod
    def _fewest_first(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        if isinstance(value, tuple) and value[0] > value[1]:
            raise ValueError("[fewest, most]: the fewest come first")
        return value

    @field_validator("model", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if not isinstance(value.get("name"), str):
            raise ValueError("a model needs its name, as in model.name=wide_deep")
        return model_module(value["name"]).Config.parse(value)

    @property
    def task(self) -> Task:
        return model_module(self.model.name).Model.task

    def training_splits(self, schema: Schema) -> dict[str, tuple[str, ...]]:
        """What each phase of training learns from; `schema` is what the model reads."""
        if getattr(model_module(self.model.name).Model, "every_position", False):
            return {
                phase: (f"sequences/{schema.sequences[0].name}/{phase}",) for phase in ("choose", "refit")
            }
        train, valid = f"{self.task}/train", f"{self.task}/valid"
        return {"choose": (train,), "refit": (train, valid)}

    @property
    def chosen_metric(self) -> str:
        """The metric that chooses the epoch; ConfigError where it is not one of the model's task."""
        cut = f"@{_RECALL_AT}" if self.task == "recall" else ""
        known = [f"{name}{cut}" for name in TASK_METRICS[self.task]]
        metric = self.metric or known[0]
        if metric.partition("@")[0] not in TASK_METRICS[self.task]:
            raise ConfigError(
                f"metric {metric!r} is not one of a {self.task} model; take {' or '.join(known)}"
            )
        if metric == "logloss" and self._expects_amount:
            raise ConfigError(
                f"{self.model.name}: metric=logloss is of probabilities, and it expects an amount; take "
                f"{' or '.join(name for name in known if name != 'logloss')}"
            )
        return metric

    @property
    def _expects_amount(self) -> bool:
        return getattr(model_module(self.model.name).Model, "expects_amount", False)

    @property
    def recall_at(self) -> int:
        """Length of the lists that choose the epoch of a recall model: the metric's cut."""
        return int(self.chosen_metric.partition("@")[2])

    @property
    def fewest_workers(self) -> int:
        return max(1, self.num_workers) if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def most_workers(self) -> int:
        return max(1, self.num_workers) if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def workers_in_words(self) -> str:
        if self.num_workers == 0:
            return "no workers"
        if self.fewest_workers < self.most_workers:
            return f"{self.fewest_workers} to {self.most_workers} workers"
        return f"{self.most_workers} worker{'s' if self.most_workers > 1 else ''}"

    def parts(self, workers: int) -> list[int]:
        """[workers] rows of each worker's part of a global batch, when there are so many of them."""
        kept = self.elastic_batch == "global"
        return evenly(self.batch_rows if kept else self.batch_rows * workers // self.most_workers, workers)

    def resized_rate(self, workers: int) -> float:
        """What every learning rate is multiplied by when there are so many workers."""
        return (sum(self.parts(workers)) / self.batch_rows) ** 0.5

    def identity(self) -> dict[str, Any]:
        """What is learned and how, whatever computes it and wherever the data are; without what is not set.

        So a setting that a later version adds, and that is None unless set, leaves former runs what they are.
        ConfigError where `item_vectors` is no finished run: what they hold is part of the identity.
        """
        values = self.model_dump(mode="json", exclude_none=True)
        learned = {key: value for key, value in values.items() if key not in _NOT_IDENTITY}
        if self.item_vectors is not None:
            found = pretrained.content(self.item_vectors, "item_vectors")
            learned["item_vectors"] = {"content": found, "std": self.item_vectors_std}
        if self.sharding.exchange is not None:  # of how tables are placed, all that changes what is learned
            learned["exchange"] = self.sharding.exchange
        if self.warm_start is not None:
            learned["warm_start"] = pretrained.content(self.warm_start, "warm_start")
        return learned

    def run_digest(self, data_digest: str) -> str:
        """Identity of the run: the same again, on the same data, is the same run, to be continued."""
        return digest([data_digest, self.identity()])

    def inputs(self, prepared: Prepared) -> Schema:
        """What the model reads of the prepared data, with the label to learn; ConfigError where it cannot."""
        return model_schema(self.model, prepared.schema, self.label)

    def check(self, prepared: Prepared) -> None:
        """ConfigError for settings that do not go together or do not fit the data."""
        _ = self.chosen_metric, self.inputs(prepared)
        if self.batch_rows < self.most_workers:
            raise ConfigError(
                f"batch_rows={self.batch_rows} are fewer than the workers (num_workers={self.num_workers}), "
                "who each need a row: raise the one or lower the other"
            )
        self._check_rows(prepared)
        if self.optimizer.plateau is not None and self.patience == 1:
            raise ConfigError(
                "optimizer.plateau lowers the learning rates after an epoch without a better metric; with "
                "patience=1 training stops there: set patience=2 or more"
            )
        if self.item_vectors is not None and self.warm_start is not None:
            raise ConfigError("warm_start and item_vectors both say what tables start from: name one")
        if self.item_vectors_std is not None and self.item_vectors is None:
            raise ConfigError(
                f"item_vectors_std={self.item_vectors_std:g} scales item_vectors, and there are none: name "
                "them, or leave it out"
            )
        if self.item_vectors is not None:
            pretrained.check(self.item_vectors, prepared)
        if self.warm_start is not None:
            Former.open(self.warm_start, "refit")
        if self.task == "recall" and self.label is not None:
            raise ConfigError(
                "label is for ranking models; recall learns the schema's recall_positive events"
            )
        if self.task == "ranking" and self.chosen_metric != "logloss":
            label = self.inputs(prepared).ranking_label
            least, greatest = prepared.extremes("ranking/valid", label)
            if least is not None and least == greatest:
                way = "" if self._expects_amount else "choose them by metric=logloss, "
                raise ConfigError(
                    f"label {label!r} is {least:g} in all {prepared.shards('ranking/valid').total_rows:,} "
                    f"validation rows, so {self.chosen_metric} cannot tell epochs apart: {way}"
                    "learn another label, or prepare the data with another valid_from"
                )

    def _check_rows(self, prepared: Prepared) -> None:
        """ConfigError where there is nothing to learn from, or to choose an epoch by."""
        held_out = "ranking/valid" if self.task == "ranking" else "users/valid"
        splits = prepared.manifest.splits
        for split in (*self.training_splits(self.inputs(prepared))["choose"], held_out):
            if split in splits and not splits[split].total_rows:
                raise ConfigError(
                    f"{split!r} of the prepared data {str(prepared.path)!r} has no rows, and "
                    f"{self.model.name!r} needs them: prepare with another valid_from, or more of the log"
                )
