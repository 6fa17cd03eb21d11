"""What of a table lives with this worker: the local part of a ShardedTensor, or all of a Tensor."""

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardedTensorMetadata
from torch.distributed._shard.sharding_spec import ShardMetadata


def pieces(weight: Any, config: Any) -> list[tuple[torch.Tensor, list[int], list[int]]]:
    """What of a table lives here: values, first row and column, rows and columns."""
    if isinstance(weight, ShardedTensor):
        local = weight.local_shards()
        return [(s.tensor, s.metadata.shard_offsets, s.metadata.shard_sizes) for s in local]
    return [(weight, [0, 0], [config.num_embeddings, config.embedding_dim])]


def local(value: Any) -> list[tuple[torch.Tensor, list[int]]]:
    """A Tensor, or what of a ShardedTensor lives here: tensors, and where in the whole they begin."""
    if isinstance(value, ShardedTensor):
        return [(s.tensor, s.metadata.shard_offsets) for s in value.local_shards()]
    return [(value, [0] * value.dim())]


def copied(value: Any) -> Any:
    """A copy, in the host's memory, of a Tensor or of this worker's part of a ShardedTensor."""
    if not isinstance(value, ShardedTensor):
        return value.detach().to("cpu", copy=True)
    mine = [Shard(s.tensor.detach().to("cpu", copy=True), s.metadata) for s in value.local_shards()]
    return ShardedTensor._init_from_local_shards_and_global_metadata(mine, value.metadata())


def placed_as(weight: Any, local: torch.Tensor) -> Any:
    """`local` [this worker's rows] or [.., n] as part of a tensor that lies where the weight's rows do."""
    if not isinstance(weight, ShardedTensor):
        return local
    found, columns = weight.metadata(), list(local.shape[1:])
    shards = [
        ShardMetadata(
            [shard.shard_offsets[0], *(0 for _ in columns)], [shard.shard_sizes[0], *columns], shard.placement
        )
        for shard in found.shards_metadata
    ]
    mine = [
        Shard(local, s) for s in shards if s.placement is not None and s.placement.rank() == dist.get_rank()
    ]
    size = torch.Size([found.size[0], *columns])
    whole = ShardedTensorMetadata(shards, size, found.tensor_properties)
    return ShardedTensor._init_from_local_shards_and_global_metadata(mine, whole)
