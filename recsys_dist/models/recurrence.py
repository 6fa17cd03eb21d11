"""Gated recurrent units over rows of unequal length, forward and backward by hand.

    r_t = sigmoid(x_t^r + U_r h_{t-1}),  u_t = sigmoid(x_t^u + U_u h_{t-1})
    n_t = tanh(x_t^n + r_t ∘ U_n h_{t-1}),  w_t = a_t u_t
    h_t = (1 - w_t) ∘ h_{t-1} + w_t ∘ n_t,  h_0 = 0

The GRU of DIEN (arXiv 1809.03672, eq. 2-5) with a = 1, its AUGRU (eq. 14-15) with the attention a. x is
W i + b of all tokens, one product before the loop. Rows are sorted by length: a step works on the prefix
of rows that still live, so no padding is touched. (torch's own GRU takes no attention, and autograd would
record a dozen operations a step; here a step is one product and six passes forward, and three backward.)

V tokens, H width of the state, T steps
"""

from typing import Any

import torch

from recsys_dist.models.behaviours import Segments
from recsys_dist.models.precision import by_hand


class Packing:
    """Tokens step by step, longest row first, instead of row by row.

    token_V   which token is at each packed place;  place_V  where each token is
    live      [T] rows that have a token at each step
    """

    def __init__(self, segments: Segments) -> None:
        every_V, lengths_B = segments.every_V, segments.lengths_B
        order_B = lengths_B.argsort(descending=True, stable=True)
        rank_B = torch.empty_like(order_B)
        rank_B[order_B] = torch.arange(len(order_B), device=order_B.device)
        step_V = every_V - segments.offsets[segments.row_V]
        live_T = torch.bincount(step_V)
        self.place_V = (live_T.cumsum(0) - live_T)[step_V] + rank_B[segments.row_V]
        self.token_V = torch.empty_like(every_V)
        self.token_V[self.place_V] = every_V
        self.live: list[int] = live_T.tolist()
        # the same row's place a step earlier, of all places but the first step's
        first = self.live[0] if self.live else 0
        self.previous = every_V[first:] - torch.repeat_interleave(live_T[:-1], live_T[1:])


def gru(
    x_VG: torch.Tensor, recurrent_GH: torch.Tensor, packing: Packing, attention_V: torch.Tensor | None = None
) -> torch.Tensor:
    """[V, H] states h_t of all tokens, in the order of the tokens.

    x_VG          [V, 3H] what the inputs give to r, u and n, in this order
    recurrent_GH  [3H, H] U_r, U_u, U_n
    attention_V   [V] a_t; 1 without
    """
    states: torch.Tensor = by_hand(_Recurrence, x_VG, recurrent_GH, attention_V, packing)
    return states


class _Recurrence(torch.autograd.Function):
    """Backward, all but the state's own gradient g_t is a product with what the forward pass knows."""

    @staticmethod
    def forward(
        ctx: Any, x_VG: torch.Tensor, recurrent_GH: torch.Tensor, a_V: torch.Tensor | None, packing: Packing
    ) -> torch.Tensor:
        width = recurrent_GH.shape[1]
        gates_VG = x_VG.index_select(0, packing.token_V)  # becomes r, u, n
        a_V1 = None if a_V is None else a_V.index_select(0, packing.token_V)[:, None]
        of_state_VG = torch.zeros_like(gates_VG)  # U h_{t-1}
        state_VH = gates_VG.new_empty(len(gates_VG), width)
        update_VH = torch.empty_like(state_VH)
        start, before = 0, state_VH.new_zeros(packing.live[0] if packing.live else 0, width)
        for step, live in enumerate(packing.live):
            now = slice(start, start + live)
            gates_NG, of_state_NG = gates_VG[now], of_state_VG[now]
            if step:
                torch.mm(before[:live], recurrent_GH.T, out=of_state_NG)
            gates_NG[:, : 2 * width].add_(of_state_NG[:, : 2 * width]).sigmoid_()
            reset, update, new = gates_NG.chunk(3, dim=1)
            new.addcmul_(reset, of_state_NG[:, 2 * width :]).tanh_()
            update = update if a_V1 is None else torch.mul(update, a_V1[now], out=update_VH[now])
            before = torch.lerp(before[:live], new, update, out=state_VH[now])
            start += live
        ctx.packing = packing
        ctx.save_for_backward(gates_VG, of_state_VG[:, 2 * width :], state_VH, recurrent_GH, a_V1)
        return state_VH.index_select(0, packing.place_V)

    @staticmethod
    def backward(ctx: Any, *gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        packing: Packing = ctx.packing
        gates_VG, of_state_VH, state_VH, recurrent_GH, a_V1 = ctx.saved_tensors
        width = state_VH.shape[1]
        reset, update, new = gates_VG.chunk(3, dim=1)
        before_VH = torch.zeros_like(state_VH)
        before_VH[len(before_VH) - len(packing.previous) :] = state_VH.index_select(0, packing.previous)
        w_VH = update if a_V1 is None else update * a_V1
        change_VH = new - before_VH
        # what a gradient of 1 of the state is to x^r, x^u, x^n
        of_new = w_VH * (1 - new.square())
        of_reset = of_new * of_state_VH * reset * (1 - reset)
        of_update = w_VH * (1 - update) * change_VH
        to_state_VG = torch.cat([of_reset, of_update, of_new * reset], dim=1)
        keep_VH = 1 - w_VH
        g_VH = gradient[0].index_select(0, packing.token_V)
        self_VG = torch.empty_like(to_state_VG)  # gradient of U h_{t-1}
        stop, carry = len(g_VH), None
        for live in reversed(packing.live):
            now = slice(stop - live, stop)
            if carry is not None:
                g_VH[stop - live : stop - live + len(carry)] += carry
            through = torch.mul(
                g_VH[now][:, None],
                to_state_VG[now].view(live, 3, width),
                out=self_VG[now].view(live, 3, width),
            ).view(live, -1)
            carry = torch.addmm(g_VH[now] * keep_VH[now], through, recurrent_GH)
            stop -= live
        of_x_VG = torch.cat([self_VG[:, : 2 * width], g_VH * of_new], dim=1)
        of_a_V = None if a_V1 is None else (g_VH * update * change_VH).sum(1).index_select(0, packing.place_V)
        return of_x_VG.index_select(0, packing.place_V), self_VG.T @ before_VH, of_a_V, None
