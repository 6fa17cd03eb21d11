"""Losses as pure functions of logits: one value per row, unweighted and unreduced.

B rows, S sampled negatives shared by all rows
"""

import torch
from torch.nn import functional as F


def binary_cross_entropy(logit_B: torch.Tensor, label_B: torch.Tensor) -> torch.Tensor:
    """[B]  log(1 + exp(z)) - y·z, which is -y log p - (1 - y) log(1 - p) at p = sigmoid(z)."""
    return F.binary_cross_entropy_with_logits(logit_B, label_B, reduction="none")


def sampled_softmax(
    positive_B: torch.Tensor,
    negative_BS: torch.Tensor,
    log_q_positive_B: torch.Tensor,
    log_q_negative_S: torch.Tensor,
    hit_BS: torch.Tensor,
) -> torch.Tensor:
    """[B]  -log( exp(s⁺) / (exp(s⁺) + Σ_j exp(s_j)) ),  where s = logit - log q(item).

    Subtracting each candidate's log-probability of being drawn makes the sampled softmax estimate the
    full one: Bengio & Senécal 2008 (IEEE TNN 19:4), Jean et al. 2015 (arXiv 1412.2007 §3.1); for
    recommenders Covington et al. 2016 and Yi et al. 2019 (RecSys). Expected counts S·q in place of q
    change nothing: log S cancels.

    `hit_BS` marks accidental hits, negatives that are the row's own positive; they are left out.
    Computed as softplus(logsumexp_j s_j - s⁺), which overflows for no finite logits.
    """
    corrected_BS = negative_BS - log_q_negative_S
    # finite, not -inf: a row whose negatives are all hits has loss 0 and gradient 0 instead of NaN
    floor = torch.finfo(corrected_BS.dtype).min / 4
    others_B = corrected_BS.masked_fill(hit_BS, floor).logsumexp(dim=1)
    return F.softplus(others_B - (positive_B - log_q_positive_B))


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
    others_B = F.softplus(negative_BS).masked_fill(hit_BS, 0.0).sum(dim=1)
    return (beta * F.softplus(-positive_B) + others_B) / (negative_BS.shape[1] + 1)


def gbce_beta(negatives: int, others: int, calibration: float) -> float:
    """beta = a·(t·(1 - 1/a) + 1/a), with a = `negatives` / `others`, t = `calibration` (ibid.).

    a is the share of the items which are not the positive that is drawn, at most 1. t = 0 gives 1, plain
    binary cross-entropy; t = 1 gives a, whose probabilities are those of all others as negatives.
    """
    share = min(1.0, negatives / others)
    return share * (calibration * (1 - 1 / share) + 1 / share)
