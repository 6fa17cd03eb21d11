"""Workers exchange the ids of a batch while the one before it computes: TorchRec's TrainPipelineSparseDist.

For GPUs, where batches are copied ahead too. (On CPUs gloo and the computation share the cores: nothing is
gained.)

TorchRec finds the lookups whose ids it can exchange ahead by tracing the model, and those that look at their
data, as all do that read histories without padding, cannot be traced. They need not be: `Fields` says what it
looks up. What else a model looks up, as tokens of histories or drawn negatives, is exchanged in the step.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.train_pipeline.pipeline_context import TrainPipelineContext
from torchrec.distributed.train_pipeline.runtime_forwards import PipelinedForward
from torchrec.distributed.train_pipeline.types import ArgInfo, BaseArgInfoStep, CallArgs
from torchrec.distributed.train_pipeline.utils import _override_input_dist_forwards

from recsys_dist.models.ranking import Fields
from recsys_dist.train.loop import Epoch, one_by_one
from recsys_dist.train.turn import Step, Turn


def schedule(device: torch.device) -> Callable[[Epoch, Iterator[Turn]], Iterator[Step]]:
    """How an Epoch runs its steps on this kind of device."""
    return overlapped if device.type == "cuda" else one_by_one


def overlapped(epoch: Epoch, turns: Iterator[Turn]) -> Iterator[Step]:
    """The steps of `turns`; meanwhile the next one's ids travel, and the one after it to the device."""
    pipeline = _Pipeline(epoch)
    while True:
        try:
            step = pipeline.progress(turns)
        except StopIteration:
            pipeline.detach()
            return
        yield step


class _Pipeline(TrainPipelineSparseDist[Turn, Step]):
    """TorchRec's, with steps that are an Epoch's and lookups that are told instead of traced."""

    def __init__(self, epoch: Epoch) -> None:
        def forward(turn: Turn | None) -> tuple[Any, Step]:
            assert turn is not None
            step = epoch.forward(turn)
            return step, step  # the former for `_backward`

        device: torch.device = epoch.idle.device
        super().__init__(epoch.model, _Within(), device, custom_model_fwd=forward)
        self._epoch = epoch
        self._computing = torch.cuda.current_stream() if device.type == "cuda" else None

    def _next_batch(self, dataloader_iter: Iterator[Turn]) -> Turn | None:
        """TorchRec asks for it within the stream that copies: what the loop reads then is not made there."""
        with self._stream_context(self._computing):
            return super()._next_batch(dataloader_iter)

    def _pipeline_model(
        self,
        batch: Turn | None,
        context: TrainPipelineContext,
        pipelined_forward: type[PipelinedForward] = PipelinedForward,
    ) -> None:
        for name, fields in self._model.named_modules():
            if isinstance(fields, Fields):
                tables: Any = fields.tables
                self._original_forwards.append(tables.forward)
                self._pipelined_modules.append(tables)
                ids = CallArgs([ArgInfo([_Ids(fields)])], {})
                tables.forward = pipelined_forward(name, ids, tables, context, self._data_dist_stream)
        self.start_sparse_data_dist(batch, context)
        self._original_kjt_dist_forwards = _override_input_dist_forwards(self._pipelined_modules)

    def _backward(self, losses: Any) -> None:
        self._epoch.learn(losses)


class _Ids(BaseArgInfoStep):
    """What one `Fields` looks up of a turn."""

    def __init__(self, fields: Fields) -> None:
        self._fields = fields

    def process(self, arg: Turn) -> Any:
        return self._fields.ids(arg.batch.sparse)


class _Within:
    """The optimizers' place: they step in `Epoch.learn`."""

    def zero_grad(self) -> None: ...

    def step(self) -> None: ...
