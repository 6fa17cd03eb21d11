"""What `jobs.benchmark_quality` measures: per suite its data, models and settings, published rows, and goals.

A model joins a suite by one `Row`. Its settings were chosen on the validation days alone; what was tried is
in `docs/tried/<suite>.jsonl`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jobs import recipes
from recsys_dist.data.pipeline import PrepareConfig
from recsys_dist.evaluate import EvaluateConfig
from recsys_dist.train.settings import TrainConfig

Figures = Mapping[str, tuple[float, ...]]  # row -> values, in the order of the suite's metrics


@dataclass(frozen=True)
class Data:
    """A prepared data set.

    name      of its directory below OUT/data
    path      where the raw log is, below the data root
    settings  of its preparation
    """

    name: str
    kind: str
    path: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def prepare(self, root: str | Path) -> PrepareConfig:
        source = {"kind": self.kind, "path": str(Path(root) / self.path)}
        return PrepareConfig.parse({"source": source, **self.settings})


@dataclass(frozen=True)
class Row:
    """A row of a suite's table: a recipe of `jobs.recipes` with dotted settings, as in `model.form=matrix`.

    Where a published row has the same name, the two are compared.
    """

    name: str
    recipe: str
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Goal:
    """What is asked of a row (None: the best of ours, by the suite's first metric).

    least     metric -> at least
    ahead_of  the row, or baseline of the evaluation, to be ahead of, by every metric of the suite
    aim       wished for, not required
    """

    of: str | None
    least: Mapping[str, float] = field(default_factory=dict)
    ahead_of: str | None = None
    aim: bool = False


@dataclass(frozen=True)
class Suite:
    """One data set, protocol and label.

    metrics    of the evaluation on test; the first ranks the table
    published  others' models on this protocol; `floors`: what any model has to beat
    settings   of every row, before the row's own
    ks         cuts of the recall metrics
    seeds      how many the goals ask for
    """

    title: str
    data: Data
    metrics: tuple[str, ...]
    rows: tuple[Row, ...]
    goals: tuple[Goal, ...]
    published: Figures = field(default_factory=dict)
    floors: Figures = field(default_factory=dict)
    settings: tuple[str, ...] = ()
    ks: tuple[int, ...] = (50, 100, 200)
    seeds: int = 3

    def config(self, row: Row, seed: int, data: Path) -> TrainConfig:
        """The training run of a row; ConfigError for a wrong setting."""
        base = recipes.named(row.recipe, {"data": str(data), "seed": seed})
        return base.override([*self.settings, *row.settings])

    @property
    def evaluation(self) -> EvaluateConfig:
        """On test; the spread over seeds is told instead of bootstrap intervals, which take longer."""
        return EvaluateConfig(ks=self.ks, bootstrap=2)


def within(distance: float, published: Figures, metric: str, names: tuple[str, ...]) -> tuple[Goal, ...]:
    """A goal for each of `names`: no further than `distance` below its published row."""
    return tuple(Goal(name, {metric: round(published[name][0] - distance, 4)}) for name in names)


# Batch, rates and widths to start from; BARS has embeddings of 10, our tables take multiples of 4.
_BARS = ("model.embedding_dim=16", "model.hidden=[400,400,400]", "model.dropout=0.2", "model.norm=batch")
_DECAYED = (  # 202,027 rows are few: without it the tables fit them by heart
    "optimizer.deep.lr=0.02",
    "optimizer.deep.weight_decay=0.0001",
    "optimizer.wide.lr=0.02",
    "optimizer.wide.weight_decay=0.0001",
)
_FRAPPE_OWN = {
    "DeepFM": ("optimizer.plateau=0.1",),
    "DCNv2": ("optimizer.plateau=0.1", "epochs=40", "patience=3"),
    # the interaction of BARS' row: without floats, dots leave out the fields themselves
    "DLRM": ("model.interaction=cat", "optimizer.plateau=0.1"),
    # without a tower they need larger weights
    "LR": ("optimizer.wide.lr=0.2", "optimizer.wide.weight_decay=0.00001", "epochs=60"),
    "FM": (
        "optimizer.wide.lr=0.2",
        "optimizer.wide.weight_decay=0.00001",
        "optimizer.deep.lr=0.1",
        "optimizer.deep.weight_decay=0.00001",
        "epochs=40",
    ),
}
# the mean of her items and a vector of her own, by cosine; an item's popularity beside it
_SUMS = (
    "model.features=[visited,user]",
    "model.side_dim=64",
    "model.shared=true",
    "model.hidden=null",
    "model.item_bias=true",
    "model.temperature=0.1",
    "model.negatives_alpha=0",
    "model.embedding_std=0.005",
    "optimizer.deep.lr=0.1",
    "batch_rows=2048",
    "patience=3",
)
# a vector a user and a vector an item, by cosine: matrix factorisation with a softmax
_FACTORS = (
    "model.features=[user]",
    "model.side_dim=64",
    "model.hidden=[]",
    "model.item_hidden=[]",
    "model.mask_history=false",
    "model.temperature=0.1",
    "optimizer.deep.lr=0.1",
    "batch_rows=2048",
)
_RECHORUS = ("model.embedding_dim=64", "model.hidden=[64]")


def _rankers(common: tuple[str, ...], attending: tuple[str, ...] = ()) -> tuple[Row, ...]:
    """Every ranker, with settings that all towers share; `attending` are those that need a history."""
    embedded = tuple(setting for setting in common if setting.startswith("model.embedding"))
    return (
        Row("LR", "lr"),
        Row("FM", "fm", embedded),
        Row("DNN", "mlp", common),
        Row("Wide&Deep", "wide_deep", common),
        Row("Deep Crossing", "deep_crossing", common),
        Row("DCN", "dcn", (*common, "model.form=vector")),
        Row("DCNv2", "dcn", common),
        Row("DeepFM", "deepfm", common),
        Row("DLRM", "dlrm", common),
        *(Row(name, name.lower(), common) for name in attending),
        *([Row(_BLIND, "mlp", (*common, "model.history=false"))] if attending else []),
    )


_HISTORY = ("DIN", "DIEN", "DSIN")
_BLIND = "DNN without history"
_EXPECTED = "YoutubeDNN, odds E[T]"
_RECALL = (
    Row("YoutubeDNN", "youtubednn"),
    Row("two-tower", "two_tower"),
    Row("item2vec", "item2vec"),
    Row("SASRec", "sasrec"),
)

_ML1M_CTR = {  # ReChorus 2.0 (arXiv 2405.18058), table 6
    "SAM": (0.7919,),
    "DIN": (0.7904,),
    "DIEN": (0.7874,),
    "DCNv2": (0.7870,),
    "FinalMLP": (0.7841,),
    "DCN": (0.7831,),
    "Wide&Deep": (0.7798,),
    "DeepFM": (0.7736,),
    "FM": (0.7661,),
}
_FRAPPE = {  # BARS Frappe_x1 (SIGIR 2022); here the items of the training negatives are drawn anew
    "FinalMLP": (0.9861,),
    "DCNv2": (0.9845,),
    "DeepFM": (0.9842,),
    "Wide&Deep": (0.9841,),
    "DLRM": (0.9840,),
    "DCN": (0.9839,),
    "DNN": (0.9833,),
    "DSSM": (0.9832,),
    "FM": (0.9671,),
    "LR": (0.9356,),
}
_AUC = ("auc", "gauc")

# The published protocol counts repeated exposures, so they are kept.
_KUAIRAND = Data("kuairand", "kuairand", "kuairand-pure", {"duplicates": "keep"})

_CLICK = Suite(
    title="KuaiRand-Pure, label click: training 25-30 April 2022, test 1-8 May",
    data=_KUAIRAND,
    metrics=_AUC,
    rows=_rankers((), _HISTORY),
    settings=("label=click",),
    floors={
        "LightGBM, target encodings and history counts": (0.7478, 0.6440),
        "additive target encoding": (0.7067, 0.6371),
    },
    goals=(
        Goal(None, {"auc": 0.749, "gauc": 0.648}),
        *(Goal(name, ahead_of=_BLIND) for name in _HISTORY),
        Goal(None, {"auc": 0.757, "gauc": 0.655}, aim=True),
    ),
)

SUITES: dict[str, Suite] = {
    "ml-1m-ctr": Suite(
        title="MovieLens-1M, rating of 4 or more, ReChorus' split by day (standard error of test about .006)",
        data=Data("ml-1m-ctr", "ml1m_ctr", "ml-1m"),
        metrics=("auc",),
        rows=_rankers(_RECHORUS, ("DIN", "DIEN")),
        settings=("refit=false", "epochs=10", "patience=2"),  # published figures come from train alone
        published=_ML1M_CTR,
        goals=(
            *within(0.004, _ML1M_CTR, "auc", ("Wide&Deep", "DeepFM", "DCN", "DCNv2", "DIN", "DIEN")),
            Goal(None, {"auc": 0.795}, aim=True),
        ),
        seeds=5,
    ),
    "frappe": Suite(
        title="Frappe, app usage in context, split of BARS Frappe_x1",
        data=Data("frappe", "frappe", "frappe"),
        metrics=("auc",),
        rows=(
            *(
                replace(row, settings=(*row.settings, *_FRAPPE_OWN.get(row.name, ())))
                for row in _rankers(_BARS)
            ),
            Row("DLRM, dots", "dlrm", _BARS),
        ),
        settings=("refit=false", "epochs=20", "patience=2", "batch_rows=4096", *_DECAYED),
        published=_FRAPPE,
        goals=(
            *within(
                0.0015, _FRAPPE, "auc", tuple(name for name in _FRAPPE if name not in ("FinalMLP", "DSSM"))
            ),
            Goal(None, {"auc": 0.986}, aim=True),
        ),
    ),
    "kuairand-click": _CLICK,
    "kuairand-long-view": replace(
        _CLICK,
        title=_CLICK.title.replace("label click", "label long_view"),
        settings=("label=long_view",),
        floors={
            "LightGBM, target encodings and history counts": (0.7464, 0.6514),
            "additive target encoding": (0.7078, 0.6446),
        },
        goals=(
            Goal(None, {"auc": 0.748, "gauc": 0.655}),
            *(Goal(name, ahead_of=_BLIND) for name in _HISTORY),
            Goal(None, {"auc": 0.756, "gauc": 0.661}, aim=True),
        ),
    ),
    "kuairand-watch-time": Suite(
        title="KuaiRand-Pure, watch time in ms, expected of every exposure of 1-8 May 2022",
        data=_KUAIRAND,
        metrics=("xauc", "mae"),
        rows=(
            Row("YoutubeDNN", "youtubednn_ranking"),
            Row(_EXPECTED, "youtubednn_ranking", ("model.count_all=true",)),
        ),
        goals=(
            Goal(_EXPECTED, ahead_of="item mean"),
        ),  # the paper's odds are E[T](1 + P): a third click here
    ),
    "kuairand-recall": Suite(
        title="KuaiRand-Pure, videos watched long or liked on 1-8 May 2022, all ranked, those seen left out",
        data=_KUAIRAND,
        metrics=("recall@100", "recall@50", "recall@200"),
        rows=_RECALL,
        published={"four-way stack, trained on five times the rows": (0.2343, 0.1731, 0.2973)},
        floors={
            "item-to-item cosine on exposures": (0.3811, 0.2609, 0.5345),
            "item-to-item cosine on positives": (0.3431, 0.2279, 0.4877),
            "popularity": (0.2671, 0.1750, 0.3771),
        },
        goals=(
            Goal("YoutubeDNN", {"recall@100": 0.36}),
            Goal(None, {"recall@100": 0.39}),
            Goal(None, {"recall@100": 0.42}, aim=True),
        ),
    ),
    "gowalla": Suite(
        title="Gowalla, check-ins, split of BARS Gowalla_m1, training items left out",
        data=Data("gowalla", "gowalla", "gowalla"),
        metrics=("user_recall@20", "ndcg@20"),
        rows=(
            Row("YoutubeDNN", "youtubednn", _SUMS),
            Row("two-tower", "two_tower", _FACTORS),
            *(row for row in _RECALL if row.name not in ("YoutubeDNN", "two-tower")),
        ),
        settings=("metric=user_recall@20", "epochs=30", "patience=2"),
        ks=(20, 50),
        published={
            "SimpleX": (0.1872, 0.1557),
            "LightGCN": (0.1820, 0.1547),
            "YoutubeDNN": (0.1754, 0.1473),
            "MF-BPR": (0.1627, 0.1378),
        },
        floors={"ItemCF": (0.1570, 0.1214)},
        goals=(
            Goal("YoutubeDNN", {"user_recall@20": 0.172, "ndcg@20": 0.144}),
            Goal("YoutubeDNN", {"user_recall@20": 0.1754, "ndcg@20": 0.1473}, aim=True),
            Goal(None, {"user_recall@20": 0.187, "ndcg@20": 0.157}, aim=True),
        ),
    ),
    "ml-1m-leave-one-out": Suite(
        title="MovieLens-1M, each user's last film among all that she has not seen",
        data=Data("ml-1m-leave-one-out", "ml1m_leave_one_out", "ml-1m"),
        metrics=("recall@10", "ndcg@10"),
        rows=(
            *(row for row in _RECALL if row.name != "SASRec"),
            Row("SASRec", "sasrec", ("model.dim=128", "model.dropout=0.3", "epochs=60", "patience=10")),
        ),
        # 512 users validate: at 10 the best of many epochs is the luckiest one
        settings=("refit=false", "metric=ndcg@100", "epochs=20", "patience=3"),
        ks=(10, 20),
        published={
            "gSASRec": (0.3003, 0.1726),
            "BERT4Rec": (0.2821, 0.1516),
            "SASRec": (0.2392, 0.1259),
        },
        goals=(
            Goal(None, {"recall@10": 0.282, "ndcg@10": 0.155}),
            Goal(None, {"recall@10": 0.300, "ndcg@10": 0.172}, aim=True),
        ),
    ),
}
