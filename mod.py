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
`python mod.py --isoflop` trains routed models and plain ones with equal FLOPs.
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

from attention import (MLP, Attention, Block, KVCache, RMSNorm, Rotary, _milliseconds, jit, on_kernel, rotary_inv_freq,
                       tl, triton)


# --- 1. Routing, in NumPy ---------------------------------------------------------------------------------------------

def count(capacity, T):
    """How many of T tokens a block takes: ⌈capacity · T⌉. ValueError unless 0 < capacity ≤ 1."""
    if not 0 < capacity <= 1:
        raise ValueError(f"capacity is {capacity}: it must be above 0 and at most 1")
    return math.ceil(capacity * T)


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
    if x.ndim != 2 or rows.ndim != 1 or rows.is_floating_point():
        raise ValueError(f"{op}: x {tuple(x.shape)} and rows {tuple(rows.shape)} {rows.dtype} must be [N, C] and [M], "
                         "whole numbers")
    if update is not None and (update.shape != (len(rows), x.shape[1]) or weight.shape != rows.shape):
        raise ValueError(f"{op}: update {tuple(update.shape)} and weight {tuple(weight.shape)} must be "
                         f"[{len(rows)}, {x.shape[1]}] and [{len(rows)}]")
    if x.device.type == "cpu" and len(rows) and not 0 <= int(rows[0]) <= int(rows[-1]) < len(x):
        raise ValueError(f"{op}: rows must lie in 0 … {len(x) - 1}, ascending")


def gather_rows(x, rows):
    """x [N, C], rows [M] ascending, none twice → x̃ [M, C], differentiable. ValueError for shapes that do not fit."""
    _check("gather_rows", x, rows)
    return _GatherRows.apply(x.contiguous(), rows) if on_kernel(x) else x.index_select(0, rows)


def scatter_add_rows(x, rows, update, weight):
    """y [N, C] = x, with weight · update added where rows say: update [M, C], weight [M]; differentiable.

    Where no gradient is asked for, x itself is changed and returned. ValueError for shapes that do not fit.
    """
    _check("scatter_add_rows", x, rows, update, weight)
    if on_kernel(x):
        return _ScatterAddRows.apply(x.contiguous(), rows, update.contiguous(), weight.contiguous())
    update = update * weight[:, None].to(update.dtype)
    learns = torch.is_grad_enabled() and (x.requires_grad or update.requires_grad)
    return x.index_add(0, rows, update.to(x.dtype)) if learns else x.index_add_(0, rows, update.to(x.dtype))


# --- 4. The module, and the causal decision ---------------------------------------------------------------------------

class RoutedState:
    """The state of a routed block for B sequences: one of the block's own for each, as they take different tokens.

    states: `KVCache`s or recurrent states of one sequence; None for attention that keeps nothing.
    """

    def __init__(self, states):
        self.states = states

    def chosen(self, keep):
        """keep [B, T] bool → the state for the chosen tokens, which come one sequence after the other, [1, n, C]."""
        some = [(state, n) for state, n in zip(self.states, keep.sum(1).tolist()) if n]
        if not some:
            return None
        attends = some[0][0] is None or isinstance(some[0][0], KVCache)
        return (_PackedAttention if attends else _PackedStates)(*zip(*some))


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

    Training knows no padding: all T tokens of a sequence compete. A sequence of one token goes through whole, and so
    does everything at a capacity of 1.
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
        self.register_buffer("cuts", torch.zeros(2), persistent=False)       # of the batches since `settle`: sum, number
        self.register_buffer("counts", torch.zeros(4), persistent=False)     # right, all, chosen and said so, both added

    @torch.no_grad()
    def initialize(self, generator):
        """Scores of about unit size on a residual stream of unit size. The predictor begins as the threshold's rule, and
        learns when to depart from it.
        """
        for layer in [self.router, *(self.predictor if self.routing == "topk" else ())]:
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * layer.in_features ** -0.5)
        if self.routing == "topk":
            first, last = self.predictor
            first.bias.zero_()
            last.weight.mul_(0.1)[:, -1] = 4.0
            last.bias.zero_()

    def forward(self, x, positions, state=None):
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
            rows = keep.nonzero()[:, 0].to(x.device)
            inner = (state or self.apart(B)).chosen(keep.view(B, T))
            if inner is None:                                                # none: and no wait for the block
                return x
            packed = (1, len(rows))
        at = (positions if positions.ndim == 2 else positions.expand(B, T)).reshape(-1)[rows].view(packed)
        some = gather_rows(flat, rows)
        update = self.block.delta(some.view(*packed, C), at, inner).flatten(0, 1)
        weight = torch.sigmoid(scores[rows])
        if not torch.is_grad_enabled():
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
        return (self.predicted(x, scores, bar) if self.routing == "topk" else scores - bar) > 0

    def predicted(self, x, scores, bar):
        """The predictor's logits [N], from the token and from its score above θ."""
        first, last = self.predictor
        x = F.silu(first(F.rms_norm(x, x.shape[-1:])))
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


# --- 5. The claims, proved on the reader's machine --------------------------------------------------------------------

BYTES = 256                                                                  # a token is a byte


class Stack(nn.Module):
    """A model small enough to train here: tokens [B, T] → logits [B, T, 256]. `a`: a block, `A`: a routed one."""

    def __init__(self, C, letters, capacity=0.125, routed=MixtureOfDepths, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.C, self.H, self.G, self.D, self.hidden = C, C // 32, max(1, C // 64), 32, 8 * C // 3
        self.capacities = [capacity if letter == "A" else 1.0 for letter in letters]
        rotary = Rotary(rotary_inv_freq(self.D))
        block = lambda: Block(Attention(C, self.H, self.G, self.D, rotary), MLP(C, self.hidden), C)
        self.embed, self.norm, self.head = nn.Embedding(BYTES, C), RMSNorm(C), nn.Linear(C, BYTES, bias=False)
        self.blocks = nn.ModuleList(routed(block(), capacity) if letter == "A" else block() for letter in letters)
        self.routed = [block for block in self.blocks if isinstance(block, MixtureOfDepths)]
        for block in self.routed:
            block.initialize(torch.Generator().manual_seed(seed))

    def forward(self, tokens, positions=None, states=None):
        x = self.embed(tokens)
        positions = torch.arange(tokens.shape[1]) if positions is None else positions
        for block, state in zip(self.blocks, states or [None] * len(self.blocks)):
            x = block(x, positions, state)
        return self.head(self.norm(x))

    def states(self, capacity):
        """Empty states for one sequence of up to `capacity` tokens."""
        cache = lambda: KVCache(1, self.G, capacity, self.D)
        return [RoutedState([cache()]) if block in self.routed else cache() for block in self.blocks]

    def flops(self, T):
        """FLOPs of a forward pass over a sequence of T tokens; a training step costs three times that."""
        blocks = (block_flops(T, self.C, self.hidden, self.H, self.G, self.D, c) for c in self.capacities)
        return sum(blocks) + 2 * T * self.C * BYTES


def library_text(most=2 ** 22):
    """Text that every machine has: the standard library's source, as bytes. → training, validation: int64 arrays."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [path for path in sorted(root.glob("*.py")) + sorted(root.glob("[a-z]*/*.py"))
             if "test" not in path.parts[len(root.parts)] and "packages" not in path.parts[len(root.parts)]]
    np.random.default_rng(0).shuffle(files)
    text = b"".join(path.read_bytes() for path in files)[:most]
    if len(text) < 2 ** 16:
        raise ValueError(f"{root} holds no Python source to train on")
    data = np.frombuffer(text, np.uint8).astype(np.int64)
    return data[:-len(data) // 10], data[-len(data) // 10:]


def windows(data, starts, T):
    """→ tokens [B, T] and the ones that follow them."""
    cut = torch.from_numpy(np.stack([data[i:i + T + 1] for i in starts]))
    return cut[:, :-1], cut[:, 1:]


def train_stack(model, data, steps, B=16, T=128, rate=3e-3, seconds=math.inf, seed=0, say=lambda step, loss: None):
    """Adam, `rate` warmed up, then falling to zero at the last step or second, what comes first. → steps taken."""
    optimizer = torch.optim.Adam(model.parameters(), rate, betas=(0.9, 0.95))
    rng, begin, done, step = np.random.default_rng(seed), time.perf_counter(), 0.0, 0
    model.train()
    while done < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 20) * (1 - done)
        tokens, targets = windows(data, rng.integers(0, len(data) - T - 1, B), T)
        loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        (loss + sum(block.auxiliary for block in model.routed)).backward()
        optimizer.step()
        optimizer.zero_grad()
        for block in model.routed:
            block.settle()
        step += 1
        done = max(step / steps, (time.perf_counter() - begin) / seconds)
        say(step, loss)
    return step


@torch.no_grad()
def validation(model, data, T=128, B=16, batches=8):
    """Nats a token over windows spread over all of `data`: as generation routes, and as training did."""
    starts, losses = np.linspace(0, len(data) - T - 1, B * batches).astype(int).reshape(batches, B), []
    for training in (False, True):
        model.train(training)
        pairs = (windows(data, some, T) for some in starts)
        losses.append(float(np.mean([F.cross_entropy(model(x).flatten(0, 1), y.flatten()).item() for x, y in pairs])))
    return losses


@torch.no_grad()
def generate(model, prompt, n):
    """Greedy: prompt [T] and n more tokens, each from the states of those before it. → tokens, seconds a new token."""
    model.eval()
    tokens, states = list(prompt), model.states(len(prompt) + n)
    logits = model(torch.tensor([tokens]), torch.arange(len(tokens)), states)
    begin = time.perf_counter()
    for _ in range(n):
        tokens.append(int(logits[0, -1].argmax()))
        logits = model(torch.tensor([tokens[-1:]]), torch.tensor([len(tokens) - 1]), states)
    return tokens, (time.perf_counter() - begin) / n


@torch.no_grad()
def choices(model, tokens):
    """tokens [T] → for each routed block, which of them it takes, [T] bool, as generation decides."""
    taken, model = [], model.eval()
    hooks = [block.register_forward_hook(lambda block, args, y: taken.append((args[0] != y).any(-1)[0]))
             for block in model.routed]
    model(torch.as_tensor(tokens)[None])
    for hook in hooks:
        hook.remove()
    return taken


def marked(tokens, taken, color):
    """The text with each chosen stretch in reverse video, or between ‹ and › where the output has no colors."""
    on, off = ("\033[7m", "\033[0m") if color else ("‹", "›")
    edges = np.diff(np.concatenate([[0], taken, [0]]).astype(int))
    return "".join((off if edge < 0 else on if edge > 0 else "") + chr(token)
                   for token, edge in zip([*tokens, 32], edges)).rstrip()


def compare_forms():
    """The largest differences between the forms → [(what, how far apart)]."""
    rng, T, C = np.random.default_rng(0), 33, 8
    W, w, x, dy = (rng.standard_normal(shape) for shape in ((C, C), (C,), (2, T, C), (2, T, C)))
    f, back = lambda x: np.tanh(x @ W), lambda x, g: (g * (1 - np.tanh(x @ W) ** 2)) @ W.T
    dx, dw = mixture_backward_numpy(x, w, f, 0.25, grad=dy, f_backward=back)
    bump = 1e-6 * rng.standard_normal(x.shape)
    slope = ((mixture_numpy(x + bump, w, f, 0.25) - mixture_numpy(x - bump, w, f, 0.25)) * dy).sum() / 2
    rows = [("NumPy's gradient, finite differences", abs(slope / (dx * bump).sum() - 1))]

    class Layer(nn.Module):
        def delta(self, x, positions, state=None):
            return torch.tanh(x @ torch.tensor(W))
    layer = MixtureOfDepths(Layer(), 0.25, C=C).double()
    layer.router.weight.data = torch.tensor(w)[None]
    tx = torch.tensor(x, requires_grad=True)
    y = layer(tx, torch.arange(T))
    y.backward(torch.tensor(dy))
    pairs = ((y, mixture_numpy(x, w, f, 0.25)), (tx.grad, dx), (layer.router.weight.grad[0], dw))
    rows.append(("torch, NumPy: y, dx and dw", max(np.abs(a.detach().numpy() - b).max() for a, b in pairs)))
    return rows


@torch.no_grad()
def compare_prefills(model, tokens):
    """Logits of one text, prefilled whole, in chunks of 7, and token by token → the largest difference."""
    model.eval()
    T = len(tokens)
    at, tokens, outputs = torch.arange(T), torch.as_tensor(tokens)[None], []
    for size in (T, 7, 1):
        states = model.states(T)
        outputs.append(torch.cat([model(tokens[:, i:i + size], at[i:i + size], states) for i in range(0, T, size)], 1))
    return max((a - outputs[0]).abs().max().item() for a in outputs[1:])


def compare_times(lengths, C=256, capacity=0.125):
    """Print FLOPs and measured time, forward and backward, of a block and of the same block routed."""
    H, G, D, hidden = C // 32, C // 64, 32, 8 * C // 3
    block = Block(Attention(C, H, G, D, Rotary(rotary_inv_freq(D))), MLP(C, hidden), C)
    routed = MixtureOfDepths(block, capacity)
    print(f"\nOne block, {C} wide, forward and backward, batch 1, capacity {capacity}:\n"
          f"{'T':>6}{'full':>14}{'routed':>12}{'full':>14}{'routed':>12}{'of FLOPs':>12}{'of time':>10}")
    for T in lengths:
        x, positions = torch.randn(1, T, C, requires_grad=True), torch.arange(T)

        def plain():
            block(x, positions).sum().backward()

        def some():
            y = routed(x, positions)
            (y.sum() + routed.auxiliary).backward()
        flops = [3 * block_flops(T, C, hidden, H, G, D, c) for c in (1.0, capacity)]
        times = [_milliseconds(work, "cpu", tries=3 if T < 4096 else 1) for work in (plain, some)]
        print(f"{T:>6}{flops[0] / 1e6:>8,.0f} MFLOP{flops[1] / 1e6:>6,.0f} MFLOP"
              f"{times[0]:>11,.1f} ms{times[1]:>9,.1f} ms"
              f"{flops[1] / flops[0]:>11.3f}×{times[1] / times[0]:>9.3f}×", flush=True)


def show(seconds=5.0):
    """What a router chooses on a text, what a routed block saves, and that the forms agree."""
    data, held_out = library_text()
    shown, T = sys.stdout.isatty(), 128
    print(f"A stack of aAaA, its A routed at a capacity of 0.125, reads Python's library for {seconds:.0f} s",
          flush=True)
    model = Stack(96, "aAaA")
    say = lambda step, loss: shown and step % 10 == 0 and print(f"\rstep {step}, {loss:.2f} nats", end="", flush=True)
    steps = train_stack(model, data, 10 ** 9, B=8, T=T, seconds=seconds, say=say)
    told = agreement([block.counts for block in model.routed])
    causal, topk = validation(model, held_out, T, batches=2)
    print("\r" * shown + f"{steps} steps; on text held out {causal:.3f} nats a byte as generation routes, {topk:.3f} "
          f"as training did.\nThe predictors said what top-k chose in {told['router_agreement']:.1%} of cases "
          f"(saying no each time: 87.5%), F1 {told['router_f1']:.2f}.")
    start = held_out.astype(np.uint8).tobytes().index(b"\ndef ") + 1
    tokens = held_out[start:start + 360]
    for number, taken in zip((2, 4), choices(model, tokens)):
        print(f"\nblock {number} takes {taken.float().mean():.1%} of this text:\n"
              + marked(tokens, taken.numpy(), shown), flush=True)
    compare_times([256, 512, 1024, 2048, 4096])
    print("\nHow far apart the forms are:")
    prefills = ("prefilled whole, in chunks, by token", compare_prefills(model, tokens[:64]))
    for what, error in [*compare_forms(), prefills]:
        print(f"    {what:40}{error:.0e}")


class RandomDepths(MixtureOfDepths):
    """The experiment's control: as many tokens, by chance."""

    def top_rows(self, scores):
        return super().top_rows(torch.rand_like(scores))

    def decide(self, x, scores, bar):
        return torch.rand_like(scores) < self.capacity


SIZES = [(64, 4), (128, 4), (128, 8), (192, 6)]                              # channels, blocks
VARIANTS = {"baseline": ("a", 1.0, MixtureOfDepths), "routed, 0.125": ("A", 0.125, MixtureOfDepths),
            "routed, 0.5": ("A", 0.5, MixtureOfDepths), "random, 0.125": ("A", 0.125, RandomDepths)}


def make_stack(C, blocks, variant):
    letter, capacity, routed = VARIANTS[variant]
    return Stack(C, "a" + "".join(letter if i % 2 else "a" for i in range(1, blocks)), capacity, routed)


def isoflop_budget(seconds, data, B, T):
    """Training FLOPs for each run, so that all of them together take so many seconds here."""
    each = []
    for C, blocks in SIZES:
        for variant in VARIANTS:
            model = make_stack(C, blocks, variant)
            train_stack(model, data, 2, B, T)                                # the first steps warm up
            begin = time.perf_counter()
            train_stack(model, data, 3, B, T)
            each.append((time.perf_counter() - begin) / (3 * 3 * B * model.flops(T)))
    return seconds / sum(each)


def isoflop(minutes, out, B=16, T=128):
    """Baseline, routed and random stacks of a few sizes, trained with equal FLOPs: loss against what they then cost.

    A line of `isoflop.jsonl` in `out` a run, so that a stopped experiment goes on with the next; at the end a table and
    `isoflop.png`.
    """
    data, held_out = library_text()
    out.mkdir(parents=True, exist_ok=True)
    log, shown = out / "isoflop.jsonl", sys.stderr.isatty()
    rows = read_rows(log)
    if rows:
        budget = rows[0]["training_flops"]
        print(f"{len(rows)} runs of {len(SIZES) * len(VARIANTS)} are in {log}: going on with their budget", flush=True)
    else:
        budget = isoflop_budget(60 * minutes * 0.85, data, B, T)
    print(f"{budget:.2e} training FLOPs a run, batches of {B} · {T} bytes\n{'C':>5}{'blocks':>7}  {'variant':15}"
          f"{'steps':>7}{'FLOPs a byte':>14}{'nats':>8}{'by top-k':>10}{'ms a byte':>11}", flush=True)
    for C, blocks in SIZES:
        for variant in VARIANTS:
            row = next((r for r in rows if (r["C"], r["blocks"], r["variant"]) == (C, blocks, variant)), None)
            if row is None:
                row = isoflop_run(C, blocks, variant, budget, data, held_out, B, T, shown)
                rows.append(row)
                with open(log, "a", encoding="utf-8") as f:
                    f.write(json.dumps(row) + "\n")
            print(row_text(row), flush=True)
    plot(rows, out / "isoflop.png")
    print(f"{out / 'isoflop.png'}")


def read_rows(log):
    """The finished runs of a log, whose last line may have been cut off."""
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    if len(whole) < len(lines):
        log.write_text("".join(whole), encoding="utf-8")
    return [json.loads(line) for line in whole]


def isoflop_run(C, blocks, variant, budget, data, held_out, B, T, shown):
    """One run of the experiment → its line."""
    model = make_stack(C, blocks, variant)
    steps = max(1, round(budget / (3 * B * model.flops(T))))
    say = lambda step, loss: shown and step % 10 == 0 and print(
        f"\r{C}, {blocks}, {variant}: step {step} of {steps}, {loss:.2f} nats   ", end="", file=sys.stderr, flush=True)
    begin = time.perf_counter()
    train_stack(model, data, steps, B, T, say=say)
    seconds = time.perf_counter() - begin
    print("\r" + " " * 70 + "\r" if shown else "", end="", file=sys.stderr, flush=True)
    causal, topk = validation(model, held_out, T)
    decode = min(generate(model, held_out[:T // 2].tolist(), T // 2)[1] for _ in range(3))
    told = agreement([block.counts for block in model.routed]) if model.routed else {}
    return dict(C=C, blocks=blocks, variant=variant, training_flops=budget, steps=steps, seconds=seconds,
                flops_per_token=model.flops(T) / T, val_loss=causal, topk_loss=topk, decode_seconds_per_token=decode,
                **told)


def row_text(row):
    return (f"{row['C']:>5}{row['blocks']:>7}  {row['variant']:15}{row['steps']:>7,}{row['flops_per_token']:>14,.0f}"
            f"{row['val_loss']:>8.3f}{row['topk_loss']:>10.3f}{1000 * row['decode_seconds_per_token']:>11.2f}")


def plot(rows, path):
    """Loss against FLOPs a byte of a forward pass, and against the time a generated byte takes."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axis, name, label, unit in ((axes[0], "flops_per_token", "MFLOP a byte, forward", 1e-6),
                                    (axes[1], "decode_seconds_per_token", "ms a generated byte", 1e3)):
        for variant in VARIANTS:
            some = sorted((row[name] * unit, row["val_loss"]) for row in rows if row["variant"] == variant)
            axis.plot(*zip(*some), "o-", label=variant)
        axis.set(xlabel=label, xscale="log")
    axes[0].set_ylabel("validation loss, nats a byte")
    axes[1].legend()
    figure.suptitle(f"Equal training FLOPs ({rows[0]['training_flops']:.1e})")
    beside = path.with_suffix(".new.png")
    figure.savefig(beside, dpi=120)
    pyplot.close(figure)
    os.replace(beside, path)


def main(argv=None):
    """Show what a router chooses on a text, what a routed block saves, and that the forms agree."""
    p = argparse.ArgumentParser(prog="mod.py", description=main.__doc__)
    p.add_argument("--isoflop", action="store_true", help="train routed stacks and plain ones with equal FLOPs")
    p.add_argument("--minutes", type=float, help="how long the experiment may take (10)")
    p.add_argument("--out", type=Path, help="the experiment's folder (out-isoflop); one that was stopped goes on there")
    args = p.parse_args(argv)
    try:
        if not args.isoflop and (args.minutes is not None or args.out is not None):
            raise ValueError("--minutes and --out belong to --isoflop")
        if args.minutes is not None and not 0 < args.minutes < math.inf:
            raise ValueError(f"--minutes is {args.minutes}: it must be above 0")
        if args.isoflop:
            isoflop(10.0 if args.minutes is None else args.minutes, args.out or Path("out-isoflop"))
        else:
            show()
    except (ValueError, OSError) as error:
        print(f"mod.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
