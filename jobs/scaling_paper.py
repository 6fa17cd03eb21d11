"""The cost model of `jobs.bench_scaling` with the rates of data sheets: 8 to 512 GPUs, a terabyte of tables.

Rates, dense, per H100 SXM5 (NVIDIA's data sheet): HBM3 3.35 TB/s and 80 GB; TF32 494.7 Tflop/s (half of the
989.4 with sparsity); NVLink 450 GB/s each way, 8 GPUs a machine; InfiniBand NDR 400 Gb/s a GPU. Shares of
them that are reached are assumptions, named in `H100`; so are latencies and what a step costs besides.
"""

from dataclasses import dataclass, replace

from jobs.bench_workers import ids_and_floats
from jobs.cost_model import FLOAT_BYTES, Machine, Spread, Table, Work, simulated, step_seconds, total_s
from recsys_dist.config import rng_for
from recsys_dist.models import din, dlrm
from recsys_dist.models.ranking import TowerConfig
from recsys_dist.schema import Schema

GPUS = (8, 16, 32, 64, 128, 256, 512)
KINDS = ("table_wise", "column_wise", "row_wise", "row_hashed")
ROWS_PER_GPU = 8192
TABLES_BYTES = 1e12
ZIPF = 1.05
_DRAWN_ROWS = 200_000  # of a batch at most, to learn how its ids fall
_HBM_BYTES, FREE = 80e9, 0.75  # share of the memory that tables may take; the rest is the step's
H100 = Machine(
    loader=1.0,  # replaced by what was measured
    gather=0.5 * 3.35e12,
    flops=0.4 * 494.7e12,
    stream=0.8 * 3.35e12,
    near=0.8 * 450e9,
    far=0.8 * 50e9,
    group=8,
    latency_s=30e-6,
    per_peer_s=1e-6,
    step_s=3e-3,  # some 500 kernels and the Python that starts them
    ahead=True,
)


@dataclass(frozen=True)
class Asked:
    """What a model asks per row, and its tables."""

    work: Work
    tables: list[Table]


@dataclass(frozen=True)
class Point:
    """A model on so many GPUs by one kind of sharding: phases' seconds, and what its tables take of a GPU."""

    model: str
    gpus: int
    kind: str
    spread: Spread
    phases: dict[str, float]
    held_bytes: float

    @property
    def fits(self) -> bool:
        return self.held_bytes <= FREE * _HBM_BYTES

    @property
    def step_s(self) -> float:
        """With the loader this repository has: one reader and one collating thread a worker."""
        return total_s(self.phases, ahead=True)

    @property
    def unfed_s(self) -> float:
        """With a loader that is never waited for."""
        return total_s({**self.phases, "loader": 0.0}, ahead=True)

    @property
    def slowest(self) -> str:
        """The phase that takes longest, but for loading, which goes on beside the others."""
        return max((name for name in self.phases if name != "loader"), key=lambda name: self.phases[name])


def models() -> dict[str, tuple[TowerConfig, Schema]]:
    """Name -> settings and a schema whose tables are a terabyte of fp32."""
    deep = dlrm.Config(embedding_dim=128, bottom=(512, 256), hidden=(1024, 1024, 512, 256))
    history = {"kind": "sequence", "name": "history", "of": "item", "max_length": 20}
    attending = din.Config(embedding_dim=64, hidden=(512, 256))
    return {
        "DLRM": (deep, ids_and_floats(26, int(TABLES_BYTES / 26 / 128 / FLOAT_BYTES))),
        "DIN": (attending, ids_and_floats(10, int(TABLES_BYTES / 10 / 64 / FLOAT_BYTES), history)),
    }


def on_paper(asked: dict[str, Asked], loader_rows_per_s: float, seed: int) -> list[Point]:
    """Every model on every number of GPUs by every kind of sharding."""
    machine = replace(H100, loader=loader_rows_per_s)
    return [
        point(name, one, machine, gpus, kind, seed)
        for name, one in asked.items()
        for gpus in GPUS
        for kind in KINDS
    ]


def point(name: str, asked: Asked, machine: Machine, gpus: int, kind: str, seed: int) -> Point:
    batch = ROWS_PER_GPU * gpus
    rng = rng_for(seed, "scaling", name, gpus, kind)
    spread = simulated(asked.tables, kind, gpus, min(batch, _DRAWN_ROWS), ZIPF, rng)
    # row-wise Adagrad keeps a number per row; columns, which it cannot step alike, take Adagrad's per weight
    states = [table.dim if kind == "column_wise" else 1 for table in asked.tables]
    floats = sum(table.rows * (table.dim + state) for table, state in zip(asked.tables, states, strict=True))
    return Point(
        model=name,
        gpus=gpus,
        kind=kind,
        spread=spread,
        phases=step_seconds(asked.work, machine, batch, gpus, spread),
        held_bytes=floats * FLOAT_BYTES / gpus * spread.fullest,
    )


def best(points: list[Point]) -> list[Point]:
    """The fastest of those of one model and number of GPUs that fit, or of all where none does."""
    found = []
    for model, gpus in dict.fromkeys((p.model, p.gpus) for p in points):
        these = [p for p in points if (p.model, p.gpus) == (model, gpus)]
        found.append(min([p for p in these if p.fits] or these, key=lambda p: p.unfed_s))
    return found
