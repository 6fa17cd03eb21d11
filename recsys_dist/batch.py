"""Batch: all that a model ever sees of the data.

B rows, F_id id features, F_dense float features, V ids in all.
"""

from dataclasses import dataclass

import torch
from torchrec import KeyedJaggedTensor


@dataclass(frozen=True)
class Batch:
    """Rows of examples as tensors.

    dense     [B, F_dense] float32, columns in the order of `schema.dense`
    sparse    KeyedJaggedTensor with a key per feature of `schema.keys`, stride B; one id per row
              for single-valued features, any number (oldest first) for lists of past events
    labels    name -> [B] float32
    weight    [B] float32; a padding row weighs 0 and so changes no loss, gradient or metric
    row_id    [B] int64, shard << 32 | row within the shard: where each row came from; padding is -1
    """

    dense: torch.Tensor
    sparse: KeyedJaggedTensor
    labels: dict[str, torch.Tensor]
    weight: torch.Tensor
    row_id: torch.Tensor

    @property
    def rows(self) -> int:
        """B, padding rows included."""
        return self.weight.shape[0]

    @property
    def real(self) -> torch.Tensor:
        """[B] bool: which rows are not padding."""
        return self.weight > 0

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def to(self, device: torch.device) -> "Batch":
        """The batch on `device`; asynchronous where the memory is pinned."""
        return Batch(
            self.dense.to(device, non_blocking=True),
            self.sparse.to(device, non_blocking=True),
            {name: label.to(device, non_blocking=True) for name, label in self.labels.items()},
            self.weight.to(device, non_blocking=True),
            self.row_id.to(device, non_blocking=True),
        )

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the CUDA allocator that `stream` still reads these tensors (TorchRec's `Pipelineable`)."""
        for tensor in (self.dense, self.weight, self.row_id, *self.labels.values()):
            tensor.record_stream(stream)
        self.sparse.record_stream(stream)

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory, for asynchronous copies to a GPU."""
        return Batch(
            self.dense.pin_memory(),
            self.sparse.pin_memory(),
            {name: label.pin_memory() for name, label in self.labels.items()},
            self.weight.pin_memory(),
            self.row_id.pin_memory(),
        )

    def pad(self, rows: int) -> "Batch":
        """Grow to `rows` rows: appended rows have no ids, zero floats, zero weight and row_id -1."""
        missing = rows - self.rows
        if missing == 0:
            return self
        assert missing > 0, f"cannot pad {self.rows} rows down to {rows}"

        def grown(tensor: torch.Tensor, fill: float = 0) -> torch.Tensor:
            return torch.cat([tensor, tensor.new_full((missing, *tensor.shape[1:]), fill)])

        keys = self.sparse.keys()
        lengths = self.sparse.lengths().view(len(keys), self.rows)
        padded = torch.cat([lengths, lengths.new_zeros(len(keys), missing)], dim=1).flatten()
        sparse = KeyedJaggedTensor(keys=keys, values=self.sparse.values(), lengths=padded)
        labels = {name: grown(label) for name, label in self.labels.items()}
        return Batch(grown(self.dense), sparse, labels, grown(self.weight), grown(self.row_id, -1))
