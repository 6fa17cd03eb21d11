"""Runs a function on several processes joined by gloo and returns what each returned."""

import multiprocessing
import queue
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_forked = multiprocessing.get_context("forkserver")  # imports torch once, then each test forks from there
_forked.set_forkserver_preload(["torch", "recsys_dist.train.sharding", "tests.train.tiny"])


def run_ranks(world: int, function: Callable[..., Any], *args: Any, timeout_s: float = 90) -> list[Any]:
    """`function(rank, *args)` on `world` ranks; a failure on any of them fails the test, with traceback."""
    results: Any = _forked.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            _forked.Process(target=_run, args=(rank, world, f"{folder}/store", results, function, args))
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        try:
            found = dict(_result(results, timeout_s) for _ in processes)
        finally:
            for process in processes:
                process.join(1)
                process.kill()
    return [found[rank] for rank in range(world)]


def _result(results: Any, timeout_s: float) -> tuple[int, Any]:
    try:
        rank, value, failure = results.get(timeout=timeout_s)
    except queue.Empty:
        raise AssertionError(f"ranks hang: no result within {timeout_s} s") from None
    assert failure is None, f"rank {rank}:\n{failure}"
    return rank, value


def _run(
    rank: int, world: int, store: str, results: Any, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=Path(store).as_uri(), rank=rank, world_size=world)
    value, failure = None, None
    try:
        value = function(rank, *args)
    except BaseException:
        failure = traceback.format_exc()
    results.put((rank, value, failure))
    if failure is None:
        dist.barrier()  # nobody leaves while another still talks to it
    dist.destroy_process_group()
