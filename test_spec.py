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
