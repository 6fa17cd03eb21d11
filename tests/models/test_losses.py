"""The losses against independent NumPy in double precision, forward and gradient."""

import numpy as np
import pytest
import torch

from recsys_dist.config import rng_for
from recsys_dist.models import losses
from recsys_dist.models.losses import (
    bayesian_personalised_ranking,
    binary_cross_entropy,
    focal,
    gbce,
    gbce_beta,
    log_square,
    sampled_softmax,
)


def numpy_sampled_softmax(
    user: np.ndarray, positive: np.ndarray, negatives: np.ndarray, log_q: tuple, hit: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Loss [B] and its gradient in the users' vectors [B, D], by a loop over rows from the formula."""
    losses, gradients = [], []
    for b in range(user.shape[0]):
        vectors = np.concatenate([positive[b : b + 1], negatives[~hit[b]]])
        corrections = np.concatenate([log_q[0][b : b + 1], log_q[1][~hit[b]]])
        exp = np.exp(vectors @ user[b] - corrections)
        p = exp / exp.sum()
        losses.append(-np.log(p[0]))
        gradients.append(p @ vectors - vectors[0])
    return np.array(losses), np.array(gradients)


def test_sampled_softmax_is_its_formula() -> None:
    rng = rng_for(0, "losses")
    user, positive, negatives = rng.normal(size=(5, 4)), rng.normal(size=(5, 4)), rng.normal(size=(7, 4))
    log_q = (np.log(rng.uniform(0.01, 0.2, 5)), np.log(rng.uniform(0.01, 0.2, 7)))
    hit = rng.random((5, 7)) < 0.2
    expected, gradient = numpy_sampled_softmax(user, positive, negatives, log_q, hit)
    u = torch.tensor(user, requires_grad=True)
    loss = sampled_softmax(u, *map(torch.tensor, (positive, negatives, *log_q, hit)))
    loss.sum().backward()
    np.testing.assert_allclose(loss.detach().numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(u.grad.numpy(), gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cached", [1, 3 * 7, 1 << 17], ids=["row by row", "blocks and a rest", "at once"])
def test_log_partition_is_autograds(cached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In whatever blocks, with rows of unequal weight and items left out."""
    monkeypatch.setattr(losses, "_CACHED_LOGITS", cached)
    monkeypatch.setattr(losses, "_FEWEST_ROWS", 1)
    rng = rng_for(9, "losses")
    values = [torch.tensor(rng.normal(size=shape)) for shape in ((8, 4), (7, 4), (7,), (8,))]
    left_out = torch.tensor(rng.random((8, 7)) < 0.3)

    def plain(u: torch.Tensor, v: torch.Tensor, log_q: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return (u @ v.T - log_q).masked_fill(out, -torch.inf).logsumexp(dim=1)

    found = []
    for log_partition in (losses.log_partition, plain):
        u, v = (x.clone().requires_grad_() for x in values[:2])
        total = log_partition(u, v, values[2], left_out)
        (total * values[3]).sum().backward()
        found.append((total.detach(), u.grad, v.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_all_items_drawn_once_uniformly_is_the_full_softmax() -> None:
    rng = rng_for(1, "losses")
    logit = torch.tensor(rng.normal(size=(6, 9)))
    positive = torch.tensor(rng.integers(0, 9, 6))
    uniform = torch.full((9,), -np.log(9.0), dtype=torch.float64)
    items = torch.eye(9, dtype=torch.float64)
    loss = sampled_softmax(
        logit,
        items[positive],
        items,
        uniform[positive],
        uniform,
        positive[:, None] == torch.arange(9)[None, :],
    )
    full = torch.nn.functional.cross_entropy(logit, positive, reduction="none")
    torch.testing.assert_close(loss, full, rtol=1e-12, atol=0)


def test_correction_removes_the_bias_of_popularity_sampling() -> None:
    """E[Σ_j exp(s_j - log q_j)] / S is the full partition sum, whatever q: checked by exact expectation."""
    rng = rng_for(2, "losses")
    logit, q = rng.normal(size=20), rng.dirichlet(np.ones(20))
    expected_sum = (q * np.exp(logit - np.log(q))).sum()
    np.testing.assert_allclose(expected_sum, np.exp(logit).sum(), rtol=1e-12)
    draws = rng.choice(20, size=200_000, p=q)
    items, log_q = torch.tensor(logit)[:, None], torch.tensor(np.log(q))
    loss = sampled_softmax(
        torch.ones(1, 1, dtype=torch.float64),
        items[:1],
        items[draws],
        torch.zeros(1, dtype=torch.float64),
        log_q[draws] + np.log(200_000.0),
        torch.zeros(1, 200_000, dtype=torch.bool),
    )
    full = np.log(np.exp(logit[0]) + np.exp(logit).sum()) - logit[0]
    np.testing.assert_allclose(loss.item(), full, atol=0.01)


def test_a_row_whose_negatives_are_all_hits_is_silent() -> None:
    vectors = [torch.full(shape, 0.3, requires_grad=True) for shape in ((1, 1), (1, 1), (2, 1))]
    hit = torch.ones(1, 2, dtype=torch.bool)
    loss = sampled_softmax(*vectors, torch.zeros(1), torch.zeros(2), hit)
    loss.sum().backward()
    assert loss.item() == 0 and not any(vector.grad.any() for vector in vectors)


def test_large_logits_do_not_overflow() -> None:
    user, item = torch.tensor([[1e4]]), torch.tensor([[1.0]])
    loss = sampled_softmax(user, -item, item, torch.zeros(1), torch.zeros(1), torch.zeros(1, 1).bool())
    assert loss.item() == 2e4


def test_binary_cross_entropy_is_its_formula() -> None:
    z, y = np.array([-800.0, -1.5, 0.0, 2.0]), np.array([0.0, 1.0, 1.0, 0.0])
    logit = torch.tensor(z, requires_grad=True)
    loss = binary_cross_entropy(logit, torch.tensor(y))
    loss.sum().backward()
    p = 1 / (1 + np.exp(-z[1:]))
    np.testing.assert_allclose(
        loss.detach().numpy(), [0, *(-y[1:] * np.log(p) - (1 - y[1:]) * np.log(1 - p))], rtol=1e-12
    )
    np.testing.assert_allclose(logit.grad.numpy(), [0, *(p - y[1:])], rtol=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_loss_is_its_formula(gamma: float) -> None:
    """Lin et al. 2017, eq. 4, and appendix B: dFL/dz = t (1 - p_t)^g (g p_t log p_t + p_t - 1), t = ±1."""
    z, y = rng_for(3, "losses").normal(size=12) * 4, np.arange(12) % 2
    logit = torch.tensor(z, requires_grad=True)
    loss = focal(logit, torch.tensor(y, dtype=torch.float64), gamma)
    loss.sum().backward()
    t = 2 * y - 1
    p_t = 1 / (1 + np.exp(-t * z))
    np.testing.assert_allclose(loss.detach(), -((1 - p_t) ** gamma) * np.log(p_t), rtol=1e-10)
    slope = t * (1 - p_t) ** gamma * (gamma * p_t * np.log(p_t) + p_t - 1)
    np.testing.assert_allclose(logit.grad, slope, rtol=1e-9)


def test_focal_loss_is_finite_where_nothing_is_left_to_learn() -> None:
    logit = torch.tensor([200.0, -200.0], requires_grad=True)
    loss = focal(logit, torch.tensor([1.0, 0.0]), 0.5)
    loss.sum().backward()
    assert loss.sum() == 0 and bool(torch.isfinite(logit.grad).all())


def test_bpr_is_its_formula() -> None:
    """Rendle et al. 2009, section 4: -ln sigmoid(x̂_uij), whose slope in s⁺ is -sigmoid(-x̂_uij)."""
    rng = rng_for(4, "losses")
    s, others, hit = rng.normal(size=5), rng.normal(size=(5, 7)), rng.random((5, 7)) < 0.3
    hit[2] = True  # nothing to learn from
    positive, negative = torch.tensor(s, requires_grad=True), torch.tensor(others, requires_grad=True)
    loss = bayesian_personalised_ranking(positive, negative, torch.tensor(hit))
    loss.sum().backward()
    expected, up, down = np.zeros(5), np.zeros(5), np.zeros((5, 7))
    for b in range(5):
        kept = np.flatnonzero(~hit[b])
        for j in kept:
            p = 1 / (1 + np.exp(-(s[b] - others[b, j])))
            expected[b] -= np.log(p) / len(kept)
            up[b] -= (1 - p) / len(kept)
            down[b, j] = (1 - p) / len(kept)
    np.testing.assert_allclose(loss.detach(), expected, rtol=1e-12)
    np.testing.assert_allclose(positive.grad, up, rtol=1e-12)
    np.testing.assert_allclose(negative.grad, down, rtol=1e-12)


def test_log_square_is_its_formula() -> None:
    z, v = np.array([-1.0, 0.0, 3.0]), np.array([0.0, 2.0, 1e6])
    predicted = torch.tensor(z, requires_grad=True)
    loss = log_square(predicted, torch.tensor(v))
    loss.sum().backward()
    np.testing.assert_allclose(loss.detach(), (z - np.log(1 + v)) ** 2, rtol=1e-12)
    np.testing.assert_allclose(predicted.grad, 2 * (z - np.log(1 + v)), rtol=1e-12)


def test_gbce_is_its_formula() -> None:
    rng = rng_for(3, "losses")
    positive, negative, hit = rng.normal(size=5), rng.normal(size=(5, 7)) * 3, rng.random((5, 7)) < 0.3
    beta = 0.37
    s, n = torch.tensor(positive, requires_grad=True), torch.tensor(negative, requires_grad=True)
    loss = gbce(s, n, torch.tensor(hit), beta)
    loss.sum().backward()
    p, q = 1 / (1 + np.exp(-positive)), 1 / (1 + np.exp(-negative))
    others = np.where(hit, 0, np.log(1 - q)).sum(axis=1)
    np.testing.assert_allclose(loss.detach().numpy(), -(np.log(p**beta) + others) / 8, rtol=1e-12)
    np.testing.assert_allclose(s.grad.numpy(), -beta * (1 - p) / 8, rtol=1e-12)
    np.testing.assert_allclose(n.grad.numpy(), np.where(hit, 0, q) / 8, rtol=1e-12)


def test_losses_of_16_bits_are_computed_in_32() -> None:
    """What autocast hands over is rounded once, and not at every step from there."""
    rng = torch.Generator().manual_seed(0)
    users, positives, negatives = (torch.randn(n, 8, generator=rng).bfloat16() for n in (6, 6, 9))
    hit = torch.zeros(6, 9, dtype=torch.bool)
    logits, others = (users * positives).sum(dim=1), users @ negatives.T
    for loss, *given in (
        (sampled_softmax, users, positives, negatives, torch.zeros(6), torch.zeros(9), hit),
        (bayesian_personalised_ranking, logits, others, hit),
        (gbce, logits, others, hit, 0.5),
    ):
        wide = [x.float() if isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 else x for x in given]
        found = loss(*given)
        assert found.dtype == torch.float32 and torch.equal(found, loss(*wide))


def test_gbce_undoes_the_overconfidence_of_sampling_at_full_calibration() -> None:
    """Where an item is the next one with probability p, negatives at rate a, the best guess is p at t = 1.

    Expected loss at score s: -(p beta log sigmoid(s) + (1 - p) a log(1 - sigmoid(s))).
    """
    share = 20 / 400
    for calibration, expected in ((1.0, 0.3), (0.0, 0.3 / (0.3 + 0.7 * share))):
        beta = gbce_beta(20, 400, calibration)
        guess = np.linspace(0.001, 0.999, 99_801)
        best = guess[np.argmax(0.3 * beta * np.log(guess) + 0.7 * share * np.log(1 - guess))]
        assert best == pytest.approx(expected, abs=1e-4)
    assert gbce_beta(500, 400, 0.9) == 1  # more negatives than items: nothing to correct
