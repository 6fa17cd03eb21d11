"""The kernels that lookups are sent to give what FBGEMM's own do: vectors, weights, optimizer state."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_codegen_lookup_invokers import (
    lookup_adagrad,
    lookup_rowwise_adagrad,
    lookup_sgd,
)
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)

from recsys_dist.train import kernels

RULES = {
    EmbOptimType.EXACT_ROWWISE_ADAGRAD: lookup_rowwise_adagrad,
    EmbOptimType.EXACT_ADAGRAD: lookup_adagrad,
    EmbOptimType.EXACT_SGD: lookup_sgd,
}
TABLES = (50, 7, 300)  # rows
SHARED = (0, 0, 1, 2, 2)  # the table of each feature


@pytest.fixture(params=RULES, ids=lambda rule: rule.name)
def rule(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> EmbOptimType:
    """The rule, by FBGEMM's own way until a test sends it another, and after the test again."""
    module: Any = RULES[request.param]
    monkeypatch.setattr(module, "invoke", getattr(module.invoke, "__wrapped__", module.invoke))
    return request.param


def trained(
    rule: EmbOptimType,
    pooling: PoolingMode,
    of: Sequence[int],
    widths: Sequence[int] = (8, 8, 8),
    precision: SparseType = SparseType.FP32,
) -> list[torch.Tensor]:
    """The vectors of three steps, and the weights and state after them."""
    rng = torch.Generator().manual_seed(0)
    tables = SplitTableBatchedEmbeddingBagsCodegen(
        [
            (rows, width, EmbeddingLocation.HOST, ComputeDevice.CPU)
            for rows, width in zip(TABLES, widths, strict=True)
        ],
        feature_table_map=list(of),
        optimizer=rule,
        learning_rate=0.1,
        eps=1e-8,
        pooling_mode=pooling,
        weights_precision=precision,
    )
    for weight in tables.split_embedding_weights():
        weight.copy_(torch.randn(weight.shape, generator=rng))
    found = []
    for rows in (20, 1, 33):
        lengths = torch.randint(0, 6, (len(of), rows), generator=rng)
        ids = [
            torch.randint(TABLES[t], (int(n.sum()),), generator=rng) for t, n in zip(of, lengths, strict=True)
        ]
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.flatten().cumsum(0)])
        vectors = tables(torch.cat(ids), offsets)
        vectors.backward(torch.randn(vectors.shape, generator=rng).to(vectors.dtype))
        found.append(vectors.detach())
    state = [each for one in tables.split_optimizer_states() for each in one]
    return [*found, *(weight.clone() for weight in tables.split_embedding_weights()), *state]


def sent(rule: EmbOptimType, monkeypatch: pytest.MonkeyPatch, slow_alone: bool) -> list[str]:
    """Send lookups their way; a list that tells which they took."""
    module: Any = RULES[rule]
    taken: list[str] = []
    for way in ("_joined", "_accompanied"):
        by = getattr(kernels, way)
        monkeypatch.setattr(kernels, way, lambda common, by=by, way=way: (taken.append(way), by(common))[1])
    monkeypatch.setattr(module, "invoke", kernels.rerouted(module.invoke, slow_alone))
    return taken


@pytest.mark.parametrize("precision", [SparseType.FP32, SparseType.FP16])
@pytest.mark.parametrize("of", [(0, 1, 2), SHARED], ids=["alone", "shared"])
def test_without_pooling_they_are_the_same_to_the_last_bit(rule, of, precision, monkeypatch):
    own = trained(rule, PoolingMode.NONE, of, precision=precision)
    taken = sent(rule, monkeypatch, slow_alone=False)
    for a, b in zip(trained(rule, PoolingMode.NONE, of, precision=precision), own, strict=True):
        assert torch.equal(a, b)
    assert set(taken) == {"_joined"}


@pytest.mark.parametrize("pooling", [PoolingMode.SUM, PoolingMode.MEAN])
@pytest.mark.parametrize("of", [(0, 1, 2), SHARED], ids=["alone", "shared"])
def test_pooled_they_are_the_same_but_for_rounding(rule, of, pooling, monkeypatch):
    own = trained(rule, pooling, of, widths=(8, 4, 16))
    taken = sent(rule, monkeypatch, slow_alone=True)
    for a, b in zip(trained(rule, pooling, of, widths=(8, 4, 16)), own, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert set(taken) == {"_accompanied"}


def test_fast_as_they_are_pooled_lookups_stay_as_they_are(rule, monkeypatch):
    taken = sent(rule, monkeypatch, slow_alone=False)
    trained(rule, PoolingMode.SUM, SHARED)
    assert not taken


def test_choosing_twice_is_choosing_once(rule):
    module: Any = RULES[rule]
    kernels.choose()
    once = module.invoke
    kernels.choose()
    assert module.invoke is once and once.__wrapped__ is not None
