"""Optimizers: Adam for dense weights, fused Adagrad for embedding tables (stepped in the backward pass).

Tables that are sharded step inside TorchRec's kernel. Data-parallel ones have no fused kernel and are
stepped here by the same rule, from `torchrec.optim`, after their gradients were averaged. FTRL and weight
decay have none anywhere (FBGEMM's CPU kernels take a `weight_decay` and ignore it): each worker steps the
rows that it holds, here.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_in_backward
from torchrec.optim import RowWiseAdagrad

from recsys_dist.config import Config
from recsys_dist.errors import ConfigError
from recsys_dist.train.ftrl import FTRL

# Classes that both run in torch and (FTRL not) name a fused kernel to TorchRec; its own Adagrad and SGD only
# name one.
RULES: dict[str, Any] = {
    "rowwise_adagrad": RowWiseAdagrad,
    "adagrad": torch.optim.Adagrad,
    "sgd": torch.optim.SGD,
    "ftrl": FTRL,
}


class DenseOptimizer(Config):
    """Adam (arXiv 1412.6980), with decoupled weight decay where `weight_decay` > 0."""

    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    clip_norm: float | None = Field(None, gt=0, description="largest global norm of the dense gradient")


class TableOptimizer(Config):
    """The rule of a group of embedding tables; row-wise Adagrad keeps one accumulator a row.

    FTRL sees the gradient of the batch's mean loss where the paper sees that of one example: its beta (1),
    l1 and l2 divided by the rows of a batch are ours.
    """

    rule: Literal["rowwise_adagrad", "adagrad", "sgd", "ftrl"] = "rowwise_adagrad"
    lr: float = Field(0.05, gt=0, description="FTRL's alpha")
    eps: float = Field(1e-8, gt=0, description="Adagrad's")
    beta: float = Field(1 / 4096, gt=0, description="FTRL's")
    l1: float = Field(0.0, ge=0, description="FTRL's; weights whose |z| stays below it are exactly 0")
    l2: float = Field(0.0, ge=0, description="FTRL's")
    weight_decay: float = Field(
        0.0,
        ge=0,
        description="row-wise Adagrad's: L2 on all rows, looked up or not, in every step. No fused kernel "
        "has it: a step takes a gradient as large as the table",
    )

    precision: Literal["fp16"] | None = Field(
        None,
        description="of the tables' weights: fp16 halves their bytes, in memory and in checkpoints; default: "
        "fp32. What is looked up, and the optimizer's state, are fp32 either way",
    )

    @model_validator(mode="after")
    def _own_penalties(self) -> "TableOptimizer":
        if self.rule != "ftrl" and (self.l1 or self.l2):
            raise ValueError(f"l1 and l2 are of rule 'ftrl'; {self.rule!r} has none")
        if self.rule != "rowwise_adagrad" and self.weight_decay:
            raise ValueError(f"weight_decay is of rule 'rowwise_adagrad'; {self.rule!r} has none")
        if self.precision is not None and not self.fused:
            raise ValueError("precision is for what the lookup kernels step: no FTRL, and no weight_decay")
        return self

    @property
    def fused(self) -> bool:
        """Whether TorchRec's kernels step by this rule in the backward pass."""
        return self.rule != "ftrl" and self.weight_decay == 0

    def kwargs(self) -> dict[str, float]:
        """Constructor arguments of the rule's optimizer class."""
        if self.rule == "ftrl":
            return {"lr": self.lr, "beta": self.beta, "l1": self.l1, "l2": self.l2}
        decay = {"weight_decay": self.weight_decay} if self.weight_decay else {}
        return {"lr": self.lr} if self.rule == "sgd" else {"lr": self.lr, "eps": self.eps, **decay}


class OptimizerConfig(Config):
    """One optimizer for the dense weights and one for each group of tables."""

    dense: DenseOptimizer = DenseOptimizer()
    deep: TableOptimizer = TableOptimizer()
    wide: TableOptimizer = TableOptimizer()
    plateau: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="multiplies every learning rate after each epoch that did not improve the metric; a "
        "refitted model repeats the rates of the epochs that it is trained for",
    )

    @field_validator("deep")
    @classmethod
    def _embeddings_have_columns(cls, deep: TableOptimizer) -> TableOptimizer:
        if deep.rule == "ftrl":
            raise ValueError("rule 'ftrl' takes a row for one weight: it is for optimizer.wide alone")
        return deep

    def table(self, group: str) -> TableOptimizer:
        """The rule of a group; ConfigError for a group that has none."""
        rules = {"deep": self.deep, "wide": self.wide}
        if group not in rules:
            raise ConfigError(f"table group {group!r} has no optimizer; groups are {sorted(rules)}")
        return rules[group]


def table_rules(
    model: nn.Module, groups: Mapping[str, list[nn.Parameter]], cfg: OptimizerConfig
) -> dict[str, TableOptimizer]:
    """The rule of each table, keyed by its weight's name in `model`."""
    by_id = {id(weight): cfg.table(group) for group, weights in groups.items() for weight in weights}
    return {name: by_id[id(weight)] for name, weight in model.named_parameters() if id(weight) in by_id}


def attach(model: nn.Module, rules: Mapping[str, TableOptimizer]) -> None:
    """Have each table's optimizer step inside the backward pass; call it before sharding.

    On an unsharded model with real (not "meta") tables this trains by the same rule, in torch.
    """
    for name, weight in model.named_parameters():
        if name in rules and rules[name].fused:
            # TorchRec writes into the kwargs: each table needs its own dict.
            apply_in_backward(RULES[rules[name].rule], [weight], rules[name].kwargs())


class Optimizers:
    """What must be stepped after the backward pass: dense weights, and tables without a fused kernel.

    State is keyed by parameter name, so that it does not depend on worker count or placement.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        rules: Mapping[str, TableOptimizer],
        cfg: DenseOptimizer,
    ) -> None:
        stepped = {
            n: p for n, p in parameters if not hasattr(p, "_in_backward_optimizers") and p.requires_grad
        }
        self.dense = {n: p for n, p in stepped.items() if n not in rules}
        self.tables = {n: p for n, p in stepped.items() if n in rules}
        self._clip_norm = cfg.clip_norm
        adam = torch.optim.AdamW if cfg.weight_decay else torch.optim.Adam
        self._optimizers: list[torch.optim.Optimizer] = []
        if self.dense:
            dense = list(self.dense.values())
            self._optimizers.append(adam(dense, lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True))
        for name, weight in self.tables.items():
            if weight.numel() == 0 and rules[name].rule == "rowwise_adagrad":
                continue  # a worker that holds none of the rows
            self._optimizers.append(RULES[rules[name].rule]([weight], **rules[name].kwargs()))
        self._unfused = {id(weight) for name, weight in self.tables.items() if not rules[name].fused}
        self._rates = [(group, group["lr"]) for o in self._optimizers for group in o.param_groups]

    def scale_rates(self, factor: float) -> None:
        """Every learning rate becomes its configured one times `factor`."""
        for group, rate in self._rates:
            group["lr"] = rate * factor

    def gradient_norms(self) -> dict[str, torch.Tensor]:
        """L2 norm of each dense layer's gradient, by the name of the module that holds its weights.

        Of the whole gradient, before clipping: to be called between the backward pass and `step`.
        """
        layers: dict[str, list[torch.Tensor]] = {}
        for name, weight in self.dense.items():
            if weight.grad is not None:
                layers.setdefault(name.rpartition(".")[0], []).append(weight.grad)
        return {layer: nn.utils.get_total_norm(gradients) for layer, gradients in layers.items()}

    def step(self) -> None:
        """Apply and forget the gradients; dense ones are clipped by their global norm first."""
        if self._clip_norm is not None:
            nn.utils.clip_grad_norm_(self.dense.values(), self._clip_norm)
        for optimizer in self._optimizers:
            optimizer.step()
        # only then: tables may be slices of one tensor, and forgetting one's gradient forgets all
        for optimizer in self._optimizers:
            # a gradient as large as its table: taking over the next one saves adding it to zeros
            whole = any(id(w) in self._unfused for group in optimizer.param_groups for w in group["params"])
            optimizer.zero_grad(set_to_none=whole)

    def state(self) -> dict[str, torch.Tensor]:
        """`<parameter>.<slot>` -> tensor, of dense weights only; tables' is `table_accumulators`."""
        state = {}
        for optimizer in self._optimizers[: bool(self.dense)]:
            for name, weight in self.dense.items():
                for slot, value in optimizer.state.get(weight, {}).items():
                    state[f"{name}.{slot}"] = value
        return state

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take what `state` returned, in any process; weights without an entry start afresh."""
        for optimizer in self._optimizers[: bool(self.dense)]:
            for name, weight in self.dense.items():
                slots = {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}
                if slots:
                    moved = {slot: value.to(weight.device, copy=True) for slot, value in slots.items()}
                    optimizer.state[weight] = moved

    def accumulators(self) -> dict[str, torch.Tensor]:
        """`accumulators_of` the tables, or of this worker's rows of them, that are stepped here."""
        owner = {id(w): o for o in self._optimizers for g in o.param_groups for w in g["params"]}
        empty = {name: w.new_zeros(0) for name, w in self.tables.items() if id(w) not in owner}
        held = {name: (owner[id(w)], w) for name, w in self.tables.items() if id(w) in owner}
        return {**accumulators_of(held), **empty}


def accumulators_of(
    tables: Mapping[str, tuple[torch.optim.Optimizer, nn.Parameter]],
) -> dict[str, torch.Tensor]:
    """Adagrad's sum of each table, as a view: [rows] row-wise, else [rows, dim]; none for SGD.

    FTRL's z and n: [rows, 2].
    """
    sums = {name: optimizer.state[weight].get("sum") for name, (optimizer, weight) in tables.items()}
    return {
        name: total.view(-1) if isinstance(tables[name][0], RowWiseAdagrad) else total
        for name, total in sums.items()
        if total is not None
    }
