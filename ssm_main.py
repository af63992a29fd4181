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


WIDTH, LENGTHS = 512, (512, 2048, 8192, 16384)


def heads_of_each(T, heads=8, P=64):
    """The four ways to mix T tokens of 512 channels → {name: (op, its inputs)}."""
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


def seconds_of(op, inputs, tries):
    """Best of `tries`, forward and backward."""
    inputs, times = [x.detach().requires_grad_() for x in inputs], []
    for _ in range(tries):
        began = time.perf_counter()
        torch.autograd.grad(op(*inputs).sum(), inputs)
        times.append(time.perf_counter() - began)
    return min(times)


def show_times():
    """Forward and backward over lengths, and from where the state is ahead of attention."""
    print(f"\nforward and backward, ms, {WIDTH} channels, float32, {torch.get_num_threads()} threads "
          "(attention: torch's)")
    names, times = list(heads_of_each(1)), {}
    print(f"{'T':>9}" + "".join(f"{name:>14}" for name in names))
    for T in LENGTHS:
        for name, (op, inputs) in heads_of_each(T).items():
            times[name, T] = seconds_of(op, inputs, 3 if T < 8192 else 1)
        print(f"{T:>9,}" + "".join(f"{1000 * times[name, T]:>14,.1f}" for name in names), flush=True)
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
    print("\none more token, µs (a sequence alone), and what is kept for it")
    heads, P = 8, 64
    x, k, one = torch.randn(1, WIDTH), F.normalize(torch.randn(1, heads, P), dim=-1), torch.rand(1, heads)
    ways = {"Mamba": (lambda h: selective_scan_step(x, x.exp(), -torch.ones(WIDTH, 16), x[:, :16], x[:, :16], state=h),
                      torch.zeros(1, WIDTH, 16)),
            "Mamba-2": (lambda h: ssd_step(k, one, -torch.ones(heads), k[:, :1], k[:, :1], state=h),
                        torch.zeros(1, heads, P, P)),
            "gated delta": (lambda h: gated_delta_step(k, k, k, -one, one, h), torch.zeros(1, heads, P, P))}

    def micros(work):
        times = []
        for _ in range(60):
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
        return 1e6 * sorted(times)[20]
    keys = torch.randn(2, 1, heads, 65536, P)
    for context in (1024, 65536):
        cells = {"attention": (micros(lambda: F.scaled_dot_product_attention(k[:, :, None], *keys[:, :, :, :context])),
                               8 * heads * context * P)}
        for name, (step, h) in ways.items():
            box = [h]

            def go():
                box[0] = step(box[0])[1]
            cells[name] = micros(go), h.nbytes
        print(f"{context:>9,}" + "".join(f"   {name} {t:,.0f} µs, {size / 2 ** 20:,.2f} MB"
                                         for name, (t, size) in cells.items()), flush=True)


# --- 11. The probe: what a state of fixed size can't remember ---------------------------------------------------------

def recall(rng, B, T, pairs):
    """Multi-query associative recall (arXiv 2312.04927): pairs of a key and its value, then the keys again in any
    order, each to be followed by its value. → tokens, targets [B, T] (−1: not asked).
    """
    tokens, targets = np.zeros((B, T), int), np.full((B, T), -1)
    for b in range(B):
        keys, values = rng.permutation(64)[:pairs] + 1, rng.integers(65, 129, pairs)
        tokens[b, 0:2 * pairs:2], tokens[b, 1:2 * pairs:2] = keys, values
        at = 2 * pairs + np.arange(pairs) * 2
        order = rng.permutation(pairs)
        tokens[b, at], targets[b, at] = keys[order], values[order]
        tokens[b, at + 1] = values[order]
    return tokens, targets


def selective_copying(rng, B, T, count):
    """Words among blanks, then as many places to write them in order (arXiv 2312.00752)."""
    tokens, targets = np.zeros((B, T), int), np.full((B, T), -1)
    for b in range(B):
        words = rng.integers(1, 17, count)
        tokens[b, np.sort(rng.permutation(T - count)[:count])] = words
        tokens[b, T - count:], targets[b, T - count:] = 17, words
    return tokens, targets


def induction(rng, B, T, _):
    """A marked word somewhere, and at the end its mark again: what stood after it (arXiv 2209.11895)."""
    tokens, targets = rng.integers(1, 17, (B, T)), np.full((B, T), -1)
    at = rng.integers(0, T - 3, B)
    tokens[np.arange(B), at], tokens[:, -1] = 17, 17
    targets[:, -1] = tokens[np.arange(B), at + 1]
    return tokens, targets


def parity(rng, B, T, _):
    """Whether the ones so far are odd, at each place: a state of one bit, if it can flip (arXiv 2207.02098)."""
    tokens = rng.integers(1, 3, (B, T))
    return tokens, np.cumsum(tokens - 1, 1) % 2


TASKS = {f"recall, {n} pairs": (recall, 4 * n, n, 129) for n in (4, 16, 32, 64)} | {
    "selective copying": (selective_copying, 128, 16, 18), "induction": (induction, 128, 0, 18),
    "parity": (parity, 64, 0, 3)}
STACKS = {"attention": "aa", "Mamba-2": "ss", "gated delta": "dd", "hybrid": "sa"}
PROBE_WIDTH, PROBE_STATE = 64, 16


class Probed(nn.Module):
    """Two layers of one kind or two, each with an MLP, at nearly equal parameters; a state of 2 · 64 · 16 numbers."""

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
    """→ the share of answers that are right on fresh rows, and steps taken. Ends early where all are."""
    make, T, n, V = TASKS[task]
    torch.manual_seed(seed)
    rng, model, began, step, right = np.random.default_rng(seed), Probed(letters, V), time.perf_counter(), 0, 0.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)

    def rows(B):
        return [torch.from_numpy(a) for a in make(rng, B, T, n)]
    while (done := (time.perf_counter() - began) / seconds) < 1 and right < 0.999:
        x, y = rows(64)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 50) * (1 - 0.9 * done)
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=-1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 50 == 0:
            with torch.no_grad():
                x, y = rows(128)
                right = (model(x).argmax(-1) == y)[y >= 0].float().mean().item()
            say(done, loss.item(), right)
    with torch.no_grad():
        x, y = rows(256)
        return (model(x).argmax(-1) == y)[y >= 0].float().mean().item(), step


def probe(minutes, out):
    """Each task with each stack → a table and probe.png. What is done lies in probe.jsonl and is not done again."""
    out.mkdir(parents=True, exist_ok=True)
    notes = out / "probe.jsonl"
    done = [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []
    known = {(row["task"], row["stack"]): row for row in done}
    seconds = 60 * minutes / (len(TASKS) * len(STACKS))
    sizes = {name: sum(w.numel() for w in Probed(letters, 129).parameters()) for name, letters in STACKS.items()}
    print(f"two layers, {PROBE_WIDTH} wide; a recurrent layer's state holds {PROBE_WIDTH * PROBE_STATE} numbers; "
          f"up to {seconds:.0f} s each; right answers on fresh rows\n"
          f"{'':20}" + "".join(f"{name:>14}" for name in STACKS)
          + f"\n{'parameters':20}" + "".join(f"{size:>14,}" for size in sizes.values()), flush=True)
    for task in TASKS:
        print(f"{task:20}", end="", flush=True)
        for name, letters in STACKS.items():
            if (task, name) not in known:
                say = lambda p, loss, right: sys.stderr.isatty() and print(
                    f"\r{task}, {name}: {p:4.0%}, loss {loss:.3f}, right {right:.1%}   ", end="", file=sys.stderr,
                    flush=True)
                right, steps = train_probe(task, letters, seconds, say)
                known[task, name] = dict(task=task, stack=name, right=right, steps=steps, seconds=round(seconds, 1))
                beside = notes.with_suffix(".new")
                beside.write_text("".join(json.dumps(row) + "\n" for row in known.values()))
                beside.replace(notes)
            print(f"{known[task, name]['right']:>14.1%}", end="", flush=True)
        print(flush=True)
    draw_probe(known, out / "probe.png")
    print(f"{out / 'probe.png'} shows it")


def draw_probe(known, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axis = plt.subplots(figsize=(9, 4), layout="constrained")
    for i, name in enumerate(STACKS):
        shares = [100 * known[task, name]["right"] for task in TASKS]
        bars = axis.bar(np.arange(len(TASKS)) + 0.2 * i, shares, 0.18, label=name)
        axis.bar_label(bars, fmt="%.0f", fontsize=6)
    axis.set_xticks(np.arange(len(TASKS)) + 0.3, list(TASKS), rotation=20, fontsize=8)
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
        probe(args.minutes, Path(args.out))
        return 0
    show_agreement()
    show_times()
    show_steps()
    return 0


if __name__ == "__main__":
    sys.exit(main())
