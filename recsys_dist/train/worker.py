"""What each Ray Train worker runs: the phases of a run, one after the other, and its result.

A run has two phases: `choose` trains on the training days until the validation metric stops improving;
`refit` trains anew on training and validation days for the epochs that were best.
"""

import json
from pathlib import Path
from typing import Any

import ray.train.torch
import torch
import torch.distributed as dist

from recsys_dist import cpu
from recsys_dist.data.output import write_text
from recsys_dist.data.prepared import Prepared
from recsys_dist.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    NonFiniteLossError,
    RecsysError,
    SupersededError,
    TrainError,
)
from recsys_dist.train.checkpoint import of_epoch
from recsys_dist.train.fence import Fence, is_of
from recsys_dist.train.phase import Common, Phase, best_epoch, finish
from recsys_dist.train.pretrained import RESULT
from recsys_dist.train.settings import TrainConfig

FAILURE = "failure.json"  # why training cannot go on: written by a worker, read by the driver
RESERVE = "failure.reserve"  # gives way to FAILURE, so that a full disk can be told of
LESS_MEMORY = "lower batch_rows, have tables on more workers, or see --plan for what each one holds"


def train_worker(values: dict[str, Any]) -> None:
    """Entry point: `values` are {"config", "run", "start", "data_digest"}.

    A TrainConfig's fields, the run's directory, the name of its start (see `train.fence`), and which data it
    was started on.
    """
    cfg, run = TrainConfig.parse(values["config"]), Path(values["run"])
    if (run / FAILURE).exists():
        return  # Ray Train started the workers again; this is not a failure that trying again mends
    threads = torch.get_num_threads()
    cpu.configure(cfg.threads_per_worker)
    alone = not dist.is_initialized()  # with num_workers=0, which has no group
    try:
        if cfg.use_gpu and not torch.cuda.is_available():
            raise ConfigError("use_gpu=true, and a process that should train sees no GPU: leave it out here")
        if alone:
            dist.init_process_group(backend(cfg), store=dist.HashStore(), rank=0, world_size=1)
        if Prepared.open(cfg.data).manifest.data_digest != values["data_digest"]:
            raise DataError(f"{cfg.data!r} was prepared anew meanwhile: start again, on what it is now")
        device = ray.train.torch.get_device() if cfg.use_gpu else torch.device("cpu")
        all_phases(Common(cfg, run, Fence(run, cfg.checkpoints, values["start"]), device))
    except SupersededError:
        return  # the run is another's now, and so is its FAILURE
    except (MemoryError, RuntimeError) as error:
        if _out_of_memory(error):  # and would be again
            lacking = TrainError(f"a worker has not enough memory: {error}; {LESS_MEMORY}")
            write_failure(run, lacking, values["start"])
            if alone:
                raise lacking from error
        raise
    except RecsysError as error:
        write_failure(run, error, values["start"])
        if not isinstance(error, NonFiniteLossError | CheckpointError):
            raise  # the other workers may not know, and wait
        # These are raised on all workers alike: all end here, and Ray Train starts none of them again.
    finally:
        if alone:
            torch.set_num_threads(threads)
            if dist.is_initialized():
                dist.destroy_process_group()


def backend(cfg: TrainConfig) -> str:
    """What the workers agree on is on the host and goes over gloo, so it never waits for a GPU."""
    return "cpu:gloo,cuda:nccl" if cfg.use_gpu else "gloo"


def write_failure(run: Path, error: RecsysError, start: str) -> None:
    """Tell the driver of `start` why training cannot go on; a newer start has no use for it."""
    if not is_of(run, start):
        return
    (run / RESERVE).unlink(missing_ok=True)
    write_text(json.dumps({"kind": type(error).__name__, "message": str(error)}), run / FAILURE)


def _out_of_memory(error: Exception) -> bool:
    """PyTorch's CPU allocator raises a plain RuntimeError."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)


def all_phases(common: Common) -> None:
    """Choose the number of epochs, refit if asked to, and write down the result. Collective."""
    cfg, path, checkpoints = common.cfg, common.path, common.checkpoints
    splits = cfg.training_splits(common.schema)
    held_out = "ranking/valid" if cfg.task == "ranking" else "users/valid"
    chosen = finish(common, Phase("choose", splits["choose"], held_out, cfg.epochs))
    history = chosen.manifest.history
    epoch = best_epoch(history, cfg.chosen_metric)
    trained = list(history)
    if cfg.refit:
        phase = Phase("refit", splits["refit"], None, epoch, history[:epoch])
        refit = finish(common, phase, chosen.manifest.rollbacks)
        final, trained = refit.path, [*history, *refit.manifest.history]
    else:
        final = common.background.workers.from_first(lambda: of_epoch(checkpoints / "choose", epoch))
    common.only_if(common.fence.holds)
    peaks = common.workers.gather(cpu.peak_bytes())
    if common.workers.rank == 0:
        seconds = sum(entry["seconds"] for entry in trained)
        result = {
            "checkpoint": f"{final.parent.name}/{final.name}",
            "chosen_epoch": epoch,
            "history": history,
            "seconds": seconds,
            "rows_per_s": sum(entry["trained_rows"] for entry in trained) / seconds,
            "peak_bytes": peaks,
        }
        write_text(json.dumps(result), path / RESULT)
    common.workers.gather(None)
