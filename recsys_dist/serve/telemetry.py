"""What the service tells Prometheus, through Ray's metrics endpoint.

recsys_requests{route}                 answers
recsys_stage_ms{route, stage}          histogram; stages are waiting, features, recall, ranking and total
recsys_degraded{route, reason}         answers that had to do without something
recsys_probability{route}              histogram of the first item's predicted probability
recsys_bundle{version}                 1 for the bundle that is answered from, 0 for former ones
"""

from ray.util.metrics import Counter, Gauge, Histogram

from recsys_dist.serve.api import Answer

_MS = [1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 40.0, 60.0, 80.0, 100.0, 150.0, 200.0, 500.0, 1000.0]
_SHARES = [0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95]


class Telemetry:
    def __init__(self) -> None:
        self._requests = Counter("recsys_requests", "answers", ("route",))
        self._ms = Histogram("recsys_stage_ms", "milliseconds by stage", _MS, ("route", "stage"))
        self._degraded = Counter("recsys_degraded", "answers without something", ("route", "reason"))
        self._scores = Histogram("recsys_probability", "of the first item", _SHARES, ("route",))
        self._bundle = Gauge("recsys_bundle", "the bundle answered from", ("version",))
        self._version: str | None = None

    def bundle(self, version: str) -> None:
        """From now on answers come from this bundle."""
        if self._version is not None:
            self._bundle.set(0, {"version": self._version})
        self._version = version
        self._bundle.set(1, {"version": version})

    def answered(self, route: str, answer: Answer) -> None:
        self._requests.inc(1, {"route": route})
        for stage, ms in answer.ms.items():
            self._ms.observe(ms, {"route": route, "stage": stage})
        for reason in answer.degraded:  # a context column's name is the client's: not a label of ours
            self._degraded.inc(1, {"route": route, "reason": reason.partition(":")[0]})
        if answer.items and answer.items[0].probability is not None:
            self._scores.observe(answer.items[0].probability, {"route": route})
