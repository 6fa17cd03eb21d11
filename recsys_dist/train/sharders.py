"""What TorchRec shards tables with: kinds of sharding it may choose, and the precision of what is sent."""

from typing import Any, Literal

import torch
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs_registry

from recsys_dist.errors import ConfigError

Exchange = Literal["fp16", "bf16"]
# fp16 has nothing below 6e-8, and a mean over 4,096 rows has gradients of 1e-5: multiplied by a power of two
# on their way, which rounds nothing, they keep their digits. What is beyond 16 is clamped to it.
_GRADIENT_SCALE = 4096.0


class _Bags(EmbeddingBagCollectionSharder):
    """Row-wise too: the CPU kernels have it, the shipped list names it for CUDA alone."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return sorted({*super().sharding_types(compute_device_type), "row_wise"})


def sharders(exchange: Exchange | None, device: torch.device) -> list[Any]:
    """Of pooled tables and of sequences'. ConfigError for an `exchange` that the device's backend has not."""
    if exchange == "bf16" and device.type == "cpu":
        raise ConfigError("sharding.exchange=bf16 is for GPUs, gloo cannot add it up; take fp16, or unset it")
    codecs = None
    if exchange is not None:
        precision = CommType(exchange)
        scale = _GRADIENT_SCALE if exchange == "fp16" else None
        asked = QCommsConfig(precision, precision, backward_loss_scale=scale)
        codecs = get_qcomm_codecs_registry(asked, device=device)
    return [_Bags(qcomm_codecs_registry=codecs), EmbeddingCollectionSharder(qcomm_codecs_registry=codecs)]
