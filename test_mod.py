from test_all import *
os.environ["TRITON_INTERPRET"] = "1"
import mod as M
os.environ.pop("TRITON_INTERPRET", None)


# --- 4. mod.py: routing, its kernels, the causal decision -------------------------------------------------------------

def mixture(seed=0, B=2, T=11, C=6):
    rng = np.random.default_rng(seed)
    W = rng.standard_normal((C, C))
    f = lambda x: np.tanh(x @ W)
    back = lambda x, g: (g * (1 - np.tanh(x @ W) ** 2)) @ W.T
    return rng.standard_normal((B, T, C)), rng.standard_normal(C), f, back, rng.standard_normal((B, T, C))


@pytest.mark.parametrize("capacity", [0.125, 0.5, 1.0])
def test_the_routed_layers_backward_is_its_slope(capacity):
    x, w, f, back, dy = mixture()
    dx, dw = M.mixture_backward_numpy(x, w, f, capacity, grad=dy, f_backward=back)
    rng = np.random.default_rng(5)
    for a, g, call in ((x, dx, lambda v: M.mixture_numpy(v, w, f, capacity)),
                       (w, dw, lambda v: M.mixture_numpy(x, v, f, capacity))):
        bump = 1e-6 * rng.standard_normal(a.shape)
        slope = ((call(a + bump) - call(a - bump)) * dy).sum() / 2
        assert abs(slope - (g * bump).sum()) <= 1e-6 * np.abs(g * bump).sum()
    changed = (M.mixture_numpy(x, w, f, capacity) != x).any(-1)
    assert (changed.sum(1) == math.ceil(capacity * 11)).all()


def test_the_highest_are_chosen_in_order_and_of_equals_the_earlier():
    scores = np.array([[0.0, 3.0, 1.0, 3.0, 2.0, 3.0], [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]])
    assert M.top_rows_numpy(scores, 0.5).tolist() == [1, 3, 5, 6, 7, 8]
    assert M.top_rows_numpy(scores, 1 / 3).tolist() == [1, 3, 6, 7]
    rows = M.random_rows_numpy(np.random.default_rng(0), 3, 40, 0.25)
    assert len(rows) == 30 and len(set(rows)) == 30 and all((rows // 40 == b).sum() == 10 for b in range(3))
    for capacity in (0, -1, 1.5, math.nan):
        with pytest.raises(ValueError, match="capacity"):
            M.count(capacity, 8)


def test_the_expert_that_does_nothing_and_the_threshold():
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((20, 5)), rng.standard_normal((5, 3))
    y = M.no_op_expert_numpy(x, w, [np.tanh, lambda x: x], 0.25)
    assert 5 <= (y != x).any(1).sum() <= 10
    w[:, 2] = 0
    far = M.no_op_expert_numpy(x, np.concatenate([w[:, :2] * 0 - 50 * np.sign(x[:1].T), w[:, 2:]], 1), [np.tanh] * 2, 0.25)
    assert np.abs(far[0] - x[0]).max() < 1e-6                                # all weight on doing nothing
    bar = None
    for _ in range(200):
        bar = M.threshold_numpy(bar, rng.standard_normal(1000), 0.125)
    assert abs(bar - 1.1503) < 0.05                                          # the normal distribution's upper eighth


@pytest.mark.parametrize("N, m, C", [(1, 1, 1), (7, 3, 5), (40, 40, 33), (64, 8, 130), (9, 0, 4)])
def test_gather_and_scatter_are_their_twins(path, N, m, C):
    rng = np.random.default_rng(N + m + C)
    rows = np.sort(rng.permutation(N)[:m])
    x, update, weight = randn(N, C), randn(m, C, seed=1), randn(m, seed=2)
    for cast, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6), (torch.float16, 2e-3)):
        if cast == torch.float64 and path == "kernel":
            continue
        a = [t.to(cast) for t in (x, update, weight)]
        exact, index = [t.double().numpy() for t in a], torch.tensor(rows)
        (y,), (dx,) = gradients(lambda x: M.gather_rows(x, index), a[0])
        close(y, M.gather_rows_numpy(exact[0], rows), tolerance)
        dy = randn(m, C, seed=9).to(cast).double().numpy()
        close(dx, M.gather_rows_backward_numpy(exact[0], rows, grad=dy)[0], tolerance)
        (y,), grads = gradients(lambda x, u, w: M.scatter_add_rows(x, index, u, w), *a)
        close(y, M.scatter_add_rows_numpy(exact[0], rows, *exact[1:]), tolerance)
        dy = randn(N, C, seed=9).to(cast).double().numpy()
        for g, wanted in zip(grads, M.scatter_add_rows_backward_numpy(exact[0], rows, *exact[1:], grad=dy)):
            close(g, wanted, tolerance * max(1, C ** 0.5 / 4))


def test_what_does_not_fit_a_router_is_refused():
    x = torch.zeros(4, 3)
    for call in (lambda: M.gather_rows(x, torch.tensor([0, 4])), lambda: M.gather_rows(x[0], torch.tensor([0])),
                 lambda: M.scatter_add_rows(x, torch.tensor([0]), x[:2], torch.ones(1))):
        with pytest.raises(ValueError, match="rows|update"):
            call()
    block = train.Block(torch.nn.Identity(), torch.nn.Identity(), 4)
    for arguments in (dict(capacity=0), dict(capacity=1.1), dict(routing="best")):
        with pytest.raises(ValueError, match="capacity|routing"):
            M.MixtureOfDepths(block, C=4, **arguments)


def routed(letter="a", routing="topk", capacity=0.25, C=32, seed=0):
    raw = train.our_config(letter.upper(), C, 2, 1, 50, 64, [], capacity=capacity, routing=routing)
    model = train.empty_model(train.parse_config(raw)).initialize(seed)
    with torch.no_grad():
        for i, w in enumerate(model.blocks[0].block.parameters()):
            if not w.any():
                w.copy_(0.3 * randn(*w.shape, seed=i))
    return model.blocks[0].double()


@pytest.mark.parametrize("letter", ["a", "s", "m", "d"])
@pytest.mark.parametrize("T, capacity", [(1, 0.125), (17, 0.25), (16, 1.0)])
def test_a_routed_block_is_the_block_on_the_chosen_tokens(letter, T, capacity):
    layer = routed(letter, capacity=capacity).train()
    x, positions = randn(2, T, 32), torch.arange(T)
    y = layer(x, positions)
    scores = (x @ layer.router.weight[0]).detach().numpy()
    rows = M.top_rows_numpy(scores, capacity).reshape(2, -1)
    wanted = x.clone()
    for b in range(2):
        at = torch.tensor(rows[b] - b * T)
        update = layer.block.delta(x[b:b + 1, at], at)                       # true positions, true order
        wanted[b, at] += torch.sigmoid(torch.tensor(scores[b])[at])[:, None] * update[0]
    close(y.detach(), wanted.detach(), 1e-5 if letter in "smd" else 1e-10)
    (y.sum() + layer.auxiliary).backward()
    assert layer.router.weight.grad.abs().sum() > 0


def test_the_predictors_gradient_ends_at_what_it_reads():
    layer = routed().train()
    x = randn(2, 16, 32).requires_grad_()
    layer(x, torch.arange(16))
    layer.auxiliary.backward()
    assert x.grad is None and layer.router.weight.grad is None
    assert all(w.grad.abs().sum() > 0 for w in layer.predictor.parameters())
    told = M.agreement([layer.counts])
    assert 0 <= told["router_agreement"] <= 1 and 0 <= told["router_f1"] <= 1 and M.agreement([torch.zeros(4)]) == {}


@pytest.mark.parametrize("routing", ["topk", "threshold"])
def test_each_token_is_decided_by_itself_in_generation(routing):
    layer = routed(routing=routing)
    x, positions = randn(3, 20, 32), torch.arange(20)
    if routing == "threshold":
        layer.train()
        for _ in range(3):
            layer(x, positions)
            layer.settle()
        assert abs((x @ layer.router.weight[0] > layer.threshold).double().mean() - 0.25) < 0.05
    layer.eval()
    with torch.no_grad():
        y = layer(x, positions)
        taken = (y != x).any(-1)
        assert 0 < taken.sum() < taken.numel()
        for t in (1, 7, 19):                                                 # nothing of the future
            assert torch.equal((layer(x[:, :t], positions[:t]) != x[:, :t]).any(-1), taken[:, :t])
            close(layer(x[:, :t], positions[:t]), y[:, :t], 1e-12)
        alone = torch.cat([layer(x[b:b + 1], positions) for b in range(3)])
        close(alone, y, 1e-12)


AHEAD_MOD = """
def launch(target):
    import mod as M
    M.on_kernel = lambda x: True
    for dtype, C in (torch.bfloat16, 768), (torch.bfloat16, 4096), (torch.float32, 4096):
        t = lambda *shape: torch.zeros(shape, dtype=dtype, requires_grad=True)
        rows = torch.arange(3)
        M.gather_rows(t(9, C), rows).sum().backward()
        M.scatter_add_rows(t(9, C), rows, t(3, C), t(3)).sum().backward()
"""


def test_kernels_of_routing_compile_ahead_without_spills(tmp_path):
    for made in ahead(AHEAD_MOD, M, set(), tmp_path).values():
        assert not any(kernel["memory"] or kernel["scalar"] for kernel in made)


def test_isoflop_runs_and_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(M, "KINDS", M.KINDS[:2] + M.KINDS[-1:])
    monkeypatch.setattr(M, "token_milliseconds", lambda model: 1.0)
    monkeypatch.setattr(M, "some_text", lambda: torch.arange(20_000).remainder(97).split([18_000, 2_000]))
    code, out, _ = run(M, "--isoflop", "--minutes", 1e-6, "--out", tmp_path)
    assert code == 0 and (tmp_path / "isoflop.png").exists() and out.count("aAaA") == 8
    monkeypatch.setattr(M, "train_tiny", None)
    again = run(M, "--isoflop", "--minutes", 1e-6, "--out", tmp_path)[1]
    assert again.splitlines()[1:] == out.splitlines()[1:]
    code, _, err = run(M, "--isoflop", "--minutes", 0)
    assert code == 2 and "--minutes" in err


def test_what_a_router_takes_is_shown_in_the_text():
    model = M.Tiny("aA", 32, 0.5)
    text = torch.tensor(list(b"def f(x): return x"))
    marked, share = M.show_choice(model, text, 1)
    assert marked.replace("‹", "").replace("›", "") == "def f(x): return x" and marked.count("‹") == marked.count("›")
    assert 0 <= share <= 1


@pytest.mark.parametrize("routing", ["topk", "threshold"])
@pytest.mark.parametrize("letter", ["a", "s", "m", "d"])
def test_a_routed_block_from_its_states_is_the_block_over_the_whole(letter, routing):
    layer = routed(letter, routing).train()
    B, T = 3, 23
    x, positions = randn(B, T, 32, seed=3), torch.arange(T)
    layer(randn(B, T, 32, seed=8), positions)                                # a threshold that is no score of x
    layer.settle()
    layer.eval()
    mixer = train.parts(layer)[1]
    new = lambda: A.KVCache(1, mixer.G, T, mixer.D, torch.float64) if letter == "a" else mixer.new_state(1)
    with torch.no_grad():
        whole = layer(x, positions)
        took = (whole != x).any(-1).sum(1)
        assert 0 < took.sum() < B * T
        for cuts in ([T], [9, 9, 5], [1] * T):
            state, start, parts = M.RoutedState([new() for _ in range(B)]), 0, []
            for n in cuts:
                parts.append(layer(x[:, start:start + n], positions[start:start + n], state))
                start += n
            close(torch.cat(parts, 1), whole, 1e-10 if letter == "a" else 1e-6)
            if letter == "a":                                                # a cache of the chosen alone
                assert [inner.length for inner in state.states] == took.tolist()


def test_a_block_that_no_token_enters_is_not_called():
    layer = routed(routing="threshold").eval()
    layer.threshold.fill_(torch.inf)
    layer.block.delta = None                                                 # calling it would raise
    x = randn(2, 5, 32)
    with torch.no_grad():
        assert torch.equal(layer(x, torch.arange(5)), x)


def test_a_router_finds_its_width_and_takes_all_at_a_capacity_of_one():
    layer = routed(capacity=1.0).train()
    again = M.MixtureOfDepths(layer.block, capacity=0.125)
    assert again.router.weight.shape == (1, 32) and again.capacity == 0.125
    x, positions = randn(2, 9, 32), torch.arange(9)
    wanted = x + torch.sigmoid(x @ layer.router.weight[0])[..., None] * layer.block.delta(x, positions)
    close(layer(x, positions).detach(), wanted.detach(), 1e-12)


def test_the_predictor_begins_as_the_thresholds_rule():
    layer, generator = routed(capacity=0.125).float().train(), torch.Generator().manual_seed(0)
    for i in range(40):
        layer(torch.randn(8, 128, 32, generator=generator), torch.arange(128))
        layer.settle()
        if i == 9:
            layer.counts.zero_()
    told = M.agreement([layer.counts])
    assert told["router_agreement"] > 0.95 and told["router_f1"] > 0.8       # never trained: by the running cut alone
    cut = torch.distributions.Normal(0, layer.router.weight.norm()).icdf(torch.tensor(0.875))
    assert abs(layer.threshold - cut) < 0.1 * cut


def test_a_threshold_follows_as_its_definition_says():
    layer, bar = routed(routing="threshold").train(), None
    for i in range(4):
        x = randn(2, 31, 32, seed=i) * (i + 1)
        layer(x, torch.arange(31))
        layer.settle()
        bar = M.threshold_numpy(bar, (x @ layer.router.weight[0]).detach().numpy(), 0.25)
        close(layer.threshold, bar, 1e-12)
    kept = layer.threshold.clone()
    layer.settle()                                                           # no batch since: no news
    assert torch.equal(layer.threshold, kept)


@pytest.mark.parametrize("how", ["compiled", "recomputed"])
def test_a_routed_block_learns_the_same(how):
    from torch.utils.checkpoint import checkpoint

    def learn(call, layer):
        x = randn(2, 17, 32, seed=5).requires_grad_()
        (call(layer, x, torch.arange(17)).square().sum() + layer.auxiliary).backward()
        return [layer.auxiliary.detach(), layer.counts[:2] / layer.counts[1], x.grad,
                *(w.grad for w in layer.parameters() if w.grad is not None)]
    plain = lambda layer, x, positions: layer(x, positions)
    other = {"compiled": lambda *a: torch.compile(plain, backend="eager", fullgraph=True)(*a),
             "recomputed": lambda *a: checkpoint(plain, *a, use_reentrant=False)}[how]
    wanted, got = learn(plain, routed().train()), learn(other, routed().train())
    assert len(wanted) == len(got) > 8
    for a, b in zip(got, wanted):
        close(a, b, 1e-12)


@pytest.mark.parametrize("N, m, C", [(5, 2, 3000), (6, 6, 1), (3, 1, 2048)])
def test_rows_in_place_where_no_gradient_is_asked(path, N, m, C):
    x, update, weight, rows = randn(N, C), randn(m, C, seed=1), randn(m, seed=2), torch.arange(N)[-m:]
    x, update, weight = (t.float() for t in (x, update, weight))
    wanted = M.scatter_add_rows_numpy(*(t.double().numpy() for t in (x,)), rows.numpy(), update.double().numpy(),
                                      weight.double().numpy())
    with torch.no_grad():
        y = M.scatter_add_rows(x, rows, update, weight)
    close(y, wanted, 1e-6)
    if not GPU:
        assert y.data_ptr() == x.data_ptr()


def test_the_program_shows_what_it_claims(monkeypatch):
    monkeypatch.setattr(M, "compare_times", lambda: None)
    own = M.train_tiny
    monkeypatch.setattr(M, "train_tiny", lambda model, text, seconds, say: own(model, text, seconds=0.2, say=say))
    code, out, err = run(M)
    assert code == 0, err
    assert "‹" in out and "F1" in out and "token by token" in out


def test_the_experiment_goes_on_where_it_stopped(monkeypatch, tmp_path):
    monkeypatch.setattr(M, "WIDTHS", (32,))
    monkeypatch.setattr(M, "KINDS", (("aa", 1.0, None), ("aA", 0.125, None), ("aA", 0.125, "random")))
    arguments = ("--isoflop", "--minutes", 0.001, "--out", tmp_path)
    code, first, err = run(M, *arguments)
    assert code == 0, err
    lines = [json.loads(line) for line in (tmp_path / "isoflop.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and len({line["training_flops"] for line in lines}) == 1
    assert lines[1]["forward_flops"] < lines[0]["forward_flops"] and (tmp_path / "isoflop.png").stat().st_size > 10_000
    monkeypatch.setattr(M, "train_tiny", None)                               # nothing is trained again
    code, second, err = run(M, *arguments)
    assert code == 0 and second == first, err


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf"])
def test_the_experiment_needs_time(minutes):
    code, out, err = run(M, "--isoflop", "--minutes", minutes)
    assert code == 2 and "--minutes" in err and not out
