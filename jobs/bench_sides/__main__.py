"""One side of the benchmark as a process: told on stdin what to do, it answers on stdout in JSON lines.

  python -m jobs.bench_sides SIDE ROWS.npz BATCH_ROWS THREADS

`build MODEL ...` answers what can be run, as [[model, setting], ...]; `run MODEL SETTING` [rows, seconds].
"""

import importlib
import importlib.util
import json
import os
import sys
import time
import types
from typing import Any

import numpy as np
import torch


def main(side: str, file: str, batch_rows: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print as they train
    if importlib.util.find_spec("requests") is None:
        # deepctr-torch imports it, undeclared, only to ask a package index for its newest version
        sys.modules["requests"] = types.ModuleType("requests")
    module: Any = importlib.import_module(f"jobs.bench_sides.{side}")
    rows = dict(np.load(file))
    runs: dict[tuple[str, str], Any] = {}
    for line in sys.stdin:
        command, *words = line.split()
        if command == "build":
            runs = {
                (model, setting): run
                for model in words
                if model in module.MODELS
                for setting, run in module.prepared(model, rows, int(batch_rows)).items()
            }
            answer: Any = list(runs)
        else:
            began = time.perf_counter()
            trained = runs[words[0], words[1]]()
            answer = [trained, time.perf_counter() - began]
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
