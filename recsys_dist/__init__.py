"""recsys_dist: a distributed recommender system on Ray, from behaviour logs to a served model."""

__version__ = "0.1.0"
