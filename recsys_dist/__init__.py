"""recsys_dist: a distributed recommender system on Ray, from behaviour logs to a served model."""

import gc

__version__ = "0.1.0"

# Importing PyTorch, TorchRec and Ray makes a million objects to keep; looking for garbage among them after
# every 700 is a tenth of the seconds that a driver, a worker and a replica need to start.
gc.set_threshold(50_000)
