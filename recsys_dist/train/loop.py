"""The training loop: no Ray, and no more knowledge of ranks than a sum over the workers.

Every step the workers agree, in one small all-reduce that travels while the previous step computes, on
how many rows and how much weight the global batch has. A worker that ran out contributes padding of
weight zero until all have. The gradient is that of the global weighted mean: each worker's loss is
divided by the global weight and multiplied by the number of workers, which the averaging of dense
gradients and of TorchRec's sparse ones takes out again.
"""

import functools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn
from torchrec import KeyedJaggedTensor

from recsys_dist.batch import Batch
from recsys_dist.errors import NonFiniteLossError, RecsysError
from recsys_dist.models.precision import full
from recsys_dist.schema import Schema
from recsys_dist.train.optim import Optimizers
from recsys_dist.train.sampling import Stopwatch, Use, added, table_use
from recsys_dist.train.turn import Step, Turn, brought

T = TypeVar("T")
_NAMED_ROWS = 5  # rows that a NonFiniteLossError names
# Steps whose loss may still be on its way: reading the newest one would make the host wait for a GPU.
_UNREAD_STEPS = {"cpu": 1, "cuda": 8}


class Workers:
    """Sums over all workers; without torch.distributed there is one."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.size = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0

    def apart(self) -> "Workers":
        """The same workers, who may talk in another thread meanwhile, and wait long. Collective.

        (A lost worker is noticed by those who talk in every step.)
        """
        return self if self.size == 1 else Workers(dist.new_group(backend="gloo"))

    def start_sum(self, values: list[float]) -> Callable[[], list[float]]:
        """Begin a sum of `values` over the workers; call the result to wait for it. Collective."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.size == 1:
            return total.tolist
        work = dist.all_reduce(total, async_op=True, group=self.group)

        def wait() -> list[float]:
            work.wait()
            return total.tolist()

        return wait

    def gather(self, value: T) -> list[T]:
        """`value` of every worker, on every worker. Collective; pickles: for what is rare."""
        gathered = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(gathered, value, group=self.group)
        return gathered

    def agree(self, value: T) -> T:
        """Rank 0's `value`, on every worker. Collective."""
        return self.gather(value)[0]

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` gives on rank 0, or the RecsysError it raises there, on every worker. Collective."""
        found: Any = None
        if self.rank == 0:
            try:
                found = make()
            except RecsysError as error:
                found = error
        found = self.agree(found)
        if isinstance(found, RecsysError):
            raise found
        return cast("T", found)


class Loss(nn.Module):
    """A model's loss as a forward pass, the form in which it can be sharded.

    With `autocast` matrix products take operands of bf16; weights, tables and their gradients stay float32.
    """

    def __init__(self, model: Any, autocast: bool = False) -> None:
        super().__init__()
        self.model = model
        self.autocast = autocast

    def forward(self, batch: Batch, step: int) -> torch.Tensor:
        """[B] loss of each row."""
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=self.autocast):
            return full(self.model.loss(batch, step))


@dataclass
class Totals:
    """What an epoch came to so far, over all workers; what ends in `_s`, and `seconds`, is this worker's.

    rows        that were trained
    skipped     rows of the batches that were left out for a loss that is not finite
    seconds     of training, without what saving took
    gradients   layer -> L2 norm of its gradient, at the newest step that was sampled
    step_ms     part of that step -> its milliseconds on this worker (see `sampling.PARTS`)
    tables      table -> ids, unknown ids, and distinct rows in a batch, summed over this worker's samples
    """

    steps: int = 0
    rows: int = 0
    skipped: int = 0
    weight: float = 0.0
    loss_sum: float = 0.0
    loader_s: float = 0.0
    saving_s: float = 0.0
    seconds: float = 0.0
    gradients: dict[str, float] = field(default_factory=dict)
    step_ms: dict[str, float] = field(default_factory=dict)
    tables: Use = field(default_factory=dict)

    @property
    def passed(self) -> int:
        """Rows that the epoch has gone through."""
        return self.rows + self.skipped

    @property
    def loss(self) -> float:
        """Weighted mean of the rows' losses, each taken before the step that its row was part of."""
        return self.loss_sum / self.weight if self.weight else 0.0


def one_by_one(epoch: "Epoch", turns: Iterator[Turn]) -> Iterator[Step]:
    """The steps of `turns`, each begun when the one before is done."""
    for turn in turns:
        step = epoch.forward(turn.to(epoch.idle.device))
        epoch.learn(step)
        yield step


@dataclass
class Epoch:
    """One pass over the workers' batches.

    model         `Loss` over the model, sharded or not
    idle          what a worker without data feeds: as many rows as a full batch, of weight zero; batches
                  go to the device that it is on
    on_step       called with the totals so far after each step whose loss is known to all
    sample_steps  steps from one sample to the next, of the layers' gradient norms, of where the step's
                  time goes, and of how its batch uses the tables; 0 takes none
    stopwatch     of the steps that are sampled
    tables        those whose use is sampled -> the features that are looked up in them
    seed          of what the model draws in a step, as dropout does, which then depends on its number alone
    due           asked of rank 0 before each step: whether to save after it
    save          called then on all workers, with the rows that this one has had. Collective
    skip_steps    in a row that may have a loss that is not finite; no worker steps then. The workers ask
                  each other before each backward pass where it is not 0
    totals        what to go on from
    schedule      runs the turns' steps in order: `one_by_one`, or `ahead.overlapped`
    """

    model: nn.Module
    optimizers: Optimizers
    idle: Batch
    workers: Workers
    on_step: Callable[[Totals], None] = lambda _: None
    sample_steps: int = 0
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    tables: Mapping[str, Sequence[str]] = field(default_factory=dict)
    seed: int | None = None
    due: Callable[[], bool] = lambda: False
    save: Callable[[int], None] = lambda _: None
    skip_steps: int = 0
    totals: Totals = field(default_factory=Totals)
    schedule: Callable[["Epoch", Iterator[Turn]], Iterator[Step]] = one_by_one

    def __post_init__(self) -> None:
        self._left_out = 0  # steps in a row, up to now
        self._known: deque[Step] = deque()  # to this worker alone
        self._began = 0.0  # since when `totals.seconds` does not count yet

    def run(self, batches: Iterator[Batch], step: int) -> Totals:
        """Train until no worker has data; `step` numbers the first step. Collective.

        Raises NonFiniteLossError, on all workers alike, naming rows of the newest bad batch.
        """
        self._began = time.perf_counter()
        self.model.train()
        first = self._next(batches)  # no step's time
        steps = self.schedule(self, self._turns(first, batches, step))
        while True:
            with self.stopwatch.timed(self._sampled(step)) as ms:
                done = next(steps, None)
            if done is None:
                break
            done.ms = ms
            self._known.append(done)
            step += 1
        self._settle_all()
        self._count_seconds()
        return self.totals

    def _turns(self, batch: Batch | None, batches: Iterator[Batch], step: int) -> Iterator[Turn]:
        mine, save = 0, False
        while True:
            rows, weight, save_next = self._agreed()
            if rows == 0:
                return
            tables = self._table_use(batch, step)
            current = self.idle if batch is None else batch.pad(self.idle.rows)
            if current.device != self.idle.device:
                current = current.pin_memory()
            before, mine = mine, mine + (batch.rows if batch is not None else 0)
            batch = self._next(batches)
            yield Turn(step, current, rows, weight, before, save, tables)
            step, save = step + 1, save_next

    def _next(self, batches: Iterator[Batch]) -> Batch | None:
        """This worker's next batch; and begin to agree on it: once all have, `_agreed` gives what they did.

        The oldest unsettled loss is carried along.
        """
        began = time.perf_counter()
        with self.stopwatch.part("loader"):
            batch = next(batches, None)
        self.totals.loader_s += time.perf_counter() - began
        mine = [0.0, 0.0] if batch is None else [float(batch.rows), float(batch.weight.sum())]
        save = float(self.workers.rank == 0 and self.due())
        unread = len(self._known) >= _UNREAD_STEPS[self.idle.device.type]
        settled = [self._known[0].loss_sum()] if unread else []
        total = self.workers.start_sum([*mine, save, *settled])

        @functools.cache
        def agreed() -> tuple[float, float, bool]:
            rows, weight, save, *settled = total()
            self._settle(settled)
            return rows, weight, bool(save)

        self._agreed = agreed
        return batch

    def _sampled(self, step: int) -> bool:
        return self.sample_steps > 0 and step % self.sample_steps == 0

    def _table_use(self, batch: Batch | None, step: int) -> Use:
        if batch is None or not self._sampled(step):
            return {}
        with self.stopwatch.part("sampling"):
            return table_use(batch, self.tables)

    def forward(self, turn: Turn) -> Step:
        """The forward pass of a turn, which is where the model is; before it saves, where due. Collective."""
        if turn.save:
            self._save(turn.before)
        if self.seed is not None:
            torch.manual_seed(self.seed + turn.number)
        with self.stopwatch.part("dense"):
            losses = self.model(turn.batch, turn.number)
            loss_sum = (losses * turn.batch.weight).sum()
            of = turn.number, turn.batch.row_id, losses.detach(), brought(loss_sum.detach())
            step = Step(*of, turn.rows, turn.weight, turn.tables)
            if not self.skip_steps or self._finite_everywhere(loss_sum):
                step.mean = loss_sum * (self.workers.size / turn.weight if turn.weight else 0.0)
            return step

    def learn(self, step: Step) -> None:
        """The backward pass of a step, and the optimizers', unless it is left out. Collective."""
        mean, step.mean = step.mean, None
        if mean is None:
            return
        with self.stopwatch.part("dense"):
            self.stopwatch.backward_of(mean)
            mean.backward()  # type: ignore[no-untyped-call]
        if self._sampled(step.number):
            with self.stopwatch.part("sampling"):
                step.gradients = self.optimizers.gradient_norms()
        with self.stopwatch.part("optimizer"):
            self.optimizers.step()

    def _save(self, mine: int) -> None:
        self._settle_all()  # what diverged is never saved
        self._count_seconds()
        with self.stopwatch.part("checkpoint"):
            self.save(mine)
        now = time.perf_counter()
        self.totals.saving_s += now - self._began
        self._began = now

    def _count_seconds(self) -> None:
        now = time.perf_counter()
        self.totals.seconds += now - self._began
        self._began = now

    def _finite_everywhere(self, loss_sum: torch.Tensor) -> bool:
        [bad] = self.workers.start_sum([float(not loss_sum.isfinite())])()
        return bad == 0

    def _settle_all(self) -> None:
        self._agreed()
        while self._known:
            self._settle(self.workers.start_sum([self._known[0].loss_sum()])())

    def _settle(self, sums: list[float]) -> None:
        for total in sums:
            step = self._known.popleft()
            self.totals.steps += 1
            if math.isfinite(total):
                self._left_out = 0
                self.totals.rows += int(step.rows)
                self.totals.weight += step.weight
                self.totals.loss_sum += total
            else:
                self._left_out += 1
                if self._left_out > self.skip_steps:
                    raise NonFiniteLossError(self._blame(step))
                self.totals.skipped += int(step.rows)
            if step.ms:
                found = {layer.removeprefix("model."): float(norm) for layer, norm in step.gradients.items()}
                self.totals.gradients, self.totals.step_ms = found, step.ms
                self.totals.tables = added(self.totals.tables, step.tables)
            self.on_step(self.totals)

    def _blame(self, step: Step) -> str:
        real = step.row_id >= 0
        bad = step.row_id[real & ~step.losses.isfinite()].tolist()
        found = self.workers.gather((bad, int(real.sum())))
        rows = [row for mine, _ in found for row in mine]
        of = sum(count for _, count in found)
        where = f"the loss of step {step.number} is not finite in {len(rows)} of its {of} rows"
        if len(rows) == of:
            return f"{where}: the weights diverged before; lower the learning rates or set dense.clip_norm"
        named = ", ".join(f"shard {row >> 32} row {row & 0xFFFFFFFF}" for row in sorted(rows)[:_NAMED_ROWS])
        return f"{where}: {named}{', ...' if len(rows) > _NAMED_ROWS else ''}; look at these rows' features"


def idle_batch(schema: Schema, rows: int) -> Batch:
    """`rows` rows of weight zero; the first looks up row 0 of every table.

    TorchRec's row-wise kernel needs equally many rows on every worker, and none takes zero of them.
    """
    keys = [feature.name for feature in schema.keys]
    one = Batch(
        dense=torch.zeros(1, len(schema.dense)),
        sparse=KeyedJaggedTensor(
            keys=keys,
            values=torch.zeros(len(keys), dtype=torch.int32),
            lengths=torch.ones(len(keys), dtype=torch.int32),
        ),
        labels={label.name: torch.zeros(1) for label in schema.labels},
        weight=torch.zeros(1),
        row_id=torch.full((1,), -1),
    )
    return one.pad(rows)
