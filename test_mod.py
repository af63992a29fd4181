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
            M.MixtureOfDepths(block, 4, **arguments)


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
