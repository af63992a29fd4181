"""Mixture of Depths: not every token needs every layer.

    A router gives each token of a sequence a score; the k = ⌈capacity · T⌉ highest go through the block, the others
    pass by on the residual. So the block costs what k tokens cost, in training and in generation: a sequence of 2,048
    with a capacity of an eighth is 256 rows for the products and 256² / 2 scores for attention, a 64th of 2,048² / 2.

    s_i = w · x_i                r_i = sigmoid(s_i)                chosen: the k largest s_i of the sequence
    y_i = x_i + r_i f(x̃)_i      for the chosen; x̃ are they alone, in their order, with their true positions
    y_i = x_i                    for the others

The weight r_i lets the loss reach the router: dr_i = dy_i · f(x̃)_i, ds_i = r_i (1 − r_i) dr_i.

Which k are the largest only the end of a sequence tells, and a token that is being written has no future. Two causal
stand-ins for the choice:

    predictor   g(x_i, s_i − θ) > 0, trained beside to say whether i was chosen; its gradient ends at x and s
    threshold   s_i > θ, θ the running mean of the batch's own (1 − capacity) quantile: one rule for both

    name        here           meaning
    x, y        [B, T, C]      the residual stream before and after
    f           `block.delta`  what the block adds, without the residual
    capacity    scalar         share of the tokens that the block takes, 0.125 in the paper
    rows        [M]            places of the chosen among all B · T, ascending
    s, r        [M]            `scores`, and `weight` = sigmoid(s)

Mixture of Depths: Raposo et al. 2024, arXiv 2404.02258; the threshold: Expert Threshold routing, arXiv 2603.11535.

`python mod.py` shows what a router chooses on a text, what a routed block saves, and that the forms agree;
`python mod.py --isoflop` trains routed models and plain ones with equal FLOPs: loss against what they then cost.
"""
import argparse
import json
import math
import os
import sys
import sysconfig
import time
from pathlib import Path

if __name__ == "__main__" and "--isoflop" not in sys.argv:                   # the matrices are small: threads would
    os.environ.setdefault("OMP_NUM_THREADS", "1")                            # wait for each other, not work
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from attention import (MLP, Attention, Block, KVCache, Rotary, _milliseconds, jit, leave, on_kernel, rotary_inv_freq,
                       tl, triton)


# --- 1. Routing, in NumPy ---------------------------------------------------------------------------------------------

def count(capacity, T):
    """How many of T tokens a block takes: ⌈capacity · T⌉. ValueError unless 0 < capacity ≤ 1."""
    if not 0 < capacity <= 1:
        raise ValueError(f"capacity is {capacity}: it must be above 0 and at most 1")
    return math.ceil(capacity * T * (1 - 1e-12))                             # 0.07 · 100 comes out a little above 7


def top_rows_numpy(scores, capacity):
    """scores [B, T] → rows [B · k]: the k highest of each sequence (of equals the earlier), in order, among B · T."""
    B, T = scores.shape
    chosen = np.argsort(-scores, axis=1, kind="stable")[:, :count(capacity, T)]
    return (np.sort(chosen, axis=1) + np.arange(B)[:, None] * T).reshape(-1)


def random_rows_numpy(rng, B, T, capacity):
    """The experiment's control: as many rows, chosen by chance."""
    return top_rows_numpy(rng.random((B, T)), capacity)


def gather_rows_numpy(x, rows):
    """x [N, C], rows [M] → x̃ [M, C]."""
    return x[rows]


def gather_rows_backward_numpy(x, rows, *, grad):
    """grad [M, C] → dx [N, C]: zero where nothing was chosen."""
    dx = np.zeros_like(x)
    dx[rows] = grad
    return (dx,)


def scatter_add_rows_numpy(x, rows, update, weight):
    """x [N, C], update [M, C], weight [M] → y [N, C]: x, with weight · update added at rows."""
    y = x.copy()
    y[rows] += weight[:, None] * update
    return y


def scatter_add_rows_backward_numpy(x, rows, update, weight, *, grad):
    """grad [N, C] → dx [N, C], dupdate [M, C], dweight [M]."""
    chosen = grad[rows]
    return grad, weight[:, None] * chosen, (update * chosen).sum(1)


def mixture_numpy(x, w, f, capacity):
    """The routed layer whole: x [B, T, C], w [C], f: x̃ [B, k, C] → its update [B, k, C]. → y [B, T, C]."""
    B, T, C = x.shape
    scores, flat = x @ w, x.reshape(-1, C)
    rows = top_rows_numpy(scores, capacity)
    weight = 1 / (1 + np.exp(-scores.reshape(-1)[rows]))
    update = f(gather_rows_numpy(flat, rows).reshape(B, -1, C)).reshape(-1, C)
    return scatter_add_rows_numpy(flat, rows, update, weight).reshape(x.shape)


def mixture_backward_numpy(x, w, f, capacity, *, grad, f_backward):
    """grad [B, T, C]; f_backward: (x̃, grad of its update) → dx̃. → dx [B, T, C], dw [C]. The choice is a constant."""
    B, T, C = x.shape
    scores, flat = x @ w, x.reshape(-1, C)
    rows = top_rows_numpy(scores, capacity)
    weight = 1 / (1 + np.exp(-scores.reshape(-1)[rows]))
    some = gather_rows_numpy(flat, rows).reshape(B, -1, C)
    dx, dupdate, dweight = scatter_add_rows_backward_numpy(flat, rows, f(some).reshape(-1, C), weight,
                                                           grad=grad.reshape(-1, C))
    dsome = f_backward(some, dupdate.reshape(some.shape)).reshape(-1, C)
    (through,) = gather_rows_backward_numpy(flat, rows, grad=dsome)
    dscores = dweight * weight * (1 - weight)
    (by_router,) = gather_rows_backward_numpy(flat, rows, grad=dscores[:, None] * w)
    return (dx + through + by_router).reshape(x.shape), flat[rows].T @ dscores


def threshold_numpy(threshold, scores, capacity, momentum=0.9):
    """θ after a batch of scores: the running mean of the score that as many lie above as the block takes."""
    quantile = np.quantile(scores, 1 - capacity)
    return quantile if threshold is None else momentum * threshold + (1 - momentum) * quantile


def no_op_expert_numpy(x, w, experts, capacity):
    """MoDE, integrated: x [T, C], w [C, E + 1], experts: E functions; the last column is an expert that does nothing.

    Each expert takes its k highest tokens and adds p f(x) to them, p its share in the softmax over all columns: where
    the one that does nothing is likely, the others add little. → y [T, C].
    """
    scores = x @ w
    p = np.exp(scores - scores.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    y = x.copy()
    for e, f in enumerate(experts):
        rows = top_rows_numpy(p[None, :, e], capacity)
        y[rows] += p[rows, e, None] * f(x[rows])
    return y


def predictor_width(C):
    return max(8, C // 8)


def block_flops(T, C, hidden, H, G, D, capacity=1.0):
    """FLOPs of a forward pass of a block `a` over T tokens of which it takes ⌈capacity · T⌉: products of q, k, v, out,
    of the MLP, of attention (its causal half), and of the router and the predictor where there are any.
    """
    k = count(capacity, T)
    products = 2 * k * C * ((H + 2 * G) * D + H * D + 3 * hidden)
    decision = 2 * T * (C + (C + 1) * predictor_width(C) + 1) if capacity < 1 else 0
    return products + 2 * k * (k + 1) * H * D + decision


# --- 2. The kernels: a program a row, each row written by one ---------------------------------------------------------

@jit
def _gather_fwd(X, ROWS, Y, C, BLOCK_C: tl.constexpr):
    m = tl.program_id(0).to(tl.int64)                                        # N · C may pass 2³¹
    row = tl.load(ROWS + m).to(tl.int64)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        tl.store(Y + m * C + c, tl.load(X + row * C + c, mask=c < C), mask=c < C)


@jit
def _gather_bwd(dY, PLACE, dX, C, BLOCK_C: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    m = tl.load(PLACE + row).to(tl.int64)                                    # where it stands among the chosen, or −1
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        dy = tl.load(dY + m * C + c, mask=(c < C) & (m >= 0), other=0.)
        tl.store(dX + row * C + c, dy, mask=c < C)


@jit
def _scatter_add_fwd(Y, ROWS, U, W, C, BLOCK_C: tl.constexpr):
    m = tl.program_id(0).to(tl.int64)
    row = tl.load(ROWS + m).to(tl.int64)
    weight = tl.load(W + m).to(tl.float32)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        x = tl.load(Y + row * C + c, mask=c < C).to(tl.float32)              # the residual, updated in place
        u = tl.load(U + m * C + c, mask=c < C).to(tl.float32)
        tl.store(Y + row * C + c, x + weight * u, mask=c < C)


@jit
def _scatter_add_bwd(dY, ROWS, U, W, dU, dW, C, BLOCK_C: tl.constexpr):
    m = tl.program_id(0).to(tl.int64)
    row = tl.load(ROWS + m).to(tl.int64)
    weight = tl.load(W + m).to(tl.float32)
    dw = tl.zeros([BLOCK_C], tl.float32)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        dy = tl.load(dY + row * C + c, mask=c < C, other=0.).to(tl.float32)
        u = tl.load(U + m * C + c, mask=c < C, other=0.).to(tl.float32)
        tl.store(dU + m * C + c, weight * dy, mask=c < C)
        dw += u * dy
    tl.store(dW + m, tl.sum(dw))


# --- 3. The ops -------------------------------------------------------------------------------------------------------

def _block(C):
    return min(triton.next_power_of_2(C), 2048)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rows):
        ctx.save_for_backward(rows)
        ctx.shape = x.shape
        y = x.new_empty(len(rows), x.shape[1])
        if len(rows):
            _gather_fwd[(len(rows),)](x, rows, y, x.shape[1], BLOCK_C=_block(x.shape[1]))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (rows,) = ctx.saved_tensors
        place = torch.full(ctx.shape[:1], -1, dtype=torch.int32, device=dy.device)
        place[rows] = torch.arange(len(rows), dtype=torch.int32, device=dy.device)
        dx = dy.new_empty(ctx.shape)
        _gather_bwd[ctx.shape[:1]](dy.contiguous(), place, dx, ctx.shape[1], BLOCK_C=_block(ctx.shape[1]))
        return dx, None


class _ScatterAddRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rows, update, weight):
        ctx.save_for_backward(rows, update, weight)
        y = x.clone() if any(ctx.needs_input_grad) else x
        if len(rows):
            _scatter_add_fwd[(len(rows),)](y, rows, update, weight, x.shape[1], BLOCK_C=_block(x.shape[1]))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        rows, update, weight = ctx.saved_tensors
        dy = dy.contiguous()
        dupdate, dweight = torch.empty_like(update), torch.empty_like(weight)
        if len(rows):
            _scatter_add_bwd[(len(rows),)](dy, rows, update, weight, dupdate, dweight, dy.shape[1],
                                           BLOCK_C=_block(dy.shape[1]))
        return dy, None, dupdate, dweight


def _check(op, x, rows, update=None, weight=None):
    if x.ndim != 2 or rows.ndim != 1 or rows.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{op}: x {tuple(x.shape)} and rows {tuple(rows.shape)} {rows.dtype} must be [N, C] and [M], "
                         "whole numbers")
    if update is not None and (update.shape != (len(rows), x.shape[1]) or weight.shape != rows.shape):
        raise ValueError(f"{op}: update {tuple(update.shape)} and weight {tuple(weight.shape)} must be "
                         f"[{len(rows)}, {x.shape[1]}] and [{len(rows)}]")
    if torch.compiler.is_compiling() or x.device.type != "cpu" or not len(rows):
        return                                                               # looking at numbers would wait for them
    if int(rows[0]) < 0 or int(rows[-1]) >= len(x) or bool((rows[1:] <= rows[:-1]).any()):
        raise ValueError(f"{op}: rows must lie in 0 … {len(x) - 1}, ascending, none twice")


def gather_rows(x, rows):
    """x [N, C], rows [M] ascending, none twice → x̃ [M, C], differentiable. ValueError for shapes that do not fit."""
    _check("gather_rows", x, rows)
    return _GatherRows.apply(x.contiguous(), rows.contiguous()) if on_kernel(x) else x.index_select(0, rows)


def scatter_add_rows(x, rows, update, weight):
    """y [N, C] = x, with weight · update added where rows say: update [M, C], weight [M]; differentiable.

    Where no gradient is asked for, x itself may be changed and returned. ValueError for shapes that do not fit.
    """
    _check("scatter_add_rows", x, rows, update, weight)
    if on_kernel(x):
        return _ScatterAddRows.apply(*(t.contiguous() for t in (x, rows, update, weight)))
    update = update * weight[:, None].to(update.dtype)
    learns = torch.is_grad_enabled() and (x.requires_grad or update.requires_grad)
    return x.index_add(0, rows, update.to(x.dtype)) if learns else x.index_add_(0, rows, update.to(x.dtype))


# --- 4. The module, and the causal decision ---------------------------------------------------------------------------

class _PackedAttention:
    def __init__(self, caches, counts):
        self.caches, self.counts = caches, counts

    def attend(self, q, k, v, attention, **options):
        parts = zip(self.caches, *(x.split(self.counts, dim=2) for x in (q, k, v)))
        return torch.cat([attention(*qkv, **options) if cache is None else cache.attend(*qkv, attention, **options)
                          for cache, *qkv in parts], dim=2)


class _PackedStates:
    ones = False

    def __init__(self, states, counts):
        self.states = states
        self.cu_seqlens = torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32, device=states[0].conv.device)

    @property
    def conv(self):
        return torch.cat([state.conv for state in self.states])

    @property
    def state(self):
        return torch.cat([state.state for state in self.states])

    def update(self, conv, state):
        for one, *own in zip(self.states, conv.split(1), state.split(1)):
            one.update(*own)


class RoutedState:
    """The state of a routed block for B sequences: one of the block's own for each, as they take different tokens.

    states: `KVCache`s or recurrent states of one sequence; None for attention that keeps nothing.
    """

    def __init__(self, states):
        self.states = states

    def chosen(self, keep):
        """keep [B, T] bool → the state for the chosen tokens, which come one sequence after the other, [1, n, C]."""
        if len(self.states) != len(keep):
            raise ValueError(f"RoutedState: {len(self.states)} states for {len(keep)} sequences")
        some = [(state, n) for state, n in zip(self.states, keep.sum(1).tolist()) if n]
        if not some:
            return None
        attends = some[0][0] is None or isinstance(some[0][0], KVCache)
        return (_PackedAttention if attends else _PackedStates)(*zip(*some))


def _quantile(scores, share):
    """torch.quantile, which refuses more than 2²⁴ numbers, by its definition: between two of the sorted."""
    at = share * (len(scores) - 1)
    low, high = scores.sort().values[[math.floor(at), math.ceil(at)]]
    return torch.lerp(low, high, at - math.floor(at))


class MixtureOfDepths(nn.Module):
    """A block that takes ⌈capacity · T⌉ of the tokens: called as the block is, x [B, T, C] → [B, T, C].

    model.train()   the highest scores of each sequence ("topk"), or all above the threshold ("threshold")
    model.eval()    each token decided by itself, as in generation: by the predictor ("topk"), by the threshold

    A state's `chosen(keep [B, T])` gives the block's own state for the tokens it takes (`RoutedState`; infer.py has
    others). In training `auxiliary` is the predictor's loss, to be added, and `counts` what `agreement` reads.
    C: channels; None: what the block's first norm has. ValueError unless 0 < capacity ≤ 1.

    Training knows no padding: all T tokens of a sequence compete. In training by "topk" a sequence of one token goes
    through whole; at a capacity of 1 everything does, always.
    """

    def __init__(self, block, capacity=0.125, routing="topk", C=None):
        super().__init__()
        count(capacity, 1)
        if routing not in ("topk", "threshold"):
            raise ValueError(f"routing is {routing!r}: it must be 'topk' or 'threshold'")
        C = C or next(len(w) for w in block.parameters() if w.ndim == 1)     # a block begins with the gains of its norm
        self.block, self.capacity, self.routing = block, capacity, routing
        self.router = nn.Linear(C, 1, bias=False)
        if routing == "topk":
            self.predictor = nn.ModuleList([nn.Linear(C, predictor_width(C)), nn.Linear(predictor_width(C) + 1, 1)])
        self.register_buffer("threshold", torch.tensor(math.nan))            # until the first batch says
        self.auxiliary = 0.0
        self.register_buffer("cuts", torch.zeros(2), persistent=False)       # since `settle`: their sum, how many
        self.register_buffer("counts", torch.zeros(4), persistent=False)     # see `learn`

    @torch.no_grad()
    def initialize(self, generator):
        """Scores of about unit size on a residual stream of unit size. The predictor begins as the threshold's rule,
        and learns when to depart from it.
        """
        for layer in [self.router, *(self.predictor if self.routing == "topk" else ())]:
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * layer.in_features ** -0.5)
        if self.routing == "topk":
            first, last = self.predictor
            first.bias.zero_()
            last.weight.mul_(0.1)[:, -1] = 4.0
            last.bias.zero_()

    def forward(self, x, positions, state=None):
        if x.ndim != 3 or x.shape[2] != self.router.in_features or positions.shape[-1:] != x.shape[1:2]:
            raise ValueError(f"MixtureOfDepths: x {tuple(x.shape)} and positions {tuple(positions.shape)} must be "
                             f"[B, T, {self.router.in_features}] and [T] or [B, T]")
        if not x.numel():
            return x
        shape = B, T, C = x.shape
        flat = x.flatten(0, 1)
        scores = self.router(flat)[:, 0]                                     # [B · T], of at least float32
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if self.training and state is None and self.routing == "topk":
            rows = self.top_rows(scores.detach().view(B, T))
            cut = scores.detach()[rows].view(B, -1).amin(1).mean()           # the lowest score that was taken
            self.learn(flat.detach(), scores.detach(), rows, self.bar(cut))
            packed, inner = (B, len(rows) // B), None
        else:
            cut = _quantile(scores.detach(), 1 - self.capacity) if self.training else torch.zeros_like(scores[0])
            keep = self.decide(flat, scores, self.bar(cut)).cpu()            # the one wait for a GPU
            inner = (state or self.apart(B)).chosen(keep.view(B, T))
            if inner is None:                                                # none: and no wait for the block
                return x
            rows = keep.nonzero()[:, 0].to(x.device)
            packed = (1, len(rows))
        at = positions.expand(B, T).reshape(-1)[rows].view(packed)
        some = gather_rows(flat, rows)
        update = self.block.delta(some.view(*packed, C), at, inner).flatten(0, 1)
        weight = torch.sigmoid(scores[rows])
        if not (torch.is_grad_enabled() and any(t.requires_grad for t in (flat, update, weight))):
            flat = flat.clone()                                              # it is written to, and may be the caller's
        return scatter_add_rows(flat, rows, update, weight.to(update.dtype)).view(shape)

    def top_rows(self, scores):
        """scores [B, T] → rows [B · k] among all B · T: `top_rows_numpy`."""
        (B, T), k = scores.shape, count(self.capacity, scores.shape[1])
        chosen = scores.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
        return (chosen + torch.arange(B, device=scores.device)[:, None] * T).flatten()

    @torch.no_grad()
    def bar(self, cut):
        """θ, before the first batch is settled that batch's own cut; in training the cut is noted for `settle`."""
        if self.training:
            self.cuts += torch.stack([cut, torch.ones_like(cut)])
        return torch.where(torch.isnan(self.threshold), cut, self.threshold)

    def decide(self, x, scores, bar):
        """x [N, C], scores [N] → which are taken, [N] bool: of each token by itself."""
        if self.capacity == 1:
            return torch.ones_like(scores, dtype=torch.bool)
        return (self.predicted(x, scores, bar) if self.routing == "topk" else scores - bar) > 0

    def predicted(self, x, scores, bar):
        """The predictor's logits [N], from the token and from its score above θ."""
        first, last = self.predictor
        wide = x.to(torch.promote_types(x.dtype, torch.float32))             # float16 ends at 256²
        x = F.silu(first(x * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6).to(x.dtype)))
        return last(torch.cat([x, (scores - bar)[:, None].to(x.dtype)], dim=-1))[:, 0]

    def learn(self, x, scores, rows, bar):
        """The predictor's loss, on what was chosen; no gradient goes on to x or the router."""
        logits = self.predicted(x, scores, bar).to(scores.dtype)
        wanted = torch.zeros_like(logits).index_fill_(0, rows, 1.0)
        self.auxiliary = F.binary_cross_entropy_with_logits(logits, wanted)
        with torch.no_grad():
            said, true = logits > 0, wanted > 0
            right, both, sizes = (said == true).sum(), (said & true).sum(), said.sum() + true.sum()
            self.counts += torch.stack([right, torch.full_like(right, len(said)), both, sizes])

    @torch.no_grad()
    def settle(self, processes=None):
        """After a step: θ follows what the step's batches had, a tenth of the way (`threshold_numpy`)."""
        if processes and processes.size > 1:
            processes.sum([self.cuts])
        mean = self.cuts[0] / self.cuts[1]                                   # of none: not a number, and no news
        moved = torch.where(torch.isnan(self.threshold), mean, torch.lerp(self.threshold, mean, 0.1))
        self.threshold.copy_(torch.where(torch.isnan(mean), self.threshold, moved))
        self.cuts.zero_()
        self.auxiliary = 0.0                                                 # and no graph of a step that is over

    def apart(self, B):
        """States for B whole sequences that are taken apart."""
        mixer = getattr(self.block, "mixer", None) or self.block.attention
        return RoutedState([None if isinstance(mixer, Attention) else mixer.new_state(1) for _ in range(B)])


def agreement(counts):
    """The `counts` of blocks → how often the predictors say what top-k chose, and their F1 (dict for a log). Saying no
    each time agrees in all but `capacity` of the cases, at an F1 of 0.
    """
    right, total, both, sizes = torch.stack(counts).sum(0).tolist()
    return dict(router_agreement=right / total, router_f1=2 * both / max(1.0, sizes)) if total else {}


# --- 5. The claims, measured ------------------------------------------------------------------------------------------

class Tiny(nn.Module):
    """The smallest language model around blocks: bytes in, logits of the next byte out."""

    def __init__(self, letters, C, capacity, routing="topk", seed=0, scores=None):
        super().__init__()
        torch.manual_seed(seed)
        H, D = max(1, C // 32), min(C, 32)
        rotary = Rotary(rotary_inv_freq(D))
        make = lambda: Block(Attention(C, H, H, D, rotary), MLP(C, -(-8 * C // 3 // 16) * 16), C)
        self.embed, self.head = nn.Embedding(256, C), nn.Linear(C, 256, bias=False)
        self.blocks = nn.ModuleList(make() if letter == "a" else (Shuffled if scores == "random" else MixtureOfDepths)(
            make(), capacity, routing) for letter in letters)
        for block in self.blocks:
            if isinstance(block, MixtureOfDepths):
                block.initialize(torch.Generator().manual_seed(seed))
            inner = block.block if isinstance(block, MixtureOfDepths) else block
            for out in (inner.attention.out, inner.mlp.down):
                nn.init.zeros_(out.weight)

    def forward(self, x, states=None, start=0):
        positions = torch.arange(start, start + x.shape[1])
        x = self.embed(x)
        for block, state in zip(self.blocks, states or [None] * len(self.blocks)):
            x = block(x, positions, state)
        return self.head(F.rms_norm(x, x.shape[-1:]))

    def states(self, capacity):
        new = lambda block: KVCache(1, block.attention.G, capacity, block.attention.D)
        return [RoutedState([new(block.block)]) if isinstance(block, MixtureOfDepths) else new(block)
                for block in self.blocks]


class Shuffled(MixtureOfDepths):
    """The control: rows by chance, in training and in generation."""

    def forward(self, x, positions, state=None):
        with torch.no_grad():
            self.router.weight.zero_()                                       # a weight of a half, for all
        self.predicted = lambda x, scores, bar: torch.rand(len(x)) - (1 - self.capacity)
        if self.training and state is None:
            rows = torch.from_numpy(random_rows_numpy(np.random.default_rng(), *x.shape[:2], self.capacity))
            at = rows.view(len(x), -1) % x.shape[1]
            some = gather_rows(x.flatten(0, 1), rows).view(len(x), -1, x.shape[2])
            update = self.block.delta(some, positions.expand(x.shape[:2]).gather(1, at)).flatten(0, 1)
            return scatter_add_rows(x.flatten(0, 1), rows, update, torch.full((len(rows),), 0.5)).view(x.shape)
        return super().forward(x, positions, state)


def some_text(most=2 ** 22):
    """Text that every machine has: Python's own library → bytes as a tensor, its last tenth held out."""
    root, parts, size = Path(sysconfig.get_path("stdlib")), [], 0
    for path in sorted(root.glob("*.py")):
        parts.append(path.read_bytes())
        size += len(parts[-1])
        if size > most:
            break
    if size < 2 ** 16:
        raise FileNotFoundError(f"{root} holds no Python source to train on")
    return torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8).long().tensor_split([9 * size // 10])


def train_tiny(model, text, T=256, B=8, seconds=None, flops=None, say=lambda done, loss: None, seed=0):
    """AdamW until the time or the FLOPs are spent → steps."""
    generator, began, step = torch.Generator().manual_seed(seed), time.perf_counter(), 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    each = 3 * B * forward_flops(model, T)
    while True:
        done = (time.perf_counter() - began) / seconds if seconds else step * each / flops
        if done >= 1 and step:
            return step
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 20) * (1 - 0.9 * min(done, 1))
        at = torch.randint(len(text) - T - 1, (B, 1), generator=generator) + torch.arange(T + 1)
        rows = text[at]
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        beside = sum(block.auxiliary for block in model.blocks if isinstance(block, MixtureOfDepths))
        optimizer.zero_grad(set_to_none=True)
        (loss + beside).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for block in model.blocks:
            if isinstance(block, MixtureOfDepths):
                block.settle()
        step += 1
        say(min(done, 1), loss.item())


def forward_flops(model, T):
    """FLOPs of a forward pass over T tokens."""
    total = 2 * T * model.head.weight.numel()
    for block in model.blocks:
        routed = isinstance(block, MixtureOfDepths)
        a, mlp = ((block.block if routed else block).attention, (block.block if routed else block).mlp)
        total += block_flops(T, model.embed.embedding_dim, mlp.down.in_features, a.H, a.G, a.D,
                             block.capacity if routed else 1.0)
    return total


@torch.no_grad()
def held_out_loss(model, text, T=256, rows=32):
    """Nats a byte on evenly spaced windows of the text."""
    at = torch.linspace(0, len(text) - T - 2, rows).long()[:, None] + torch.arange(T + 1)
    return F.cross_entropy(model(text[at[:, :-1]]).flatten(0, 1), text[at[:, 1:]].flatten()).item()


def show_choice(model, text, layer):
    """A text with the bytes that a routed block takes in generation set off by brackets, as in ‹these› ones."""
    seen = {}
    block, decide = model.blocks[layer], model.blocks[layer].decide

    def note(*args):
        seen["keep"] = decide(*args)
        return seen["keep"]
    block.decide = note
    with torch.no_grad():
        model.eval()(text[None])
    del block.decide
    marked, inside = [], False
    for byte, keep in zip(bytes(text.tolist()), seen["keep"].tolist()):
        if keep != inside:
            marked.append(("‹" if keep else "›").encode())
        marked.append(bytes([byte]))
        inside = keep
    return b"".join(marked).decode("utf-8", "replace") + "›" * inside, sum(seen["keep"].tolist()) / len(text)


def compare_times(C=256, capacity=0.125, tries=3):
    """A block beside the same block routed, forward and backward: FLOPs and time."""
    rotary = Rotary(rotary_inv_freq(64))
    block = Block(Attention(C, C // 64, C // 64, 64, rotary), MLP(C, 8 * C // 3 // 32 * 32), C)
    layer = MixtureOfDepths(block, capacity)
    layer.initialize(torch.Generator().manual_seed(0))
    print(f"one block, {C} wide, forward and backward; a routed one takes {capacity:g} of the tokens\n"
          f"{'T':>6}{'FLOPs':>14}{'routed':>12}{'time':>14}{'routed':>12}{'FLOPs':>9}{'time':>8}")
    for T in (256, 512, 1024, 2048, 4096):
        x, positions = torch.randn(1, T, C, requires_grad=True), torch.arange(T)
        both = lambda f: torch.autograd.grad(f(x, positions).sum(), x)
        full, routed = (_milliseconds(lambda: both(f), "cpu", tries) for f in (block, layer))
        a = block.attention
        flops = [3 * block_flops(T, C, block.mlp.down.in_features, a.H, a.G, a.D, c) for c in (1.0, capacity)]
        print(f"{T:>6}{flops[0] / 1e9:>12.2f} G{flops[1] / 1e9:>10.2f} G{full:>11.1f} ms{routed:>9.1f} ms"
              f"{flops[1] / flops[0]:>8.3f}×{routed / full:>7.3f}×", flush=True)


def agree():
    """How far NumPy, the module and its causal forms are apart."""
    x, positions = torch.randn(2, 64, 32, dtype=torch.float64), torch.arange(64)
    model = Tiny("A", 32, 0.25).double()
    layer = model.blocks[0]
    with torch.no_grad():
        layer.block.mlp.down.weight.normal_()
        f = lambda a: layer.block.delta(torch.from_numpy(a), torch.arange(a.shape[1])).numpy()
        layer.block.attention.rotary = lambda q, k, positions: (q, k)        # NumPy's f is told of no positions
        twin = mixture_numpy(x.numpy(), layer.router.weight[0].numpy(), f, 0.25)
        whole = np.abs(layer.train()(x, positions).numpy() - twin).max()
        layer.eval()
        y, state = layer(x[:1], positions), RoutedState([KVCache(1, 1, 64, 32, torch.float64)])
        steps = torch.cat([layer(x[:1, t:t + 1], positions[t:t + 1], state) for t in range(64)], 1)
    print(f"top-k routing by the module and by NumPy: {whole:.0e} apart;\n"
          f"in generation the whole text at once and token by token: {(steps - y).abs().max():.0e}")


def show_all():
    """What `python mod.py` prints."""
    text, held = some_text()
    model = Tiny("aAaA", 96, 0.125)
    shown, began = sys.stdout.isatty(), time.perf_counter()

    def say(done, loss):
        if shown:
            print(f"\rtraining {done:4.0%}, loss {loss:.3f}   ", end="", flush=True)
    steps = train_tiny(model, text, seconds=6, say=say)
    told = agreement([block.counts for block in model.blocks if isinstance(block, MixtureOfDepths)])
    model.train()
    top = held_out_loss(model, held)
    causal = held_out_loss(model.eval(), held)
    marked, share = show_choice(model, held[2000:2400], 1)
    seconds = time.perf_counter() - began
    print("\r" * shown + f"aAaA, 96 wide, {steps} steps in {seconds:.0f} s on Python's own library:\n"
          f"{top:.3f} nats a byte routed by top-k, {causal:.3f} by its predictors, which say\n"
          f"what top-k chose in {told['router_agreement']:.1%} of all cases (saying no each time: 87.5%), "
          f"F1 {told['router_f1']:.2f}.\nWhat the first routed block takes of a text in generation ({share:.0%}):\n\n"
          f"{marked}\n")
    compare_times()
    print()
    agree()


# --- 6. Equal training FLOPs ------------------------------------------------------------------------------------------

KINDS = (("aaaa", 1.0, None), ("aAaA", 0.125, None), ("aAaA", 0.5, None), ("AAAA", 0.125, None),
         ("aAaA", 0.125, "random"))
WIDTHS = 32, 48, 64, 96


def flops_each(minutes, text):
    """Training FLOPs for each model, so that all of them take about so many minutes: by a few steps of each kind, at
    the least width and at the largest, which does more FLOPs a second.
    """
    cost = 0.0                                                               # seconds a FLOP, of all kinds together
    for letters, capacity, scores in KINDS:
        for C in (WIDTHS[0], WIDTHS[-1]):
            model = Tiny(letters, C, capacity, scores=scores)
            step = 3 * 8 * forward_flops(model, 256)
            train_tiny(model, text, flops=step)                              # the first warms up
            begin = time.perf_counter()
            train_tiny(model, text, flops=2 * step)
            cost += (time.perf_counter() - begin) / (2 * step) / 2
    return 60 * minutes / (cost * len(WIDTHS))


def isoflop(minutes, out):
    """Plain and routed models of a few widths, all trained with the same FLOPs → a table, isoflop.png. What is done
    lies in isoflop.jsonl and is not done again.
    """
    out.mkdir(parents=True, exist_ok=True)
    notes, (text, held) = out / "isoflop.jsonl", some_text()
    done = [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []
    flops = done[0]["training_flops"] if done else flops_each(minutes, text)
    print(f"{len(KINDS) * len(WIDTHS)} models, {flops:.2e} FLOPs of training each;\n{notes} keeps what is done\n"
          f"{'blocks':8}{'capacity':>9}{'routing':>9}{'width':>7}{'steps':>7}{'FLOPs a pass':>14}{'ms a token':>12}"
          f"{'nats a byte':>13}", flush=True)
    for C in WIDTHS:
        for letters, capacity, scores in KINDS:
            key = dict(blocks=letters, capacity=capacity, routing=scores or ("top-k" if capacity < 1 else "–"), width=C)
            row = next((r for r in done if all(r[k] == v for k, v in key.items())), None)
            if row is None:
                model = Tiny(letters, C, capacity, scores=scores)
                say = lambda p, loss: sys.stderr.isatty() and print(f"\r{letters} {C}: {p:4.0%}, loss {loss:.3f}   ",
                                                                    end="", file=sys.stderr, flush=True)
                steps = train_tiny(model, text, flops=flops, say=say)
                print("\r" * sys.stderr.isatty(), end="", file=sys.stderr)
                row = key | dict(training_flops=flops, steps=steps, forward_flops=forward_flops(model, 256) / 256,
                                 ms_per_token=token_milliseconds(model.eval()), loss=held_out_loss(model, held))
                done.append(row)
                beside = notes.with_suffix(".new")
                beside.write_text("".join(json.dumps(r) + "\n" for r in done))
                beside.replace(notes)
            print(f"{letters:8}{capacity:>9.3f}{row['routing']:>9}{C:>7}{row['steps']:>7}{row['forward_flops']:>14.2e}"
                  f"{row['ms_per_token']:>12.2f}{row['loss']:>13.3f}", flush=True)
    draw(done, out / "isoflop.png")
    print(f"\n{out / 'isoflop.png'} shows loss over FLOPs a pass and over time a token")


@torch.no_grad()
def token_milliseconds(model, prompt=128, count=64):
    """Median time of a generated token after a prompt, on one thread: such products are too small to share."""
    states, times, threads = model.states(prompt + count), [], torch.get_num_threads()
    torch.set_num_threads(1)
    model(torch.zeros(1, prompt, dtype=torch.long), states)
    for i in range(count):
        t = time.perf_counter()
        model(torch.full((1, 1), i % 256), states, prompt + i)
        times.append(time.perf_counter() - t)
    torch.set_num_threads(threads)
    return 1000 * sorted(times)[count // 2]


def draw(rows, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for letters, capacity, scores in KINDS:
        name = scores or ("top-k" if capacity < 1 else "–")
        own = [r for r in rows if (r["blocks"], r["capacity"], r["routing"]) == (letters, capacity, name)]
        label = letters if capacity == 1 else f"{letters}, capacity {capacity:g}" + (", random" if scores else "")
        for axis, key in zip(axes, ("forward_flops", "ms_per_token")):
            axis.plot([r[key] for r in own], [r["loss"] for r in own], "o-", label=label, linewidth=1, markersize=4)
    axes[0].set(xlabel="FLOPs of a forward pass, per token", ylabel="nats a byte, held out", xscale="log")
    axes[1].set(xlabel="ms per generated token")
    axes[0].legend(frameon=False, fontsize=8)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"equal training FLOPs: {rows[0]['training_flops']:.1e} each", fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv=None):
    """Show what a router chooses and what it saves; or train plain and routed models with equal FLOPs."""
    p = argparse.ArgumentParser(prog="mod.py", description=main.__doc__)
    p.add_argument("--isoflop", action="store_true", help="loss at equal training FLOPs, over sizes and capacities")
    p.add_argument("--minutes", type=float, default=10.0, help="for --isoflop, about (%(default)g)")
    p.add_argument("--out", default="isoflop", help="folder for --isoflop: its results, to go on with (%(default)s)")
    args = p.parse_args(argv)
    if not 0 < args.minutes < math.inf:
        print(f"mod.py: --minutes {args.minutes}: it must be above 0", file=sys.stderr)
        return 2
    try:
        isoflop(args.minutes, Path(args.out)) if args.isoflop else show_all()
    except BrokenPipeError:
        raise
    except OSError as error:                                                 # no library to read, no room to write
        print(f"mod.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    leave(main)
