"""State space models: a state of fixed size instead of a cache that grows.

    Attention keeps all it has seen and looks at it again for each token: T² work, T memory. A state space model keeps a
    summary h, brings it up to date with each token and reads from it: T work, constant memory, and what the summary has
    lost is lost.

    h_t = Ā_t h_{t−1} + B̄_t x_t                y_t = C_t h_t + D x_t

    member             state a layer   Ā_t                            what of it depends on the input
    S4D                [C, N]          exp(Δ A), complex, diagonal    nothing: so it is a convolution, too
    Mamba              [C, N]          exp(Δ_t A), real, diagonal     Δ, B, C: it can choose what to keep
    Mamba-2            [H, P, N]       exp(Δ_t A), one number a head  the same; it becomes products of matrices
    gated delta rule   [H, K, V]       α_t (I − β_t k_t k_tᵀ)         α, β, k: it can also replace what stands at a key

    A continuous system h' = A h + B x becomes steps of Δ: by ZOH (x held constant within a step) Ā = exp(Δ A) and
    B̄ = A⁻¹ (exp(Δ A) − 1) B; S4D does so. Mamba and Mamba-2 take the simpler B̄ = Δ B.

    name       shape            in the papers
    x, y       [B, T, C]        x, y (u, y): C channels, each with a state of its own
    dt         [B, T, C]        Δ > 0: how long a step is; large: forget and take in, near 0: stay
    A          [C, N]           A < 0: how fast each number of the state fades
    B, C       [B, T, N]        B, C: how a token is written into the state, how it is read
    D          [C]              D: a way past the state
    state      [B, C, N]        h
    w          [C, K]           the short convolution before it, K = 4: a token and the three before it

S4: Gu et al. 2021, arXiv 2111.00396; S4D: 2206.11893; HiPPO: 2008.07669. Mamba: Gu & Dao 2023, 2312.00752. Mamba-2: Dao
& Gu 2024, 2405.21060. The gated delta rule: Yang et al. 2024, 2412.06464.

`python ssm.py` shows that all forms agree, where the state overtakes attention, and what a token costs after 1,000 and
after 64,000 others; `python ssm.py --probe` what a state of fixed size can't remember.
"""
import argparse
import itertools
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from attention import (MLP, Attention, Block, RMSNorm, Rotary, _exact, _floats, jit, leave, on_kernel, rms_norm,
                       rotary_inv_freq, swiglu, tl, triton)


# --- 1. S4D: one model, three views -----------------------------------------------------------------------------------

def hippo_legs(N):
    """HiPPO-LegS (arXiv 2008.07669, theorem 2) → A [N, N], B [N]: a state that is the past in Legendre polynomials."""
    n = np.arange(N)
    root = np.sqrt(2 * n + 1)
    A = -np.where(n[:, None] > n, root[:, None] * root, np.diag(n + 1.0))
    return A, root


def _exp(M):
    """exp of a matrix: its Taylor series at M / 2^s, squared s times."""
    s = max(0, math.ceil(math.log2(max(np.abs(M).sum(1).max(), 1e-300))) + 3)
    M, term = M / 2 ** s, np.eye(len(M))
    total = term
    for i in range(1, 16):
        term = term @ M / i
        total = total + term
    for _ in range(s):
        total = total @ total
    return total


def discretize(A, B, dt, method="zoh"):
    """h' = A h + B x in steps of dt → Ā, B̄. A [N, N] and B [N], or diagonal: A [..., N], B [..., N], dt [...].

    zoh: the input is held for a step; bilinear: the trapezoidal rule. ValueError for another method.
    """
    if method not in ("zoh", "bilinear"):
        raise ValueError(f"method is {method!r}: it must be 'zoh' or 'bilinear'")
    if A.ndim == 2 and A.shape[0] == A.shape[1] and np.ndim(dt) == 0:        # whole matrices
        I = np.eye(len(A))
        if method == "bilinear":
            left = np.linalg.inv(I - dt / 2 * A)
            return left @ (I + dt / 2 * A), left @ (dt * B)
        both = np.zeros((len(A) + 1,) * 2)                                   # exp of (A B; 0 0) holds Ā and B̄
        both[:-1, :-1], both[:-1, -1] = A * dt, B * dt
        both = _exp(both)
        return both[:-1, :-1], both[:-1, -1]
    dt = np.asarray(dt)[..., None]
    if method == "bilinear":
        return (1 + dt / 2 * A) / (1 - dt / 2 * A), dt * B / (1 - dt / 2 * A)
    return np.exp(dt * A), np.expm1(dt * A) / A * B


def s4d_init(C, N):
    """S4D-Lin's A [C, N], complex: the same decay, frequencies in a row; only one of each conjugate pair is kept."""
    return np.broadcast_to(-0.5 + 1j * np.pi * np.arange(N), (C, N)).copy()


def s4d_recurrence_numpy(x, A, B, C, dt, state=None):
    """First view, a step at a time: x [T, C] real; A, B, C [C, N] complex, dt [C] → y [T, C], state [C, N]."""
    A_bar, B_bar = discretize(A, B, dt)
    h, y = np.zeros(A.shape, complex) if state is None else state, np.empty(x.shape)
    for t in range(len(x)):
        h = A_bar * h + B_bar * x[t, :, None]
        y[t] = 2 * (C * h).sum(1).real                                       # the other halves are its conjugates
    return y, h


def s4d_convolution_numpy(x, A, B, C, dt):
    """Second view: y = K ∗ x with K_t = 2 Re(C Āᵗ B̄), by FFT: as Ā is the same at all times. → y [T, C]."""
    T = len(x)
    A_bar, B_bar = discretize(A, B, dt)
    kernel = 2 * np.einsum("cn,cnt->tc", C * B_bar, A_bar[..., None] ** np.arange(T)).real
    spectrum = np.fft.rfft(kernel, 2 * T, axis=0) * np.fft.rfft(x, 2 * T, axis=0)    # twice as long: nothing wraps
    return np.fft.irfft(spectrum, 2 * T, axis=0)[:T]


def s4d_scan_numpy(x, A, B, C, dt):
    """Third view: a scan over pairs (a, b), (a₁, b₁) ∘ (a₂, b₂) = (a₂ a₁, a₂ b₁ + b₂), in log₂ T rounds. → y [T, C]."""
    A_bar, B_bar = discretize(A, B, dt)
    a, b = np.broadcast_to(A_bar, (len(x), *A.shape)).copy(), B_bar * x[..., None]
    shift = 1
    while shift < len(x):                                                    # after round r each holds 2^r steps
        a[shift:], b[shift:] = a[shift:] * a[:-shift], a[shift:] * b[:-shift] + b[shift:]
        shift *= 2
    return 2 * (C * b).sum(-1).real


# --- 2. Sequences in a pack: B = 1, one after the other, each with a state of its own ---------------------------------

def _pack_numpy(op, tensors, by_token, state, cu_seqlens):
    """A pack is a loop over its sequences. by_token: which of the tensors have a token axis."""
    y, ends = np.zeros_like(tensors[2 if op is gated_delta_numpy else 0]), []
    for i, (t0, t1) in enumerate(zip(cu_seqlens, cu_seqlens[1:])):
        own = [a[:, t0:t1] if n in by_token else a for n, a in enumerate(tensors)]
        y[:, t0:t1], end = op(*own, state=None if state is None else state[i:i + 1])
        ends.append(end)
    return y, np.concatenate(ends)


def _pack_backward_numpy(op, tensors, by_token, state, cu_seqlens, grad):
    sums, dstates = [np.zeros_like(a) for a in tensors if a is not None], []
    for i, (t0, t1) in enumerate(zip(cu_seqlens, cu_seqlens[1:])):
        own = [a[:, t0:t1] if n in by_token else a for n, a in enumerate(tensors)]
        *parts, dstate = op(*own, state=np.zeros_like(grad[1][i:i + 1]) if state is None else state[i:i + 1],
                            grad=(grad[0][:, t0:t1], grad[1][i:i + 1]))
        for n, part in enumerate(parts):
            sums[n][(slice(None), slice(t0, t1)) if n in by_token else ...] += part
        dstates.append(dstate)
    return *sums, *([] if state is None else [np.concatenate(dstates)])


def _offsets(op, cu_seqlens, T, B):
    """cu_seqlens [n + 1] as kernels read it. ValueError unless it has offsets into T packed rows: of values on a CPU,
    where they can be looked at.
    """
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{op}: cu_seqlens {tuple(cu_seqlens.shape)} {cu_seqlens.dtype} must be [sequences + 1] "
                         "offsets, int32")
    if B != 1:
        raise ValueError(f"{op}: with cu_seqlens {tuple(cu_seqlens.shape)} the batch must be 1, not {B}")
    if not cu_seqlens.is_cuda:
        cu = cu_seqlens.tolist()
        if cu[0] != 0 or cu[-1] > T or any(a > b for a, b in zip(cu, cu[1:])):
            raise ValueError(f"{op}: cu_seqlens must rise from 0 to at most {T}, the rows there are: {cu[:9]}")
    return cu_seqlens.contiguous()


def _pack_in_torch(whole, step, tensors, state, cu_seqlens):
    """A pack, sequence by sequence; those of one token all by one step. tensors [1, T, ...] → y [1, T, ...], state."""
    cu, T = cu_seqlens.tolist(), tensors[0].shape[1]
    spans = list(zip(cu, cu[1:]))
    ys, states = [None] * len(spans), list(state.split(1))
    ones = [i for i, (t0, t1) in enumerate(spans) if t1 == t0 + 1]
    if ones:
        rows = [spans[i][0] for i in ones]
        y, ends = step(*(a[0, rows] for a in tensors), state=state[ones])
        for i, row, end in zip(ones, y[:, None].split(1), ends.split(1)):
            ys[i], states[i] = row, end
    for i, (t0, t1) in enumerate(spans):
        if t1 > t0 + 1:
            ys[i], states[i] = whole(*(a[:, t0:t1] for a in tensors), state=states[i])
    ys = [y for y in ys if y is not None]
    if not ys:
        return None, state
    y = torch.cat(ys, 1)
    return F.pad(y, [0, 0] * (y.ndim - 2) + [0, T - y.shape[1]]), torch.cat(states)


# --- 3. The short convolution -----------------------------------------------------------------------------------------
#
# y_t = silu(bias + Σ_j w_j x_{t − K + 1 + j}): what stands before a sequence are the inputs of its state, or zeros.

def silu_numpy(z):
    """→ silu(z) and its slope."""
    s = 1 / (1 + np.exp(-z))
    return z * s, s * (1 + z * (1 - s))


def _sequences(x, cu_seqlens):
    """(row of x, its first token, the one after its last) for each sequence: rows of a batch, or pieces of a pack."""
    if cu_seqlens is None:
        return [(b, 0, x.shape[1]) for b in range(x.shape[0])]
    return [(0, int(i), int(j)) for i, j in zip(cu_seqlens[:-1], cu_seqlens[1:])]


def causal_conv1d_numpy(x, w, bias=None, state=None, cu_seqlens=None):
    """x [B, T, C], w [C, K], bias [C], state [B, C, K − 1] → y [B, T, C], state: arguments and results as the op's."""
    K, y, after = w.shape[1], np.zeros_like(x), []
    for s, (b, i, j) in enumerate(_sequences(x, cu_seqlens)):
        before = np.zeros((K - 1, x.shape[2]), x.dtype) if state is None else state[s].T
        line = np.concatenate([before, x[b, i:j]])                           # [K − 1 + T, C]
        z = sum((line[k:k + j - i] * w[:, k] for k in range(K)), np.zeros((j - i, x.shape[2]), x.dtype))
        y[b, i:j] = silu_numpy(z if bias is None else z + bias)[0]
        after.append(line[len(line) - (K - 1):].T)
    return y, np.stack(after)


def causal_conv1d_backward_numpy(x, w, bias=None, state=None, cu_seqlens=None, *, grad):
    """grad (dy, dstate) → dx, dw, and dbias, dstate where they were given."""
    dy, dafter = grad
    K, dx, dw, dbias, dstate = w.shape[1], np.zeros_like(x), np.zeros_like(w), np.zeros_like(w[:, 0]), []
    for s, (b, i, j) in enumerate(_sequences(x, cu_seqlens)):
        before = np.zeros((K - 1, x.shape[2]), x.dtype) if state is None else state[s].T
        line = np.concatenate([before, x[b, i:j]])
        z = sum((line[k:k + j - i] * w[:, k] for k in range(K)), np.zeros((j - i, x.shape[2]), x.dtype))
        dz = dy[b, i:j] * silu_numpy(z if bias is None else z + bias)[1]
        dline = np.zeros_like(line)
        for k in range(K):
            dline[k:k + j - i] += dz * w[:, k]
            dw[:, k] += (dz * line[k:k + j - i]).sum(0)
        dbias += dz.sum(0)
        dline[len(line) - (K - 1):] += dafter[s].T
        dx[b, i:j] = dline[K - 1:]
        dstate.append(dline[:K - 1].T)
    return dx, dw, *(() if bias is None else (dbias,)), *(() if state is None else (np.stack(dstate),))


@jit
def _conv_in(X, S, t, first, seq, k, c, C, sx, K: tl.constexpr, mask):
    """What stands K − 1 − k tokens before t: an input, or before the first one a number of the state (zero without)."""
    at = t - (K - 1) + k
    x = tl.load(X + at[:, None] * sx + c, mask=mask & (at >= first)[:, None], other=0.).to(tl.float32)
    if S is not None:
        old = at - first + K - 1                                             # its place in the state [C, K − 1]
        s = tl.load(S + (seq[:, None] * C + c) * (K - 1) + old[:, None], mask=mask & (at < first)[:, None], other=0.)
        x += s.to(tl.float32)
    return x


@jit
def _conv_sum(X, W, BIAS, S, t, first, seq, c, C, sx, K: tl.constexpr, mask):
    """→ z, of which y is the silu."""
    z = tl.zeros_like(mask.to(tl.float32))
    if BIAS is not None:
        z += tl.load(BIAS + c, mask=c < C, other=0.).to(tl.float32)
    for k in tl.static_range(K):
        w = tl.load(W + c * K + k, mask=c < C, other=0.).to(tl.float32)
        z += w * _conv_in(X, S, t, first, seq, k, c, C, sx, K, mask)
    return z


@jit
def _causal_conv1d_fwd(X, W, BIAS, S, FIRST, LAST, SEQ, Y, N, C, sx, K: tl.constexpr, BLOCK_T: tl.constexpr,
                       BLOCK_C: tl.constexpr):
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    first = tl.load(FIRST + t, mask=t < N, other=0)                          # where the token's own sequence begins
    last = tl.load(LAST + t, mask=t < N, other=0)                            # and ends: at t itself, if it has none
    seq = tl.load(SEQ + t, mask=t < N, other=0).to(tl.int64)
    mask = (t < last)[:, None] & (c < C)
    z = _conv_sum(X, W, BIAS, S, t, first, seq, c, C, sx, K, mask)
    tl.store(Y + t[:, None] * C + c, z / (1 + tl.exp(-z)), mask=mask)


@jit
def _causal_conv1d_bwd(dY, X, W, BIAS, S, FIRST, SEQ, LAST, dX, dW, dBIAS, N, C, sx, K: tl.constexpr,
                       BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    tile = tl.program_id(0).to(tl.int64)
    t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    first = tl.load(FIRST + t, mask=t < N, other=0)
    last = tl.load(LAST + t, mask=t < N, other=0)                            # where it ends
    seq = tl.load(SEQ + t, mask=t < N, other=0).to(tl.int64)
    dx = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for k in tl.static_range(K):                                             # x_t is in z_t … z_{t + K − 1}
        u = t + K - 1 - k
        mask = ((t < N) & (u < last))[:, None] & (c < C)
        z = _conv_sum(X, W, BIAS, S, u, first, seq, c, C, sx, K, mask)
        s = 1 / (1 + tl.exp(-z))
        dz = tl.load(dY + u[:, None] * C + c, mask=mask, other=0.).to(tl.float32) * s * (1 + z * (1 - s))
        dx += dz * tl.load(W + c * K + k, mask=c < C, other=0.).to(tl.float32)
        if k == K - 1:                                                       # z_t itself
            tl.store(dBIAS + tile * C + c, tl.sum(dz, 0)[None, :], mask=c < C)
            for j in tl.static_range(K):
                x = _conv_in(X, S, t, first, seq, j, c, C, sx, K, mask)
                tl.store(dW + (tile * C + c) * K + j, tl.sum(dz * x, 0)[None, :], mask=c < C)
    tl.store(dX + t[:, None] * C + c, dx, mask=(t < N)[:, None] & (c < C))


def _places(cu_seqlens, B, T, device):
    """For each token of a batch or pack, all in one row: where its sequence begins and ends, and which it is."""
    if cu_seqlens is None:
        seq = torch.arange(B, device=device).repeat_interleave(T)
        return seq * T, (seq + 1) * T, seq
    cu = cu_seqlens.to(device=device, dtype=torch.int64)
    at = torch.arange(T, device=device)
    seq = torch.searchsorted(cu, at, right=True) - 1
    inside = seq < len(cu) - 1                                               # past the last offset: of no sequence
    seq = seq.clamp(max=max(len(cu) - 2, 0))
    return torch.where(inside, cu[seq], at), torch.where(inside, cu[(seq + 1).clamp(max=len(cu) - 1)], at), seq


def _conv_silu(line, w, bias):
    """line [B, C, K − 1 + T] → [B, C, T], summed in float32 whatever the dtypes."""
    wide = torch.promote_types(torch.float32, line.dtype)
    z = F.conv1d(line.to(wide), w.to(wide)[:, None], None if bias is None else bias.to(wide), groups=len(w))
    return F.silu(z).to(line.dtype)


def _conv_in_torch(x, w, bias, state):
    """x [B, T, C] → y, state after: one product of torch."""
    K = w.shape[1]
    before = x.new_zeros(x.shape[0], x.shape[2], K - 1) if state is None else state.to(x.dtype)
    line = torch.cat([before, x.mT], dim=2)                                  # [B, C, K − 1 + T]
    after = line[:, :, line.shape[2] - (K - 1):].clone()                     # not the whole text with it
    if not x.shape[1]:
        return x, after
    return _conv_silu(line, w, bias).mT, after


def _conv_state_gradient(dy, rows, w, bias, state, cu_seqlens, B, T):
    """dstate: of the first K − 1 tokens of each sequence alone, in torch."""
    K1, x, dy = state.shape[2], rows.view(B, T, -1), dy.view(B, T, -1)
    with torch.enable_grad():
        before = state.detach().requires_grad_()
        total = before[:0].sum()                                             # where no sequence has a token
        for s, (b, i, j) in enumerate(_sequences(x, cu_seqlens)):
            j = min(j, i + K1)
            y, _ = _conv_in_torch(x[b:b + 1, i:j].detach(), w.detach(), None if bias is None else bias.detach(),
                                  before[s:s + 1])
            total = total + (y * dy[b:b + 1, i:j]).sum()
        return torch.autograd.grad(total, before)[0]


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, bias, state, cu_seqlens):
        (B, T, C), K = x.shape, w.shape[1]
        rows = x.reshape(B * T, C) if x.stride(-1) == 1 else x.contiguous().view(B * T, C)
        places, y = _places(cu_seqlens, B, T, x.device), x.new_zeros(B, T, C)    # zeros past the last offset
        grid = triton.cdiv(B * T, 32), triton.cdiv(C, 64)
        _causal_conv1d_fwd[grid](rows, w, bias, state, *places, y, B * T, C, rows.stride(0), K=K, BLOCK_T=32,
                                 BLOCK_C=64)
        ctx.save_for_backward(rows, w, bias, state, cu_seqlens, *places)
        ctx.shape = x.shape
        return y

    @staticmethod
    @once_differentiable
    @_exact
    def backward(ctx, dy):
        rows, w, bias, state, cu_seqlens, first, last, seq = ctx.saved_tensors
        (B, T, C), K = ctx.shape, w.shape[1]
        dy, tiles = dy.contiguous(), triton.cdiv(B * T, 32)
        dx, dw, dbias = dy.new_empty(B, T, C), w.new_empty(tiles, C, K, dtype=torch.float32), torch.empty(
            tiles, C, device=dy.device)
        _causal_conv1d_bwd[tiles, triton.cdiv(C, 32)](dy, rows, w, bias, state, first, seq, last, dx, dw, dbias, B * T,
                                                      C, rows.stride(0), K=K, BLOCK_T=32, BLOCK_C=32, num_warps=8)
        return (dx, dw.sum(0).to(w.dtype), None if bias is None else dbias.sum(0).to(bias.dtype),
                None if state is None else _conv_state_gradient(dy, rows, w, bias, state, cu_seqlens, B, T), None)


def _tails(x, state, cu_seqlens, B, T, K):
    """The last K − 1 inputs of each sequence, oldest first [sequences, C, K − 1]; a short one's begin in its state."""
    if cu_seqlens is None:
        starts, ends = torch.arange(B, device=x.device) * T, (torch.arange(B, device=x.device) + 1) * T
    else:
        starts, ends = cu_seqlens[:-1].to(x.device).long(), cu_seqlens[1:].to(x.device).long()
    at = ends[:, None] - (K - 1) + torch.arange(K - 1, device=x.device)      # [sequences, K − 1]
    here = at >= starts[:, None]
    some = x.reshape(B * T, -1)[at.clamp(0, max(B * T - 1, 0))] if B * T else x.new_zeros(*at.shape, x.shape[2])
    some = torch.where(here[..., None], some, 0).mT                          # [sequences, C, K − 1]
    if state is None:
        return some
    old = (at - starts[:, None] + K - 1).clamp(0, max(K - 2, 0))[:, None].expand(-1, x.shape[2], -1)
    return torch.where(here[:, None], some, state.to(x.dtype).gather(2, old))


@_exact
def causal_conv1d(x, w, bias=None, state=None, cu_seqlens=None):
    """Each channel convolved with its last K inputs, then SiLU: x [B, T, C], w [C, K], bias [C] → (y as x, state).

    state [B, C, K − 1]: the inputs before the first, oldest first (None: zeros), and after the last. Differentiable,
    the state too. Packed: `cu_seqlens` [sequences + 1], B = 1, a state for each. ValueError for shapes that do not fit.
    """
    _floats("causal_conv1d", x=x)
    if (x.ndim != 3 or w.ndim != 2 or len(w) != x.shape[2] or not w.shape[1]
            or bias is not None and bias.shape != w.shape[:1]):
        raise ValueError(f"causal_conv1d: x {tuple(x.shape)}, w {tuple(w.shape)}, bias "
                         f"{None if bias is None else tuple(bias.shape)} must be [B, T, C], [C, K], [C]")
    (B, T, C), K = x.shape, w.shape[1]
    sequences = B
    if cu_seqlens is not None:
        cu_seqlens = _offsets("causal_conv1d", cu_seqlens, T, B)
        sequences = len(cu_seqlens) - 1
    if state is not None and state.shape != (sequences, C, K - 1):
        raise ValueError(f"causal_conv1d: state {tuple(state.shape)} must be {(sequences, C, K - 1)}")
    if on_kernel(x):
        w, bias, state = (a if a is None else a.contiguous() for a in (w, bias, state))
        return _CausalConv1d.apply(x, w, bias, state, cu_seqlens), _tails(x, state, cu_seqlens, B, T, K)
    if cu_seqlens is None:
        return _conv_in_torch(x, w, bias, state)
    # Packed: one convolution over all, and the first K − 1 tokens of each sequence, which must not see the one before.
    ends = cu_seqlens.tolist()
    y = _conv_in_torch(x[:, :ends[-1]], w, bias, None)[0]
    at = [i + k for i, j in zip(ends, ends[1:]) for k in range(min(K - 1, j - i))]
    own = [(s, min(K - 1, j - i)) for s, (i, j) in enumerate(zip(ends, ends[1:])) if j > i]
    if at:
        heads = torch.zeros(len(own), C, 2 * (K - 1), dtype=x.dtype, device=x.device)
        if state is not None:
            heads = torch.cat([state.to(x.dtype)[[s for s, _ in own]], heads[:, :, K - 1:]], dim=2)
        row = torch.tensor([n for n, (_, count) in enumerate(own) for _ in range(count)], device=x.device)
        column = torch.tensor([K - 1 + k for _, count in own for k in range(count)], device=x.device)
        at = torch.tensor(at, device=x.device)
        heads = heads.index_put((row[:, None], torch.arange(C, device=x.device), column[:, None]), x[0, at])
        first = _conv_silu(heads, w, bias)                                   # [n, C, K − 1]
        y = y.index_copy(1, at, first[row, :, column - (K - 1)][None])
    return F.pad(y, (0, 0, 0, T - ends[-1])), _tails(x, state, cu_seqlens, B, T, K)


@_exact
def causal_conv1d_step(x, w, bias=None, state=None):
    """One token of each sequence: x [B, C], state [B, C, K − 1] → (y [B, C], state)."""
    _floats("causal_conv1d_step", x=x)
    if (x.ndim != 2 or w.ndim != 2 or len(w) != x.shape[1] or state is None
            or state.shape != (*x.shape, w.shape[1] - 1) or bias is not None and bias.shape != w.shape[:1]):
        raise ValueError(f"causal_conv1d_step: x {tuple(x.shape)}, w {tuple(w.shape)}, bias "
                         f"{None if bias is None else tuple(bias.shape)}, state "
                         f"{None if state is None else tuple(state.shape)} must be [B, C], [C, K], [C], [B, C, K − 1]")
    line = torch.cat([state.to(x.dtype), x[:, :, None]], dim=2)
    z = (line.to(torch.promote_types(torch.float32, x.dtype)) * w).sum(-1)
    return F.silu(z if bias is None else z + bias).to(x.dtype), line[:, :, 1:]


# --- 4. Mamba: a scan that chooses ------------------------------------------------------------------------------------
#
#     h_t = exp(Δ_t A) h_{t−1} + Δ_t x_t B_t            y_t = C_t · h_t + D x_t            a state of N for each channel
#
# Backward, with g_t the gradient of h_t:  g_t = C_t dy_t + exp(Δ_{t+1} A) g_{t+1},  and from it, with a_t = exp(Δ_t A):
#
#     dC_t = Σ_c dy_t h_t      dB_t = Σ_c Δ_t x_t g_t      d(Δx)_t = Σ_n B_t g_t      d(Δ_t A) = a_t g_t h_{t−1}

def selective_scan_numpy(x, dt, A, B, C, D=None, state=None, cu_seqlens=None):
    """The definition, step by step: arguments and results as `selective_scan`."""
    if cu_seqlens is not None:
        return _pack_numpy(selective_scan_numpy, (x, dt, A, B, C, D), (0, 1, 3, 4), state, cu_seqlens)
    h = np.zeros((x.shape[0], *A.shape), x.dtype) if state is None else state
    y = np.zeros_like(x)
    for t in range(x.shape[1]):
        h = np.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * x[:, t])[..., None] * B[:, t, None]
        y[:, t] = (h * C[:, t, None]).sum(-1) + (0 if D is None else D * x[:, t])
    return y, h


def selective_scan_associative_numpy(x, dt, A, B, C, D=None, state=None):
    """The same in log₂ T rounds, as `s4d_scan_numpy`: what is scanned depends on the input now."""
    a, b = np.exp(dt[..., None] * A), (dt * x)[..., None] * B[:, :, None]    # [B, T, C, N]
    if state is not None and x.shape[1]:
        b[:, 0] += a[:, 0] * state
    shift = 1
    while shift < x.shape[1]:
        a[:, shift:], b[:, shift:] = a[:, shift:] * a[:, :-shift], a[:, shift:] * b[:, :-shift] + b[:, shift:]
        shift *= 2
    after = b[:, -1] if x.shape[1] else np.zeros((x.shape[0], *A.shape)) if state is None else state
    return (b * C[:, :, None]).sum(-1) + (0 if D is None else D * x), after


def selective_scan_backward_numpy(x, dt, A, B, C, D=None, state=None, cu_seqlens=None, *, grad):
    """grad (dy, dstate) → dx, ddt, dA, dB, dC, and dD, dstate where they were given."""
    if cu_seqlens is not None:
        return _pack_backward_numpy(selective_scan_backward_numpy, (x, dt, A, B, C, D), (0, 1, 3, 4), state, cu_seqlens,
                                    grad)
    dy, g = grad
    h = [np.zeros((x.shape[0], *A.shape), x.dtype) if state is None else state]
    for t in range(x.shape[1]):
        h.append(np.exp(dt[:, t, :, None] * A) * h[-1] + (dt[:, t] * x[:, t])[..., None] * B[:, t, None])
    du, ddt, dA, dB, dC = (np.zeros_like(a) for a in (x, dt, A, B, C))
    for t in reversed(range(x.shape[1])):
        g = g + C[:, t, None] * dy[:, t, :, None]
        a = np.exp(dt[:, t, :, None] * A)
        dC[:, t] = (dy[:, t, :, None] * h[t + 1]).sum(1)
        dB[:, t] = ((dt[:, t] * x[:, t])[..., None] * g).sum(1)
        du[:, t] = (g * B[:, t, None]).sum(-1)
        da = a * g * h[t]
        ddt[:, t] = (da * A).sum(-1) + du[:, t] * x[:, t]
        dA += (da * dt[:, t, :, None]).sum(0)
        g = a * g
    dx = du * dt + (0 if D is None else D * dy)
    return dx, ddt, dA, dB, dC, *(() if D is None else ((dy * x).sum((0, 1)),)), *(() if state is None else (g,))


@jit
def _selective_scan_fwd(X, DT, A, B, C, D, S, CU, Y, LAST, HELD, CHANNELS, N, CHUNK, BLOCK_C: tl.constexpr,
                        BLOCK_N: tl.constexpr):
    seq = tl.program_id(0).to(tl.int64)
    c, n = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_N)
    mask = (c < CHANNELS)[:, None] & (n < N)[None, :]
    place = c[:, None] * N + n[None, :]
    a_log = tl.load(A + place, mask=mask, other=0.).to(tl.float32)
    h = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
    if S is not None:
        h = tl.load(S + seq * CHANNELS * N + place, mask=mask, other=0.).to(tl.float32)
    first, last = tl.load(CU + seq).to(tl.int64), tl.load(CU + seq + 1).to(tl.int64)
    for t in range(first, last):
        if (t - first) % CHUNK == 0:                                         # for the backward pass: the state before
            tl.store(HELD + (t // CHUNK + seq) * CHANNELS * N + place, h, mask=mask)                 # each chunk
        x = tl.load(X + t * CHANNELS + c, mask=c < CHANNELS, other=0.).to(tl.float32)
        dt = tl.load(DT + t * CHANNELS + c, mask=c < CHANNELS, other=0.).to(tl.float32)
        b = tl.load(B + t * N + n, mask=n < N, other=0.).to(tl.float32)
        r = tl.load(C + t * N + n, mask=n < N, other=0.).to(tl.float32)
        h = tl.exp(dt[:, None] * a_log) * h + (dt * x)[:, None] * b[None, :]
        y = tl.sum(h * r[None, :], 1)
        if D is not None:
            y += tl.load(D + c, mask=c < CHANNELS, other=0.).to(tl.float32) * x
        tl.store(Y + t * CHANNELS + c, y, mask=c < CHANNELS)
    tl.store(LAST + seq * CHANNELS * N + place, h, mask=mask)


@jit
def _selective_scan_bwd(dY, dLAST, X, DT, A, B, C, D, CU, HELD, ROOM, dX, dDT, dA, dB, dC, dD, dS, T, CHANNELS, N,
                        CHUNK, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr):
    seq, group = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    c, n = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_N)
    mask = (c < CHANNELS)[:, None] & (n < N)[None, :]
    place = c[:, None] * N + n[None, :]
    a_log = tl.load(A + place, mask=mask, other=0.).to(tl.float32)
    g = tl.load(dLAST + seq * CHANNELS * N + place, mask=mask, other=0.).to(tl.float32)
    da_sum = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
    dd_sum = tl.zeros([BLOCK_C], tl.float32)
    first, last = tl.load(CU + seq).to(tl.int64), tl.load(CU + seq + 1).to(tl.int64)
    chunks = (last - first + CHUNK - 1) // CHUNK
    for back in range(0, chunks):
        start = first + (chunks - 1 - back) * CHUNK
        stop = tl.minimum(start + CHUNK, last)
        h = tl.load(HELD + (start // CHUNK + seq) * CHANNELS * N + place, mask=mask, other=0.)
        for t in range(start, stop):                                         # the chunk's states anew, before each t
            tl.store(ROOM + (seq * CHUNK + t - start) * CHANNELS * N + place, h, mask=mask)
            x = tl.load(X + t * CHANNELS + c, mask=c < CHANNELS, other=0.).to(tl.float32)
            dt = tl.load(DT + t * CHANNELS + c, mask=c < CHANNELS, other=0.).to(tl.float32)
            b = tl.load(B + t * N + n, mask=n < N, other=0.).to(tl.float32)
            h = tl.exp(dt[:, None] * a_log) * h + (dt * x)[:, None] * b[None, :]
        tl.debug_barrier()                                                   # a small tile lies in several warps, and
        for i in range(0, stop - start):                                     # one of them has stored for all
            t = stop - 1 - i
            x = tl.load(X + t * CHANNELS + c, mask=c < CHANNELS, other=0.).to(tl.float32)
            dt = tl.load(DT + t * CHANNELS + c, mask=c < CHANNELS, other=0.).to(tl.float32)
            dy = tl.load(dY + t * CHANNELS + c, mask=c < CHANNELS, other=0.).to(tl.float32)
            b = tl.load(B + t * N + n, mask=n < N, other=0.).to(tl.float32)
            r = tl.load(C + t * N + n, mask=n < N, other=0.).to(tl.float32)
            before = tl.load(ROOM + (seq * CHUNK + t - start) * CHANNELS * N + place, mask=mask, other=0.)
            a = tl.exp(dt[:, None] * a_log)
            h = a * before + (dt * x)[:, None] * b[None, :]
            g += r[None, :] * dy[:, None]
            tl.store(dC + (group * T + t) * N + n, tl.sum(dy[:, None] * h, 0), mask=n < N)          # summed later over
            tl.store(dB + (group * T + t) * N + n, tl.sum((dt * x)[:, None] * g, 0), mask=n < N)    # groups: no atomics
            du = tl.sum(g * b[None, :], 1)
            da = a * g * before
            dx = du * dt
            if D is not None:
                dx += tl.load(D + c, mask=c < CHANNELS, other=0.).to(tl.float32) * dy
                dd_sum += dy * x
            tl.store(dX + t * CHANNELS + c, dx, mask=c < CHANNELS)
            tl.store(dDT + t * CHANNELS + c, tl.sum(da * a_log, 1) + du * x, mask=c < CHANNELS)
            da_sum += da * dt[:, None]
            g = a * g
        tl.debug_barrier()                                                   # all have read before it is overwritten
    tl.store(dA + seq * CHANNELS * N + place, da_sum, mask=mask)
    tl.store(dD + seq * CHANNELS + c, dd_sum, mask=c < CHANNELS)
    tl.store(dS + seq * CHANNELS * N + place, g, mask=mask)


SCAN_CHUNK, SCAN_CHANNELS = 16, 32                                           # steps to a kept state; channels a program


class _ScanKernel(torch.autograd.Function):
    """x, dt [T, C], B, C [T, N] of all sequences, one after the other; cu [sequences + 1]."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, state, cu):
        (T, channels), N, sequences = x.shape, A.shape[1], len(cu) - 1
        y = torch.zeros_like(x)
        last = torch.empty(sequences, channels, N, device=x.device)
        held = torch.empty(T // SCAN_CHUNK + sequences + 1, channels, N, device=x.device)
        grid = sequences, triton.cdiv(channels, SCAN_CHANNELS)
        _selective_scan_fwd[grid](x, dt, A, B, C, D, state, cu, y, last, held, channels, N, SCAN_CHUNK,
                                  BLOCK_C=SCAN_CHANNELS, BLOCK_N=triton.next_power_of_2(N))
        ctx.save_for_backward(x, dt, A, B, C, D, state, cu, held)
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dlast):
        x, dt, A, B, C, D, state, cu, held = ctx.saved_tensors
        (T, channels), N, sequences = x.shape, A.shape[1], len(cu) - 1
        groups, new = triton.cdiv(channels, SCAN_CHANNELS), lambda *shape: torch.zeros(*shape, device=x.device)
        room, dx, ddt = new(sequences, SCAN_CHUNK, channels, N), torch.zeros_like(x), torch.zeros_like(dt)
        dA, dS, dD = new(sequences, channels, N), new(sequences, channels, N), new(sequences, channels)
        dB, dC = new(groups, T, N), new(groups, T, N)
        _selective_scan_bwd[sequences, groups](
            dy.contiguous(), dlast.contiguous(), x, dt, A, B, C, D, cu, held, room, dx, ddt, dA, dB, dC, dD, dS, T,
            channels, N, SCAN_CHUNK, BLOCK_C=SCAN_CHANNELS, BLOCK_N=triton.next_power_of_2(N))
        return (dx, ddt, dA.sum(0).to(A.dtype), dB.sum(0).to(B.dtype), dC.sum(0).to(C.dtype),
                None if D is None else dD.sum(0).to(D.dtype), None if state is None else dS.to(state.dtype), None)


# On a CPU the line is folded: `steps` tokens one after the other, in all pieces of so many at once; each piece as if
# nothing had been before it, and then what entered it, faded by as many steps as have passed.

STEPS, FOLDED = 32, 2 ** 18                                                  # tokens a piece; numbers at once


def _fold(x, steps):
    """x [B, T, …] → [steps, B, pieces, …], zeros behind the end: at Δ = 0 nothing fades and nothing is added."""
    B, T = x.shape[:2]
    pieces = -(-T // steps)
    x = F.pad(x, [0] * (2 * (x.ndim - 2)) + [0, pieces * steps - T])
    return x.unflatten(1, (pieces, steps)).movedim(2, 0)


def _unfold(x, T):
    return x.movedim(0, 2).flatten(1, 2)[:, :T]


def _carry_on(fade, own, entering):
    """Pieces in a row: fade, own [B, pieces, C, N], entering [B, C, N] → what enters each, and what leaves."""
    each = []
    for f, o in zip(fade.unbind(1), own.unbind(1)):
        each.append(entering)
        entering = f * entering + o
    return torch.stack(each, 1), entering


def _piecewise_forward(u, dt, A, B, C, state):
    """u = Δ x and dt [steps, B, pieces, C], B, C [steps, B, pieces, N] → y, what entered each piece, and what left."""
    h, y = u.new_zeros(*u.shape[1:], A.shape[1]), torch.empty_like(u)
    for i in range(len(u)):
        a = (dt[i, ..., None] * A).exp_()
        h = torch.addcmul(a.mul_(h), u[i, ..., None], B[i, ..., None, :])
        torch.matmul(C[i, ..., None, :], h.mT, out=y[i][..., None, :])       # a row: a column takes 3 times as long
    passed = dt.cumsum(0)
    entered, after = _carry_on((passed[-1, ..., None] * A).exp_(), h, state)
    for i in range(len(u)):
        y[i] += (C[i, ..., None, :] @ (passed[i, ..., None] * A).exp_().mul_(entered).mT)[..., 0, :]
    return y, entered, after


def _piecewise_backward(u, dt, A, B, C, entered, dy, g):
    """g [B, C, N]: the gradient of what leaves → du, d(Δ) by way of the decays, dA, dB, dC, and g of what enters."""
    hs, h = [entered], entered
    for i in range(len(u)):
        a = (dt[i, ..., None] * A).exp_()
        h = torch.addcmul(a.mul_(h), u[i, ..., None], B[i, ..., None, :])
        hs.append(h)
    du, ddt, dB, dC, dA = (torch.zeros_like(x) for x in (u, dt, B, C, A))
    own = torch.zeros_like(h)
    for i in reversed(range(len(u))):                                        # each piece as if nothing came after it
        own = torch.addcmul(own, dy[i, ..., None], C[i, ..., None, :])
        own = own * (dt[i, ..., None] * A).exp_()
    left = dt.flip(0).cumsum(0).flip(0)                                      # Δ_t + … to the end of the piece
    fade = (left[0, ..., None] * A).exp_()
    leaving, before = _carry_on(fade.flip(1), own.flip(1), g)
    later = leaving.flip(1)                                                  # what comes back into each from behind
    for i in reversed(range(len(u))):
        g = torch.addcmul(later, dy[i, ..., None], C[i, ..., None, :])
        dC[i] = (dy[i, ..., None, :] @ hs[i + 1])[..., 0, :]
        dB[i] = (u[i, ..., None, :] @ g)[..., 0, :]
        du[i] = (B[i, ..., None, :] @ g.mT)[..., 0, :]
        later = g.mul_((dt[i, ..., None] * A).exp_())
        da = later * hs[i]
        ddt[i] = (da * A).sum(-1)
        dA += torch.einsum("bpc,bpcn->cn", dt[i], da)
    return du, ddt, dA, dB, dC, before


class _ScanInPieces(torch.autograd.Function):
    """A few pieces at a time, so that their numbers stay in a CPU's cache; between them only what entered is kept."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, state):
        T, many = x.shape[1], max(1, FOLDED // max(1, x.shape[0] * A.numel())) * STEPS
        y, entered = torch.empty_like(x), []
        for t in range(0, T, many):
            part = slice(t, min(T, t + many))
            u, d, b, c = (_fold(a[:, part], STEPS) for a in (dt * x, dt, B, C))
            out, entering, state = _piecewise_forward(u, d, A, b, c, state)
            y[:, part] = _unfold(out, y[:, part].shape[1])
            entered.append(entering)
        ctx.save_for_backward(x, dt, A, B, C, D, *entered)
        ctx.many = many
        return y if D is None else torch.addcmul(y, D, x), state.clone() if not T else state

    @staticmethod
    @once_differentiable
    @_exact
    def backward(ctx, dy, g):
        x, dt, A, B, C, D, *entered = ctx.saved_tensors
        dx, ddt, dA, dB, dC = (torch.zeros_like(a) for a in (x, dt, A, B, C))
        for i, t in reversed(list(enumerate(range(0, x.shape[1], ctx.many)))):
            part = slice(t, min(x.shape[1], t + ctx.many))
            own = x[:, part], dt[:, part], B[:, part], C[:, part], dy[:, part]
            u, d, b, c, e = (_fold(a, STEPS) for a in (own[0] * own[1], *own[1:]))
            du, through, da, db, dc, g = _piecewise_backward(u, d, A, b, c, entered[i], e, g)
            n = own[0].shape[1]
            du = _unfold(du, n)
            dx[:, part], ddt[:, part] = du * own[1], _unfold(through, n) + du * own[0]
            dB[:, part], dC[:, part] = _unfold(db, n), _unfold(dc, n)
            dA += da
        dD = None if D is None else (dy * x).sum((0, 1))
        return dx if D is None else dx + D * dy, ddt, dA, dB, dC, dD, g


def _check_scan(op, x, dt, A, B, C, D, state, sequences, end=None):
    """What selective_scan and its step ask; past row `end` of a pack values may be anything."""
    _floats(op, x=x)
    told = f"{op}: x {tuple(x.shape)}, dt {tuple(dt.shape)}, A {tuple(A.shape)}, B {tuple(B.shape)}, C {tuple(C.shape)}"
    if (A.ndim != 2 or x.shape[-1:] != A.shape[:1] or dt.shape != x.shape or B.shape != (*x.shape[:-1], A.shape[1])
            or C.shape != B.shape or D is not None and D.shape != A.shape[:1]):
        raise ValueError(f"{told}, D {None if D is None else tuple(D.shape)} must be [B, T, C], [B, T, C], [C, N], "
                         "[B, T, N] twice and [C], without T for a step")
    if state is not None and state.shape != (sequences, *A.shape):
        raise ValueError(f"{op}: state {tuple(state.shape)} must be {(sequences, *A.shape)}")
    if x.device.type == "cpu":
        if A.numel() and not (A < 0).all():
            raise ValueError(f"{op}: A {tuple(A.shape)} holds {A.max().item():g}; all of it must be below 0")
        dt = dt if end is None else dt[:, :end]
        if dt.numel() and dt.min() < 0:
            raise ValueError(f"{op}: dt {tuple(dt.shape)} holds {dt.min().item():g}; a step can't be below 0")


@_exact
def selective_scan(x, dt, A, B, C, D=None, state=None, cu_seqlens=None):
    """Mamba's scan (arXiv 2312.00752, algorithm 2): x, dt [B, T, C] (dt > 0), A [C, N] (< 0), B, C [B, T, N], D [C] →
    (y as x, state [B, C, N] float32).

    state: before the first token (None: zeros), and after the last; differentiable, too. Packed: `cu_seqlens`
    [sequences + 1], B = 1, a state for each sequence. ValueError for shapes that do not fit, and on a CPU for signs.
    """
    if x.ndim != 3:
        raise ValueError(f"selective_scan: x {tuple(x.shape)} must be [B, T, C]")
    (rows, T, _), kind = x.shape, x.dtype
    if cu_seqlens is not None:
        cu_seqlens = _offsets("selective_scan", cu_seqlens, T, rows)
    sequences = rows if cu_seqlens is None else len(cu_seqlens) - 1
    _check_scan("selective_scan", x, dt, A, B, C, D, state, sequences, None if cu_seqlens is None else cu_seqlens[-1])
    if on_kernel(x):
        cu = torch.arange(rows + 1, device=x.device) * T if cu_seqlens is None else cu_seqlens
        flat = [a.flatten(0, 1).contiguous() for a in (x, dt, B, C)]
        D, state = (a if a is None else a.contiguous() for a in (D, state))
        y, after = _ScanKernel.apply(*flat[:2], A.contiguous(), *flat[2:], D, state, cu)
        return y.view(x.shape), after
    wide = torch.promote_types(torch.float32, kind)
    x, dt, A, B, C, D = (a if a is None else a.to(wide) for a in (x, dt, A, B, C, D))
    state = x.new_zeros(sequences, *A.shape) if state is None else state.to(wide)
    if cu_seqlens is None:
        y, state = _ScanInPieces.apply(x, dt, A, B, C, D, state)
    else:
        y, state = _pack_in_torch(lambda x, dt, B, C, state: _ScanInPieces.apply(x, dt, A, B, C, D, state),
                                  lambda x, dt, B, C, state: selective_scan_step(x, dt, A, B, C, D, state),
                                  (x, dt, B, C), state, cu_seqlens)
        y = F.pad(x[:, :0], [0, 0, 0, T]) if y is None else y                # no sequence has a token
    return y.to(kind), state


@_exact
def selective_scan_step(x, dt, A, B, C, D=None, state=None):
    """One token: x, dt [B, C], B, C [B, N], state [B, C, N] → (y [B, C], state)."""
    if state is None or x.ndim != 2:
        raise ValueError(f"selective_scan_step: x {tuple(x.shape)} must be [B, C], and it needs a state")
    _check_scan("selective_scan_step", x, dt, A, B, C, D, state, len(x))
    kind, wide = x.dtype, torch.promote_types(torch.float32, x.dtype)
    x, dt, A, B, C = (a.to(wide) for a in (x, dt, A, B, C))
    state = torch.exp(dt[..., None] * A) * state + (dt * x)[..., None] * B[:, None]
    y = (C[..., None, :] @ state.mT)[..., 0, :]
    return (y if D is None else y + D.to(wide) * x).to(kind), state


# --- 5. Mamba-2: SSD, a scan that is a masked matrix product ----------------------------------------------------------
#
#     h_t = exp(Δ_t A) h_{t−1} + Δ_t x_t ⊗ B_t            y_t = h_t C_t + D x_t            A one number a head
#
# Written out, y = (L ∘ C Bᵀ) Δx + D x with L_ij = exp(Σ_{j<m≤i} Δ_m A): attention without softmax, whose mask decays.
# The first form costs T steps one after the other, the second T² products. Cut in chunks, it is both: within a chunk
# the second, from chunk to chunk the first (Dao & Gu 2024, arXiv 2405.21060, section 6):
#
#     1  within a chunk           y_i  = Σ_{j≤i} exp(g_{j+1} + … + g_i) (C_i · B_j) Δ_j x_j       g_t = Δ_t A
#     2  what a chunk adds        S⁺   = Σ_j exp(g_{j+1} + … + g_l) B_j ⊗ Δ_j x_j
#     3  from chunk to chunk      S'   = exp(g_1 + … + g_l) S + S⁺
#     4  what entered             y_i += exp(g_1 + … + g_i) C_i S
#
#     name      shape                  in the paper
#     x, y      [B, T, H, P]           X, Y: H heads, P channels each
#     dt, A     [B, T, H], [H]         Δ > 0, and A < 0: how fast a head forgets
#     B, C      [B, T, G, N]           B, C: what is written where, and read from where; H / G heads share one
#     D         [H]                    a way past the state
#     state     [B, H, P, N]           h: of fixed size, whatever T
#     q, k, v   C, B, Δx               the same in attention's letters: the gated delta rule below goes on from here
#     g         [..., l]               log decays of a chunk's l steps, ≤ 0
#     S         [..., R, N, P]         the state between two chunks, turned; R = H / G heads of a group

def ssd_numpy(x, dt, A, B, C, D=None, state=None, cu_seqlens=None):
    """The definition, step by step: arguments and results as `ssd`."""
    if cu_seqlens is not None:
        return _pack_numpy(ssd_numpy, (x, dt, A, B, C, D), (0, 1, 3, 4), state, cu_seqlens)
    (b, T, H, P), (G, N) = x.shape, B.shape[2:]
    B, C = np.repeat(B, H // G, axis=2), np.repeat(C, H // G, axis=2)        # [B, T, H, N]
    h = np.zeros((b, H, P, N), x.dtype) if state is None else state
    y = np.zeros_like(x)
    for t in range(T):
        h = np.exp(dt[:, t] * A)[..., None, None] * h + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        y[:, t] = (h @ C[:, t, :, :, None])[..., 0] + (0 if D is None else D[:, None] * x[:, t])
    return y, h


def segment_sums(g):
    """g [..., l] → [..., l, l]: g_{j+1} + … + g_i at (i, j), and −∞ for j > i. Each is a sum of its own terms: the
    difference of two running sums would be as wrong as those are large."""
    l = g.shape[-1]
    terms = np.where(np.tril(np.ones((l, l), bool), -1), g[..., :, None], 0)
    return np.where(np.tril(np.ones((l, l), bool)), np.cumsum(terms, -2), -np.inf)


def ssd_mask_numpy(x, dt, A, B, C, D=None):
    """The second form: the whole T × T matrix at once, from a state of zeros. → y."""
    R = x.shape[2] // B.shape[2]
    L = np.exp(segment_sums((dt * A).swapaxes(1, 2)))                        # [B, H, T, T]
    scores = np.repeat(np.einsum("btgn,bsgn->bgts", C, B), R, axis=1) * L
    return np.einsum("bhts,bsh,bshp->bthp", scores, dt, x) + (0 if D is None else D[:, None] * x)


# The chunked form. Its text stands in operations that NumPy and torch share, so the same lines are the definition, the
# backward pass, and what a CPU runs. All is cut in M chunks, [B, M, G, R, l, ...]; what has as many numbers as a state
# or as a chunk's mask is made for a block of m chunks at a time, and stays in the cache.

FLOOR = -1000.0                                                              # e^−1000 is 0 in any dtype
LOG2E = math.log2(math.e)                                                    # e^x = 2^(x log₂e), and 2^x is fast
BLOCK = 2 ** 17                                                              # numbers a thread at a time: in its cache


def _xp(x):
    return np if isinstance(x, np.ndarray) else torch


def _double(x):
    if isinstance(x, np.ndarray):
        return x.astype(np.float64)
    return (x.cpu() if x.device.type == "mps" else x).double()               # Apple's GPUs have no float64


def _like(x, y):
    return x.astype(y.dtype) if isinstance(x, np.ndarray) else x.to(y)


def _each(x):
    """[B, m, ...] → m times [B, ...]."""
    return x.swapaxes(0, 1) if isinstance(x, np.ndarray) else x.unbind(1)


def _stack(states):
    return _xp(states[0]).stack(states, 1)


def _room(like, *shape):
    """Empty, contiguous."""
    return np.empty(shape, like.dtype) if isinstance(like, np.ndarray) else like.new_empty(shape)


def _states(S, m):
    """Room for S [B, ...] and m more, one after the other in memory → [B, m + 1, ...]."""
    return _room(S, m + 1, *S.shape).swapaxes(0, 1)


def _times(x, y):
    """x · y, contiguous."""
    return _xp(x).multiply(x, y, out=_room(x, *x.shape))


def _differences(G, like):
    """G [..., l, 1] → G_i − G_j [..., l, l], rounded to like's dtype."""
    columns = G.swapaxes(-1, -2)
    if isinstance(G, np.ndarray):
        return (G - columns).astype(like.dtype)
    return torch.sub(G, columns, out=G.new_empty(*G.shape[:-1], G.shape[-2], dtype=like.dtype)).to(like)


def _plus(y, a, b):
    """y + a @ b, into y: in torch one pass, not two."""
    if isinstance(y, np.ndarray):
        y += a @ b
        return y
    three = lambda x: x.reshape(-1, *x.shape[-2:])
    return three(y).baddbmm_(three(a), three(b)).view(y.shape)


def _add(y, a, b):
    """y + a · b, into y."""
    if isinstance(y, np.ndarray):
        y += a * b
        return y
    return y.addcmul_(a, b)


def decays(g):
    """Log decays g [..., l, 1] of a chunk's steps → G, their running sum, and what is left
    enter  [..., l, 1]  of the entering state at step i                leave  [..., l, 1]  of step i's input at the end
    across [..., 1, 1]  of the entering state at the end

    A running sum in float64 of terms that are not below FLOOR is good to 1e-11, so here differences are exact enough.
    """
    xp = _xp(g)
    G = xp.cumsum(_double(g.clip(min=FLOOR)) * LOG2E, -2)
    enter, leave = (xp.exp2(_like(x, g)) for x in (G, G[..., -1:, :] - G))
    return G, enter, leave, enter[..., -1:, :]


def _of_block(decay, c):
    """`decays` of the chunks c; instead of G, within [..., l, l]: what is left at step i of step j's input."""
    G, enter, leave, across = (a[:, c] for a in decay)
    xp, l, within = _xp(G), G.shape[-2], _differences(G, enter)
    within += _like(xp.triu(xp.full((l, l), -xp.inf), 1), enter)             # masked before exp: e^large is no number
    return xp.exp2(within, out=within), enter, leave, across


def _scan(states, across, a, b, way=1):
    """S' = across · S + a @ b, from the first state to the last; or, way = −1, from the last to the first."""
    _xp(a).matmul(a, b, out=states[:, 1:] if way > 0 else states[:, :-1])
    each = _each(states)[::way]
    for fade, before, after in zip(_each(across)[::way], each, each[1:]):
        _add(after, fade, before)


def chunk_states(k, v, decay, states):
    """Steps 2 and 3. k [B, m, G, 1, l, N], v [B, m, G, R, l, P], states [B, m + 1, G, R, N, P]: the first is given, the
    others get their places. States before the chunks are states[:, :-1], after them states[:, 1:].
    """
    _, _, leave, across = decay
    _scan(states, across, (k * leave).swapaxes(-1, -2), v)


def chunk_states_backward(q, dy, decay, dstates):
    """Of dstates the last is given, the others get their places: the same, read backwards."""
    _, enter, _, across = decay
    _scan(dstates, across, (q * enter).swapaxes(-1, -2), dy, -1)


def chunk_out(q, k, v, decay, S):
    """Steps 1 and 4. q, k [..., 1, l, N], v [..., R, l, P], S [..., R, N, P] → y as v."""
    within, enter, _, _ = decay
    return _plus((q @ k.swapaxes(-1, -2) * within) @ v, q * enter, S)


def chunk_u_backward(products, decay, dy):
    """products q kᵀ [..., 1, l, l], dy as v → dv by way of the chunk's own y."""
    return (products * decay[0]).swapaxes(-1, -2) @ dy


def _over_heads(x):
    """[..., R, l, N] → [..., 1, l, N]: the sum over the heads of a group, which share q and k."""
    return x.sum(-3, keepdims=True)


def chunk_out_backward(q, k, v, products, decay, S, dy, dS):
    """dy as v, dS of the chunk's last state, which is used up → dq, dk, and what `gradient_of_decays` takes."""
    within, enter, leave, across = decay
    dscores = dy @ v.swapaxes(-1, -2)                                        # [..., R, l, l]
    dscores *= within
    dproducts = _over_heads(dscores)
    dscores *= _xp(q).tril(products, -1)
    dq_heads, dk_heads = dy @ S.swapaxes(-1, -2), v @ dS.swapaxes(-1, -2)    # [..., R, l, N]
    dq_heads *= enter
    dk_heads *= leave
    dq = _plus(_over_heads(dq_heads), dproducts, k)
    dk = _plus(_over_heads(dk_heads), dproducts.swapaxes(-1, -2), q)
    dq_heads *= q
    dk_heads *= k
    dS *= S
    return dq, dk, (dscores.sum(-1) - dscores.sum(-2), dq_heads.sum(-1), dk_heads.sum(-1),
                    across[..., 0, 0] * dS.sum((-2, -1)))


def gradient_of_decays(within, enter, leave, across):
    """From the gradients of the logarithms of `decays` and of `within` → dg [..., l].

    Of within's, g_m has all (i, j) with j < m ≤ i: Σ_{i≥m} (sum of row i − sum of column i), in which those with m ≤ j
    cancel; the diagonal, sums of nothing, must not even be there to cancel. within holds these differences. Of the
    others, enter's from m on, and leave's before m.
    """
    like, within, enter, leave, across = within, *map(_double, (within, enter, leave, across))
    later = within + enter
    each = later - leave
    return _like((later.sum(-1) + across)[..., None] - each.cumsum(-1) + each, like)


def _chunks(x, m, G):
    """[B, m · l, G · R, ...] → [B, m, G, R, l, ...], as it lies."""
    x = x.reshape(x.shape[0], m, x.shape[1] // m, G, -1, *x.shape[3:])
    return _xp(x).moveaxis(x, 2, 4)


def _laid(x):
    """In order in memory."""
    return np.ascontiguousarray(x) if isinstance(x, np.ndarray) else x.contiguous()


def _grouped(state, G):
    """[B, H, P, N] → [B, G, R, N, P], and back."""
    return state.reshape(state.shape[0], G, -1, *state.shape[2:]).swapaxes(-1, -2)


def _ungrouped(S):
    B, G, R, N, P = S.shape
    return S.swapaxes(-1, -2).reshape(B, G * R, P, N)


def _blocks(v, N):
    """v [B, M, G, R, l, P], N numbers of k → slices of the M chunks."""
    B, M, G, R, l, P = v.shape
    m = max(1, BLOCK * torch.get_num_threads() // (B * G * R * l * max(N, P)))
    return [slice(c, min(c + m, M)) for c in range(0, M, m)]


def _whole(blocks):
    """Blocks of chunks, the last block first → all chunks [B, M, ...]."""
    return _xp(blocks[0]).concatenate(blocks[::-1], 1)


def _by_head(a, G):
    """A or D [H] → [G, R, 1, 1]."""
    return a.reshape(G, -1, 1, 1)


def ssd_chunks(x, dt, A, B, C, D, S, M):
    """M chunks, S [B, G, R, N, P] → y as x, and what the way back takes: decays and states, the last S among them."""
    y, G, states = _room(x, *x.shape), B.shape[2], _states(S, M)
    out, x, step, k, q = (_chunks(a, M, G) for a in (y, x, dt[..., None], B, C))
    decay, states[:, 0] = decays(_times(step, _by_head(A, G))), S
    for c in _blocks(x, k.shape[-1]):
        own, k_, q_, v = _of_block(decay, c), _laid(k[:, c]), _laid(q[:, c]), _times(x[:, c], step[:, c])
        chunk_states(k_, v, own, states[:, c.start:c.stop + 1])
        out[:, c] = chunk_out(q_, k_, v, own, states[:, c])
    if D is not None:
        out += _by_head(D, G) * x
    return y, (*decay, states)


def ssd_chunks_backward(x, dt, A, B, C, D, kept, dy, dS, M):
    """dS of the last state → dx, ddt, dA, dB, dC, dD, and dS of the first."""
    G, (dx, ddt, dB, dC), (*decay, states), sums = B.shape[2], (_room(a, *a.shape) for a in (x, dt, B, C)), kept, []
    x, step, k, q, dy, du, dk, dq = (_chunks(a, M, G) for a in (x, dt[..., None], B, C, dy, dx, dB, dC))
    for c in _blocks(x, k.shape[-1])[::-1]:
        own, v, k_, q_, dy_ = _of_block(decay, c), _times(x[:, c], step[:, c]), *(_laid(a[:, c]) for a in (k, q, dy))
        dstates = _states(dS, c.stop - c.start)
        dstates[:, -1] = dS
        chunk_states_backward(q_, dy_, own, dstates)
        dS, products = dstates[:, 0], q_ @ k_.swapaxes(-1, -2)
        dv = _plus(chunk_u_backward(products, own, dy_), k_ * own[2], dstates[:, 1:])
        dq[:, c], dk[:, c], parts = chunk_out_backward(q_, k_, v, products, own, states[:, c], dy_, dstates[:, 1:])
        du[:, c] = dv * step[:, c]
        dv *= x[:, c]
        sums.append((*parts, dv.sum(-1)))
    *parts, by_step = map(_whole, zip(*sums))
    dg, over_time = gradient_of_decays(*parts), lambda d: d.sum((0, 1, 4)).reshape(-1)
    _chunks(ddt, M, G)[:] = _add(by_step, dg, _by_head(A, G)[..., 0])
    dD = None
    if D is not None:
        du += _by_head(D, G) * dy
        dD = over_time((dy * x).sum(-1))
    return dx, ddt, over_time(dg * step[..., 0]), dB, dC, dD, dS


def _padded(tensors, l):
    """T tokens → M chunks of one length, at most l: zeros at the end add nothing, and their decay, e⁰, keeps the state.
    """
    T = tensors[0].shape[1]
    M = max(1, -(-T // l))
    more = max(1, -(-T // M)) * M - T
    if isinstance(tensors[0], np.ndarray):
        return [np.pad(a, [(0, 0), (0, more)] + [(0, 0)] * (a.ndim - 2)) for a in tensors], M
    return [F.pad(a, [0, 0] * (a.ndim - 2) + [0, more]) if more else a for a in tensors], M


def ssd_chunked_numpy(x, dt, A, B, C, D=None, chunk=64, state=None):
    """The chunked form: arguments and results as `ssd`."""
    (b, T, H, P), (G, N) = x.shape, B.shape[2:]
    state = np.zeros((b, H, P, N), x.dtype) if state is None else state
    (x, dt, B, C), M = _padded((x, dt, B, C), chunk)
    y, kept = ssd_chunks(x, dt, A, B, C, D, _grouped(state, G), M)
    return y[:, :T], _ungrouped(kept[-1][:, -1])


def ssd_backward_numpy(x, dt, A, B, C, D=None, state=None, cu_seqlens=None, chunk=64, *, grad):
    """grad = (dy, dstate) → dx, ddt, dA, dB, dC, and dD, dstate where there were D and state."""
    if cu_seqlens is not None:
        return _pack_backward_numpy(ssd_backward_numpy, (x, dt, A, B, C, D), (0, 1, 3, 4), state, cu_seqlens, grad)
    (b, T, H, P), (G, N) = x.shape, B.shape[2:]
    first = np.zeros((b, H, P, N), x.dtype) if state is None else state
    (x, dt, B, C, dy), M = _padded((x, dt, B, C, grad[0]), chunk)
    _, kept = ssd_chunks(x, dt, A, B, C, D, _grouped(first, G), M)
    dx, ddt, dA, dB, dC, dD, dS = ssd_chunks_backward(x, dt, A, B, C, D, kept, dy, _grouped(grad[1], G), M)
    more = [d for d, given in ((dD, D), (_ungrouped(dS), state)) if given is not None]
    return dx[:, :T], ddt[:, :T], dA, dB[:, :T], dC[:, :T], *more


# --- 6. The gated delta rule: look before you write -------------------------------------------------------------------
#
#     S_t = α_t (I − β_t k_t k_tᵀ) S_{t−1} + β_t k_t v_tᵀ          y_t = S_tᵀ q_t
#
# SSD adds v to what stands at k already. The delta rule first reads what stands there, and writes the difference:
# S_t = α_t S_{t−1} + k_t u_tᵀ with u_t = β_t (v_t − α_t S_{t−1}ᵀ k_t): SSD, once the u are known. Within a chunk the u
# hang on each other. With Γ_ij = exp(g_{j+1} + … + g_i), γ_i = exp(g_1 + … + g_i), g = log α, and the entering S:
#
#     u_i = β_i (v_i − γ_i Sᵀ k_i − Σ_{j<i} Γ_ij (k_i · k_j) u_j)
#     (I + A) u = β (v − γ k S)          A_ij = β_i Γ_ij k_i · k_j for j < i          T = (I + A)⁻¹
#     u = T β v − (T β γ k) S = u₀ − w S
#
# so steps 2 and 3 of SSD become u = u₀ − w S, S' = across S + (leave k)ᵀ u, chunk after chunk; 1 and 4 stay. (Bischof
# & Van Loan's WY form of a product of such erasers; Yang et al. 2024, arXiv 2406.06484; gated: 2412.06464.)
#
#     name         shape            in the papers
#     q, k         [B, T, H, K]     k of length 1, or 1 − β k·k, what is kept of k's entry, leaves −1 … 1
#     v, y         [B, T, H, V]     v, o
#     decay        [B, T, H]        log α ≤ 0: forget everything a little
#     beta         [B, T, H]        β in 0 … 1: forget what stands at k
#     state        [B, H, K, V]     the paper's Sᵀ

def gated_delta_numpy(q, k, v, decay, beta, state=None, cu_seqlens=None):
    """The definition, step by step: arguments and results as `gated_delta`."""
    if cu_seqlens is not None:
        return _pack_numpy(gated_delta_numpy, (q, k, v, decay, beta), range(5), state, cu_seqlens)
    (b, T, H, K), V = q.shape, v.shape[3]
    S = np.zeros((b, H, K, V), v.dtype) if state is None else state
    y = np.zeros_like(v)
    for t in range(T):
        S = np.exp(decay[:, t])[..., None, None] * S
        u = beta[:, t, :, None] * (v[:, t] - np.einsum("bhkv,bhk->bhv", S, k[:, t]))
        S = S + k[:, t, :, :, None] * u[:, :, None, :]
        y[:, t] = np.einsum("bhkv,bhk->bhv", S, q[:, t])
    return y, S


def unit_lower_inverse(A):
    """(I + A)⁻¹ for A [..., l, l], strictly lower: two halves, and −T₂ A₂₁ T₁ between them; log₂ l products deep. The
    series I − A + A² − …, also a few products, is no way: where keys repeat its terms grow to 10¹⁸ and cancel."""
    xp, l = _xp(A), A.shape[-1]
    if l == 1:
        return A * 0 + 1
    h = l // 2
    T = A * 0
    if l % 2:
        T[..., :h, :h], T[..., h:, h:] = unit_lower_inverse(A[..., :h, :h]), unit_lower_inverse(A[..., h:, h:])
    else:
        T[..., :h, :h], T[..., h:, h:] = unit_lower_inverse(xp.stack([A[..., :h, :h], A[..., h:, h:]]))
    T[..., h:, :h] = -(T[..., h:, h:] @ A[..., h:, :h] @ T[..., :h, :h])
    return T


def wy(k, v, beta, decay):
    """k [..., l, K], v [..., l, V], beta [..., l, 1] → A, T [..., l, l], u₀ as v, w as k."""
    within, enter, _, _ = decay
    A = _xp(k).tril(beta * within * (k @ k.swapaxes(-1, -2)), -1)
    T = unit_lower_inverse(A)
    return A, T, T @ (beta * v), T @ (beta * enter * k)


def wy_backward(k, v, beta, decay, A, T, u, S, du):
    """(I + A) u = β (v − γ k S), in reverse → dk, dv, dbeta, and for `gradient_of_decays` within and enter; S's part is
    in `delta_states_backward`.
    """
    within, enter, _, _ = decay
    xp = _xp(k)
    z = T.swapaxes(-1, -2) @ du                                              # the gradient of the right side
    read = enter * (k @ S)                                                   # [..., l, V]: what stands at k
    dA = xp.tril(-(z @ u.swapaxes(-1, -2)), -1)
    dproducts = dA * within
    dbeta = (z * (v - read)).sum(-1) + (dproducts * (k @ k.swapaxes(-1, -2))).sum(-1)
    dproducts *= beta
    dk = dproducts @ k + dproducts.swapaxes(-1, -2) @ k - beta * enter * (z @ S.swapaxes(-1, -2))
    d = dA * A
    return dk, beta * z, dbeta, (d.sum(-1) - d.sum(-2), -(beta * z * read).sum(-1))


def delta_states(k, u, w, decay, states):
    """Steps 2 and 3 with erase: u₀ [B, m, H, 1, l, V], states [B, m + 1, H, 1, K, V] as of `chunk_states` → u."""
    _, _, leave, across = decay
    k_leave, us = (k * leave).swapaxes(-1, -2), []
    for c in range(k.shape[1]):
        us.append(u[:, c] - w[:, c] @ states[:, c])
        states[:, c + 1] = across[:, c] * states[:, c] + k_leave[:, c] @ us[c]
    return _stack(us)


def delta_states_backward(q, k, w, du, dy, decay, dS):
    """du: the gradient of u by way of y → the whole du, dS at each chunk's end [B, m, ...], dS of the first state."""
    _, enter, leave, across = decay
    new, w, k_leave, dus, dstates = (q * enter).swapaxes(-1, -2) @ dy, w.swapaxes(-1, -2), k * leave, [], []
    for c in reversed(range(k.shape[1])):
        dstates.append(dS)
        dus.append(du[:, c] + k_leave[:, c] @ dS)
        dS = across[:, c] * dS + new[:, c] - w[:, c] @ dus[-1]
    return _stack(dus[::-1]), _stack(dstates[::-1]), dS


def delta_chunks(q, k, v, decay, beta, S, M):
    """M chunks, S [B, H, 1, K, V] → y as v, and what the way back takes: decays and states, the last S among them."""
    y, states = _room(v, *v.shape), _states(S, M)
    out, q, k, v, decay, beta = (_chunks(a, M, a.shape[2]) for a in (y, q, k, v, decay, beta[..., None]))
    decay, states[:, 0] = decays(_laid(decay)[..., None]), S
    for c in _blocks(v, k.shape[-1]):
        own, (q_, k_, v_, beta_) = _of_block(decay, c), (_laid(a[:, c]) for a in (q, k, v, beta))
        _, _, u, w = wy(k_, v_, beta_, own)
        u = delta_states(k_, u, w, own, states[:, c.start:c.stop + 1])
        out[:, c] = chunk_out(q_, k_, u, own, states[:, c])
    return y, (*decay, states)


def delta_chunks_backward(q, k, v, decay, beta, kept, dy, dS, M):
    """dS of the last state → dq, dk, dv, ddecay, dbeta, and dS of the first."""
    grads, (*decay, states), sums = [_room(a, *a.shape) for a in (q, k, v, decay, beta)], kept, []
    q, k, v, beta, dy, dq, dk, dv, ddecay, dbeta = (
        _chunks(a, M, a.shape[2]) for a in (q, k, v, beta[..., None], dy, *grads[:4], grads[4][..., None]))
    for c in _blocks(v, k.shape[-1])[::-1]:
        own, (q_, k_, v_, beta_, dy_) = _of_block(decay, c), (_laid(a[:, c]) for a in (q, k, v, beta, dy))
        S, (A, T, u, w) = states[:, c], wy(k_, v_, beta_, own)
        u = u - w @ S
        products = q_ @ k_.swapaxes(-1, -2)
        du, dstates, dS = delta_states_backward(q_, k_, w, chunk_u_backward(products, own, dy_), dy_, own, dS)
        dq[:, c], dk_out, (within, enter, *parts) = chunk_out_backward(q_, k_, u, products, own, S, dy_, dstates)
        dk_wy, dv[:, c], dbeta[:, c, ..., 0], more = wy_backward(k_, v_, beta_, own, A, T, u, S, du)
        dk[:, c] = dk_out + dk_wy
        sums.append((within + more[0], enter + more[1], *parts))
    ddecay[:] = gradient_of_decays(*map(_whole, zip(*sums)))
    return *grads, dS


def gated_delta_chunked_numpy(q, k, v, decay, beta, state=None, chunk=64):
    """The chunked form: arguments and results as `gated_delta`."""
    state = np.zeros((len(q), *q.shape[2:], v.shape[3]), v.dtype) if state is None else state
    tensors, M = _padded((q, k, v, decay, beta), chunk)
    y, kept = delta_chunks(*tensors, state[:, :, None], M)
    return y[:, :q.shape[1]], kept[-1][:, -1, :, 0]


def gated_delta_backward_numpy(q, k, v, decay, beta, state=None, cu_seqlens=None, chunk=64, *, grad):
    """grad = (dy, dstate) → dq, dk, dv, ddecay, dbeta, and dstate where there was a state."""
    if cu_seqlens is not None:
        return _pack_backward_numpy(gated_delta_backward_numpy, (q, k, v, decay, beta), range(5), state, cu_seqlens,
                                    grad)
    first = np.zeros((len(q), *q.shape[2:], v.shape[3]), v.dtype) if state is None else state
    (*tensors, dy), M = _padded((q, k, v, decay, beta, grad[0]), chunk)
    _, kept = delta_chunks(*tensors, first[:, :, None], M)
    *grads, dS = delta_chunks_backward(*tensors, kept, dy, grad[1][:, :, None], M)
    return *(d[:, :q.shape[1]] for d in grads), *([] if state is None else [dS[:, :, 0]])


# --- 7. The kernels: a chunk in one program's registers, and the state carried from chunk to chunk --------------------
#
# SSD is the gated delta rule without its erase, with (q, k, v) = (C, B, Δx), so the kernels of chunk states and chunk
# outputs serve both; the delta rule adds the two of the WY form. X_at is the tuple of X's strides (batch, token, head),
# the last axis is dense. A pack is one row of the batch; slot Cu[b] // L + b is the first of sequence b's chunks, which
# leaves at most one slot a sequence empty and needs no length to be known. No two programs add to one number.

@jit
def _spot(Cu, Owner, c, T, per, L: tl.constexpr):
    """Slot c → (row of the batch, its first token there, how many tokens: none in an empty slot)."""
    if Cu is None:
        row, first = c // per, c % per * L
        n = tl.minimum(T - first, L)
    else:
        b = tl.load(Owner + c)
        begin = tl.load(Cu + b)
        row, first = c * 0, begin + (c - begin // L - b) * L
        n = tl.minimum(tl.load(Cu + b + 1) - first, L)
    return row.to(tl.int64), first.to(tl.int64), n


@jit
def _slots(Cu, b, per, L: tl.constexpr):
    """Sequence b → its first slot, and how many it has."""
    if Cu is None:
        slot, chunks = b * per, per
    else:
        begin = tl.load(Cu + b)
        slot, chunks = begin // L + b, (tl.load(Cu + b + 1) - begin + L - 1) // L
    return slot, chunks


@jit
def _load(X, X_at, row, first, n, h, d, D, L: tl.constexpr):
    """Tokens first … first + n − 1 of head h, numbers d [BLOCK] → [L, BLOCK]; zeros elsewhere."""
    i = tl.arange(0, L)
    here = X + row * X_at[0] + h * X_at[2] + (first + i)[:, None] * X_at[1] + d[None, :]
    return tl.load(here, mask=(i < n)[:, None] & (d < D)[None, :], other=0.)


@jit
def _store(X, X_at, row, first, n, h, d, D, x, L: tl.constexpr):
    i = tl.arange(0, L)
    here = X + row * X_at[0] + h * X_at[2] + (first + i)[:, None] * X_at[1] + d[None, :]
    tl.store(here, x.to(X.dtype.element_ty), mask=(i < n)[:, None] & (d < D)[None, :])


@jit
def _steps(X, T, H, row, first, h, L: tl.constexpr):
    """Where a chunk's numbers of X [B, T, H] lie."""
    return X + (row * T + first + tl.arange(0, L)) * H + h


@jit
def _decays(Gate, T, H, row, first, n, h, L: tl.constexpr):
    """As `decays` → the two halves of G, and enter, leave [L], across: the running sum is made in float64; its float32
    `hi` and what that leaves, `lo`, are subtracted apart.
    """
    g = tl.load(_steps(Gate, T, H, row, first, h, L), mask=tl.arange(0, L) < n, other=0.)
    g = tl.maximum(g, -1000.).to(tl.float64) * 1.4426950408889634            # FLOOR, LOG2E
    G, end = tl.cumsum(g, 0), tl.sum(g, 0)
    hi = G.to(tl.float32)
    lo = (G - hi.to(tl.float64)).to(tl.float32)
    return hi, lo, tl.exp2(hi), tl.exp2((end - G).to(tl.float32)), tl.exp2(end.to(tl.float32))


@jit
def _within(hi, lo, L: tl.constexpr):
    i = tl.arange(0, L)
    seen = i[:, None] >= i[None, :]
    return tl.exp2(tl.where(seen, (hi[:, None] - hi[None, :]) + (lo[:, None] - lo[None, :]), -float("inf")))


@jit
def _dot(a, b):
    return tl.dot(a, b, input_precision="ieee")                              # float32 is float32, not tf32


@jit
def _chunk_state_fwd(K, U, W, Gate, S_first, States, U_out, S_last, Cu, K_at, U_at, W_at, S_at, T, per, H, N, P,
                     GROUP: tl.constexpr, L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr):
    """Steps 2 and 3: a program for each sequence, head, and BLOCK_P columns of the state. With W, u = u₀ − w S."""
    b, h = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    d, p = tl.arange(0, BLOCK_N), tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    at = b * S_at[0] + h * S_at[1] + d[:, None] * S_at[2] + p[None, :] * S_at[3]
    inside = (d < N)[:, None] & (p < P)[None, :]
    S = tl.load(S_first + at, mask=inside, other=0.).to(tl.float32)          # [N, P]
    slot, chunks = _slots(Cu, b, per, L)
    begin, end = b * 0, T + b * 0
    if Cu is not None:
        begin, end = tl.load(Cu + b).to(tl.int64), tl.load(Cu + b + 1).to(tl.int64)
        b = b * 0
    for c in range(chunks):
        tl.store(States + ((slot + c).to(tl.int64) * H + h) * N * P + d[:, None] * P + p[None, :],
                 S.to(States.dtype.element_ty), mask=inside)
        first = begin + c * L
        n = tl.minimum(end - first, L)
        hi, lo, enter, leave, across = _decays(Gate, T, H, b, first, n, h, L)
        k = _load(K, K_at, b, first, n, h // GROUP, d, N, L)                 # [L, N]
        u = _load(U, U_at, b, first, n, h, p, P, L)                          # [L, P]
        if W is not None:
            w = _load(W, W_at, b, first, n, h, d, N, L)
            u = (u - _dot(w, S.to(w.dtype))).to(u.dtype)
            _store(U_out, U_at, b, first, n, h, p, P, u, L)
        S = across * S + _dot(tl.trans((k * leave[:, None]).to(k.dtype)), u)
    tl.store(S_last + at, S, mask=inside)


@jit
def _chunk_out_fwd(Q, K, U, Gate, States, Y, Cu, Owner, Q_at, K_at, U_at, Y_at, T, per, H, N, P, GROUP: tl.constexpr,
                   L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr):
    """Steps 1 and 4: a program for each chunk, head, and BLOCK_P columns."""
    c, h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    d, p = tl.arange(0, BLOCK_N), tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
    row, first, n = _spot(Cu, Owner, c, T, per, L)
    if n <= 0:
        return
    hi, lo, enter, _, _ = _decays(Gate, T, H, row, first, n, h, L)
    q = _load(Q, Q_at, row, first, n, h // GROUP, d, N, L)                   # [L, N]
    k = _load(K, K_at, row, first, n, h // GROUP, d, N, L)
    u = _load(U, U_at, row, first, n, h, p, P, L)                            # [L, P]
    S = tl.load(States + (c.to(tl.int64) * H + h) * N * P + d[:, None] * P + p[None, :],
                mask=(d < N)[:, None] & (p < P)[None, :], other=0.)
    scores = _dot(q, tl.trans(k)) * _within(hi, lo, L)                       # [L, L]
    y = _dot(scores.to(u.dtype), u) + enter[:, None] * _dot(q, S)
    _store(Y, Y_at, row, first, n, h, p, P, y, L)


@jit
def _chunk_u_bwd(Q, K, Gate, dY, dU, Cu, Owner, Q_at, K_at, dY_at, dU_at, T, per, H, N, P, GROUP: tl.constexpr,
                 L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr):
    """The gradient of u by way of its own chunk's y."""
    c, h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    d, p = tl.arange(0, BLOCK_N), tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
    row, first, n = _spot(Cu, Owner, c, T, per, L)
    if n <= 0:
        return
    hi, lo, _, _, _ = _decays(Gate, T, H, row, first, n, h, L)
    q = _load(Q, Q_at, row, first, n, h // GROUP, d, N, L)
    k = _load(K, K_at, row, first, n, h // GROUP, d, N, L)
    dy = _load(dY, dY_at, row, first, n, h, p, P, L)
    scores = _dot(q, tl.trans(k)) * _within(hi, lo, L)
    _store(dU, dU_at, row, first, n, h, p, P, _dot(tl.trans(scores.to(dy.dtype)), dy), L)


@jit
def _chunk_state_bwd(Q, K, W, Gate, dY, dS_last, dStates, dU, dS_first, Cu, Q_at, K_at, W_at, dY_at, dU_at, S_at, T,
                     per, H, N, P, GROUP: tl.constexpr, L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr):
    """The same from the last chunk to the first: the gradient of the state at each chunk's end, and the whole du."""
    b, h = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    d, p = tl.arange(0, BLOCK_N), tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    at = b * S_at[0] + h * S_at[1] + d[:, None] * S_at[2] + p[None, :] * S_at[3]
    inside = (d < N)[:, None] & (p < P)[None, :]
    dS = tl.load(dS_last + at, mask=inside, other=0.).to(tl.float32)
    slot, chunks = _slots(Cu, b, per, L)
    begin, end = b * 0, T + b * 0
    if Cu is not None:
        begin, end = tl.load(Cu + b).to(tl.int64), tl.load(Cu + b + 1).to(tl.int64)
        b = b * 0
    for back in range(chunks):
        c = chunks - 1 - back
        tl.store(dStates + ((slot + c).to(tl.int64) * H + h) * N * P + d[:, None] * P + p[None, :],
                 dS.to(dStates.dtype.element_ty), mask=inside)
        first = begin + c * L
        n = tl.minimum(end - first, L)
        hi, lo, enter, leave, across = _decays(Gate, T, H, b, first, n, h, L)
        q = _load(Q, Q_at, b, first, n, h // GROUP, d, N, L)
        k = _load(K, K_at, b, first, n, h // GROUP, d, N, L)
        dy = _load(dY, dY_at, b, first, n, h, p, P, L)
        du = _load(dU, dU_at, b, first, n, h, p, P, L) + leave[:, None] * _dot(k, dS.to(k.dtype))    # [L, P]
        _store(dU, dU_at, b, first, n, h, p, P, du, L)
        dS = across * dS + _dot(tl.trans((q * enter[:, None]).to(q.dtype)), dy)
        if W is not None:
            w = _load(W, W_at, b, first, n, h, d, N, L)
            dS -= _dot(tl.trans(w), du.to(w.dtype))
    tl.store(dS_first + at, dS, mask=inside)


@jit
def _from_here_on(a, L: tl.constexpr):
    """Σ_{i≥m} a_i, for each m."""
    i = tl.arange(0, L)
    return tl.sum(tl.where(i[:, None] >= i[None, :], a[:, None], 0.), 0)


@jit
def _segments(dscores, L: tl.constexpr):
    """As `gradient_of_decays` of within."""
    i = tl.arange(0, L)
    dscores = tl.where(i[:, None] > i[None, :], dscores, 0.)
    rows, columns = tl.sum(dscores, 1), tl.sum(dscores, 0)
    both = tl.where(i[:, None] == i[None, :], columns[:, None], 0.)          # a column's sums stand along the other
    return _from_here_on(rows - tl.sum(both, 1), L)                          # axis: brought to this one


@jit
def _chunk_out_bwd(Q, K, U, Gate, States, dStates, dY, dQ, dK, dGate, Cu, Owner, Q_at, K_at, U_at, dY_at, dQ_at, T, per,
                   H, N, P, GROUP: tl.constexpr, L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr):
    """dq, dk [B, T, H, N] of each head (those of a group are summed later), dg [B, T, H]: a program a chunk, head."""
    c, h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BLOCK_N)
    row, first, n = _spot(Cu, Owner, c, T, per, L)
    if n <= 0:
        return
    dscores = tl.zeros([L, L], tl.float32)
    dq, dk = tl.zeros([L, BLOCK_N], tl.float32), tl.zeros([L, BLOCK_N], tl.float32)
    dacross = 0.
    for p0 in range(0, P, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        here = (c.to(tl.int64) * H + h) * N * P + d[:, None] * P + p[None, :]
        inside = (d < N)[:, None] & (p < P)[None, :]
        S, dS = tl.load(States + here, mask=inside, other=0.), tl.load(dStates + here, mask=inside, other=0.)
        u = _load(U, U_at, row, first, n, h, p, P, L)
        dy = _load(dY, dY_at, row, first, n, h, p, P, L)
        dscores += _dot(dy, tl.trans(u))
        dq += _dot(dy, tl.trans(S))
        dk += _dot(u, tl.trans(dS))
        dacross += tl.sum(tl.sum(S.to(tl.float32) * dS.to(tl.float32), 0), 0)
    hi, lo, enter, leave, across = _decays(Gate, T, H, row, first, n, h, L)
    q = _load(Q, Q_at, row, first, n, h // GROUP, d, N, L)
    k = _load(K, K_at, row, first, n, h // GROUP, d, N, L)
    dscores *= _within(hi, lo, L)
    dq *= enter[:, None]
    dk *= leave[:, None]
    i, dleave = tl.arange(0, L), tl.sum(dk * k.to(tl.float32), 1)
    dg = _from_here_on(tl.sum(dq * q.to(tl.float32), 1), L) + across * dacross
    dg += tl.sum(tl.where(i[:, None] < i[None, :], dleave[:, None], 0.), 0)
    dg += _segments(dscores * _dot(q, tl.trans(k)), L)
    dscores = dscores.to(k.dtype)
    _store(dQ, dQ_at, row, first, n, h, d, N, dq + _dot(dscores, k), L)
    _store(dK, dQ_at, row, first, n, h, d, N, dk + _dot(tl.trans(dscores), q), L)
    tl.store(_steps(dGate, T, H, row, first, h, L), dg, mask=i < n)


@jit
def _unit_lower_inverse(A, L: tl.constexpr, PRECISION: tl.constexpr):
    """As the function of that name, level by level: T ← T − T A' T, A' the lower left blocks of size `half`."""
    i, j = tl.arange(0, L)[:, None], tl.arange(0, L)[None, :]
    inverse = tl.where(i == j, 1., 0.) - tl.where((i // 2 == j // 2) & (i > j), A, 0.)
    for level in tl.static_range(1, 8):
        if 2 ** level < L:
            corner = (i // 2 ** (level + 1) == j // 2 ** (level + 1)) & (i // 2 ** level > j // 2 ** level)
            step = tl.dot(tl.where(corner, A, 0.), inverse, input_precision=PRECISION)
            inverse -= tl.dot(inverse, step, input_precision=PRECISION)
    return inverse


@jit
def _wy_fwd(K, V, Beta, Gate, U, W, Inverse, Cu, Owner, K_at, V_at, U_at, W_at, I_at, T, per, H, N, P,
            L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr):
    """u₀ = T β v, w = T β γ k, and T itself for the backward pass: a program a chunk and head."""
    c, h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BLOCK_N)
    row, first, n = _spot(Cu, Owner, c, T, per, L)
    if n <= 0:
        return
    i = tl.arange(0, L)
    hi, lo, enter, _, _ = _decays(Gate, T, H, row, first, n, h, L)
    beta = tl.load(_steps(Beta, T, H, row, first, h, L), mask=i < n, other=0.)
    k = _load(K, K_at, row, first, n, h, d, N, L)
    A = tl.where(i[:, None] > i[None, :], beta[:, None] * _dot(k, tl.trans(k)) * _within(hi, lo, L), 0.)
    inverse = _unit_lower_inverse(A, L, PRECISION).to(k.dtype)
    _store(Inverse, I_at, row, first, n, h, i, L, inverse, L)
    _store(W, W_at, row, first, n, h, d, N, _dot(inverse, ((beta * enter)[:, None] * k).to(k.dtype)), L)
    for p0 in range(0, P, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        v = _load(V, V_at, row, first, n, h, p, P, L)
        _store(U, U_at, row, first, n, h, p, P, _dot(inverse, (beta[:, None] * v).to(v.dtype)), L)


@jit
def _wy_bwd(K, V, Beta, Gate, Inverse, U, States, dU, dK, dV, dBeta, dGate, Cu, Owner, K_at, V_at, I_at, U_at, dK_at, T,
            per, H, N, P, L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr):
    """As `wy_backward`; dk and dg are added to what `_chunk_out_bwd` left there."""
    c, h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BLOCK_N)
    row, first, n = _spot(Cu, Owner, c, T, per, L)
    if n <= 0:
        return
    i = tl.arange(0, L)
    hi, lo, enter, _, _ = _decays(Gate, T, H, row, first, n, h, L)
    beta = tl.load(_steps(Beta, T, H, row, first, h, L), mask=i < n, other=0.)
    dA, dk = tl.zeros([L, L], tl.float32), tl.zeros([L, BLOCK_N], tl.float32)
    dbeta, dread = tl.zeros([L], tl.float32), tl.zeros([L], tl.float32)
    for p0 in range(0, P, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        S = tl.load(States + (c.to(tl.int64) * H + h) * N * P + d[:, None] * P + p[None, :],
                    mask=(d < N)[:, None] & (p < P)[None, :], other=0.)
        v = _load(V, V_at, row, first, n, h, p, P, L)
        inverse = _load(Inverse, I_at, row, first, n, h, i, L, L)            # k too: loads are cheaper than registers
        z = _dot(tl.trans(inverse), _load(dU, U_at, row, first, n, h, p, P, L))                      # [L, P]
        read = enter[:, None] * _dot(_load(K, K_at, row, first, n, h, d, N, L), S)
        dbeta += tl.sum(z * (v.to(tl.float32) - read), 1)
        dread += tl.sum(z * read, 1)
        _store(dV, U_at, row, first, n, h, p, P, beta[:, None] * z, L)
        z = z.to(v.dtype)
        dA -= _dot(z, tl.trans(_load(U, U_at, row, first, n, h, p, P, L)))
        dk -= _dot(z, tl.trans(S))
    k = _load(K, K_at, row, first, n, h, d, N, L)
    dk *= (beta * enter)[:, None]
    products = _dot(k, tl.trans(k))
    dA = tl.where(i[:, None] > i[None, :], dA * _within(hi, lo, L), 0.)
    dbeta += tl.sum(dA * products, 1)
    dA *= beta[:, None]
    dg = _segments(dA * products, L) - _from_here_on(beta * dread, L)
    dA = dA.to(k.dtype)
    dk += _dot(dA, k) + _dot(tl.trans(dA), k) + _load(dK, dK_at, row, first, n, h, d, N, L).to(tl.float32)
    _store(dK, dK_at, row, first, n, h, d, N, dk, L)
    tl.store(_steps(dBeta, T, H, row, first, h, L), dbeta, mask=i < n)
    gate = _steps(dGate, T, H, row, first, h, L)
    tl.store(gate, dg + tl.load(gate, mask=i < n, other=0.), mask=i < n)


@jit
def _ssd_step(X, Dt, A, B, C, D, State, Y, State_out, H, P, N, GROUP: tl.constexpr, BLOCK_P: tl.constexpr,
              BLOCK_N: tl.constexpr):
    """One token: a program for each row, head, and BLOCK_P rows of the state [P, N]."""
    row = tl.program_id(1).to(tl.int64)                                      # b · H + h
    p, j = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    here, inside = row * P * N + p[:, None] * N + j[None, :], (p < P)[:, None] & (j < N)[None, :]
    dt, h = tl.load(Dt + row).to(tl.float32), row % H
    x = tl.load(X + row * P + p, mask=p < P, other=0.).to(tl.float32)
    b = tl.load(B + row // GROUP * N + j, mask=j < N, other=0.).to(tl.float32)
    c = tl.load(C + row // GROUP * N + j, mask=j < N, other=0.).to(tl.float32)
    state = tl.load(State + here, mask=inside, other=0.)
    state = tl.exp(dt * tl.load(A + h)) * state + (dt * x)[:, None] * b[None, :]
    y = tl.sum(state * c[None, :], 1)
    if D is not None:
        y += tl.load(D + h) * x
    tl.store(Y + row * P + p, y.to(Y.dtype.element_ty), mask=p < P)
    tl.store(State_out + here, state, mask=inside)


@jit
def _gated_delta_step(Q, K, V, Decay, Beta, State, Y, State_out, N, P, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr):
    """One token: a program for each row, head, and BLOCK_P columns of the state [K, V] = [N, P]."""
    row = tl.program_id(1).to(tl.int64)
    p, j = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    here, inside = row * N * P + j[:, None] * P + p[None, :], (j < N)[:, None] & (p < P)[None, :]
    q = tl.load(Q + row * N + j, mask=j < N, other=0.).to(tl.float32)
    k = tl.load(K + row * N + j, mask=j < N, other=0.).to(tl.float32)
    v = tl.load(V + row * P + p, mask=p < P, other=0.).to(tl.float32)
    state = tl.exp(tl.load(Decay + row)) * tl.load(State + here, mask=inside, other=0.)
    u = tl.load(Beta + row) * (v - tl.sum(k[:, None] * state, 0))
    state += k[:, None] * u[None, :]
    tl.store(Y + row * P + p, tl.sum(q[:, None] * state, 0).to(Y.dtype.element_ty), mask=p < P)
    tl.store(State_out + here, state, mask=inside)


# --- 8. The ops -------------------------------------------------------------------------------------------------------

def _dense(x):
    return x if x.stride(-1) == 1 else x.contiguous()


# BLOCK_P, warps and stages of a kernel, where L = 64 and N ≤ 128 are to stay in registers. More than one stage corrupts
# such loops on Blackwell under Triton 3.5 to 3.7.
TILES = {
    "cuda": dict(wy_fwd=(64, 8, 1), state_fwd=(32, 4, 2), out_fwd=(64, 4, 2), u_bwd=(64, 4, 2), state_bwd=(32, 8, 2),
                 out_bwd=(32, 8, 1), wy_bwd=(16, 8, 1)),
    "cuda 100": dict(wy_fwd=(64, 8, 1), state_fwd=(32, 4, 1), out_fwd=(64, 4, 1), u_bwd=(64, 4, 1),
                     state_bwd=(32, 4, 1), out_bwd=(32, 8, 1), wy_bwd=(32, 8, 1)),
    "hip": dict(wy_fwd=(64, 4, 1), state_fwd=(32, 4, 1), out_fwd=(64, 4, 1), u_bwd=(64, 4, 1), state_bwd=(32, 4, 1),
                out_bwd=(32, 4, 1), wy_bwd=(32, 4, 1)),
}


def _tile(kernel, P):
    """→ programs for P columns, and launch options."""
    chip = "cuda"
    if not triton.knobs.runtime.interpret:
        target = triton.runtime.driver.active.get_current_target()
        chip = "hip" if target.backend == "hip" else "cuda 100" if 100 <= target.arch < 120 else "cuda"
    columns, warps, stages = TILES[chip][kernel]
    columns = max(16, min(columns, triton.next_power_of_2(P)))
    return triton.cdiv(P, columns), dict(BLOCK_P=columns, num_warps=warps, num_stages=stages)


def _slots_of(cu_seqlens, B, T, L):
    """→ Owner, slots, chunks a sequence of a dense batch."""
    if cu_seqlens is None:
        return None, B * triton.cdiv(T, L), triton.cdiv(T, L)
    begins = cu_seqlens[:-1] // L + torch.arange(len(cu_seqlens) - 1, device=cu_seqlens.device)
    slots = T // L + len(cu_seqlens) - 1
    owner = torch.searchsorted(begins, torch.arange(slots, device=begins.device), right=True) - 1
    return owner.to(torch.int32), slots, 0


def _precision(x):
    """Of the products that invert: on the matrix units of NVIDIA's chips where the inputs are half as long anyway."""
    short = x.element_size() == 2 and not triton.knobs.runtime.interpret
    return "tf32" if short and triton.runtime.driver.active.get_current_target().backend == "cuda" else "ieee"


class _OnKernel(torch.autograd.Function):
    """q, k [B, T, G, N], v [B, T, H, P], gate [B, T, H], beta as gate or None, state [n, H, N, P] → y, state."""

    @staticmethod
    def forward(ctx, q, k, v, gate, beta, state, cu, L):
        q, k, v, gate = _dense(q), _dense(k), _dense(v), gate.contiguous()
        (B, T, G, N), (H, P) = q.shape, v.shape[2:]
        owner, slots, per = _slots_of(cu, B, T, L)
        sizes, shape = (T, per, H, N, P), dict(L=L, BLOCK_N=max(16, triton.next_power_of_2(N)))
        u, w, w_at, inverse = v, None, None, None
        if beta is not None:
            beta, inverse = beta.contiguous(), k.new_empty(*k.shape[:3], L)
            u, w = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (v, k))
            w_at = w.stride()
            _wy_fwd[(slots, H)](k, v, beta, gate, u, w, inverse, cu, owner, k.stride(), v.stride(), u.stride(), w_at,
                                inverse.stride(), *sizes, **shape, **_tile("wy_fwd", P)[1], PRECISION=_precision(v))
        y, last = torch.empty_like(v, memory_format=torch.contiguous_format), torch.empty_like(state)
        if cu is not None:
            y.zero_()                                                        # rows past the last offset
        states, shape["GROUP"] = v.new_empty(slots, H, N, P), H // G
        programs, tile = _tile("state_fwd", P)
        _chunk_state_fwd[(programs, H, len(state))](k, u, w, gate, state, states, u, last, cu, k.stride(), u.stride(),
                                                    w_at, state.stride(), *sizes, **shape, **tile)
        programs, tile = _tile("out_fwd", P)
        _chunk_out_fwd[(slots, H, programs)](q, k, u, gate, states, y, cu, owner, q.stride(), k.stride(), u.stride(),
                                             y.stride(), *sizes, **shape, **tile)
        ctx.save_for_backward(q, k, v, gate, beta, u, w, inverse, states, cu, owner)
        ctx.plan = slots, per, shape
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dlast):
        q, k, v, gate, beta, u, w, inverse, states, cu, owner = ctx.saved_tensors
        (B, T, G, N), (H, P), (slots, per, shape) = q.shape, v.shape[2:], ctx.plan
        sizes, make = (T, per, H, N, P), torch.empty if cu is None else torch.zeros
        new = lambda *more, like: make(B, T, H, *more, dtype=like.dtype, device=v.device)
        dy, dlast, du = _dense(dy), dlast.contiguous(), new(P, like=v)
        dstates, dfirst = torch.empty_like(states), torch.empty_like(dlast)
        programs, tile = _tile("u_bwd", P)
        _chunk_u_bwd[(slots, H, programs)](q, k, gate, dy, du, cu, owner, q.stride(), k.stride(), dy.stride(),
                                           du.stride(), *sizes, **shape, **tile)
        programs, tile = _tile("state_bwd", P)
        _chunk_state_bwd[(programs, H, len(dlast))](
            q, k, w, gate, dy, dlast, dstates, du, dfirst, cu, q.stride(), k.stride(),
            None if w is None else w.stride(), dy.stride(), du.stride(), dlast.stride(), *sizes, **shape, **tile)
        dq, dk, dgate = new(N, like=q), new(N, like=k), new(like=gate)
        _chunk_out_bwd[(slots, H)](q, k, u, gate, states, dstates, dy, dq, dk, dgate, cu, owner, q.stride(), k.stride(),
                                   u.stride(), dy.stride(), dq.stride(), *sizes, **shape, **_tile("out_bwd", P)[1])
        if beta is None:
            over_group = lambda x: x.view(B, T, G, H // G, N).sum(3) if H > G else x
            return over_group(dq), over_group(dk), du, dgate, None, dfirst, None, None
        dv, dbeta = new(P, like=v), new(like=beta)
        _wy_bwd[(slots, H)](k, v, beta, gate, inverse, u, states, du, dk, dv, dbeta, dgate, cu, owner, k.stride(),
                            v.stride(), inverse.stride(), du.stride(), dk.stride(), *sizes, L=shape["L"],
                            BLOCK_N=shape["BLOCK_N"], **_tile("wy_bwd", P)[1])
        return dq, dk, dv, dgate, dbeta, dfirst, None, None


def _learns(*tensors):
    """Whether a gradient will be asked for, which the kernels of one token do not have."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _step_tile(P, N):
    """About 4,096 numbers of the state for a program → BLOCK_P, BLOCK_N."""
    BLOCK_N = triton.next_power_of_2(N)
    return max(1, min(triton.next_power_of_2(P), 4096 // BLOCK_N)), BLOCK_N


CHUNK, CPU_CHUNK = 64, 32                                                    # tokens: in kernels, and in torch's text


class _SSD(torch.autograd.Function):
    """The chunked text. Of the forward pass the states between chunks are kept; the rest is made anew."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, state, chunk):
        ctx.T = x.shape[1]
        (x, dt, B, C), ctx.M = _padded((x, dt, B, C), chunk)
        y, kept = ssd_chunks(x, dt, A, B, C, D, _grouped(state, B.shape[2]), ctx.M)
        ctx.save_for_backward(x, dt, A, B, C, D, *kept)
        return y[:, :ctx.T], _ungrouped(kept[-1][:, -1].clone())             # not the room of all states with it

    @staticmethod
    @once_differentiable
    @_exact
    def backward(ctx, dy, dstate):
        x, dt, A, B, C, D, *kept = ctx.saved_tensors
        (dy,), T = _padded((dy,), -(-ctx.T // ctx.M))[0], ctx.T
        dx, ddt, dA, dB, dC, dD, dS = ssd_chunks_backward(x, dt, A, B, C, D, kept, dy, _grouped(dstate, B.shape[2]),
                                                          ctx.M)
        return dx[:, :T], ddt[:, :T], dA, dB[:, :T], dC[:, :T], dD, _ungrouped(dS), None


class _GatedDelta(torch.autograd.Function):
    """The chunked text, as `_SSD`."""

    @staticmethod
    def forward(ctx, *tensors):
        *tensors, state = tensors
        ctx.T = tensors[0].shape[1]
        tensors, ctx.M = _padded(tensors, CPU_CHUNK)
        y, kept = delta_chunks(*tensors, state[:, :, None], ctx.M)
        ctx.save_for_backward(*tensors, *kept)
        return y[:, :ctx.T], kept[-1][:, -1, :, 0].clone()

    @staticmethod
    @once_differentiable
    @_exact
    def backward(ctx, dy, dstate):
        (dy,), _ = _padded((dy,), -(-ctx.T // ctx.M))
        tensors, kept = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
        *grads, dS = delta_chunks_backward(*tensors, kept, dy, dstate[:, :, None], ctx.M)
        return *(d[:, :ctx.T] for d in grads), dS[:, :, 0]


def _zeros(x):
    """Zeros like x that depend on x still, even on what is not a number."""
    return x.where(torch.zeros((), dtype=torch.bool, device=x.device), 0)


def _check_ssd(op, x, dt, A, B, C, D, state, sequences):
    """What ssd and its step ask: x [..., H, P], and so on. ValueError names what does not fit."""
    _floats(op, x=x)
    for name, t in dict(dt=dt, A=A, B=B, C=C, **({} if D is None else dict(D=D))).items():
        if not t.is_floating_point():
            raise ValueError(f"{op}: {name} {tuple(t.shape)} {t.dtype} must be floating")
    (*lead, H, P), lead_of_B = x.shape, tuple(B.shape[:-2])
    if dt.shape != x.shape[:-1]:
        raise ValueError(f"{op}: dt {tuple(dt.shape)} must be x {tuple(x.shape)} without its last axis")
    if A.shape != (H,) or D is not None and D.shape != (H,):
        raise ValueError(f"{op}: A {tuple(A.shape)} and D {None if D is None else tuple(D.shape)} must be one a head "
                         f"of x {tuple(x.shape)}: [H] = {(H,)}")
    if B.shape != C.shape or B.ndim != x.ndim or lead_of_B != tuple(lead) or not B.shape[-2] or H % B.shape[-2]:
        raise ValueError(f"{op}: B {tuple(B.shape)} and C {tuple(C.shape)} must be [..., G, N] with {lead} and G a "
                         f"divisor of the {H} heads of x {tuple(x.shape)}")
    wanted = (sequences, H, P, B.shape[-1])
    if state is not None and tuple(state.shape) != wanted:
        raise ValueError(f"{op}: state {tuple(state.shape)} must be [sequences, H, P, N] = {wanted}: it is of another "
                         "layer or batch")
    if not A.is_cuda and bool((A > 0).any()):
        raise ValueError(f"{op}: A must not be above 0, or the state grows without bound: {A.max().item():g}")


@_exact
def ssd(x, dt, A, B, C, D=None, chunk=None, state=None, cu_seqlens=None):
    """The SSD layer of Mamba-2: h_t = exp(dt_t A) h_{t−1} + dt_t x_t ⊗ B_t, y_t = h_t C_t + D x_t → (y, state).

    x           [B, T, H, P]          H heads of P channels, T from 0 on
    dt, A       [B, T, H], [H]        step sizes ≥ 0; A ≤ 0
    B, C        [B, T, G, N]          G divides H
    D           [H]                   the way past the state; none if None
    chunk       tokens                that are multiplied out at once, 64 in kernels and 32 on a CPU if None; the result
                                      does not depend on it
    state       [B, H, P, N]          what the text before left behind; None: zeros
    cu_seqlens  [n + 1] int32         B = 1: n sequences packed one after the other, each with its own state (states in
                                      and out are [n, H, P, N]); rows past the last offset are zero

    y is as x; the state is float32 (float64 for float64), differentiable in and out. ValueError names what does not
    fit; values (A, cu_seqlens) are looked at on a CPU only. Dao & Gu 2024, arXiv 2405.21060.
    """
    if x.ndim != 4:
        raise ValueError(f"ssd: x {tuple(x.shape)} must be [B, T, H, P]")
    if cu_seqlens is not None:
        cu_seqlens = _offsets("ssd", cu_seqlens, x.shape[1], len(x))
    n = len(x) if cu_seqlens is None else len(cu_seqlens) - 1
    _check_ssd("ssd", x, dt, A, B, C, D, state, n)
    chunk = chunk if chunk is not None else CHUNK if on_kernel(x) else CPU_CHUNK
    if chunk < 1:
        raise ValueError(f"ssd: chunk ({chunk}) must be at least 1")
    exact = torch.promote_types(x.dtype, torch.float32)
    state = x.new_zeros(n, *x.shape[2:], B.shape[3], dtype=exact) if state is None else state.to(exact)
    fixed = [A.to(exact).clamp(min=torch.finfo(exact).min), None if D is None else D.to(exact)]      # 0 · −∞ is none
    if on_kernel(x):
        if cu_seqlens is not None:                                           # rows past the end may hold anything
            inside = (torch.arange(x.shape[1], device=x.device) < cu_seqlens[-1])[:, None]
            x, dt = x.where(inside[..., None], 0), dt.where(inside, 0)
        y, state = _OnKernel.apply(C.to(x), B.to(x), (x * dt[..., None]).to(x.dtype), dt.to(exact) * fixed[0], None,
                                   state.contiguous().mT, cu_seqlens, min(64, max(16, triton.next_power_of_2(chunk))))
        y = y if D is None else torch.addcmul(y, x, D.to(x)[:, None])
        return y, state.mT
    rows = [t.to(exact) for t in (x, dt, B, C)]
    whole = lambda x, dt, B, C, state: _SSD.apply(x, dt, fixed[0], B, C, fixed[1], state, chunk)
    step = lambda x, dt, B, C, state: ssd_step(x, dt, fixed[0], B, C, fixed[1], state)
    if cu_seqlens is not None:
        y, state = _pack_in_torch(whole, step, rows, state, cu_seqlens)
    else:
        y, state = whole(*rows, state) if x.numel() else (None, state)
    return (_zeros(x) if y is None else y.to(x.dtype)), state


@_exact
def ssd_step(x, dt, A, B, C, D=None, state=None):
    """One token: x [B, H, P], dt [B, H], B, C [B, G, N], state [B, H, P, N] → (y as x, the state after it)."""
    if x.ndim != 3 or state is None:
        raise ValueError(f"ssd_step: x {tuple(x.shape)} must be [B, H, P], with a state")
    _check_ssd("ssd_step", x, dt, A, B, C, D, state, len(x))
    exact, R = torch.promote_types(x.dtype, torch.float32), x.shape[1] // B.shape[1]
    u, dt, A, state = (t.to(exact) for t in (x, dt, A, state))
    if on_kernel(x) and not _learns(x, dt, A, B, C, D, state):
        (b, H, P), N = x.shape, B.shape[2]
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        D = None if D is None else D.to(exact).contiguous()
        x, dt, A, B, C, state = (t.contiguous() for t in (x, dt, A, B, C, state))
        end, (BLOCK_P, BLOCK_N) = torch.empty_like(state), _step_tile(P, N)
        _ssd_step[(triton.cdiv(P, BLOCK_P), b * H)](x, dt, A, B, C, D, state, y, end, H, P, N, GROUP=R, BLOCK_P=BLOCK_P,
                                                    BLOCK_N=BLOCK_N)
        return y, end
    B, C = (t.to(exact).repeat_interleave(R, 1) for t in (B, C))             # [B, H, N]
    state = torch.exp(dt * A)[..., None, None] * state + (dt[..., None] * u)[..., None] * B[:, :, None]
    y = (C[..., None, :] @ state.mT)[..., 0, :]
    return (y if D is None else y + D.to(exact)[:, None] * u).to(x.dtype), state


def _check_delta(op, q, k, v, decay, beta, state, sequences, end=None):
    """What gated_delta and its step ask; past row `end` of a pack values may be anything."""
    _floats(op, q=q, k=k, v=v)
    if q.shape != k.shape or v.shape[:-1] != q.shape[:-1]:
        raise ValueError(f"{op}: q {tuple(q.shape)} and k {tuple(k.shape)} must be alike, and v {tuple(v.shape)} but "
                         "for its last axis")
    for name, t in dict(decay=decay, beta=beta).items():
        if t.shape != q.shape[:-1] or not t.is_floating_point():
            raise ValueError(f"{op}: {name} {tuple(t.shape)} {t.dtype} must be floating, q {tuple(q.shape)} without "
                             "its last axis")
    wanted = (sequences, q.shape[-2], q.shape[-1], v.shape[-1])
    if state is not None and tuple(state.shape) != wanted:
        raise ValueError(f"{op}: state {tuple(state.shape)} must be [sequences, H, K, V] = {wanted}: it is of another "
                         "layer or batch")
    decay = decay if end is None or decay.is_cuda else decay[:, :end]
    if not decay.is_cuda and bool((decay > 0).any()):
        raise ValueError(f"{op}: decay, a logarithm, must not be above 0: {decay.max().item():g}")


@_exact
def gated_delta(q, k, v, decay, beta, state=None, cu_seqlens=None):
    """S_t = α_t (I − β_t k_t k_tᵀ) S_{t−1} + β_t k_t v_tᵀ, y_t = S_tᵀ q_t → (y, state).

    q, k         [B, T, H, K]         q is not scaled, k not normalised in here: where |k| > 1 the state may diverge
    v            [B, T, H, V]
    decay, beta  [B, T, H]            log α ≤ 0, and β in 0 … 1
    state        [B, H, K, V]         what the text before left behind; None: zeros
    cu_seqlens   [n + 1] int32        as in `ssd`: states are [n, H, K, V]

    y is as v; the state is float32 (float64 for float64), differentiable in and out. ValueError names what does not
    fit; values (decay, cu_seqlens) are looked at on a CPU only. Yang et al. 2024, arXiv 2412.06464, section 3.
    """
    if q.ndim != 4 or v.ndim != 4:
        raise ValueError(f"gated_delta: q {tuple(q.shape)} must be [B, T, H, K] and v {tuple(v.shape)} [B, T, H, V]")
    if cu_seqlens is not None:
        cu_seqlens = _offsets("gated_delta", cu_seqlens, q.shape[1], len(q))
    n = len(q) if cu_seqlens is None else len(cu_seqlens) - 1
    _check_delta("gated_delta", q, k, v, decay, beta, state, n, None if cu_seqlens is None else cu_seqlens[-1])
    exact = torch.promote_types(v.dtype, torch.float32)
    state = v.new_zeros(n, *q.shape[2:], v.shape[3], dtype=exact) if state is None else state.to(exact)
    if on_kernel(v):
        return _OnKernel.apply(q, k, v, decay.to(exact), beta.to(exact), state.contiguous(), cu_seqlens, CHUNK)
    rows = [t.to(exact) for t in (q, k, v, decay, beta)]
    if cu_seqlens is not None:
        whole = lambda *rows, state: _GatedDelta.apply(*rows, state)
        y, state = _pack_in_torch(whole, gated_delta_step, rows, state, cu_seqlens)
    else:
        y, state = _GatedDelta.apply(*rows, state) if v.numel() else (None, state)
    return (_zeros(v) if y is None else y.to(v.dtype)), state


@_exact
def gated_delta_step(q, k, v, decay, beta, state):
    """One token: q, k [B, H, K], v [B, H, V], decay, beta [B, H], state [B, H, K, V] → (y as v, the state after it)."""
    if q.ndim != 3 or v.ndim != 3 or state is None:
        raise ValueError(f"gated_delta_step: q {tuple(q.shape)} must be [B, H, K] and v {tuple(v.shape)} [B, H, V], "
                         "with a state")
    _check_delta("gated_delta_step", q, k, v, decay, beta, state, len(q))
    exact = torch.promote_types(v.dtype, torch.float32)
    if on_kernel(v) and not _learns(q, k, v, decay, beta, state):
        (b, H, N), P = q.shape, v.shape[2]
        decay, beta, state = (t.to(exact) for t in (decay, beta, state))
        q, k, x, decay, beta, state = (t.contiguous() for t in (q, k, v, decay, beta, state))
        y, end, (BLOCK_P, BLOCK_N) = torch.empty_like(x), torch.empty_like(state), _step_tile(P, N)
        _gated_delta_step[(triton.cdiv(P, BLOCK_P), b * H)](q, k, x, decay, beta, state, y, end, N, P, BLOCK_N=BLOCK_N,
                                                            BLOCK_P=BLOCK_P)
        return y, end
    q, k, u, decay, beta, state = (t.to(exact) for t in (q, k, v, decay, beta, state))
    state = torch.exp(decay)[..., None, None] * state
    u = beta[..., None] * (u - (k[:, :, None] @ state)[:, :, 0])
    state = state + k[..., None] * u[:, :, None]
    return (q[:, :, None] @ state)[:, :, 0].to(v.dtype), state


# --- 9. The layers: from a stream of tokens to the ops, and back ------------------------------------------------------

class RecurrentState:
    """The state of a recurrent layer for B sequences in step: the convolution's last inputs `conv` [B, channels, K − 1]
    and the layer's own `state` [B, …].

    A state of packed sequences (one of infer.py's, or a routed layer's) has the same names. `cu_seqlens`: where each
    begins and ends in x [1, N, C]; `ones`: whether each has one token there.
    """
    cu_seqlens, ones = None, False

    def __init__(self, conv, state):
        self.conv, self.state = conv, state

    def update(self, conv, state):
        self.conv, self.state = conv, state


class Mixer(nn.Module):
    """x [B, T, C] → [B, T, C]: project in, convolve, mix along time, gate, project out. What the layers below share.

    Each has `widths` (rows of `in_proj`: gate, what is convolved, the rest), and two calls of its own: `mix(x, rest,
    one, **state)`, its op after the convolution → (y, state), and `gated(y, gate)`.
    """

    def __init__(self, C, widths, K, state_shape, bias=False, conv_bias=True):
        super().__init__()
        self.widths, self.K, self.state_shape = widths, K, state_shape
        self.in_proj = nn.Linear(C, sum(widths), bias=bias)
        self.conv_weight = nn.Parameter(torch.zeros(widths[1], K))
        self.conv_bias = nn.Parameter(torch.zeros(widths[1])) if conv_bias else None

    def new_state(self, B):
        """The state before the first token, of B sequences."""
        w = self.conv_weight
        return RecurrentState(w.new_zeros(B, self.widths[1], self.K - 1),
                              torch.zeros(B, *self.state_shape, device=w.device))

    def forward(self, x, positions, state=None):
        shape = x.shape
        one = state is not None and (state.ones or shape[1] == 1 and state.cu_seqlens is None)
        gate, x, rest = self.in_proj(x.flatten(0, 1) if one else x).split(self.widths, dim=-1)
        w, bias = self.conv_weight.to(x.dtype), None if self.conv_bias is None else self.conv_bias.to(x.dtype)
        if state is None:
            y, _ = self.mix(causal_conv1d(x, w, bias)[0], rest, one)
        else:
            packed = {} if one else dict(cu_seqlens=state.cu_seqlens)
            x, conv = (causal_conv1d_step if one else causal_conv1d)(x, w, bias, state=state.conv, **packed)
            y, after = self.mix(x, rest, one, state=state.state, **packed)
            state.update(conv, after)
        return self.out_proj(self.gated(y, gate)).view(shape)

    def matrices(self):
        """Matrices for Muon, as (parameter, first row, last row): the parts of `in_proj` that mean something each."""
        ends = list(itertools.accumulate(self.parts))
        return [(self.in_proj.weight, end - rows, end) for rows, end in zip(self.parts, ends)] + [
            (self.out_proj.weight, 0, len(self.out_proj.weight))]

    @torch.no_grad()
    def initialize(self, generator):
        """What is neither matrix nor gain: the convolution, and steps from 0.001 to 0.1 at decays from 1 to 16."""
        uniform = lambda w, low, high: torch.rand(w.shape, generator=generator) * (high - low) + low
        self.conv_weight.copy_(uniform(self.conv_weight, -1, 1) * self.K ** -0.5)
        dt = torch.exp(uniform(self.dt_bias, math.log(1e-3), math.log(0.1)))
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))                # softplus makes it dt again
        self.A_log.copy_(torch.log(uniform(self.A_log, 1, 16)))


class Mamba(Mixer):
    """Mamba-1 (arXiv 2312.00752): inner width E, state size N a channel, Δ from R numbers a token."""

    def __init__(self, C, E=None, N=16, R=None, K=4, bias=False, conv_bias=True):
        E, R = E or 2 * C, R or -(-C // 16)
        super().__init__(C, (E, E, 0), K, (E, N), bias, conv_bias)
        self.parts, self.R, self.N = (E, E), R, N
        self.x_proj = nn.Linear(E, R + 2 * N, bias=False)
        self.dt_proj, self.dt_bias = nn.Linear(R, E, bias=False), nn.Parameter(torch.zeros(E))
        self.A_log, self.D = nn.Parameter(torch.zeros(E, N)), nn.Parameter(torch.ones(E))
        self.out_proj = nn.Linear(E, C, bias=bias)

    def mix(self, x, rest, one, **state):
        r, B, C = self.x_proj(x).split([self.R, self.N, self.N], dim=-1)
        dt = F.softplus(self.dt_proj(r).float() + self.dt_bias.float())
        op = selective_scan_step if one else selective_scan
        return op(x, dt, -torch.exp(self.A_log.float()), B, C, self.D, **state)

    def gated(self, y, gate):
        return swiglu(gate, y)

    def matrices(self):
        return super().matrices() + [(self.x_proj.weight, 0, self.R), (self.x_proj.weight, self.R, self.R + self.N),
                                     (self.x_proj.weight, self.R + self.N, self.R + 2 * self.N)]

    @torch.no_grad()
    def initialize(self, generator):
        super().initialize(generator)
        self.dt_proj.weight.copy_((torch.rand(self.dt_proj.weight.shape, generator=generator) * 2 - 1) * self.R ** -0.5)
        self.A_log.copy_(torch.log(torch.arange(1.0, self.N + 1)).expand_as(self.A_log))                 # S4D-real


class Mamba2(Mixer):
    """Mamba-2 (arXiv 2405.21060): H heads of P channels, state size N, B and C shared by the heads of each of G groups.

    dt_limit: bounds of Δ. Its weights are those of Hugging Face's Mamba2Mixer.
    """

    def __init__(self, C, H=None, P=64, N=64, G=1, K=4, bias=False, conv_bias=True, eps=1e-5, dt_limit=(0.0, math.inf)):
        H = H or max(1, 2 * C // P)
        E = H * P
        super().__init__(C, (E, E + 2 * G * N, H), K, (H, P, N), bias, conv_bias)
        self.parts, self.H, self.P, self.N, self.G = (E, E, G * N, G * N, H), H, P, N, G
        self.eps, self.dt_limit = eps, tuple(dt_limit)
        self.dt_bias, self.A_log = nn.Parameter(torch.zeros(H)), nn.Parameter(torch.zeros(H))
        self.D, self.norm = nn.Parameter(torch.ones(H)), nn.Parameter(torch.ones(E))
        self.out_proj = nn.Linear(E, C, bias=bias)

    def mix(self, x, rest, one, **state):
        E, N = self.H * self.P, self.G * self.N
        x, B, C = (a.unflatten(-1, (n, -1)) for a, n in zip(x.split([E, N, N], dim=-1), (self.H, self.G, self.G)))
        dt = F.softplus(rest.float() + self.dt_bias.float())
        if self.dt_limit != (0.0, math.inf):
            dt = dt.clamp(*self.dt_limit)
        return (ssd_step if one else ssd)(x, dt, -torch.exp(self.A_log.float()), B, C, self.D, **state)

    def gated(self, y, gate):
        y = swiglu(gate, y.flatten(-2))
        if self.G == 1:
            return rms_norm(y, self.norm, self.eps)
        y = y.unflatten(-1, (self.G, -1))                                    # each group has a length of its own
        return rms_norm(y, y.new_ones(y.shape[-1]), self.eps).flatten(-2) * self.norm


class GatedDelta(Mixer):
    """The gated delta rule (arXiv 2412.06464) as a layer: H heads, keys of K_dim and values of V_dim channels.

    k and q are brought to length 1; α = exp(−exp(A_log) softplus(a + dt_bias)), β = sigmoid(b).
    """

    def __init__(self, C, H=None, K_dim=64, V_dim=64, K=4, eps=1e-6):
        H = H or max(1, C // V_dim)
        keys, values = H * K_dim, H * V_dim
        super().__init__(C, (values, 2 * keys + values, 2 * H), K, (H, K_dim, V_dim), conv_bias=False)
        self.parts, self.H, self.keys, self.values, self.eps = (values, keys, keys, values, H, H), H, keys, values, eps
        self.dt_bias, self.A_log = nn.Parameter(torch.zeros(H)), nn.Parameter(torch.zeros(H))
        self.norm = nn.Parameter(torch.ones(V_dim))
        self.out_proj = nn.Linear(values, C, bias=False)

    def mix(self, x, rest, one, **state):
        q, k, v = (a.unflatten(-1, (self.H, -1)) for a in x.split([self.keys, self.keys, self.values], dim=-1))
        wide = torch.promote_types(q.dtype, torch.float32)                   # float16 knows no 1e-12: 0 / 0
        q, k = (F.normalize(a.to(wide), dim=-1).to(a.dtype) for a in (q, k))
        q = q * q.shape[-1] ** -0.5
        b, a = rest.float().chunk(2, dim=-1)
        decay = -torch.exp(self.A_log.float()) * F.softplus(a + self.dt_bias.float())
        return (gated_delta_step if one else gated_delta)(q, k, v, decay, torch.sigmoid(b), **state)

    def gated(self, y, gate):
        return swiglu(gate, rms_norm(y, self.norm, self.eps).flatten(-2))


class MixerBlock(nn.Module):
    """A pre-norm layer without an MLP: `block(x, positions, state)` = x + `block.delta(x, positions, state)`."""

    def __init__(self, mixer, C, eps=1e-5):
        super().__init__()
        self.norm, self.mixer = RMSNorm(C, eps), mixer

    def forward(self, x, positions, state=None):
        return x + self.delta(x, positions, state)

    def delta(self, x, positions, state=None):
        return self.mixer(self.norm(x), positions, state)


# --- 10. The claims, measured -----------------------------------------------------------------------------------------

def show_agreement():
    """Each member in all its forms, against its definition step by step in float64."""
    rng = np.random.default_rng(0)
    T, H, P, N, C = 257, 2, 16, 8, 24
    normal = lambda *shape: rng.standard_normal(shape)
    apart = lambda a, b: np.abs(np.asarray(a) - b).max() / max(1.0, np.abs(b).max())
    single = lambda *arrays: [torch.tensor(a, dtype=torch.float32) for a in arrays]
    print(f"forms of each member, T = {T}, apart from its definition step by step")

    def row(name, **errors):
        print(f"   {name:18}" + "   ".join(f"{form.replace('_', ' ')} {error:.0e}" for form, error in errors.items()))
    A, ones, B_, dt = s4d_init(C, N), np.ones((C, N)), normal(C, N) + 1j * normal(C, N), np.exp(rng.uniform(-6, -1, C))
    x = normal(T, C)
    y, _ = s4d_recurrence_numpy(x, A, ones, B_, dt)
    row("S4D", convolution=apart(s4d_convolution_numpy(x, A, ones, B_, dt), y),
        scan=apart(s4d_scan_numpy(x, A, ones, B_, dt), y))
    args = (normal(1, T, C), np.exp(rng.uniform(-6, 0, (1, T, C))), -np.exp(normal(C, N)), normal(1, T, N),
            normal(1, T, N))
    y, _ = selective_scan_numpy(*args)
    row("Mamba", scan=apart(selective_scan_associative_numpy(*args)[0], y),
        op=apart(selective_scan(*single(*args))[0], y))
    args = (normal(1, T, H, P), np.exp(rng.uniform(-6, 0, (1, T, H))), -np.exp(normal(H)), normal(1, T, 1, N),
            normal(1, T, 1, N))
    y, _ = ssd_numpy(*args)
    row("Mamba-2", mask=apart(ssd_mask_numpy(*args), y), chunks=apart(ssd_chunked_numpy(*args)[0], y),
        op=apart(ssd(*single(*args))[0], y))
    unit = lambda a: a / np.linalg.norm(a, axis=-1, keepdims=True)
    args = (normal(1, T, H, N), unit(normal(1, T, H, N)), normal(1, T, H, P), -np.exp(rng.uniform(-6, 0, (1, T, H))),
            rng.random((1, T, H)))
    y, _ = gated_delta_numpy(*args)
    row("gated delta rule", chunks=apart(gated_delta_chunked_numpy(*args)[0], y),
        op=apart(gated_delta(*single(*args))[0], y))


WIDTH, LENGTHS = 256, (512, 2048, 8192, 16384)


def heads_of_each(T, heads=WIDTH // 64, P=64):
    """The four ways to mix T tokens of WIDTH channels → {name: (op, its inputs)}."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(1, T, *shape, generator=generator)
    step = lambda *shape: F.softplus(normal(*shape) - 3)
    q, k, v = (normal(heads, P).transpose(1, 2) for _ in range(3))
    return {
        "attention": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v)),
        "Mamba": (lambda x, dt, B, C: selective_scan(x, dt, -torch.arange(1.0, 17).repeat(WIDTH, 1), B, C)[0],
                  (normal(WIDTH), step(WIDTH), normal(16), normal(16))),
        "Mamba-2": (lambda x, dt, B, C: ssd(x, dt, -torch.ones(heads), B, C)[0],
                    (normal(heads, P), step(heads), normal(1, 64), normal(1, 64))),
        "gated delta": (lambda q, k, v, decay, beta: gated_delta(q, k, v, decay, beta)[0],
                        (normal(heads, P), F.normalize(normal(heads, P), dim=-1), normal(heads, P), -step(heads),
                         torch.rand(1, T, heads, generator=generator)))}


def measured(op, inputs, tries):
    """Forward and backward → seconds, the best of `tries`, and MB that the one keeps for the other, inputs included."""
    inputs, times, kept = [x.detach().requires_grad_() for x in inputs], [], {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x
    for _ in range(tries):
        kept.clear()
        began = time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            y = op(*inputs)
        torch.autograd.grad(y.sum(), inputs)
        times.append(time.perf_counter() - began)
    return min(times), sum(kept.values()) / 2 ** 20


def show_times():
    """Forward and backward over lengths, and from where the state is ahead of attention."""
    print(f"\nforward and backward, ms; {WIDTH} channels, float32, {torch.get_num_threads()} threads "
          "(attention: torch's)")
    names, times, memory = list(heads_of_each(1)), {}, {}
    print(f"{'T':>9}" + "".join(f"{name:>14}" for name in names))
    for T in LENGTHS:
        for name, (op, inputs) in heads_of_each(T).items():
            times[name, T], memory[name, T] = measured(op, inputs, 2 if T < 8192 else 1)
        print(f"{T:>9,}" + "".join(f"{1000 * times[name, T]:>14,.1f}" for name in names), flush=True)
    print("   and what the forward pass keeps for the backward one, MB")
    for T in LENGTHS:
        print(f"{T:>9,}" + "".join(f"{memory[name, T]:>14,.1f}" for name in names))
    for name in names[1:]:
        ahead = [T for T in LENGTHS if times[name, T] < times["attention", T]]
        if not ahead or ahead[0] == LENGTHS[0]:
            print(f"   {name} is ahead " + (f"from {LENGTHS[0]:,} tokens on at least" if ahead else "at none of them"))
            continue
        above = ahead[0]
        below = LENGTHS[LENGTHS.index(above) - 1]                            # between the two both are near powers of T
        a, b = (math.log(times[name, T] / times["attention", T]) for T in (below, above))
        print(f"   {name} overtakes attention at about {below * (above / below) ** (a / (a - b)):,.0f} tokens")


@torch.no_grad()
def show_steps():
    """What one more token costs after 1,024 and after 65,536 others."""
    heads, P = WIDTH // 64, 64
    x, k, one = torch.randn(1, WIDTH), F.normalize(torch.randn(1, heads, P), dim=-1), torch.rand(1, heads)
    ways = {"Mamba": (lambda h: selective_scan_step(x, x.exp(), -torch.ones(WIDTH, 16), x[:, :16], x[:, :16], state=h),
                      torch.zeros(1, WIDTH, 16)),
            "Mamba-2": (lambda h: ssd_step(k, one, -torch.ones(heads), k[:, :1], k[:, :1], state=h),
                        torch.zeros(1, heads, P, P)),
            "gated delta": (lambda h: gated_delta_step(k, k, k, -one, one, h), torch.zeros(1, heads, P, P))}

    def micros(work):
        times = []
        for _ in range(30):
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
        return 1e6 * sorted(times)[10]

    def after(T):
        """Of attention, then the others → µs, bytes; attention is timed last: it empties the CPU's caches."""
        cells = []
        for step, h in ways.values():
            box = [h]

            def go():
                box[0] = step(box[0])[1]
            cells.append((micros(go), h.nbytes))
        keys = torch.randn(2, 1, heads, T, P)
        attend = micros(lambda: F.scaled_dot_product_attention(k[:, :, None], *keys))
        return zip((attend, keys.nbytes), *cells)
    rows = [(T, *after(T)) for T in (1024, 65536)]
    print("\none more token after T others, µs (a sequence alone); and what is kept, MB\n"
          f"{'T':>9}" + "".join(f"{name:>14}" for name in ("attention", *ways)))
    for T, times, _ in rows:
        print(f"{T:>9,}" + "".join(f"{t:>14,.0f}" for t in times))
    for T, _, sizes in rows:
        print(f"{T:>9,}" + "".join(f"{size / 2 ** 20:>14,.2f}" for size in sizes))


# --- 11. The probe: what a state of fixed size can't remember ---------------------------------------------------------

def recall(rng, B, pairs):
    """Multi-query associative recall (arXiv 2312.04927): pairs of a key and its value, then the keys again in any
    order, each to be followed by its value. → tokens, targets [B, 4 · pairs] (−1: not asked).
    """
    row, any_order = np.arange(B)[:, None], lambda n: rng.permuted(np.tile(np.arange(n), (B, 1)), axis=1)
    keys, values, order = any_order(64)[:, :pairs] + 1, rng.integers(65, 129, (B, pairs)), any_order(pairs)
    both = lambda x: np.concatenate([x, x[row, order]], 1)
    tokens, targets = np.stack([both(keys), both(values)], 2).reshape(B, -1), np.full((B, 4 * pairs), -1)
    targets[:, 2 * pairs::2] = values[row, order]
    return tokens, targets


def selective_copying(rng, B, count):
    """Words among blanks, then as many places to write them in order (arXiv 2312.00752). [B, 8 · count]"""
    tokens, targets, words = np.zeros((B, 8 * count), int), np.full((B, 8 * count), -1), rng.integers(1, 17, (B, count))
    at = np.sort(rng.permuted(np.tile(np.arange(7 * count), (B, 1)), axis=1)[:, :count], axis=1)
    tokens[np.arange(B)[:, None], at] = words
    tokens[:, -count:], targets[:, -count:] = 17, words
    return tokens, targets


def induction(rng, B, T):
    """A marked word somewhere, and at the end its mark again: what stood after it (arXiv 2209.11895). [B, T]"""
    tokens, targets = rng.integers(1, 17, (B, T)), np.full((B, T), -1)
    at = rng.integers(0, T - 3, B)
    tokens[np.arange(B), at], tokens[:, -1] = 17, 17
    targets[:, -1] = tokens[np.arange(B), at + 1]
    return tokens, targets


def parity(rng, B, T):
    """Whether the ones so far are odd, at each place: a state of one bit, if it can flip (arXiv 2207.02098). [B, T]"""
    tokens = rng.integers(1, 3, (B, T))
    return tokens, np.cumsum(tokens - 1, 1) % 2


# task: how it is made, its vocabulary, how many tokens a pair or a word takes, the sizes it is learned at (from small
# ones a stack gets the idea, and soon), and those it is asked at, each an equal share of the minutes.
TASKS = {"recall": (recall, 129, 4, (2, 4, 8, 16, 32, 64), (4, 16, 32, 64)),
         "copying": (selective_copying, 18, 8, (2, 4, 8, 16), (16,)),
         "induction": (induction, 18, 1, (8, 16, 32, 64, 128), (128,)),
         "parity": (parity, 3, 1, (4, 8, 16, 32, 64), (64,))}
STACKS = {"attention": "aa", "Mamba-2": "ss", "gated delta": "dd", "hybrid": "sa"}
PROBE_WIDTH, PROBE_STATE, PROBE_TOKENS = 64, 32, 512                         # channels; the state's N; of a batch


class Probed(nn.Module):
    """Two layers of one kind or two, each with an MLP, at nearly equal parameters; a state of 64 · 32 numbers each."""

    def __init__(self, letters, V, C=PROBE_WIDTH):
        super().__init__()
        rotary = Rotary(rotary_inv_freq(C // 2))
        make = {"a": lambda: Attention(C, 2, 2, C // 2, rotary), "s": lambda: Mamba2(C, H=2, P=C // 2, N=PROBE_STATE),
                "d": lambda: GatedDelta(C, H=2, K_dim=PROBE_STATE, V_dim=C // 2)}
        self.embed, self.head = nn.Embedding(V, C), nn.Linear(C, V)
        self.blocks = nn.ModuleList(Block(make[letter](), MLP(C, 2 * C), C) for letter in letters)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for block in self.blocks:
                if isinstance(block.attention, Mixer):
                    block.attention.initialize(generator)

    def forward(self, x):
        positions, x = torch.arange(x.shape[1]), self.embed(x)
        for block in self.blocks:
            x = block(x, positions)
        return self.head(F.rms_norm(x, x.shape[-1:]))


def train_probe(task, letters, seconds, say, seed=0):
    """→ the share of answers that are right on fresh rows of each size that is asked, and steps taken. Ends early where
    nearly all are.
    """
    make, V, each, sizes, asked = TASKS[task]
    torch.manual_seed(seed)
    rng, model, began, step, right = np.random.default_rng(seed), Probed(letters, V), time.perf_counter(), 0, [0.0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0)

    def rows(B, size):
        return [torch.from_numpy(a) for a in make(rng, B, size)]

    @torch.no_grad()
    def shares(B):
        return [(model(x).argmax(-1) == y)[y >= 0].float().mean().item() for x, y in (rows(B, size) for size in asked)]
    while (done := (time.perf_counter() - began) / seconds) < 1 and min(right) < 0.999:
        size = int(rng.choice(sizes))
        x, y = rows(max(4, PROBE_TOKENS // (each * size)), size)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 50) * (1 - 0.9 * done)
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=-1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            right = shares(64)
            say(done)
    return shares(256), step


def probe(minutes, out):
    """Each stack at each task → a table and probe.png. What is done lies in probe.jsonl and is not done again, unless
    there is more time for it now.
    """
    out.mkdir(parents=True, exist_ok=True)
    notes = out / "probe.jsonl"
    done = [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []
    known = {(row["task"], row["stack"]): row for row in done}
    columns = [(task, size) for task, (*_, asked) in TASKS.items() for size in asked]
    seconds, wide = 60 * minutes / (len(columns) * len(STACKS)), lambda task: max(8, len(task) + 2)
    first = lambda task, size: task if size == TASKS[task][-1][0] else ""
    print(f"two layers, {PROBE_WIDTH} wide; a recurrent state holds {PROBE_WIDTH * PROBE_STATE:,} numbers; "
          f"{seconds:.0f} s a figure\nright answers, %, on fresh rows of so many pairs, words, or tokens\n{'':19}"
          + "".join(f"{first(task, size):>{wide(task)}}" for task, size in columns)
          + f"\n{'':11}{'weights':>8}" + "".join(f"{size:>{wide(task)}}" for task, size in columns), flush=True)
    live = sys.stdout.isatty()                                               # a row is written again as it grows
    for name, letters in STACKS.items():
        row = f"{name:11}{sum(w.numel() for w in Probed(letters, 129).parameters()):>8,}"
        print(row, end="", flush=True)
        for task, (*_, asked) in TASKS.items():
            time_ = round(seconds * len(asked), 3)
            if (task, name) not in known or known[task, name]["seconds"] < time_:
                say = lambda done: live and print(f"\r{row} {done:4.0%}", end="", flush=True)
                right, steps = train_probe(task, letters, time_, say)
                known[task, name] = dict(task=task, stack=name, right=right, steps=steps, seconds=time_)
                beside = notes.with_suffix(".new")
                beside.write_text("".join(json.dumps(row) + "\n" for row in known.values()))
                beside.replace(notes)
            cells = "".join(f"{100 * right:>{wide(task)}.1f}" for right in known[task, name]["right"])
            row += cells
            print(f"\r{row}" if live else cells, end="", flush=True)
        print(flush=True)
    draw_probe(known, columns, out / "probe.png")
    print(f"{out / 'probe.png'} shows it")


def draw_probe(known, columns, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axis = plt.subplots(figsize=(9, 4), layout="constrained")
    for i, name in enumerate(STACKS):
        shares = [100 * right for task in TASKS for right in known[task, name]["right"]]
        bars = axis.bar(np.arange(len(shares)) + 0.2 * i, shares, 0.18, label=name)
        axis.bar_label(bars, fmt="%.0f", fontsize=6)
    axis.set_xticks(np.arange(len(columns)) + 0.3, [f"{task} {size}" for task, size in columns], rotation=20,
                    fontsize=8)
    axis.set(ylabel="right answers, %", ylim=(0, 112))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, ncols=4, loc="upper center", fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv=None):
    """Show that all forms agree, where a state overtakes attention, what a token costs; or probe what it remembers."""
    p = argparse.ArgumentParser(prog="ssm.py", description=main.__doc__)
    p.add_argument("--probe", action="store_true", help="recall, copying, induction and parity, for four stacks")
    p.add_argument("--minutes", type=float, default=20.0, help="for --probe, at most (%(default)g)")
    p.add_argument("--out", default="probe", help="folder for --probe: its results, to go on with (%(default)s)")
    args = p.parse_args(argv)
    if not 0 < args.minutes < math.inf:
        print(f"ssm.py: --minutes {args.minutes}: it must be above 0", file=sys.stderr)
        return 2
    if args.probe:
        try:
            probe(args.minutes, Path(args.out))
        except BrokenPipeError:
            raise
        except OSError as error:
            print(f"ssm.py: --out {args.out}: {error.strerror}", file=sys.stderr)
            return 2
        return 0
    show_agreement()
    show_times()
    show_steps()
    return 0


if __name__ == "__main__":
    leave(main)
