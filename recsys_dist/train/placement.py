"""Which worker each table goes to: what TorchRec's planner may choose from, and what it chooses."""

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingCollection
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.partitioners import GreedyPerfPartitioner, SortBy
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.types import CacheParams
from torchrec.modules.embedding_configs import DataType

from recsys_dist.config import Config, nearest
from recsys_dist.errors import ConfigError
from recsys_dist.train.optim import OptimizerConfig, TableOptimizer, attach, table_rules
from recsys_dist.train.sharders import Exchange, sharders

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
    ids: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = Field(
        default_factory=dict,
        description="table -> ids of a row of data that are looked up in it, by which the planner gives each "
        "worker as much to do; default: as the first training rows have it",
    )
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
    narrow(model, rules)
    attach(model, rules)
    using = sharders(sharding.exchange, torch.device(device))
    planner = planner_of(sharding, tables, rules, workers, device)
    try:
        with quiet():
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
    for setting in ("tables", "offload", "ids"):
        for name in getattr(cfg, setting):
            if name not in names:
                raise ConfigError(
                    f"sharding.{setting}: the model has no table {name!r}{nearest(name, names)}"
                )
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
            pooling_factors=_ids_per_feature(cfg, config),
            cache_params=CacheParams(load_factor=cfg.cached) if config.name in cfg.offload else None,
        )
        for weight, config in tables.items()
    }


def _ids_per_feature(cfg: ShardingConfig, table: Any) -> list[float]:
    """What the planner multiplies with the cost of a lookup, for each feature that looks the table up."""
    features = len(table.feature_names)
    return [cfg.ids.get(table.name, features) / features] * features


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


def planner_of(
    cfg: ShardingConfig,
    tables: Mapping[str, Any],
    rules: Mapping[str, TableOptimizer],
    workers: int,
    device: str,
) -> EmbeddingShardingPlanner:
    """TorchRec's, told of our tables. ConfigError for what could not be trained rightly."""
    constraints = _constraints(cfg, tables, rules, device)
    # what fits is asked beforehand, of the real machines: see train.plan
    memory = {"ddr_cap": _ANY_BYTES} if device == "cpu" else {"hbm_cap": _gpu_bytes(), "ddr_cap": _ANY_BYTES}
    with quiet():
        topology = Topology(world_size=workers, compute_device=device, **memory)
        # it places the most work first; by default the largest table, and what is left of work goes anywhere
        by_work = GreedyPerfPartitioner(sort_by=SortBy.PERF)
        return EmbeddingShardingPlanner(
            topology=topology, constraints=constraints, partitioner=by_work, stats=[]
        )


def _gpu_bytes() -> int:
    return int(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else _ANY_BYTES


def narrow(model: nn.Module, rules: Mapping[str, TableOptimizer]) -> None:
    """Have "meta" tables of lower precision be sharded as such. (FBGEMM has no bf16 on CPU.)"""
    tables = tables_of(model)
    for name in (name for name, rule in rules.items() if rule.precision == "fp16"):
        tables[name].data_type = DataType.FP16
        narrow = torch.empty_like(model.get_parameter(name), dtype=torch.half)
        model.get_submodule(name.rpartition(".")[0]).weight = nn.Parameter(narrow)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The planner and the kernels log pages at WARNING, some of it on the root logger."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
