from test_all import *
import mod as M


# --- 4. mod.py: to be appended to its section -------------------------------------------------------------------------

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
