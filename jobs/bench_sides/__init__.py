"""What `jobs.bench_train --models` compares, a process each: ours, plain PyTorch, two libraries.

All but `ours` import nothing of recsys_dist: the libraries run in environments of their own.
"""
