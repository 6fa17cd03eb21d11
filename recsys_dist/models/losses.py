"""Losses as pure functions: one value per row, unweighted and unreduced.

B rows, b of them, S sampled negatives shared by all rows, D dimension of their vectors
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from recsys_dist.models.precision import by_hand, full

_CACHED_LOGITS = 1 << 17  # at once, on a CPU: half a MiB
_FEWEST_ROWS = 32  # at once, however many items: fewer make poor matrix products


def binary_cross_entropy(logit_B: torch.Tensor, label_B: torch.Tensor) -> torch.Tensor:
    """[B]  log(1 + exp(z)) - y·z, which is -y log p - (1 - y) log(1 - p) at p = sigmoid(z)."""
    return F.binary_cross_entropy_with_logits(logit_B, label_B, reduction="none")


def sampled_softmax(
    user_BD: torch.Tensor,
    positive_BD: torch.Tensor,
    negative_SD: torch.Tensor,
    log_q_positive_B: torch.Tensor,
    log_q_negative_S: torch.Tensor,
    hit_BS: torch.Tensor,
) -> torch.Tensor:
    """[B]  -log( exp(s⁺) / (exp(s⁺) + Σ_j exp(s_j)) ),  where s = user · item - log q(item).

    Subtracting each candidate's log-probability of being drawn makes the sampled softmax estimate the
    full one: Bengio & Senécal 2008 (IEEE TNN 19:4), Jean et al. 2015 (arXiv 1412.2007 §3.1); for
    recommenders Covington et al. 2016 and Yi et al. 2019 (RecSys). Expected counts S·q in place of q
    change nothing: log S cancels.

    `hit_BS` marks accidental hits, negatives that are the row's own positive; they are left out.
    Computed as softplus(logsumexp_j s_j - s⁺), which overflows for no finite logits.
    """
    user_BD, positive_BD, negative_SD = full(user_BD), full(positive_BD), full(negative_SD)
    positive_B = (user_BD * positive_BD).sum(dim=1) - log_q_positive_B
    return F.softplus(log_partition(user_BD, negative_SD, log_q_negative_S, hit_BS) - positive_B)


def log_partition(
    user_BD: torch.Tensor, item_SD: torch.Tensor, log_q_S: torch.Tensor, left_out_BS: torch.Tensor
) -> torch.Tensor:
    """[B]  log Σ_j exp(user · item_j - log q_j) over the items that are not left out.

    Differentiable in users and items. Where all are left out it is so low that a softplus of it is 0, and so
    is its gradient.
    """
    total_B: torch.Tensor = by_hand(_LogPartition, user_BD, item_SD, log_q_S, left_out_BS)
    return total_B


class _LogPartition(torch.autograd.Function):
    """By hand, some rows at a time: each block of logits stays in a CPU's cache until all is done with it.

    With p_bj = exp(s_bj) / Σ_k exp(s_bk), the gradients are Σ_j p_bj item_j and Σ_b g_b p_bj user_b.
    """

    @staticmethod
    def forward(
        ctx: Any, user_BD: torch.Tensor, item_SD: torch.Tensor, log_q_S: torch.Tensor, out_BS: torch.Tensor
    ) -> torch.Tensor:
        # finite, not -inf: a row of which all is left out has the gradient 0 instead of NaN
        floor = torch.finfo(user_BD.dtype).min / 4
        exp_BS, mean_BD = user_BD.new_empty(out_BS.shape), torch.empty_like(user_BD)
        top_B, sum_B = user_BD.new_empty(len(user_BD)), user_BD.new_empty(len(user_BD))
        cached = len(user_BD) if user_BD.is_cuda else _CACHED_LOGITS // max(1, len(item_SD))
        rows = max(_FEWEST_ROWS, cached)
        for b in (slice(start, start + rows) for start in range(0, len(user_BD), rows)):
            block_bS = torch.addmm(log_q_S, user_BD[b], item_SD.T, beta=-1, out=exp_BS[b])
            block_bS.masked_fill_(out_BS[b], floor)
            torch.amax(block_bS, dim=1, out=top_B[b])
            block_bS.sub_(top_B[b, None]).exp_()
            torch.sum(block_bS, dim=1, out=sum_B[b])
            torch.mm(block_bS, item_SD, out=mean_BD[b])
        mean_BD /= sum_B[:, None]
        ctx.save_for_backward(user_BD, exp_BS, sum_B, mean_BD)
        return top_B + sum_B.log()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *of_total: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        user_BD, exp_BS, sum_B, mean_BD = ctx.saved_tensors
        g_B = of_total[0]
        return g_B[:, None] * mean_BD, exp_BS.T @ ((g_B / sum_B)[:, None] * user_BD), None, None


def focal(logit_B: torch.Tensor, label_B: torch.Tensor, gamma: float) -> torch.Tensor:
    """[B]  -(1 - p_t)^gamma log p_t,  p_t = p where y = 1 and 1 - p where y = 0 (Lin et al. 2017, eq. 4)."""
    cross_entropy_B = binary_cross_entropy(logit_B, label_B)
    # 1 - p_t = 1 - exp(-cross entropy); kept off 0, where a power below 1 has no derivative
    wrong_B = (-torch.expm1(-cross_entropy_B)).clamp(min=torch.finfo(logit_B.dtype).tiny)
    return wrong_B.pow(gamma) * cross_entropy_B


def log_square(predicted_B: torch.Tensor, value_B: torch.Tensor) -> torch.Tensor:
    """[B]  (z - log(1 + v))²: an amount v ≥ 0 learned on a scale that long tails do not rule."""
    return (predicted_B - torch.log1p(value_B)).square()


def bayesian_personalised_ranking(
    positive_B: torch.Tensor, negative_BS: torch.Tensor, hit_BS: torch.Tensor
) -> torch.Tensor:
    """[B]  mean_j -log sigmoid(s⁺ - s_j) over negatives that are no accidental hits (Rendle et al. 2009)."""
    positive_B, negative_BS = full(positive_B), full(negative_BS)
    kept_BS = (~hit_BS).to(positive_B.dtype)
    loss_BS = F.softplus(negative_BS - positive_B[:, None]) * kept_BS
    return loss_BS.sum(dim=1) / kept_BS.sum(dim=1).clamp(min=1)


def weighted_logistic(
    logit_B: torch.Tensor, positive_B: torch.Tensor, negative_B: torch.Tensor
) -> torch.Tensor:
    """[B]  -w⁺ log p - w⁻ log(1 - p): weights of each row as a positive and as a negative."""
    return positive_B * F.softplus(-logit_B) + negative_B * F.softplus(logit_B)


def gbce(
    positive_B: torch.Tensor, negative_BS: torch.Tensor, hit_BS: torch.Tensor, beta: float
) -> torch.Tensor:
    """[B]  -( beta·log p⁺ + Σ_j log(1 - p_j) ) / (S + 1),  where p = sigmoid(logit).

    Generalised binary cross-entropy: Petrov & Macdonald 2023 (RecSys, arXiv 2308.07192). With
    `gbce_beta` it takes out, as far as is asked, the overconfidence that comes of seeing only a few
    of the negatives. `hit_BS` as in `sampled_softmax`.
    """
    positive_B, negative_BS = full(positive_B), full(negative_BS)
    others_B = F.softplus(negative_BS).masked_fill(hit_BS, 0.0).sum(dim=1)
    return (beta * F.softplus(-positive_B) + others_B) / (negative_BS.shape[1] + 1)


def gbce_beta(negatives: int, others: int, calibration: float) -> float:
    """beta = a·(t·(1 - 1/a) + 1/a), with a = `negatives` / `others`, t = `calibration` (ibid.).

    a is the share of the items which are not the positive that is drawn, at most 1. t = 0 gives 1, plain
    binary cross-entropy; t = 1 gives a, whose probabilities are those of all others as negatives.
    """
    share = min(1.0, negatives / others)
    return share * (calibration * (1 - 1 / share) + 1 / share)
