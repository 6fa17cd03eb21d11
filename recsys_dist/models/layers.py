"""Building blocks that models share: MLP, embedding tables over TorchRec, and how they start.

B rows, D embedding dimension, F features
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedTensor, PoolingType

from recsys_dist.errors import ConfigError
from recsys_dist.schema import IdFeature, Schema

DIM_UNIT = 4  # FBGEMM's sharded kernels ask for table dimensions that are multiples of it

Activation = Literal["relu", "leaky_relu", "prelu", "gelu", "tanh", "sigmoid"]

_ACTIVATIONS: dict[Activation, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "prelu": nn.PReLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}

# He et al. 2015 (arXiv 1502.01852): the slope on the negative side enters the variance. GELU has no
# closed form and is started as ReLU. Tanh and sigmoid start as Glorot & Bengio 2010 (AISTATS) have it.
_HE_SLOPE: dict[Activation, float] = {"relu": 0.0, "leaky_relu": 0.01, "prelu": 0.25, "gelu": 0.0}


class MLP(nn.Module):
    """Linear → activation → dropout for each of `widths`, then a plain linear layer to `out` if given.

    Weights start as fits the activation (He for the ReLU family, Xavier for the others), biases at 0,
    drawn from torch's global generator: seed it before building.
    """

    def __init__(
        self,
        inputs: int,
        widths: Sequence[int],
        activation: Activation = "relu",
        dropout: float = 0.0,
        out: int | None = None,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in widths:
            layers += [_linear(inputs, width, activation), _ACTIVATIONS[activation]()]
            if dropout > 0:
                layers.append(nn.Dropout(dropout))
            inputs = width
        if out is not None:
            layers.append(_linear(inputs, out, None))
        self.layers = nn.Sequential(*layers)
        self.out_features = inputs if out is None else out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, inputs] → [B, out_features]."""
        return self.layers(x)


def _linear(inputs: int, outputs: int, activation: Activation | None) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    if activation in _HE_SLOPE:
        nn.init.kaiming_normal_(layer.weight, a=_HE_SLOPE[activation], nonlinearity="leaky_relu")
    else:
        gain = nn.init.calculate_gain("tanh") if activation == "tanh" else 1.0
        nn.init.xavier_normal_(layer.weight, gain=gain)
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
            pooling=PoolingType.MEAN,
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
