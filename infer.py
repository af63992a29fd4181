"""Serve a language model: a prompt in, text out, as fast as the machine's memory can be read.

    prefill   the prompt at once: matrix × matrix, bound by arithmetic   tokens/s ≤ FLOP/s / (2 · weights)
    decode    one token a step: matrix × vector, bound by memory         steps/s ≤ bytes/s / (bytes of weights + cache)

A decode step reads every weight once, whatever the batch: B sequences in step are nearly B times the tokens per second,
until arithmetic or the cache (which each sequence has for itself) is the bound. Every figure printed here stands beside
its bound.

    sampling  token = argmax(logits / temperature + g),  g = −log(−log u), u uniform in (0, 1): Gumbel-max, the same
              distribution as softmax. u is a hash of (seed, choice, position, token) and of nothing else, so a seeded
              text does not depend on what else is in the batch, on the order of requests, or on the machine's load.

`python infer.py "def fibonacci(n):"` streams from out/; `--model DIR` takes any folder of ours or a Hugging Face Qwen3,
Qwen2, Llama or Mistral; `--score FILE`, `--bench`; without a prompt, on a terminal, it asks for one.
"""
import argparse
import codecs
import json
import math
import os
import secrets
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import train
from train import Parser, UserError, load, measure, positive


# --- 1. Sampler -------------------------------------------------------------------------------------------------------

def _mix(x):
    """SplitMix64's finaliser (Steele, Lea & Flood 2014): int64 [...] → int64, every bit depends on every bit."""
    x = (x ^ ((x >> 30) & 0x3_FFFF_FFFF)) * -0x40A7_B892_E31B_1A47           # · BF58476D1CE4E5B9, in two's complement
    x = (x ^ ((x >> 27) & 0x1F_FFFF_FFFF)) * -0x6B2F_B644_ECCE_EE15          # · 94D049BB133111EB
    return x ^ ((x >> 31) & 0x1_FFFF_FFFF)


GOLDEN = -0x61C8_8646_80B5_83EB                                              # 9E3779B97F4A7C15: 2⁶⁴ / the golden ratio


def gumbel(seeds, choices, positions, V):
    """Noise keyed by (seed, choice, position, token): three int64 [R] → float32 [R, V]. A counter-based generator."""
    key = seeds
    for part in (choices, positions):
        key = _mix((key + GOLDEN) ^ _mix(part + GOLDEN))
    token = torch.arange(1, V + 1, device=seeds.device)
    bits = _mix(_mix(key)[:, None] + token * GOLDEN)                         # [R, V]
    u = (((bits >> 40) & 0xFF_FFFF).double() + 0.5) * 2.0 ** -24             # never 0 or 1
    return -torch.log(-torch.log(u)).float()


@dataclass
class Sampling:
    """How to choose a request's tokens. temperature 0 or top_p 0 is greedy; top_k 0, top_p 1, min_p 0 are off."""
    max_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: list = field(default_factory=list)
    n: int = 1
    ignore_eos: bool = False

    def check(self):
        """ValueError names the argument that is out of range."""
        def need(ok, name, what):
            if not ok:
                raise ValueError(f"{name} is {getattr(self, name)!r}: it must be {what}")
        number = lambda x: isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)
        whole = lambda x: isinstance(x, int) and not isinstance(x, bool)
        need(self.max_tokens is None or whole(self.max_tokens) and self.max_tokens >= 1,
             "max_tokens", "a whole number from 1")
        need(number(self.temperature) and self.temperature >= 0, "temperature", "a number from 0 (greedy) up")
        need(whole(self.top_k) and self.top_k >= 0, "top_k", "a whole number from 0 (off) up")
        need(number(self.top_p) and 0 <= self.top_p <= 1, "top_p", "from 0 (greedy) to 1 (off)")
        need(number(self.min_p) and 0 <= self.min_p <= 1, "min_p", "from 0 (off) to 1")
        need(number(self.repetition_penalty) and self.repetition_penalty > 0,
             "repetition_penalty", "a number above 0 (1: off)")
        need(self.seed is None or whole(self.seed), "seed", "a whole number")
        need(whole(self.n) and self.n >= 1, "n", "a whole number from 1")
        self.stop = [self.stop] if isinstance(self.stop, str) else list(self.stop or [])
        need(all(isinstance(s, str) and s for s in self.stop), "stop", "a string or a list of strings, none empty")


def sample(logits, requests):
    """logits [R, V] and the R requests they belong to → token ids [R].

    In this order: repetition penalty, temperature, min-p, top-k, top-p, Gumbel-max. ValueError if a row is not finite.
    """
    logits = logits.float()
    R, V = logits.shape
    device = logits.device
    column = lambda name, dtype=torch.float32: torch.tensor([getattr(r.sampling, name) for r in requests],
                                                            dtype=dtype, device=device)[:, None]
    if any(r.sampling.repetition_penalty != 1 for r in requests):
        seen = torch.zeros(R, V, dtype=torch.bool, device=device)
        for row, r in zip(seen, requests):
            row[torch.tensor(r.prompt + r.tokens, device=device)] = True
        penalty = column("repetition_penalty")                               # makes a token rarer, whatever its sign
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if not torch.isfinite(logits.amax(-1)).all():
        raise ValueError("the model's logits are not finite: its weights are broken, or --dtype float32 is needed")
    greedy = torch.tensor([r.sampling.temperature == 0 or r.sampling.top_p == 0 for r in requests], device=device)
    if greedy.all():
        return logits.argmax(-1)
    temperature = column("temperature")
    scores = logits / torch.where(greedy[:, None], 1, temperature)
    if any(r.sampling.min_p > 0 for r in requests):                          # at least min_p of the likeliest's
        floor = scores.amax(-1, keepdim=True) + column("min_p").log()
        scores = scores.masked_fill(scores < floor, -torch.inf)
    if any(0 < r.sampling.top_k < V or r.sampling.top_p < 1 for r in requests):
        ranked, order = scores.sort(dim=-1, descending=True, stable=True)    # of equals the lower id first
        rank = torch.arange(V, device=device)
        k = column("top_k", torch.int64)
        ranked = ranked.masked_fill((rank >= k) & (k > 0), -torch.inf)
        before = ranked.softmax(-1, dtype=torch.float64).cumsum(-1).roll(1, -1)  # probability of all likelier tokens
        before[:, 0] = 0
        p = column("top_p", torch.float64)
        ranked = ranked.masked_fill((before >= p) & (p < 1) & (rank > 0), -torch.inf)  # the smallest set that reaches p
        scores = torch.empty_like(scores).scatter_(1, order, ranked)
    key = lambda values: torch.tensor(values, dtype=torch.int64, device=device)
    noise = gumbel(key([_signed(r.seed) for r in requests]), key([r.choice for r in requests]),
                   key([r.position for r in requests]), V)
    return torch.where(greedy, logits.argmax(-1), (scores + noise).argmax(-1))


def _signed(seed):
    """Any whole number as an int64."""
    seed &= 2 ** 64 - 1
    return seed - 2 ** 64 if seed >= 2 ** 63 else seed


# --- 2. Text: from tokens to what may be shown ------------------------------------------------------------------------

class Text:
    """The text of a growing token list. Bytes of an unfinished character wait; a stop string cuts before it begins."""

    def __init__(self, tokenizer, stop=()):
        self.tokenizer, self.stop = tokenizer, stop
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.text, self.shown, self.stopped = "", 0, False

    def push(self, token):
        """Add a token's bytes → whether a stop string is now in the text (it is cut off)."""
        return self._add(self.decoder.decode(self.tokenizer.token_bytes(token)))

    def close(self):
        """No token follows: bytes that are still no character become U+FFFD."""
        return self.stopped or self._add(self.decoder.decode(b"", final=True))

    def _add(self, piece):
        start = len(self.text)
        self.text += piece
        hits = [i for s in self.stop if (i := self.text.find(s, max(0, start - len(s) + 1))) >= 0]
        if hits:
            self.text, self.stopped = self.text[:min(hits)], True
        return self.stopped

    def news(self, closed):
        """The text not yet shown, without a tail that may still become a stop string."""
        end = len(self.text)
        if not closed:
            for s in self.stop:
                for k in range(min(len(s) - 1, len(self.text)), 0, -1):
                    if self.text.endswith(s[:k]):
                        end = min(end, len(self.text) - k)
                        break
        piece, self.shown = self.text[self.shown:end], max(self.shown, end)
        return piece


# --- 3. Engine: requests, a runner over them, LLM ---------------------------------------------------------------------

@dataclass
class Request:
    """One text in the making: choice `choice` of a prompt."""
    prompt: list
    sampling: Sampling
    seed: int
    choice: int
    limit: int                                                               # new tokens at most
    out: Text
    tokens: list = field(default_factory=list)
    finish_reason: str | None = None

    @property
    def position(self):
        """Where the next token will stand."""
        return len(self.prompt) + len(self.tokens)

    def accept(self, token, eos_ids):
        """Take the next token; sets finish_reason where it ends the text. The earliest event wins."""
        self.tokens.append(token)
        if token in eos_ids and not self.sampling.ignore_eos:
            self.finish_reason = "stop"
        elif self.out.push(token):
            self.finish_reason = "stop"
        elif len(self.tokens) == self.limit:
            self.finish_reason = "length"
        if self.finish_reason and self.out.close():
            self.finish_reason = "stop"

    @property
    def text(self):
        return self.out.text

    @property
    def prompt_tokens(self):
        return len(self.prompt)


class FewRows(torch.nn.Linear):
    """A linear layer that is quick for few rows too, where matrix libraries are made for many: decode is bound by it.

    On a CPU a second copy of the weights may be packed in oneDNN's own order (`quicken` measures whether that pays).
    One row in a compiled graph is a product and a sum, which the compiler turns into one pass over the weights.
    """
    packed = None

    def pack(self):
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), 1)

    def forward(self, x):
        rows = x.numel() // x.shape[-1]
        if torch.compiler.is_compiling():
            if rows == 1 and x.device.type == "cpu":
                y = (x.reshape(-1) * self.weight).sum(-1).view(*x.shape[:-1], -1)
                return y if self.bias is None else y + self.bias
        elif self.packed is not None and rows <= 32:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)


@torch.no_grad()
def quicken(model):
    """Turn a model's linear layers into `FewRows`, packed where one row is faster for it on this machine (and where its
    memory holds a second copy of the weights with ease).
    """
    model.requires_grad_(False)
    layers = [module for module in model.modules() if type(module) is torch.nn.Linear]
    for layer in layers:
        layer.__class__ = FewRows
    head = model.head
    plain = head.weight.device.type == "cpu" and head.weight.dtype == torch.float32
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 2 ** 33
    room = 4 * sum(w.numel() for w in model.parameters()) < memory / 4
    if not plain or not room or not torch.backends.mkldnn.is_available():
        return model
    head.pack()
    x, packed, times = torch.ones(1, head.in_features), head.packed, {True: [], False: []}
    for which in (True, False) * 3:
        head.packed = packed if which else None
        t = time.perf_counter()
        head(x)
        times[which].append(time.perf_counter() - t)
    head.packed = None
    if min(times[True]) < min(times[False]):
        for layer in layers:
            layer.pack()
    return model


class Slab:
    """A `KVCache` of fixed shape, for a compiled step: the position is a tensor, the mask says how far it is filled."""

    def __init__(self, k, v, position):
        self.k, self.v, self.position = k, v, position

    def attend(self, q, k, v, attention, window=None):
        self.k.index_copy_(2, self.position, k)
        self.v.index_copy_(2, self.position, v)
        at = torch.arange(self.k.shape[2], device=k.device)
        seen = at <= self.position if window is None else (at <= self.position) & (at > self.position - window)
        (B, H, _, D), G = q.shape, k.shape[1]
        y = F.scaled_dot_product_attention(q.reshape(B, G, H // G, D), self.k, self.v,
                                           attn_mask=seen.expand(H // G, -1))
        return y.reshape(B, H, 1, D)


class Step(torch.nn.Module):
    """One decode step as a module of its own, so that the compiler may take the weights for constants and pack them."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens, position, slabs):
        """tokens [B, 1], position [1], slabs [(k, v)] of `KVCache` → logits [B, V]."""
        states = [Slab(k, v, position) for k, v in slabs]
        return self.model.head(self.model.hidden(tokens, position, states)[:, -1])


class Runner:
    """The model and the states of sequences in step: prefill a prompt in chunks, then one token for each row a step.

    compiled: decode steps run as one graph that torch.compile makes for this shape; it takes most of a minute, so only
    benchmarks and servers ask for it.
    """

    CHUNK = 1024

    def __init__(self, model, B, capacity, compiled=False):
        self.model, self.states, self.position = model, model.new_states(B, capacity), 0
        self.step = None
        if compiled:
            try:
                self.step = self._compile(B)
            except Exception as error:                                       # a broken compiler, a shape without kernel
                print(f"torch.compile does not work here ({type(error).__name__}); going on without it",
                      file=sys.stderr)

    @torch.no_grad()
    def _compile(self, B):
        """A decode step for B rows as one compiled graph. Compiled at once: the settings count while it is traced."""
        import torch._inductor.config as inductor
        device = self.model.embed.weight.device
        packed = B > 1 and device.type == "cpu"                              # several rows: weights laid out for them
        settings = dict(freezing=True, max_autotune=True, max_autotune_gemm_backends="CPP") if packed else {}
        step = torch.compile(Step(self.model), dynamic=False, fullgraph=True)
        with inductor.patch(**settings):
            step(torch.zeros(B, 1, dtype=torch.int64, device=device),
                 torch.zeros(1, dtype=torch.int64, device=device), self.slabs())
        return step

    def slabs(self):
        return [(state.k, state.v) for state in self.states]

    @torch.no_grad()
    def forward(self, tokens):
        """tokens [B, T], the next T of each row → logits after the last [B, V]."""
        T = tokens.shape[1]
        if T == 1 and self.step is not None:
            logits = self.step(tokens, torch.tensor([self.position], device=tokens.device), self.slabs())
            self.position += 1
            for state in self.states:
                state.length = self.position
            return logits
        for chunk in tokens.split(self.CHUNK, dim=1):
            positions = torch.arange(self.position, self.position + chunk.shape[1], device=tokens.device)
            hidden = self.model.hidden(chunk, positions, self.states)
            self.position += chunk.shape[1]
        return self.model.head(hidden[:, -1])

    def restart(self):
        """Forget all tokens, keep the memory and what was compiled."""
        self.position = 0
        for state in self.states:
            state.length = 0

    def repeat(self, n):
        """Turn the one row of the states into n alike: the choices of a prompt share its prefill."""
        for state in self.states:
            state.repeat(n)


class LLM:
    """A model folder, ready to generate. `LLM(DIR).generate("…")`; `stream` for text as it is made."""

    def __init__(self, folder, device=None, dtype=None, compile=False):
        self.folder, self.compile = Path(folder), compile
        self.model, self.tokenizer = load(folder, device, dtype)
        self.weights = (sum(w.numel() for w in self.model.parameters())
                        - (0 if self.model.config.tied else self.model.embed.weight.numel()))
        quicken(self.model)
        self.context = self.model.config.context
        self.eos_ids = set(self.tokenizer.eos_ids)
        self.no_text = None                                                  # ids that no token has: never sampled
        if self.tokenizer.vocab_size < self.model.config.vocab:
            ids = torch.arange(self.model.config.vocab, device=self.model.embed.weight.device)
            self.no_text = ids >= self.tokenizer.vocab_size

    def requests(self, prompt, sampling, index=0):
        """A prompt (text or token ids) and its settings, checked → n requests. ValueError names what does not fit."""
        try:
            sampling.check()
            ids = [int(i) for i in prompt] if not isinstance(prompt, str) else (
                self.tokenizer.start_ids + self.tokenizer.encode(prompt))
            if not ids:
                raise ValueError("the prompt is empty: give at least one token")
            V = self.model.config.vocab
            if bad := [i for i in ids if not 0 <= i < V]:
                raise ValueError(f"token {bad[0]} is outside 0 … {V - 1}")
            room = self.context - len(ids)
            if room < (sampling.max_tokens or 1):
                raise ValueError(f"prompt ({len(ids)} tokens) and max_tokens ({sampling.max_tokens or 1}) "
                                 f"exceed the context of {self.context}")
        except ValueError as error:
            raise ValueError(f"prompt {index}: {error}") from None
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        return [Request(ids, sampling, seed, i, sampling.max_tokens or min(room, 128),
                        Text(self.tokenizer, sampling.stop)) for i in range(sampling.n)]

    def run(self, requests):
        """Generate for requests of one and the same prompt, yielding after each token: the state is in the requests."""
        device = self.model.embed.weight.device
        prompt = requests[0].prompt
        runner = Runner(self.model, 1, len(prompt) + requests[0].limit)
        logits = runner.forward(torch.tensor([prompt], device=device))
        if len(requests) > 1:
            runner.repeat(len(requests))
            logits = logits.repeat(len(requests), 1)
        while True:
            if self.no_text is not None:
                logits = logits.masked_fill(self.no_text, -torch.inf)
            tokens = sample(logits, requests)
            for request, token in zip(requests, tokens.tolist()):
                if request.finish_reason is None:
                    request.accept(token, self.eos_ids)
            yield
            if all(r.finish_reason for r in requests):
                return
            logits = runner.forward(tokens[:, None])

    def stream(self, prompt, **sampling):
        """Yield pieces of text as they are certain; joined they are what `generate` returns."""
        (request,) = self.requests(prompt, Sampling(**sampling))
        for _ in self.run([request]):
            if piece := request.out.news(closed=request.finish_reason is not None):
                yield piece

    def generate(self, prompts, **sampling):
        """prompts: a str, a list of token ids, or a list of those → a list of finished requests, one a prompt
        (a list of n inside where n > 1), with .text, .tokens, .finish_reason, .prompt_tokens.

        Settings: see `Sampling`; each one value or a list of one a prompt (a list of strings is one `stop`). All are
        checked before any runs: ValueError names the prompt and the argument.
        """
        if isinstance(prompts, str) or prompts and all(isinstance(i, int) for i in prompts):
            prompts = [prompts]
        waiting = []
        for i, prompt in enumerate(prompts):
            own = {}
            for name, value in sampling.items():
                several = (isinstance(value, (list, tuple))
                           and (name != "stop" or any(not isinstance(v, str) for v in value)))
                if several and len(value) != len(prompts):
                    raise ValueError(f"{name} has {len(value)} values for {len(prompts)} prompts")
                own[name] = value[i] if several else value
            waiting.append(self.requests(prompt, Sampling(**own), i))
        for requests in waiting:
            for _ in self.run(requests):
                pass
        return [requests if len(requests) > 1 else requests[0] for requests in waiting]


def bound(llm, machine, batch, context):
    """Decode tokens/s that memory allows: each step reads all weights that multiply, and each row's keys and values."""
    c, size = llm.model.config, llm.model.embed.weight.element_size()
    cache = 2 * len(llm.model.blocks) * c.kv_heads * c.head_dim * context
    return batch * machine.bandwidth / (size * (llm.weights + batch * cache))


# --- 4. Chat templates and scores -------------------------------------------------------------------------------------

def chat_template(folder):
    """A folder's chat template (chat_template.jinja or tokenizer_config.json) → (text, its variables), or None."""
    folder = Path(folder)
    path = folder / "tokenizer_config.json"
    about = train.read_json(path) if path.exists() else {}
    template = about.get("chat_template")
    if isinstance(template, list):
        template = next((t["template"] for t in template if t.get("name") == "default"), None)
    if (folder / "chat_template.jinja").exists():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    name = lambda t: t["content"] if isinstance(t, dict) else t
    return template and (template, {k: name(about[k]) for k in ("bos_token", "eos_token") if about.get(k)})


BREAK = "\ufdd0"                                                             # a noncharacter, put into forged markers


def chat_ids(tokenizer, template, messages):
    """messages [{"role", "content"}] through a template of `chat_template` → token ids, ready for the reply.

    Only the template's own text gives control tokens: one that a message spells out is broken before rendering and
    mended after the cut, so it reaches the model as plain text. UserError where the template does not render.
    """
    import jinja2.sandbox

    def refuse(message):
        raise jinja2.TemplateError(message)
    source, variables = template
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals.update(raise_exception=refuse, strftime_now=time.strftime)
    plain = lambda s: [s] if s else []
    markers = sorted(tokenizer.special, key=len, reverse=True)

    def disarm(text):
        text = train.mend(text).replace(BREAK, "\ufffd")
        for marker in markers:
            text = text.replace(marker, marker[0] + BREAK + marker[1:])
        return text
    messages = [dict(m, content=disarm(m["content"])) for m in messages]
    try:
        text = environment.from_string(source).render(messages=messages, add_generation_prompt=True, **variables)
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template does not render: {error}") from None
    ids, rest = [], text
    while rest:
        at, marker = min(((i, m) for m in markers if (i := rest.find(m)) >= 0),
                         key=lambda x: (x[0], -len(x[1])), default=(len(rest), ""))
        for part in plain(rest[:at].replace(BREAK, "")):
            ids += tokenizer.encode(part)
        ids += [tokenizer.special[marker]] if marker else []
        rest = rest[at + len(marker):]
    return ids


@torch.inference_mode()
def score(llm, text, overlap=0.5):
    """How well a model predicts a text → dict(tokens, bytes, nats_per_token, bits_per_byte).

    A text longer than the context is read in windows that overlap by half: each token is scored once, with at least
    half a context before it. The folder's own start token is context, not counted; without one the first token is not.
    """
    start = llm.tokenizer.start_ids
    ids = start + llm.tokenizer.encode(text)
    first = max(1, len(start))
    if len(ids) <= first:
        raise UserError("the text to score has fewer than two tokens")
    lengths = [len(llm.tokenizer.token_bytes(i)) for i in ids]
    context, stride = llm.context, max(1, int(llm.context * (1 - overlap)))
    device, done, nats = llm.model.embed.weight.device, first, 0.0
    while done < len(ids):
        begin = max(0, min(done - 1, done - context + stride) if done > first else 0)
        window = torch.tensor(ids[begin:begin + context + 1], device=device)
        fresh = begin + len(window) - done                                   # tokens not scored before
        x, y = window[:-1], window[1:].clone()
        y[:len(y) - fresh] = -100
        hidden = llm.model.hidden(x[None])[0]
        nats += train.linear_cross_entropy(hidden, llm.model.head.weight, y).item() * fresh
        done += fresh
    count, size = len(ids) - first, sum(lengths[first:])
    return dict(tokens=count, bytes=size, nats_per_token=nats / count, bits_per_byte=nats / math.log(2) / max(size, 1))


def bench(llm, machine, batch, prompt_tokens, new_tokens):
    """Time prefill and decode on random tokens, the median of three → the --bench record."""
    rng = np.random.default_rng(0)
    tokens = torch.tensor(rng.integers(0, llm.tokenizer.vocab_size, (batch, prompt_tokens)),
                          device=llm.model.embed.weight.device)
    prefill, decode = [], []
    runner = Runner(llm.model, batch, prompt_tokens + new_tokens, compiled=llm.compile)
    for _ in range(4):                                                       # the first compiles and warms up
        runner.restart()
        t = time.perf_counter()
        token = runner.forward(tokens).argmax(-1)
        token[0].item()                                                      # waits for a GPU
        prefill.append(time.perf_counter() - t)
        t = time.perf_counter()
        for _ in range(new_tokens):
            token = runner.forward(token[:, None]).argmax(-1)
        token[0].item()
        decode.append(time.perf_counter() - t)
    limit = bound(llm, machine, batch, prompt_tokens + new_tokens / 2)
    median = lambda times: sorted(times[1:])[1]
    speed = batch * new_tokens / median(decode)
    return dict(batch=batch, prompt_tokens=prompt_tokens, new_tokens=new_tokens, quantize=None,
                prefill_tokens_per_second=batch * prompt_tokens / median(prefill), decode_tokens_per_second=speed,
                bound_tokens_per_second=limit, bound_share=speed / limit)


# --- 5. The command line ----------------------------------------------------------------------------------------------

def arguments():
    """The command line, as a parser."""
    p = Parser(prog="infer.py", description="Generate text with a model folder of train.py or of Hugging Face.")
    p.add_argument("prompt", nargs="?",
                   help="the text to continue (standard input if it is piped; on a terminal: a prompt loop)")
    p.add_argument("--model", default="out", help="the model's folder (%(default)s)")
    p.add_argument("--max-tokens", type=int, help="new tokens at most (128, or what the context leaves)")
    p.add_argument("--temperature", type=float, default=train.TEMPERATURE, help="0 is greedy (%(default)s)")
    p.add_argument("--top-k", type=int, default=0, help="only the k likeliest tokens; 0: all")
    p.add_argument("--top-p", type=float, default=1.0,
                   help="the smallest set of likeliest tokens that reaches p; 1: all")
    p.add_argument("--min-p", type=float, default=train.MIN_P,
                   help="only tokens at least this share as likely as the likeliest (%(default)s)")
    p.add_argument("--repetition-penalty", type=float, default=1.0,
                   help="above 1, tokens that are there already get rarer")
    p.add_argument("--seed", type=int, help="the same text again (a new one each time)")
    p.add_argument("--stop", action="append", help="end before this text; may be given several times")
    p.add_argument("--n", type=int, default=1, help="that many continuations")
    p.add_argument("--ignore-eos", action="store_true", help="go on past the end token")
    p.add_argument("--device", help="cpu, cuda, mps (the best there is)")
    p.add_argument("--dtype", choices=["float32", "bfloat16", "float16"],
                   help="of weights and cache (float32 on a CPU, else the folder's)")
    p.add_argument("--json", action="store_true", help="one JSON object on standard output, all else on standard error")
    p.add_argument("--score", metavar="FILE", help="how well the model predicts this text: bits per byte")
    p.add_argument("--bench", action="store_true", help="time prefill and decode")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction,
                   help="compile the decode step, for --bench (where a compiler is there)")
    p.add_argument("--batch", type=positive(int), default=1, help="sequences at once, for --bench")
    p.add_argument("--prompt-tokens", type=positive(int), default=32, help="for --bench")
    p.add_argument("--new-tokens", type=positive(int), default=64, help="for --bench")
    return p


def show(text, end=""):
    """Print to standard output at once; a code page that lacks a character gets a replacement, never an end."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, errors="replace").decode(encoding), end=end, flush=True)


def complete(llm, machine, prompt, sampling, as_json):
    """Generate for one prompt, streaming, then say how fast it was."""
    requests = llm.requests(prompt, sampling)
    t, first, last = time.perf_counter(), None, None
    for _ in llm.run(requests):
        last = time.perf_counter()
        first = first or last
        if len(requests) == 1 and not as_json:
            show(requests[0].out.news(closed=requests[0].finish_reason is not None))
    generated, prompt_tokens = sum(len(r.tokens) for r in requests), len(requests[0].prompt)
    steps = max(len(r.tokens) for r in requests) - 1
    speed = dict(prefill=prompt_tokens / (first - t), decode=len(requests) * steps / (last - first) if steps else 0.0)
    if as_json:
        for r in requests:
            show(json.dumps(dict(prompt=prompt if isinstance(prompt, str) else llm.tokenizer.decode(prompt),
                                 text=r.text, tokens=r.tokens, finish_reason=r.finish_reason,
                                 prompt_tokens=prompt_tokens, generated_tokens=len(r.tokens),
                                 prefill_tokens_per_second=speed["prefill"],
                                 decode_tokens_per_second=speed["decode"])), end="\n")
    elif len(requests) > 1:
        for i, r in enumerate(requests):
            print(f"--- {i + 1} of {len(requests)}", file=sys.stderr, flush=True)
            show(r.text, end="\n")
    else:
        show("", end="\n")
    line = f"prompt {prompt_tokens} tokens at {speed['prefill']:,.0f}/s"
    if steps:
        limit = bound(llm, machine(), len(requests), prompt_tokens + steps / 2)
        line += (f" · generated {generated} at {speed['decode']:,.0f}/s, "
                 f"{speed['decode'] / limit:.0%} of what the memory allows")
    print(line, file=sys.stderr)
    return requests


def prompt_loop(llm, machine, sampling):
    """Ask for prompts until the input ends; through the folder's chat template where it has one."""
    template, messages = chat_template(llm.folder), []
    print("a prompt and Enter; Ctrl-D ends", file=sys.stderr)
    while True:
        try:
            text = input("> ")
        except EOFError:
            print(file=sys.stderr)
            return
        if not text.strip():
            continue
        try:
            if template:
                messages.append(dict(role="user", content=text))
                (request, *_) = complete(llm, machine, chat_ids(llm.tokenizer, template, messages), sampling, False)
                messages.append(dict(role="assistant", content=request.text))
            else:
                complete(llm, machine, text, sampling, False)
        except ValueError as error:
            print(error, file=sys.stderr)
            messages.clear()                                                 # a chat beyond the context begins anew


def once(make):
    """A function that makes its value when it is first called for, and keeps it."""
    kept = []
    return lambda: kept[0] if kept else kept.append(make()) or kept[0]


def main(argv=None):
    """Generate, score or time by command-line flags → exit code."""
    try:
        args = arguments().parse_args(argv)
        sampling = Sampling(**{k: getattr(args, k) for k in ("max_tokens", "temperature", "top_k", "top_p", "min_p",
                                                             "repetition_penalty", "seed", "stop", "n", "ignore_eos")})
        sampling.check()
        if args.bench and args.score or (args.bench or args.score) and args.prompt is not None:
            raise UserError("a prompt, --score and --bench: give one of them")
        text = train.read_text(args.score) if args.score else None
        llm = LLM(args.model, args.device, args.dtype,
                  compile=args.bench and args.compile is not False and train.compiler_there())
        machine = once(lambda: measure(llm.model.embed.weight.device.type, 0.3))
        if args.score:
            result = score(llm, text)
            show(json.dumps(result) if args.json else
                 f"{result['bits_per_byte']:.4f} bits per byte, {result['nats_per_token']:.4f} nats per token, "
                 f"over {result['tokens']:,} tokens ({result['bytes']:,} bytes)", end="\n")
        elif args.bench:
            if args.prompt_tokens + args.new_tokens > llm.context:
                raise UserError(f"--prompt-tokens {args.prompt_tokens} and --new-tokens {args.new_tokens} "
                                f"exceed the context of {llm.context}")
            r = bench(llm, machine(), args.batch, args.prompt_tokens, args.new_tokens)
            show(json.dumps(r) if args.json else
                 f"batch {r['batch']}: prefill {r['prefill_tokens_per_second']:,.0f} tokens/s, "
                 f"decode {r['decode_tokens_per_second']:,.1f} tokens/s, "
                 f"{r['bound_share']:.0%} of the memory bound ({r['bound_tokens_per_second']:,.1f})", end="\n")
        elif args.prompt is None and sys.stdin.isatty():
            prompt_loop(llm, machine, sampling)
        else:
            prompt = args.prompt if args.prompt is not None else sys.stdin.read()
            complete(llm, machine, prompt, sampling, args.json)
        return 0
    except (UserError, ValueError) as error:
        print(f"infer.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
