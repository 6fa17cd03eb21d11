"""Whether a bundle may become champion: not worse than the present one, nor than popularity.

Figures are compared on the same held-out days only.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import Field

from recsys_dist.config import Config
from recsys_dist.manifest import Manifest

Metrics = Mapping[str, Mapping[str, Mapping[str, float]]]  # task -> scorer -> metric -> value


class GateConfig(Config):
    """What is asked of a bundle. More must be better for every metric named."""

    ranking: tuple[str, ...] = ("auc",)
    recall: tuple[str, ...] = ("recall@100",)
    tolerance: float = Field(0.002, ge=0, description="below the champion's figure by this is not yet worse")
    index_recall: float = Field(0.99, ge=0, le=1, description="least recall@200 of the index against exact")


@dataclass(frozen=True)
class Gate:
    """One condition, whether it holds, and the figures in words."""

    name: str
    passed: bool
    said: str


def judge(
    candidate: Manifest, champion: Manifest | None, cfg: GateConfig, measured: Metrics | None = None
) -> list[Gate]:
    """Every gate. `measured` are the champion's figures on the candidate's test days, needed where its own
    are of other days."""
    recall = candidate.index.recall_at_200
    gates = [
        Gate("index", recall >= cfg.index_recall, f"recall@200 {recall:.4f}, least {cfg.index_recall:g}")
    ]
    if champion is not None and measured is None and same_days(candidate, champion):
        measured = champion.metrics
    for task, names in (("ranking", cfg.ranking), ("recall", cfg.recall)):
        for metric in names:
            own = _figure(candidate.metrics, task, "model", metric)
            base = _figure(candidate.metrics, task, "popularity", metric)
            gates.append(_gate(f"{task} {metric} against popularity", own, base, 0.0))
            if champion is None:
                continue
            name = f"{task} {metric} against champion {champion.version}"
            if measured is None:
                days = f"{champion.data.test_from} to {champion.data.last_event}"
                gates.append(Gate(name, False, f"not comparable: its figures are of other data ({days})"))
            else:
                gates.append(_gate(name, own, _figure(measured, task, "model", metric), cfg.tolerance))
    return gates


def same_days(one: Manifest, other: Manifest) -> bool:
    """Whether both were measured on the same held-out rows."""
    return one.data.data_digest == other.data.data_digest


def report(gates: list[Gate]) -> str:
    """A line for each gate, for people."""
    return "\n".join(f"  {'passed' if gate.passed else 'FAILED'}  {gate.name}: {gate.said}" for gate in gates)


def _figure(metrics: Metrics, task: str, scorer: str, metric: str) -> float | None:
    return metrics.get(task, {}).get(scorer, {}).get(metric)


def _gate(name: str, own: float | None, other: float | None, slack: float) -> Gate:
    if own is None or other is None:
        return Gate(name, False, "not measured: evaluate both on the test days")
    return Gate(name, own >= other - slack, f"{own:.4f} beside {other:.4f}, tolerance {slack:g}")
