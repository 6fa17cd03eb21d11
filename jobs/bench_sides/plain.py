"""The zoo's rankers as an able user writes them in PyTorch alone, from the papers, at our widths.

B rows, F single ids, L longest history, E width of a behaviour
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from jobs.bench_sides.bare import Run, matched
from jobs.bench_sides.rows import FLOATS, HISTORY, TABLES, Rows, batches

DIM, HIDDEN, ATTENTION, CROSSES, BOTTOM = 16, (256, 128), 36, 3, 64
EVENT = DIM * len(HISTORY)
FIELDS = len(TABLES) + len(HISTORY)  # histories are fields as their mean
WIDTH = FIELDS * DIM + FLOATS


@dataclass(frozen=True)
class Inputs:
    """ids [B, F]; histories [B, L] padded, and as (ids, offsets) to pool; real [B, L], dense [B, 8]."""

    ids: torch.Tensor
    history: list[torch.Tensor]
    negative: list[torch.Tensor]
    pooled: list[tuple[torch.Tensor, torch.Tensor]]
    length: torch.Tensor
    real: torch.Tensor
    dense: torch.Tensor
    click: torch.Tensor

    @classmethod
    def of(cls, rows: Rows) -> "Inputs":
        found = {name: torch.from_numpy(column) for name, column in rows.items()}
        length = found["length"].long()
        real = torch.arange(found["session"].shape[1]) < length[:, None]
        offsets = F.pad(length.cumsum(0), (1, 0))[:-1]
        history = [found[f"history_{name}"].long() for name in HISTORY]
        negative = [found[f"negative_{name}"].long() for name in HISTORY]
        pooled = [(ids[real], offsets) for ids in history]
        return cls(
            found["ids"].long(), history, negative, pooled, length, real, found["dense"], found["click"]
        )


class Plain(nn.Module):
    """Tables and what models read of them; `loss` is the cross-entropy of `forward`'s logits [B]."""

    def __init__(self, dim: int = DIM) -> None:
        super().__init__()
        self.tables: Any = nn.ModuleDict()
        for name, rows in TABLES.items():
            table = nn.Embedding(rows, dim, padding_idx=0)
            nn.init.normal_(table.weight, std=0.01)
            self.tables[name] = table

    def singles(self, x: Inputs) -> list[torch.Tensor]:
        """F times [B, D]"""
        return [table(x.ids[:, number]) for number, table in enumerate(self.tables.values())]

    def fields(self, x: Inputs) -> torch.Tensor:
        """[B, F + histories, D]"""
        pooled = []
        for name, (ids, offsets) in zip(HISTORY, x.pooled, strict=True):
            table = self.tables[name]
            pooled.append(F.embedding_bag(ids, table.weight, offsets, mode="mean", sparse=table.sparse))
        return torch.stack([*self.singles(x), *pooled], dim=1)

    def inputs(self, x: Inputs) -> torch.Tensor:
        """[B, I] fields and floats side by side."""
        return torch.cat([self.fields(x).flatten(1), x.dense], dim=1)

    def events(self, ids: list[torch.Tensor]) -> torch.Tensor:
        """[B, L, E]"""
        return torch.cat([self.tables[name](i) for name, i in zip(HISTORY, ids, strict=True)], dim=-1)

    def loss(self, x: Inputs) -> torch.Tensor:
        return F.binary_cross_entropy_with_logits(self(x), x.click)


def mlp(inputs: int, *widths: int, out: int | None = 1) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Linear(inputs, width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, *([] if out is None else [nn.Linear(inputs, out)]))


class Linear(Plain):
    def __init__(self) -> None:
        super().__init__(dim=1)
        self.dense = nn.Linear(FLOATS, 1)

    def forward(self, x: Inputs) -> torch.Tensor:
        return (torch.stack(self.singles(x)).sum(0) + self.dense(x.dense)).squeeze(1)


class MLP(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.tower = mlp(WIDTH, *HIDDEN)

    def forward(self, x: Inputs) -> torch.Tensor:
        return self.tower(self.inputs(x)).squeeze(1)


class WideDeep(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.wide = Plain(dim=1)

    def forward(self, x: Inputs) -> torch.Tensor:
        return super().forward(x) + torch.stack(self.wide.singles(x)).sum(0).squeeze(1)


class FM(Plain):
    def __init__(self, *hidden: int) -> None:
        super().__init__()
        self.linear = Linear()
        self.of_floats = nn.Parameter(torch.randn(FLOATS, DIM) * 0.01)
        self.tower = mlp(WIDTH, *hidden) if hidden else None

    def forward(self, x: Inputs) -> torch.Tensor:
        fields = self.fields(x)
        vectors = torch.cat([fields, x.dense[:, :, None] * self.of_floats], dim=1)
        pairs = 0.5 * (vectors.sum(1).square() - vectors.square().sum(1)).sum(1)
        logit = self.linear(x) + pairs
        if self.tower is None:
            return logit
        return logit + self.tower(torch.cat([fields.flatten(1), x.dense], dim=1)).squeeze(1)


class DeepCrossing(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.units = nn.ModuleList(mlp(WIDTH, width, out=WIDTH) for width in HIDDEN)
        self.score = nn.Linear(WIDTH, 1)

    def forward(self, x: Inputs) -> torch.Tensor:
        state = self.inputs(x)
        for unit in self.units:
            state = torch.relu(state + unit(state))
        return self.score(state).squeeze(1)


class DCN(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.crosses = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(CROSSES))
        self.tower = mlp(WIDTH, *HIDDEN, out=None)
        self.score = nn.Linear(WIDTH + HIDDEN[-1], 1)

    def forward(self, x: Inputs) -> torch.Tensor:
        first = crossed = self.inputs(x)
        for cross in self.crosses:
            crossed = first * cross(crossed) + crossed
        return self.score(torch.cat([crossed, self.tower(first)], dim=1)).squeeze(1)


class DLRM(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.bottom = mlp(FLOATS, BOTTOM, DIM, out=None)
        self.register_buffer("pairs", torch.triu_indices(FIELDS + 1, FIELDS + 1, offset=1))
        self.pairs: torch.Tensor
        self.top = mlp(self.pairs.shape[1] + DIM, *HIDDEN)

    def forward(self, x: Inputs) -> torch.Tensor:
        floats = self.bottom(x.dense)
        vectors = torch.cat([floats[:, None], self.fields(x)], dim=1)
        dots = (vectors @ vectors.transpose(1, 2))[:, self.pairs[0], self.pairs[1]]
        return self.top(torch.cat([floats, dots], dim=1)).squeeze(1)


class Dice(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width, affine=False)
        self.alpha = nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = torch.sigmoid(self.norm(x))
        return (gate + (1 - gate) * self.alpha) * x


class Attending(Plain):
    """Single fields, what `interest` makes of the history, and floats, to a tower with Dice."""

    def __init__(self) -> None:
        super().__init__()
        first, second = HIDDEN
        width = len(TABLES) * DIM + EVENT + FLOATS
        self.tower = nn.Sequential(
            nn.Linear(width, first), Dice(first), nn.Linear(first, second), Dice(second), nn.Linear(second, 1)
        )

    def interest(self, x: Inputs, candidate: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, x: Inputs) -> torch.Tensor:
        singles = self.singles(x)
        interest = self.interest(x, torch.cat(singles[: len(HISTORY)], dim=1))
        return self.tower(torch.cat([*singles, interest, x.dense], dim=1)).squeeze(1)


class DIN(Attending):
    def __init__(self) -> None:
        super().__init__()
        self.unit = nn.Sequential(nn.Linear(4 * EVENT, ATTENTION), Dice(ATTENTION), nn.Linear(ATTENTION, 1))

    def interest(self, x: Inputs, candidate: torch.Tensor) -> torch.Tensor:
        """Unnormalised weights, of real events alone."""
        events = self.events(x.history)
        real = events[x.real]
        of_row = torch.repeat_interleave(candidate, x.length, dim=0, output_size=len(real))
        weight = events.new_zeros(x.real.shape)
        weight[x.real] = self.unit(torch.cat([real, of_row, real - of_row, real * of_row], dim=1)).squeeze(1)
        return torch.bmm(weight[:, None], events).squeeze(1)


class DIEN(Attending):
    def __init__(self) -> None:
        super().__init__()
        self.extractor = nn.GRU(EVENT, EVENT, batch_first=True)
        self.of_input, self.of_state = nn.Linear(EVENT, 3 * EVENT), nn.Linear(EVENT, 3 * EVENT)
        self.attention = nn.Linear(EVENT, EVENT, bias=False)
        self.auxiliary = torch.zeros(())

    def interest(self, x: Inputs, candidate: torch.Tensor) -> torch.Tensor:
        """The AUGRU's last state, a loop over steps of the padded batch, as public versions have it."""
        events, wrong = self.events(x.history), self.events(x.negative)
        lengths = x.length.clamp(min=1)  # packing takes no row without any
        packed = pack_padded_sequence(events, lengths, batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(self.extractor(packed)[0], batch_first=True)
        real = x.real[:, : states.shape[1]]
        self.auxiliary = self._auxiliary(states, events, wrong, real)
        score = torch.einsum("ble,be->bl", states, self.attention(candidate))
        weight = torch.softmax(score.masked_fill(~real, torch.finfo(score.dtype).min), dim=1) * real
        gates, state = self.of_input(states), torch.zeros_like(candidate)
        for step in range(states.shape[1]):
            reset, update, new = gates[:, step].chunk(3, dim=1)
            of_reset, of_update, of_new = self.of_state(state).chunk(3, dim=1)
            update = torch.sigmoid(update + of_update) * weight[:, step, None]  # 0 behind the end
            new = torch.tanh(new + torch.sigmoid(reset + of_reset) * of_new)
            state = torch.lerp(state, new, update)
        return state

    def _auxiliary(
        self, states: torch.Tensor, events: torch.Tensor, wrong: torch.Tensor, real: torch.Tensor
    ) -> torch.Tensor:
        longest = states.shape[1]
        has_next = real[:, 1:]
        right = (states[:, :-1] * events[:, 1:longest]).sum(-1)[has_next]
        left = (states[:, :-1] * wrong[:, 1:longest]).sum(-1)[has_next]
        return (F.softplus(-right) + F.softplus(left)).mean()

    def loss(self, x: Inputs) -> torch.Tensor:
        return super().loss(x) + self.auxiliary


_MAKE: dict[str, Callable[[], Plain]] = {
    "lr": Linear,
    "fm": FM,
    "mlp": MLP,
    "wide_deep": WideDeep,
    "deep_crossing": DeepCrossing,
    "dcn": DCN,
    "deepfm": partial(FM, *HIDDEN),
    "dlrm": DLRM,
    "din": DIN,
    "dien": DIEN,
}
MODELS = tuple(_MAKE)


def prepared(model: str, rows: Rows, batch_rows: int) -> dict[str, Run]:
    """`matched` alone: there is nothing that ships."""
    inputs = [Inputs.of(batch) for batch in batches(rows, batch_rows)]
    return {"matched": matched(_MAKE[model], lambda plain, x: plain.loss(x), inputs, len(rows["click"]))}
