"""What `jobs.bench_train --models` compares, a process each: ours, plain PyTorch, two libraries.

All but `ours` import nothing of recsys_dist: the libraries run in environments of their own.
"""

import gc

gc.enable()  # `jobs` leaves that to `command.reported`, and these run as they do elsewhere
