from test_all import *


# --- 9. Stacks of all kinds: recurrent and routed blocks, trained and served ------------------------------------------

STACKS = ["ssss", "m", "dd", "sssa", "mAd", "aS", "AaAA", "sDaM"]


@pytest.fixture(scope="session")
def stacks(trained, tmp_path_factory):
    """layers → a folder of random weights, with the tokenizer of `trained`; made when it is first asked for."""
    made, tokenizer = {}, train.load_tokenizer(trained)

    def folder(layers, **changes):
        key = (layers, *changes.items())
        if key not in made:
            raw = train.our_config(layers, 64, 2, 1, tokenizer.vocab_size, 128, tokenizer.eos_ids, capacity=0.4)
            model = train.empty_model(train.parse_config({**raw, **changes})).initialize(1)
            with torch.no_grad():
                for i, (name, w) in enumerate(model.named_parameters()):
                    if not w.any():                                          # what starts at zero
                        w.copy_(0.3 * randn(*w.shape, seed=i))
            made[key] = tmp_path_factory.mktemp("stack")
            train.save(model, tokenizer, made[key])
        return made[key]
    return folder


@pytest.mark.parametrize("layers", STACKS)
def test_any_stack_serves_the_same_text_batched_chunked_preempted_and_from_the_prefix_cache(stacks, layers):
    folder = stacks(layers)
    plain = infer.LLM(folder, prefix_caching=False, max_num_seqs=1)
    one = [plain.generate(p, max_tokens=20, ignore_eos=True, **s)[0] for p, s in MIXED]
    tokens = [[r.tokens for r in (result if isinstance(result, list) else [result])] for result in one]
    assert plain.model.config.layers == layers and len({tuple(t[0]) for t in tokens}) > 3
    for options in ({}, dict(max_num_batched_tokens=1), dict(max_num_batched_tokens=7, block_size=4),
                    dict(num_blocks=12, max_num_batched_tokens=5, block_size=8, max_num_seqs=3)):
        m = infer.LLM(folder, **options)
        for _ in range(2):
            requests = [m.add(p, max_tokens=20, ignore_eos=True, **s) for p, s in MIXED]
            while any(r.finish_reason is None for rs in requests for r in rs):
                m.step()
            assert [[r.tokens for r in rs] for rs in requests] == tokens, options
            assert idle(m)
        s = m.stats()
        assert s["prefix_hits"] > 0 and (s["preemptions"] > 0) == ("num_blocks" in options)


@pytest.mark.parametrize("layers", ["ssss", "sDaM", "AaAA"])
def test_random_traffic_over_any_stack(stacks, layers):
    rng, plain = np.random.default_rng(3), infer.LLM(stacks(layers), prefix_caching=False, max_num_seqs=1)
    m = infer.LLM(stacks(layers), block_size=4, num_blocks=17, max_num_batched_tokens=16, max_num_seqs=8)
    for (prompt, arguments), r in traffic(m, rng, 15):
        assert same_text(plain, prompt, arguments, r), (prompt, arguments, r.tokens)


@pytest.mark.parametrize("layers", STACKS)
def test_whole_chunk_and_token_agree_in_any_stack(stacks, layers):
    model, tokenizer = train.load(stacks(layers))
    tokens = torch.arange(90).reshape(2, 45) % 250
    with torch.no_grad():
        whole = model(tokens)
        for cuts in ((1,) * 45, (44, 1), (7, 1, 1, 20, 16)):
            states, at, parts = model.new_states(2, 45), 0, []
            for n in cuts:
                parts.append(model(tokens[:, at:at + n], torch.arange(at, at + n), states))
                at += n
            close(torch.cat(parts, 1), whole, 2e-5)


def test_states_alone_know_no_longest_text(stacks):
    m = infer.LLM(stacks("ssss"), max_num_seqs=2)
    assert m.context == 128
    (r,) = m.generate("x", max_tokens=200, ignore_eos=True, temperature=0)
    assert len(r.tokens) == 200 and idle(m)
    with pytest.raises(ValueError, match="context of 128"):
        infer.LLM(stacks("sssa")).add("x", max_tokens=200)


def test_prompts_that_begin_alike_compute_the_beginning_once(stacks):
    m = infer.LLM(stacks("sssa"), block_size=4)
    start = list(range(40))
    requests = [m.add(start + [100 + i] * 9, max_tokens=2, ignore_eos=True)[0] for i in range(6)]
    while any(r.finish_reason is None for r in requests):
        m.step()
    assert [r.cached_tokens for r in requests] == [0] + [40] * 5             # they waited for the first
    (again,) = m.generate([start + [100] * 9], max_tokens=2)
    assert again.cached_tokens == 48
    (other,) = m.generate([start[:23] + [7] * 9], max_tokens=2)              # nothing was kept at 20,
    (after,) = m.generate([start[:23] + [8] * 9], max_tokens=2)              # but now it is
    assert (other.cached_tokens, after.cached_tokens) == (0, 20)


def test_of_states_kept_for_prompts_those_used_longest_ago_go(stacks):
    m = infer.LLM(stacks("ssss"), block_size=4)
    m.blocks.most = 3
    for i in range(5):
        m.generate([[i] * 9], max_tokens=1)
    assert len(m.blocks.memories) == 3 == sum(b.memory is not None for b in m.blocks.known.values())
    m.generate([[2] * 9], max_tokens=1)                                      # used again, so the latest
    m.generate([[9] * 9], max_tokens=1)
    assert m.generate([[2] * 9], max_tokens=1)[0].cached_tokens == 8
    assert m.generate([[3] * 9], max_tokens=1)[0].cached_tokens == 0


@pytest.mark.parametrize("layers", ["ssss", "sDaM"])
def test_int8_weights_and_cache_in_any_stack(stacks, layers):
    text = (HERE / "attention.py").read_text()[:2000]
    exact = infer.score(infer.LLM(stacks(layers)), text)["bits_per_byte"]
    small = infer.LLM(stacks(layers), quantize="int8", kv_cache_dtype="int8")
    assert abs(infer.score(small, text)["bits_per_byte"] / exact - 1) < 2e-2
    prompts = [START, START + "x", "import"]
    together = [r.tokens for r in small.generate(prompts, max_tokens=12, seed=[1, 2, 3])]
    assert together == [small.generate(p, max_tokens=12, seed=i + 1)[0].tokens for i, p in enumerate(prompts)]


def hf_mamba2(tmp_path, **changes):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    config = transformers.Mamba2Config(**dict(dict(
        num_heads=4, head_dim=16, hidden_size=32, state_size=24, n_groups=2, num_hidden_layers=3, vocab_size=300,
        chunk_size=16, expand=2), **changes))
    model = transformers.Mamba2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, w in model.named_parameters():
            if w.ndim == 1 and "norm" in name or name.endswith((".D", "conv1d.bias")):
                w.add_(0.3 * torch.randn_like(w))                            # nothing at its neutral value
    model.save_pretrained(tmp_path)
    return model


@pytest.mark.parametrize("changes", [
    {}, dict(n_groups=1, use_conv_bias=False), dict(use_bias=True, conv_kernel=3), dict(time_step_limit=(0.02, 0.5)),
    dict(tie_word_embeddings=True), dict(residual_in_fp32=False, layer_norm_epsilon=1e-3)], ids=str)
def test_a_mamba2_folder_of_hugging_face_gives_its_logits(tmp_path, changes, trained):
    theirs = hf_mamba2(tmp_path, **changes)
    shutil.copy(trained / "tokenizer.json", tmp_path)
    ours, _ = train.load(tmp_path)
    tokens = torch.arange(74).reshape(2, 37) * 7 % 300
    with torch.no_grad():
        wanted = theirs(tokens).logits
        close(ours(tokens), wanted, 1e-4)
        states = ours.new_states(2, 37)
        steps = [ours(tokens[:, i:i + 1], torch.tensor([i]), states) for i in range(37)]
    close(torch.cat(steps, 1), wanted, 1e-4)


def test_our_mamba2_folder_is_one_of_hugging_face(stacks, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(stacks("ssss")).eval()
    ours, _ = train.load(stacks("ssss"))
    tokens = torch.arange(60).reshape(2, 30) % 250
    with torch.no_grad():
        close(ours(tokens), theirs(tokens).logits, 1e-4)
    theirs.save_pretrained(tmp_path)                                         # and back
    shutil.copy(stacks("ssss") / "tokenizer.json", tmp_path)
    with torch.no_grad():
        close(train.load(tmp_path)[0](tokens), ours(tokens), 1e-6)


@pytest.mark.parametrize("layers", ["s", "ma", "dA", "Sa"])
def test_any_stack_trains_resumes_to_the_bit_and_is_served(corpus, layers, tmp_path):
    flags = ["--data", corpus, "--layers", layers, "--dim", 64, "--context", 32, "--batch", 4, "--vocab", 400]
    flags += ["--capacity", 0.25] if layers != layers.lower() else []
    assert run(train, *flags, "--steps", 12, "--out", tmp_path / "whole")[0] == 0
    first = run(train, *flags, "--steps", 6, "--out", tmp_path / "cut")
    assert first[0] == 0, first[2]
    log = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["val_loss"] < log[0]["val_loss"] - 0.1
    assert ("router_agreement" in log[-1]) == (layers != layers.lower())
    code, out, err = run(infer, "def f(", "--model", tmp_path / "whole", "--max-tokens", 5, "--seed", 1)
    assert code == 0 and out, err


@pytest.mark.parametrize("layers", ["sa", "Ad"])
def test_a_stack_that_was_stopped_goes_on_as_if_it_had_not_been(corpus, layers, tmp_path):
    flags = ["--data", corpus, "--layers", layers, "--dim", 64, "--context", 32, "--batch", 4, "--vocab", 400,
             "--steps", 8]
    assert run(train, *flags, "--out", tmp_path / "whole")[0] == 0
    before, train.Stop.code = train.Stop.__init__, None

    def stop_at(self):
        before(self)
        self.code = 130
    train.Stop.__init__ = stop_at                                            # as Ctrl-C at once
    try:
        assert run(train, *flags, "--out", tmp_path / "cut")[0] == 130
    finally:
        train.Stop.__init__ = before
    assert run(train, "--resume", "--out", tmp_path / "cut")[0] == 0
    a, b = (safetensors.torch.load_file(tmp_path / x / "model.safetensors") for x in ("whole", "cut"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("flags, said", [
    (["--layers", "axa"], "--layers axa"), (["--capacity", "0.5"], "--capacity 0.5"),
    (["--layers", "aA", "--capacity", "1.5"], "--capacity 1.5"),
    (["--layers", "aa", "--routing", "topk"], "--routing topk")])
def test_bad_layers_are_one_clear_line(flags, said, corpus, tmp_path):
    code, _, err = run(train, "--data", corpus, "--steps", 2, "--out", tmp_path, *flags)
    assert code == 2 and said in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("draft", ["ngram", "self"])
@pytest.mark.parametrize("layers", ["ssss", "sssa", "sDaM", "AaAA"])
def test_any_stack_writes_the_same_with_drafts(stacks, layers, draft):
    plain = infer.LLM(stacks(layers), prefix_caching=False, max_num_seqs=1)
    m = infer.LLM(stacks(layers), draft=draft, block_size=4, num_blocks=30, max_num_batched_tokens=16)
    m.learn, m.costs = lambda *_: None, {(n, False): 1.0 for n in range(20)}
    rng = np.random.default_rng(5)
    for (prompt, arguments), r in traffic(m, rng, 10):
        assert same_text(plain, prompt, arguments, r), (prompt, arguments, r.tokens)
    (r,) = m.generate([[40, 41, 42] * 6], max_tokens=30, temperature=0, logit_bias={40: 60.0})       # drafts that hold
    assert r.tokens == [40] * 30 and m.stats()["draft_tokens"] > 10
    assert m.stats()["accepted_tokens"] > (15 if draft == "ngram" else -1) and idle(m)
