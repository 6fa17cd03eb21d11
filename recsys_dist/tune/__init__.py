"""Sweeps: which architecture and training settings are best, with little compute.

space    what is searched, declared as dotted settings; what to try next (Optuna)
ledger   what was tried and what comes next (asynchronous successive halving)
sweep    runs it on a cluster; the only ray.tune
summary  what it came to: best settings, compute, importance
"""
