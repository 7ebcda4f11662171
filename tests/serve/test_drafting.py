"""Rows whose shadows draft beside rows whose shadows do not: every answer is what it would be without drafts."""

import openai
import pytest
import torch
from scipy.stats import chi2_contingency

from chatbase import chat_tokenizer
from serving import Reader, ask, attached, detached, engine_of
from shadowpeft.core.speculation import Gate
from shadowpeft.data.action_trie import ActionTrie
from shadowpeft.hf.forward.speculation import Speculation
from shadowpeft.hf.layer import find_hub
from shadowpeft.ops import thin
from shadowpeft.serve.backend import Attached
from shadowpeft.serve.batch import NumbersError
from shadowpeft.serve.cloud_role import CloudRole
from shadowpeft.serve.engine import Engine, EngineLimits
from shadowpeft.serve.guard import Keys
from shadowpeft.serve.requests import SamplingParams
from shadowpeft.serve.server import Settings, build
from shadowpeft.serve.several_backends import MultiBackend
from webserver import Running, metric

KEY = "user-key-0123456789"

PROMPTS = ["sit", "stand up now", "turn left and then right", "why is the sky blue"]
NAMES = ["default", "late", "deep", "base"]


class Eager(Gate):
    """Always drafts four tokens."""

    def __init__(self):
        super().__init__(0.0, [1.0] * 5)

    def plan(self):
        return 4

    def wants(self, *_):
        return True


@pytest.fixture
def eager(monkeypatch):
    """Every request that may draft does."""
    monkeypatch.setattr(Attached, "gate", lambda self, name, **_: None if name == self.base_name else Eager())


def answers(backend, speculative, **sampling):
    """Texts of every prompt by every name, together in one engine; and the ends."""
    engine = engine_of(backend, speculative=speculative, max_num_seqs=16)
    readers = [ask(engine, prompt, name, max_tokens=24, **sampling) for prompt in PROMPTS for name in NAMES]
    found = [(reader.text, [t.id for t in reader.tokens], reader.wait()) for reader in readers]
    scores = [[t.logprob for t in reader.tokens] for reader in readers]
    assert engine.stop()
    return found, scores


def test_answers_stay_what_they_are(eager):
    backend = attached()
    plain, plain_scores = answers(attached(), False)
    drafted, scores = answers(backend, True)
    assert [(text, ids, end.reason, end.new_tokens) for text, ids, end in drafted] == [
        (text, ids, end.reason, end.new_tokens) for text, ids, end in plain
    ]
    for mine, theirs in zip(scores, plain_scores, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-3)
    counts = backend.drafts
    assert counts.accepted > 0
    assert sum(end.accepted for _, _, end in drafted) >= counts.accepted
    assert {end.drafted for _, _, end in drafted[3::4]} == {0}, "the base has no shadow"
    others = [end for name, (_, _, end) in zip(NAMES * 4, drafted, strict=True) if name != "base"]
    assert all(end.drafted > 0 for end in others if end.new_tokens > 2)


def test_a_request_says_for_itself(eager):
    engine = engine_of(attached(), speculative=False)
    readers = []
    for wanted in (None, True, False):
        reader = Reader()
        ids = engine.backend.tokenizer("stand up now", add_special_tokens=False).input_ids
        engine.submit(ids, "deep", SamplingParams(max_tokens=12), reader, speculative=wanted)
        readers.append(reader)
    assert [reader.wait().drafted > 0 for reader in readers] == [False, True, False]
    assert len({reader.text for reader in readers}) == 1
    assert engine.stop()


def test_stop_texts_and_conditions_end_an_answer_within_its_drafts(eager):
    plain, drafting = engine_of(attached()), engine_of(attached(), speculative=True)
    free = ask(plain, "stand up now", "deep", max_tokens=24)
    text = free.text
    stop = text[4:6]
    for options in ({"stop": (stop,)}, {"top_logprobs": 3}, {"max_tokens": 3}):
        found = [ask(engine, "stand up now", "deep", **{"max_tokens": 24, **options}) for engine in (plain, drafting)]
        assert found[0].text == found[1].text
        assert found[0].wait().reason == found[1].wait().reason
        assert [t.raw for t in found[0].tokens] == [t.raw for t in found[1].tokens]

    def until(pieces, scores):
        return len(pieces) >= 5

    found = [ask(engine, "stand up now", "deep", until, max_tokens=24) for engine in (plain, drafting)]
    assert found[0].text == found[1].text
    assert len(found[1].tokens) == 5
    assert plain.stop()
    assert drafting.stop()


def test_rows_that_choose_an_action_draft_after_it(eager):
    trie = ActionTrie.of(chat_tokenizer(), ["Sit", "StandUp", "Dance"])
    texts = []
    for speculative in (False, True):
        engine = engine_of(attached(), speculative=speculative)
        readers = []
        for prompt in PROMPTS:
            reader = Reader()
            ids = engine.backend.tokenizer(prompt, add_special_tokens=False).input_ids
            engine.submit(ids, "deep", SamplingParams(max_tokens=24), reader, actions=trie)
            readers.append(reader)
        others = [ask(engine, prompt, "default", max_tokens=9) for prompt in PROMPTS]
        texts.append([reader.text for reader in readers + others])
        assert all(text.startswith("[") for text in texts[-1][:4])
        assert engine.stop()
    assert texts[0] == texts[1]


def test_requests_that_come_and_go_while_others_draft(eager):
    engine = engine_of(attached(), speculative=True)
    expected = {}
    for prompt in PROMPTS:
        expected[prompt] = ask(engine, prompt, "default", max_tokens=40).text
    first = [ask(engine, prompt, "default", max_tokens=40) for prompt in PROMPTS[:2]]
    left = ask(engine, PROMPTS[3], "deep", max_tokens=200)
    later = [ask(engine, prompt, "default", max_tokens=40) for prompt in PROMPTS]
    left.request.cancelled = True
    assert [reader.text for reader in first] == [expected[p] for p in PROMPTS[:2]]
    assert [reader.text for reader in later] == [expected[p] for p in PROMPTS]
    assert engine.stop()


@pytest.mark.parametrize("top_p", [pytest.param(1.0, marks=pytest.mark.slow), 0.8])
def test_drawn_answers_keep_their_distribution(eager, top_p):
    counted = []
    for speculative in (False, True):
        engine = engine_of(attached(), speculative=speculative, queue=2000, max_num_seqs=32)
        sampling = {"max_tokens": 3, "temperature": 0.6, "top_p": top_p}
        readers = [ask(engine, "sit", "deep", seed=seed, **sampling) for seed in range(700)]
        pairs = [tuple(t.id for t in reader.tokens)[:2] for reader in readers if reader.wait()]
        counted.append(pairs)
        assert engine.stop()
    kinds = sorted(set(counted[0]) | set(counted[1]), key=lambda k: -(counted[0].count(k) + counted[1].count(k)))
    table = [[pairs.count(kind) for kind in kinds] for pairs in counted]
    frequent = [n for n in range(len(kinds)) if table[0][n] + table[1][n] >= 10]
    rest = [[row[n] for n in frequent] + [sum(row[n] for n in range(len(kinds)) if n not in frequent)] for row in table]
    if sum(row[-1] for row in rest) == 0:
        rest = [row[:-1] for row in rest]
    assert len(frequent) > 3
    assert chi2_contingency(rest).pvalue > 1e-4


def test_a_seeded_answer_is_the_same_whoever_runs_beside_it(eager):
    engine = engine_of(attached(), speculative=True)
    options = {"max_tokens": 16, "temperature": 1.0, "seed": 5}
    alone = ask(engine, "stand up now", "deep", **options).text
    beside = [ask(engine, prompt, name, max_tokens=16) for prompt in PROMPTS for name in NAMES]
    assert ask(engine, "stand up now", "deep", **options).text == alone
    assert all(reader.wait() for reader in beside)
    assert engine.stop()


@pytest.mark.parametrize("stream", [False, True])
def test_usage_and_metrics_say_what_was_drafted(eager, stream):
    role = CloudRole(Engine(attached(), EngineLimits(speculative=True)), system=None, default_tokens=16)
    with (
        Running(build(role, Settings(Keys((KEY,), ())))) as server,
        openai.OpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0, timeout=60) as client,
    ):
        options = {"model": "deep", "prompt": "stand up now", "max_tokens": 16}
        if stream:
            chunks = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
            usage, text = chunks[-1].usage, "".join(c.choices[0].text for c in chunks if c.choices)
        else:
            answer = client.completions.create(**options)
            usage, text = answer.usage, answer.choices[0].text
        details = usage.completion_tokens_details
        assert details.accepted_prediction_tokens + details.rejected_prediction_tokens > 0
        plain = client.completions.create(**options, extra_body={"speculative": False})
        assert plain.choices[0].text == text
        assert plain.usage.completion_tokens_details is None
        with pytest.raises(openai.BadRequestError, match="speculative"):
            client.completions.create(**options, extra_body={"speculative": "yes"})
        with server.http(KEY) as http:
            said = http.get("/metrics").text
    drafted = details.accepted_prediction_tokens + details.rejected_prediction_tokens
    assert "# TYPE shadowpeft_drafted_tokens_total counter" in said
    assert metric(said, "shadowpeft_drafted_tokens_total") == drafted
    assert metric(said, "shadowpeft_accepted_tokens_total") == details.accepted_prediction_tokens
    assert metric(said, "shadowpeft_tokens_per_pass") >= 1.0


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 5e-3])
def test_the_smallest_temperatures_draft_the_likeliest_tokens(eager, temperature):
    engine = engine_of(attached(), speculative=True)
    greedy = ask(engine, "stand up now", "deep", max_tokens=16)
    drawn = ask(engine, "stand up now", "deep", max_tokens=16, temperature=temperature, seed=1)
    assert drawn.text == greedy.text
    assert drawn.wait().drafted > 0
    assert engine.stop()


def test_weights_that_are_no_numbers_fail_their_own_request_alone(monkeypatch):
    backend = attached()
    with torch.no_grad():
        find_hub(backend.model).shadowpeft_backbone["late"].layers[0].mlp.up_proj.weight.fill_(torch.nan)
    engine = engine_of(backend, speculative=True)
    bad, good = ask(engine, "sit", "late", max_tokens=8), ask(engine, "sit", "default", max_tokens=8)
    with pytest.raises(NumbersError):
        bad.wait()
    assert good.wait().new_tokens > 0
    assert engine.stop()


@pytest.mark.parametrize("backend", ["detached", "several"])
def test_what_has_no_shadow_drafts_nothing(backend):
    made = detached() if backend == "detached" else MultiBackend([detached("one"), detached("two")])
    name = made.names[0]
    assert made.gate(name, sampled=False) is None
    engine = engine_of(made, speculative=True)
    assert ask(engine, "sit", name, max_tokens=8).wait().drafted == 0
    assert engine.stop()


def test_a_gate_is_priced_by_the_adapter_and_never_by_its_neighbours():
    backend = attached()
    prices = {name: backend.gate(name, sampled=False).draft_cost for name in ("default", "deep")}
    assert prices["deep"] > prices["default"]
    assert prices["default"] == Speculation().gate(backend._inner).draft_cost, "of one row, however many there are"
    assert backend.gate("base", sampled=True) is None


def test_the_engine_computes_thin_products_while_it_runs(monkeypatch):
    monkeypatch.setattr(thin, "pays_here", lambda: True)
    monkeypatch.setattr(thin, "_SMALLEST", 1)
    backend = attached()
    head = backend._inner.get_output_embeddings()
    engine = engine_of(backend)
    texts = [ask(engine, prompt, "default", max_tokens=12) for prompt in PROMPTS[:3]]
    found = [reader.text for reader in texts]
    assert "forward" in vars(head)
    assert engine.stop()
    assert "forward" not in vars(head)
    plain = engine_of(attached())
    monkeypatch.setattr(thin, "pays_here", lambda: False)
    assert [ask(plain, prompt, "default", max_tokens=12).text for prompt in PROMPTS[:3]] == found
    assert plain.stop()
    assert torch.is_tensor(head.weight)
