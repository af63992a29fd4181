from test_all import *


# --- 10. Drafts: a text is the same with and without ------------------------------------------------------------------

@pytest.mark.parametrize("draft", ["ngram", "self", "folder"])
@pytest.mark.parametrize("options", [
    {}, dict(max_num_batched_tokens=7, block_size=4), dict(num_blocks=12, max_num_batched_tokens=5, block_size=8),
    dict(max_num_seqs=3, num_draft_tokens=1), dict(num_draft_tokens=7, block_size=1)], ids=str)
def test_a_text_is_the_same_with_drafts(trained, alone, draft, options):
    m = infer.LLM(trained, draft=trained if draft == "folder" else draft, **options)
    m.learn = lambda *_: None                                                # drafts pay, whatever the clock says
    m.costs = {(n, False): 1.0 for n in range(20)}
    requests = [m.add(prompt, max_tokens=24, ignore_eos=True, **s) for prompt, s in MIXED]
    while any(r.finish_reason is None for rs in requests for r in rs):
        m.step()
    assert [[r.tokens for r in rs] for rs in requests] == alone
    assert idle(m) and m.stats()["draft_tokens"] > 0
    if draft == "folder":                                                    # it guesses what the target says
        assert m.stats()["accepted_tokens"] > 0.5 * m.stats()["draft_tokens"]


@pytest.mark.parametrize("draft", ["ngram", "self", "folder"])
def test_random_traffic_with_drafts(trained, draft):
    rng, plain = np.random.default_rng(2), infer.LLM(trained, prefix_caching=False, max_num_seqs=1)
    m = infer.LLM(trained, draft=trained if draft == "folder" else draft, block_size=4, num_blocks=17,
                  max_num_batched_tokens=16, max_num_seqs=8)
    m.learn, m.costs = lambda *_: None, {(n, False): 1.0 for n in range(20)}
    for (prompt, arguments), r in traffic(m, rng, 12):
        assert same_text(plain, prompt, arguments, r), (prompt, arguments, r.tokens)
    assert not getattr(m.drafter, "texts", None) and not getattr(m.drafter, "seen", None)            # nothing is left


def test_an_end_inside_a_draft_ends_the_text(trained):
    """The model repeats itself, the drafts say so; one of those tokens is declared the end."""
    prompt, plain = [40, 41, 42, 43] * 6, infer.LLM(trained)
    (free,) = plain.generate([prompt], max_tokens=30, temperature=0, logit_bias={i: 60.0 for i in (40,)})
    m = infer.LLM(trained, draft="ngram", num_draft_tokens=5)
    m.learn, m.costs = lambda *_: None, {(1, False): 1.0}
    (r,) = m.generate([prompt], max_tokens=30, temperature=0, logit_bias={40: 60.0})
    assert r.tokens == free.tokens and m.stats()["accepted_tokens"] > 15
    m.eos_ids = {40}
    (r,) = m.generate([prompt], max_tokens=30, temperature=0, logit_bias={40: 60.0}, logprobs=2)
    assert r.tokens == [40] and r.finish_reason == "stop" and len(r.logprobs) == 1
    m.eos_ids = set()
    piece = m.tokenizer.decode([40])
    (r,) = m.generate([prompt], max_tokens=30, temperature=0, logit_bias={40: 60.0}, logprobs=2, stop=piece * 3)
    assert r.tokens == [40] * 3 and r.text == "" and len(r.logprobs) == 3 and r.finish_reason == "stop" and idle(m)


def test_drafts_that_do_not_pay_pause(trained):
    m = infer.LLM(trained, draft="ngram")
    m.drafter.propose = lambda requests, k: [[0] * k for _ in requests]      # always wrong,
    m.learn = lambda segments, _: infer.LLM.learn(m, segments, 3.0 if any(r.drafts for r, *_ in segments) else 1.0)
    (r,), seen = m.add([40, 41], max_tokens=60, temperature=1.0, seed=3, ignore_eos=True, logit_bias={0: -90.0}), []
    while r.finish_reason is None:
        drafted = m.draft_tokens
        m.step()
        seen.append(m.draft_tokens > drafted)
    assert 0 < sum(seen) < 12 and r.rest > 8 and idle(m)                     # tried, and tried ever more rarely


def test_both_rules_of_acceptance_draw_what_the_target_says():
    rng, V, k, n = np.random.default_rng(0), 7, 2, 20_000
    p, q = rng.dirichlet(np.ones(V), k + 1), rng.dirichlet(np.ones(V), k)
    first, second, third = np.zeros(V), np.zeros(V), np.zeros(V)
    for _ in range(n):
        drafts = [rng.choice(V, p=row) for row in q]
        tokens = infer.accept_or_resample_numpy(p, q, drafts, rng)
        first[tokens[0]] += 1
        if len(tokens) > 1:
            second[tokens[1]] += 1
        if len(tokens) > 2:
            third[tokens[2]] += 1
    chi = lambda seen, wanted: ((seen - seen.sum() * wanted) ** 2 / (seen.sum() * wanted)).sum()
    limit = 22.46                                                            # chi-square of 6, p = 0.001
    assert chi(first, p[0]) < limit and chi(second, p[1]) < limit and chi(third, p[2]) < limit
    # The engine's rule: the target's own token, whatever was guessed; and a draft with the same noise is often right.
    rows = [infer.Request([0], infer.Sampling(), 7, i, 10, None) for i in range(n)]
    logits = torch.log(torch.from_numpy(np.stack([p[0], q[0]]))).float()
    target, draft = (np.array(infer.sample(row.repeat(n, 1), rows)) for row in logits)
    assert chi(np.bincount(target, minlength=V), p[0]) < limit
    accepted, classic = (target == draft).mean(), np.minimum(p[0], q[0]).sum()
    assert classic / (2 - classic) - 0.02 < accepted <= classic + 0.01       # between the bound for Gumbel and the best


def test_a_draft_that_cannot_be_is_refused(trained, tmp_path):
    code, _, err = run(infer, "x", "--model", trained, "--draft", tmp_path / "none")
    assert code == 2 and "draft" in err and len(err.strip().splitlines()) == 1
    shutil.copytree(trained, tmp_path / "other")
    source = json.loads((tmp_path / "other" / "tokenizer.json").read_text(encoding="utf-8"))
    a, b = list(source["model"]["vocab"])[-2:]
    vocab = source["model"]["vocab"]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(source), encoding="utf-8")
    with pytest.raises(ValueError, match="draft .*tokens"):
        infer.LLM(trained, draft=tmp_path / "other")
    with pytest.raises(ValueError, match="num_draft_tokens"):
        infer.LLM(trained, draft="ngram", num_draft_tokens=0)
