"""Where each table lives, by TorchRec; with `sharders` the only torchrec.distributed.

`shard` spreads a model over the workers of the process group; `materialise` makes its unsharded twin
with the same values. Starting values are a function of (seed, table, block of rows), so they do not
depend on the number of workers or the kind of sharding.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingCollection
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.types import CacheParams, ShardingPlan
from torchrec.modules.embedding_configs import DataType

from recsys_dist.config import Config, nearest
from recsys_dist.errors import ConfigError
from recsys_dist.train.collectives import connect
from recsys_dist.train.increments import Touched
from recsys_dist.train.optim import (
    OptimizerConfig,
    Optimizers,
    TableOptimizer,
    accumulators_of,
    attach,
    table_rules,
)
from recsys_dist.train.pieces import pieces, placed_as
from recsys_dist.train.sharders import Exchange, sharders
from recsys_dist.train.starting import fill

Kind = Literal["table_wise", "row_wise", "column_wise", "data_parallel"]
Offload = Literal["fused_uvm", "fused_uvm_caching"]

_COLUMNS = 4  # narrowest column-wise shard, FBGEMM's vector width
_FLOAT_BYTES = 4
# On CPU the planner's cost model, made for GPUs, cuts every table by rows; whole tables are faster (22 tables
# of 100k rows, 2 workers over gloo, batch 4,096: 40 ms a step against 60). Larger ones it may cut.
_WHOLE_BYTES = 1 << 30
_ANY_BYTES = 1 << 60


class ShardingConfig(Config):
    """`kind` pins every table, `tables` single ones by name; TorchRec's planner places the others."""

    kind: Kind | Literal["auto"] = "auto"
    tables: dict[str, Kind] = Field(default_factory=dict)
    offload: dict[str, Offload] = Field(
        default_factory=dict,
        description="table -> FBGEMM's kernel for one that is larger than the GPU's memory: it lives in the "
        "host's, with (fused_uvm_caching) a cache of rows on the GPU; see docs/large_tables.md",
    )
    cached: float = Field(0.2, gt=0, le=1, description="of a fused_uvm_caching table's rows, in the cache")
    exchange: Exchange | None = Field(
        None,
        description="precision in which vectors and their gradients go to other workers; default: fp32",
    )


@dataclass(frozen=True)
class Placed:
    """Where a table is to live.

    kind      of its sharding
    kernel    of TorchRec that looks it up, by its name
    fused     whether its optimizer steps inside the lookup kernel, without a gradient as large as the table
    pooled    whether its features' ids are looked up as one vector, or as one each
    features  whose ids are looked up in it
    pieces    (worker, rows, columns) of each piece
    """

    name: str
    rows: int
    dim: int
    kind: str
    kernel: str
    fused: bool
    pooled: bool
    rule: TableOptimizer
    features: tuple[str, ...]
    pieces: tuple[tuple[int, int, int], ...]

    @property
    def weight_bytes(self) -> int:
        """Of one weight."""
        return 2 if self.rule.precision == "fp16" else _FLOAT_BYTES


class ShardedModel:
    """A model spread over the workers, and everything a checkpoint needs of it.

    model       DistributedModelParallel; call it as the wrapped module
    optimizers  to step after each backward pass
    tables      name of each table's weight -> its TorchRec config
    touched     rows since the last full checkpoint; None: all are full, see `saving.watch`
    """

    def __init__(
        self, model: DistributedModelParallel, optimizers: Optimizers, tables: Mapping[str, Any]
    ) -> None:
        self.model = model
        self.optimizers = optimizers
        self.tables = tables
        self.touched: Touched | None = None
        self._fused_rates = [(group, group["lr"]) for group in model.fused_optimizer.param_groups]

    def scale_rates(self, factor: float) -> None:
        """Every learning rate, of tables and dense weights, becomes its configured one times `factor`."""
        self.optimizers.scale_rates(factor)
        for group, rate in self._fused_rates:
            group["lr"] = rate * factor
        self.model.fused_optimizer.step()  # hands the rates to the kernels; they step in the backward pass

    def inner(self) -> Any:
        """The model as it was before `Loss` wrapped it; its lookups are collective."""
        return self.model.module.model

    def lookups(self) -> list[nn.Module]:
        """The modules that look this worker's tables up, each of which gives one tensor of embeddings."""
        return [each for module in self.model.modules() for each in getattr(module, "_lookups", [])]

    def weights(self) -> dict[str, Any]:
        """Parameter name -> Tensor or ShardedTensor, views of the live weights."""
        return dict(self.model.state_dict())

    def accumulators(self) -> dict[str, Any]:
        """Table's parameter name -> its optimizer's sum, Tensor or ShardedTensor, views of the live state."""
        fused = self.model.fused_optimizer.state_dict()["state"]
        sums = {name: state for name, states in fused.items() for state in states.values()}
        weights = self.weights()
        for name, local in self.optimizers.accumulators().items():
            sums[name] = placed_as(weights[name], local)
        return sums

    @torch.no_grad()
    def set_known_rows(self, name: str, values: torch.Tensor) -> None:
        """All rows but row 0 of the table whose weight is `name` become those of `values` [rows, dim].

        Each worker sets those that live with it.
        """
        for tensor, (row, column), (height, width) in pieces(self.weights()[name], self.tables[name]):
            unknown = max(0, 1 - row)
            tensor[unknown:].copy_(values[row + unknown : row + height, column : column + width])

    def plan(self) -> dict[str, dict[str, Any]]:
        """Table -> {"kind", "ranks"}."""
        placed = [item for module in self.model.plan.plan.values() for item in module.items()]
        return {t: {"kind": p.sharding_type, "ranks": list(p.ranks or [])} for t, p in placed}


def shard(
    model: nn.Module,
    groups: Mapping[str, list[nn.Parameter]],
    optimizer: OptimizerConfig,
    sharding: ShardingConfig,
    seed: int,
    device: torch.device | str = "cpu",
) -> ShardedModel:
    """Spread `model`, tables on "meta", over the process group. Collective; dense weights follow rank 0.

    `groups` is the model's `table_groups()`. Raises ConfigError for a plan that cannot train rightly.
    """
    rules = table_rules(model, groups, optimizer)
    tables = tables_of(model)
    connect(model)
    _narrow(model, rules)
    attach(model, rules)
    using = sharders(sharding.exchange, torch.device(device))
    constraints = _constraints(sharding, tables, rules, torch.device(device).type)
    group = dist.group.WORLD
    assert group is not None, "shard() needs torch.distributed; materialise() is the single-process twin"
    planner = _planner(group.size(), constraints, torch.device(device).type)
    with _quiet():
        plan = planner.collective_plan(model, using, group)
        _keep_gradients(plan, [tables[name].name for name, rule in rules.items() if not rule.fused])
        parallel = DistributedModelParallel(
            model, plan=plan, sharders=using, device=torch.device(device), init_data_parallel=False
        )
        fill({n: w for n, w in parallel.state_dict().items() if n in tables}, tables, seed)
        parallel.init_data_parallel()
    return ShardedModel(parallel, Optimizers(parallel.named_parameters(), rules, optimizer.dense), tables)


def place(
    model: nn.Module,
    groups: Mapping[str, list[nn.Parameter]],
    optimizer: OptimizerConfig,
    sharding: ShardingConfig,
    workers: int,
    device: str = "cpu",
) -> list[Placed]:
    """What `shard` would do with so many workers, without any of them. Raises ConfigError as it would."""
    rules = table_rules(model, groups, optimizer)
    tables = tables_of(model)
    _narrow(model, rules)
    attach(model, rules)
    using = sharders(sharding.exchange, torch.device(device))
    constraints = _constraints(sharding, tables, rules, device)
    planner = _planner(workers, constraints, device)
    try:
        with _quiet():
            plan = planner.plan(model, using)
    except PlannerError as error:
        raise ConfigError(f"TorchRec's planner finds no place for the tables: {error}") from None
    found = {name: placed for module in plan.plan.values() for name, placed in module.items()}
    return [
        _placed(weight, table, found[table.name], rules[weight], workers) for weight, table in tables.items()
    ]


def _placed(weight: str, table: Any, placed: Any, rule: TableOptimizer, workers: int) -> Placed:
    whole = (table.num_embeddings, table.embedding_dim)
    shards = placed.sharding_spec.shards if placed.sharding_spec is not None else ()
    pieces = [(shard.placement.rank(), *shard.shard_sizes) for shard in shards]
    return Placed(
        name=table.name,
        rows=whole[0],
        dim=whole[1],
        kind=placed.sharding_type,
        kernel=placed.compute_kernel,
        fused=rule.fused and placed.sharding_type != "data_parallel",
        pooled=".embeddings." not in f".{weight}",
        rule=rule,
        features=tuple(table.feature_names),
        pieces=tuple(pieces or [(worker, *whole) for worker in range(workers)]),
    )


def materialise(model: nn.Module, seed: int, device: torch.device | str = "cpu") -> nn.Module:
    """Give an unsharded model's "meta" tables memory and the values that `shard` would; returns `model`."""
    for module in model.modules():
        if isinstance(module, EmbeddingBagCollection | EmbeddingCollection):
            module.to_empty(device=torch.device(device))
    tables = tables_of(model)
    fill({name: w for name, w in model.state_dict().items() if name in tables}, tables, seed)
    return model.to(device)


def train_unsharded(
    model: nn.Module, groups: Mapping[str, list[nn.Parameter]], optimizer: OptimizerConfig
) -> Optimizers:
    """Optimizers of a materialised model that train it by the same rules as `shard` does."""
    rules = table_rules(model, groups, optimizer)
    attach(model, rules)
    return Optimizers(model.named_parameters(), rules, optimizer.dense)


def unsharded_accumulators(model: nn.Module, optimizers: Optimizers) -> dict[str, torch.Tensor]:
    """`ShardedModel.accumulators` of a model that `train_unsharded` prepared, with the optimizers it gave."""
    attached = {n: w for n, w in model.named_parameters() if hasattr(w, "_in_backward_optimizers")}
    fused = accumulators_of({n: (w._in_backward_optimizers[0], w) for n, w in attached.items()})
    return {**fused, **optimizers.accumulators()}


def tables_of(model: nn.Module) -> dict[str, Any]:
    """Weight's name -> its TorchRec config, of every table."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, EmbeddingBagCollection):
            of = {f"embedding_bags.{c.name}.weight": c for c in module.embedding_bag_configs()}
        elif isinstance(module, EmbeddingCollection):
            of = {f"embeddings.{c.name}.weight": c for c in module.embedding_configs()}
        else:
            continue
        found.update({f"{path}.{name}" if path else name: config for name, config in of.items()})
    return found


def _constraints(
    cfg: ShardingConfig, tables: Mapping[str, Any], rules: Mapping[str, TableOptimizer], device: str
) -> dict[str, ParameterConstraints]:
    names = [config.name for config in tables.values()]
    for setting, name in [*(("tables", n) for n in cfg.tables), *(("offload", n) for n in cfg.offload)]:
        if name not in names:
            raise ConfigError(f"sharding.{setting}: the model has no table {name!r}{nearest(name, names)}")
    if cfg.offload and device != "cuda":
        raise ConfigError(
            f"sharding.offload={cfg.offload} is of FBGEMM's CUDA kernels; on {device} tables are in the "
            "host's memory anyway: unset it, or set use_gpu=true"
        )
    return {
        config.name: ParameterConstraints(
            sharding_types=_kinds(cfg, config, weight, rules[weight], device),
            compute_kernels=[cfg.offload[config.name]] if config.name in cfg.offload else None,
            min_partition=_COLUMNS,
            cache_params=CacheParams(load_factor=cfg.cached) if config.name in cfg.offload else None,
        )
        for weight, config in tables.items()
    }


def _kinds(cfg: ShardingConfig, table: Any, weight: str, rule: TableOptimizer, device: str) -> list[str]:
    """Kinds that the planner may choose from for one table."""
    refused: dict[str, str] = {}
    dim = table.embedding_dim
    if rule.rule == "rowwise_adagrad":
        refused["column_wise"] = (
            "row-wise Adagrad would keep an accumulator per column shard and so train otherwise than "
            "unsharded; set its optimizer's rule to 'adagrad', or shard it row_wise or table_wise"
        )
    elif not rule.fused:
        refused["column_wise"] = "FTRL and weight decay step whole rows; shard it row_wise or table_wise"
    elif dim % _COLUMNS or dim < 2 * _COLUMNS:
        refused["column_wise"] = (
            f"its dimension {dim} cannot be cut into columns of {_COLUMNS} or more; take table_wise"
        )
    if table.name in cfg.offload:
        if not rule.fused:
            raise ConfigError(
                f"sharding.offload: table {table.name!r} is stepped by a rule without a kernel (FTRL, or "
                "weight_decay), which leaves a gradient as large as the table; take another rule"
            )
        refused["data_parallel"] = "a copy on each GPU is not offloaded; take table_wise or row_wise"
    if rule.precision is not None:
        refused["data_parallel"] = (
            "data-parallel tables are stepped by gradients of their own precision, which fp16 has too little "
            "of; unset its optimizer's precision, or shard it table_wise or row_wise"
        )
    if ".embeddings." in f".{weight}":
        if not rule.fused:
            raise ConfigError(
                f"table {table.name!r} is of sequences, whose ids TorchRec looks up one by one: it has no "
                "weight_decay there; set optimizer.deep.weight_decay=0"
            )
        refused["data_parallel"] = (
            "TorchRec's CPU kernel fails on a batch without any id for a sequence table; take table_wise"
        )
    pinned = cfg.tables.get(table.name, None if cfg.kind == "auto" else cfg.kind)
    if pinned in refused:
        raise ConfigError(f"table {table.name!r} cannot be sharded {pinned}: {refused[pinned]}")
    if pinned is not None:
        return [pinned]
    if device == "cpu" and table.num_embeddings * dim * _FLOAT_BYTES <= _WHOLE_BYTES:
        return ["table_wise"]
    return [
        kind for kind in ("table_wise", "row_wise", "column_wise", "data_parallel") if kind not in refused
    ]


def _planner(
    workers: int, constraints: dict[str, ParameterConstraints], device: str
) -> EmbeddingShardingPlanner:
    # what fits is asked beforehand, of the real machines: see train.plan
    memory = {"ddr_cap": _ANY_BYTES} if device == "cpu" else {"hbm_cap": _gpu_bytes(), "ddr_cap": _ANY_BYTES}
    with _quiet():
        topology = Topology(world_size=workers, compute_device=device, **memory)
        return EmbeddingShardingPlanner(topology=topology, constraints=constraints, stats=[])


def _gpu_bytes() -> int:
    return int(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else _ANY_BYTES


def _narrow(model: nn.Module, rules: Mapping[str, TableOptimizer]) -> None:
    """Have "meta" tables of lower precision be sharded as such. (FBGEMM has no bf16 on CPU.)"""
    tables = tables_of(model)
    for name in (name for name, rule in rules.items() if rule.precision == "fp16"):
        tables[name].data_type = DataType.FP16
        narrow = torch.empty_like(model.get_parameter(name), dtype=torch.half)
        model.get_submodule(name.rpartition(".")[0]).weight = nn.Parameter(narrow)


def _keep_gradients(plan: ShardingPlan, tables: list[str]) -> None:
    """Have these tables looked up by the kernel that leaves an ordinary gradient to step by.

    (As a planner's constraint TorchRec allows it for data-parallel tables only; it serves all others too.)
    """
    for placed in plan.plan.values():
        for name, parameter in placed.items():
            if name in tables:
                parameter.compute_kernel = EmbeddingComputeKernel.DENSE.value


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The planner and the kernels log pages at WARNING, some of it on the root logger."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
