"""What one training run is: a frozen config, checked as a whole before anything starts."""

from typing import Any

from pydantic import Field, SerializeAsAny, field_validator

from recsys_dist.config import Config, digest
from recsys_dist.data.prepared import Prepared
from recsys_dist.errors import ConfigError
from recsys_dist.models.protocol import ModelConfig, Task, model_module, model_schema
from recsys_dist.schema import Schema
from recsys_dist.train import pretrained
from recsys_dist.train.calibrate import Kind as CalibrationKind
from recsys_dist.train.optim import OptimizerConfig
from recsys_dist.train.sharding import ShardingConfig

# Metrics to choose an epoch by, the default first; those of recall are at a cut, as in ndcg@20.
TASK_METRICS: dict[Task, tuple[str, ...]] = {
    "ranking": ("auc", "gauc", "logloss"),
    "recall": ("recall", "user_recall", "ndcg"),
}
_RECALL_AT = 100  # the default cut

# What may change between two starts of one run: where and how it computes, not what.
_NOT_IDENTITY = (
    "data",
    "num_workers",
    "threads_per_worker",
    "use_gpu",
    "sharding",
    "timeout_s",
    "max_failures",
    "checkpoint_every_s",
    "profile",
    "item_vectors",  # told apart by what they are, see identity()
    "item_vectors_std",
)


class TrainConfig(Config):
    """One model trained on one prepared data set. `batch_rows` is global, whatever the number of workers."""

    data: str = Field(description="directory of the prepared data")
    model: SerializeAsAny[ModelConfig]
    label: str | None = Field(None, description="binary label to rank by; default: the schema's")
    seed: int = 0
    batch_rows: int = Field(4096, ge=1, description="rows of a global batch, over all workers")
    newest_fraction: float = Field(
        1.0, gt=0, le=1, description="train on the newest part of the training rows only, as cheap trials do"
    )
    epochs: int = Field(5, ge=1, description="at most; the best one on the validation days is kept")
    patience: int = Field(1, ge=1, description="epochs without a better metric before stopping")
    metric: str | None = Field(
        None,
        pattern=r"^(auc|gauc|logloss|(recall|user_recall|ndcg)@[1-9]\d*)$",
        description="chooses the epoch; default: auc for ranking, recall@100 (any cut will do) for recall",
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
    optimizer: OptimizerConfig = OptimizerConfig()
    sharding: ShardingConfig = ShardingConfig()
    num_workers: int = Field(1, ge=1)
    threads_per_worker: int = Field(1, ge=1, description="CPU threads, and CPUs reserved, of each worker")
    use_gpu: bool = False
    timeout_s: int = Field(60, ge=1, description="a collective that takes longer is a lost worker")
    checkpoint_every_s: float | None = Field(
        60.0,
        ge=0,
        description="seconds between checkpoints within an epoch, from which a lost run goes on; 0: after "
        "every step; none (null): after each epoch alone",
    )
    max_failures: int = Field(3, ge=0, description="restarts from the newest checkpoint after lost workers")
    profile: bool = Field(False, description="write a trace of worker 0's steps 5 to 10 after each start")

    @field_validator("model", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if "name" not in value:
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
        return metric

    @property
    def recall_at(self) -> int:
        """Length of the lists that choose the epoch of a recall model: the metric's cut."""
        return int(self.chosen_metric.partition("@")[2])

    @property
    def rows_per_worker(self) -> int:
        return exact_div(self.batch_rows, self.num_workers, "batch_rows", "num_workers")

    def identity(self) -> dict[str, Any]:
        """What is learned and how, whatever computes it and wherever the data are; without what is not set.

        So a setting that a later version adds, and that is None unless set, leaves former runs what they are.
        ConfigError where `item_vectors` is no finished run: what they hold is part of the identity.
        """
        values = self.model_dump(mode="json", exclude_none=True)
        learned = {key: value for key, value in values.items() if key not in _NOT_IDENTITY}
        if self.item_vectors is not None:
            found = pretrained.content(self.item_vectors)
            learned["item_vectors"] = {"content": found, "std": self.item_vectors_std}
        return learned

    def run_digest(self, data_digest: str) -> str:
        """Identity of the run: the same again, on the same data, is the same run, to be continued."""
        return digest([data_digest, self.identity()])

    def inputs(self, prepared: Prepared) -> Schema:
        """What the model reads of the prepared data, with the label to learn; ConfigError where it cannot."""
        return model_schema(self.model, prepared.schema, self.label)

    def check(self, prepared: Prepared) -> None:
        """ConfigError for settings that do not go together or do not fit the data."""
        _ = self.chosen_metric, self.rows_per_worker, self.inputs(prepared)
        if self.optimizer.plateau is not None and self.patience == 1:
            raise ConfigError(
                "optimizer.plateau lowers the learning rates after an epoch without a better metric; with "
                "patience=1 training stops there: set patience=2 or more"
            )
        if self.item_vectors is not None:
            pretrained.check(self.item_vectors, prepared)
        if self.task == "recall" and self.label is not None:
            raise ConfigError(
                "label is for ranking models; recall learns the schema's recall_positive events"
            )


def exact_div(dividend: int, divisor: int, name: str, by: str) -> int:
    """`dividend / divisor`, which must come out even; else ConfigError naming the nearest that does."""
    quotient, remainder = divmod(dividend, divisor)
    if remainder:
        nearest = max(1, round(dividend / divisor)) * divisor
        raise ConfigError(f"{name}={dividend} is not divisible by {by}={divisor}; nearest is {nearest}")
    return quotient
