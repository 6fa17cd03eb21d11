"""Building blocks that models share: MLP, embedding tables over TorchRec, and how they start.

B rows, D embedding dimension, F features
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedTensor, PoolingType

from recsys_dist.errors import ConfigError
from recsys_dist.feature_kinds import IdFeature, SingleId
from recsys_dist.models.precision import by_hand, full
from recsys_dist.schema import Schema

DIM_UNIT = 4  # FBGEMM's sharded kernels ask for table dimensions that are multiples of it

RowActivation = Literal["relu", "leaky_relu", "prelu", "gelu", "tanh", "sigmoid"]
Activation = Literal[RowActivation, "dice"]  # which looks at the other rows of a batch
Norm = Literal["batch", "layer"]
Widths = tuple[Annotated[int, Field(ge=1)], ...]  # of the layers of a tower


class WorkerSum(nn.Module):
    """The sum of a tensor over all workers, differentiable. Alone a worker is all of them: the identity.

    `train.sharding.shard` puts its collective twin in this one's place, so that no model knows of ranks.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape on every worker."""
        return x


class WorkerMax(nn.Module):
    """The largest of all workers' counts; see WorkerSum."""

    def forward(self, count: int, device: torch.device) -> int:
        """`device` is that of the model's tensors."""
        del device  # its collective twin communicates there
        return count


class BatchNorm(nn.Module):
    """Batch normalisation (Ioffe & Szegedy 2015, arXiv 1502.03167) over the real rows of all workers.

    torch's own would count padding, and each worker for itself: training would depend on how many there
    are. `affine` learns a scale and a shift. In evaluation: running means of what training saw.
    """

    def __init__(self, width: int, affine: bool = True, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.workers = WorkerSum()
        self.momentum, self.eps = momentum, eps
        self.scale = nn.Parameter(torch.ones(width)) if affine else None
        self.shift = nn.Parameter(torch.zeros(width)) if affine else None
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))
        self.mean: torch.Tensor
        self.variance: torch.Tensor

    def forward(self, x_BH: torch.Tensor, real_B: torch.Tensor | None = None) -> torch.Tensor:
        """[B, H] → [B, H]; rows where `real_B` [B] bool is False count for nothing."""
        x_BH = full(x_BH)
        mean, scale = self.moments(x_BH, real_B)
        out = (x_BH - mean) * scale
        return out if self.scale is None or self.shift is None else out * self.scale + self.shift

    def moments(self, x_BH: torch.Tensor, real_B: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """[H] mean and [H] 1 / sqrt(variance + ε): of these rows in training, else of what training saw."""
        if not self.training:
            return self.mean, (self.variance + self.eps).rsqrt()
        rows = x_BH.new_ones(len(x_BH)) if real_B is None else real_B.to(x_BH.dtype)
        # sums about the running mean, which all workers share: no digits are lost where means are large
        of_rows = by_hand(_Sums, x_BH, self.mean, rows)
        sums = self.workers(torch.cat([*of_rows, rows.sum()[None]]))
        first, second, count = sums[: x_BH.shape[1]], sums[x_BH.shape[1] : -1], sums[-1].clamp(min=1)
        offset = first / count
        variance = (second / count - offset.square()).clamp(min=0)
        mean = self.mean + offset
        with torch.no_grad():
            # nor is a batch remembered that is not finite: training may leave it out
            # nor is a single row, which has no variance
            seen = ((sums[-1] > 1) & sums.isfinite().all()).to(x_BH.dtype) * self.momentum
            unbiased = variance * count / (count - 1).clamp(min=1)
            self.mean.lerp_(mean.nan_to_num(), seen)
            self.variance.lerp_(unbiased.nan_to_num(), seen)
        return mean, (variance + self.eps).rsqrt()


class _Sums(torch.autograd.Function):
    """Σ_b r_b (x_b - c) and Σ_b r_b (x_b - c)²: sums over rows as products with r, and one pass backward."""

    @staticmethod
    def forward(
        ctx: Any, x_BH: torch.Tensor, c_H: torch.Tensor, r_B: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(x_BH, c_H.clone(), r_B)  # the running mean changes before the backward pass
        centred = x_BH - c_H
        return r_B @ centred, r_B @ centred.square_()

    @staticmethod
    def backward(ctx: Any, *of_sums: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        x_BH, c_H, r_B = ctx.saved_tensors
        first_H, second_H = of_sums[0], 2 * of_sums[1]
        return torch.addcmul(first_H - c_H * second_H, x_BH, second_H).mul_(r_B[:, None]), None, None


class Dice(nn.Module):
    """Data adaptive activation (DIN, Zhou et al. 2018, arXiv 1706.06978, eq. 3): PReLU with a moving knee.

    f(s) = p(s)·s + (1 - p(s))·alpha·s,  p(s) = sigmoid( (s - E[s]) / sqrt(Var[s] + ε) )
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = BatchNorm(width, affine=False, eps=1e-8)
        self.alpha = nn.Parameter(torch.zeros(width))

    def forward(self, s_BH: torch.Tensor, real_B: torch.Tensor | None = None) -> torch.Tensor:
        """[B, H] → [B, H]; moments as in BatchNorm."""
        s_BH = full(s_BH)
        out: torch.Tensor = by_hand(_Gate, s_BH, *self.norm.moments(s_BH, real_B), self.alpha)
        return out


class _Gate(torch.autograd.Function):
    """Dice for given moments, (alpha + (1 - alpha)·p)·s with p = sigmoid((s - m)·k).

    By hand in few passes: over 40k tokens x 36 8 ms instead of autograd's 15, forward and backward.
    """

    @staticmethod
    def forward(
        ctx: Any, s_BH: torch.Tensor, m_H: torch.Tensor, k_H: torch.Tensor, alpha_H: torch.Tensor
    ) -> torch.Tensor:
        p_BH = torch.addcmul(-m_H * k_H, s_BH, k_H).sigmoid_()
        ctx.save_for_backward(s_BH, p_BH, m_H, k_H, alpha_H)
        return torch.addcmul(alpha_H, p_BH, 1 - alpha_H).mul_(s_BH)

    @staticmethod
    def backward(ctx: Any, *of_out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        s_BH, p_BH, m_H, k_H, alpha_H = ctx.saved_tensors
        slope_H, one_B = 1 - alpha_H, s_BH.new_ones(len(s_BH))  # sums as products, three times as fast
        gs_BH = of_out[0] * s_BH
        gsp_BH = gs_BH * p_BH
        of_alpha_H = one_B @ gs_BH - one_B @ gsp_BH
        of_z_BH = gsp_BH.addcmul_(gsp_BH, p_BH, value=-1)  # g s p (1 - p), but for its factor 1 - alpha
        of_s_BH = torch.addcmul(alpha_H, p_BH, slope_H).mul_(of_out[0]).addcmul_(of_z_BH, slope_H * k_H)
        sum_H = one_B @ of_z_BH
        of_k_H = slope_H * (one_B @ torch.mul(of_z_BH, s_BH, out=gs_BH) - m_H * sum_H)
        return of_s_BH, -slope_H * k_H * sum_H, of_k_H, of_alpha_H


_ACTIVATIONS: dict[Activation, Callable[[int], nn.Module]] = {
    "relu": lambda _: nn.ReLU(),
    "leaky_relu": lambda _: nn.LeakyReLU(),
    "prelu": lambda _: nn.PReLU(),
    "dice": Dice,
    "gelu": lambda _: nn.GELU(),
    "tanh": lambda _: nn.Tanh(),
    "sigmoid": lambda _: nn.Sigmoid(),
}
_NORMS: dict[Norm, Callable[[int], nn.Module]] = {"batch": BatchNorm, "layer": nn.LayerNorm}

# He et al. 2015 (arXiv 1502.01852): the slope on the negative side enters the variance. GELU has no
# closed form and is started as ReLU. Tanh and sigmoid start as Glorot & Bengio 2010 (AISTATS) have it.
# Dice begins as sigmoid(z)·s, close to GELU.
_HE_SLOPE: dict[Activation, float] = {
    "relu": 0.0,
    "leaky_relu": 0.01,
    "prelu": 0.25,
    "dice": 0.0,
    "gelu": 0.0,
}


class MLP(nn.Module):
    """Linear → norm → activation → dropout for each of `widths`, then a plain linear layer to `out` if given.

    Weights start as fits the activation (He for the ReLU family, Xavier for the others), biases at 0,
    drawn from torch's global generator: seed it before building. Batch norm takes a bias before it out
    again: there is none, for Adam would make steps of the rounding noise that is its gradient.
    """

    def __init__(
        self,
        inputs: int,
        widths: Sequence[int],
        activation: Activation = "relu",
        dropout: float = 0.0,
        out: int | None = None,
        norm: Norm | None = None,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in widths:
            layers.append(_linear(inputs, width, activation, bias=norm != "batch"))
            if norm is not None:
                layers.append(_NORMS[norm](width))
            layers.append(_ACTIVATIONS[activation](width))
            if dropout > 0:
                layers.append(nn.Dropout(dropout))
            inputs = width
        if out is not None:
            layers.append(_linear(inputs, out, None))
        self.layers = nn.Sequential(*layers)
        self.out_features = inputs if out is None else out

    def forward(self, x: torch.Tensor, real_B: torch.Tensor | None = None) -> torch.Tensor:
        """[B, inputs] → [B, out_features]; `real_B` [B] bool keeps padding out of batch moments."""
        return self.after(0, x, real_B)

    def after(self, first: int, x: torch.Tensor, real_B: torch.Tensor | None = None) -> torch.Tensor:
        """The same from layer number `first` on, for a model that computes the layers before it otherwise."""
        for layer in list(self.layers)[first:]:
            x = layer(x, real_B) if isinstance(layer, BatchNorm | Dice) else layer(x)
        return x


def _linear(inputs: int, outputs: int, activation: Activation | None, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=bias)
    if activation in _HE_SLOPE:
        nn.init.kaiming_normal_(layer.weight, a=_HE_SLOPE[activation], nonlinearity="leaky_relu")
    else:
        gain = nn.init.calculate_gain("tanh") if activation == "tanh" else 1.0
        nn.init.xavier_normal_(layer.weight, gain=gain)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def normal(std: float) -> Callable[[torch.Tensor], Any]:
    """Table start: N(0, std²)."""
    return partial(nn.init.normal_, std=std)


def embedding_tables(
    schema: Schema,
    features: Iterable[IdFeature],
    dim: int | Mapping[str, int],
    init: Callable[[torch.Tensor], Any],
    prefix: str = "",
    extra: Sequence[EmbeddingBagConfig] = (),
) -> EmbeddingBagCollection:
    """One table [rows, dim] per `schema.table(feature)`, on the meta device until sharded or materialised.

    `dim` is that of all tables, or a mapping by table (without `prefix`).
    Features that share a table (an item and the sequences of such items) are looked up in it together.
    Ids are pooled to their mean: a single one is itself, none at all (padding, an empty history) are zeros.
    (Of single ones as their sum, for which FBGEMM's CPU kernel takes a half to a fifth of the time.)
    `prefix` keeps the names of two collections over the same features apart; `extra` are tables of another
    make in the same collection. ConfigError where the schema is not fitted.
    """
    by_table: dict[str, list[IdFeature]] = {}
    for feature in features:
        by_table.setdefault(schema.table(feature), []).append(feature)
    configs = [
        EmbeddingBagConfig(
            name=prefix + table,
            num_embeddings=table_rows(shared[0]),
            embedding_dim=dim if isinstance(dim, int) else dim[table],
            feature_names=[feature.name for feature in shared],
            pooling=PoolingType.SUM if all(isinstance(f, SingleId) for f in shared) else PoolingType.MEAN,
            init_fn=init,
        )
        for table, shared in by_table.items()
    ]
    return EmbeddingBagCollection(tables=[*configs, *extra], device=torch.device("meta"))


def table_rows(feature: IdFeature) -> int:
    if feature.rows is None:
        raise ConfigError(f"feature {feature.name!r} has no table size: fit the schema's vocabularies first")
    return feature.rows


def pooled(embeddings: KeyedTensor, names: Sequence[str]) -> torch.Tensor:
    """[B, F·D] pooled embeddings in the order of `names`.

    A sharded collection returns its keys in the order of its shards, so `.values()` alone would hand
    the next layer other columns than in the unsharded model. (Split and concatenated: on CPU four times
    as fast as `KeyedTensor.regroup` at 2,048 x 30 x 16, forward and backward.)
    """
    if list(embeddings.keys()) == list(names):
        return embeddings.values()
    by_name = embeddings.to_dict()
    return torch.cat([by_name[name] for name in names], dim=1)
