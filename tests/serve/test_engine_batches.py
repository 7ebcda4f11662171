"""Concurrent requests get the answers they would get alone: batches, adapters, sampling, stop texts, cancelling, swaps."""

import threading
import time

import pytest
import torch

from serving import Reader, ask, attached, detached, engine_of
from shadowpeft.decode import decode
from shadowpeft.errors import ConfigError, DataError
from shadowpeft.serve import engine as module
from shadowpeft.serve.batch import Batch
from shadowpeft.serve.engine import Engine
from shadowpeft.serve.requests import OverdueError, QueueFullError, SamplingParams, StoppedError
from shadowpeft.serve.router import Scores
from shadowpeft.serve.sampling import sample_token
from shadowpeft.serve.sessions import Session

PROMPTS = ["sit", "a much longer request, please", "x", "站起来", "another one of middle length", "1 2 3"]


@pytest.fixture(scope="module")
def backend():
    return attached()


@pytest.fixture
def engine(backend):
    made = engine_of(backend)
    yield made
    assert made.stop(20)


def naive(backend, prompt, name, n):
    """Greedy tokens of the model alone, uncached, without padding, one row; the end token is not part of them."""
    ids = backend.tokenizer(prompt, add_special_tokens=False).input_ids
    made, logprobs = [], []
    model = backend.model
    if name != "base":
        model.set_adapter(name)
    for _ in range(n):
        with torch.no_grad():
            if name == "base":
                with model.disable_adapter():
                    logits = model(input_ids=torch.tensor([ids + made])).logits[0, -1]
            else:
                logits = model(input_ids=torch.tensor([ids + made])).logits[0, -1]
        token = int(logits.argmax())
        if token in backend.stop_token_ids:
            break
        made.append(token)
        logprobs.append(float(logits.double().log_softmax(-1)[token]))
    return made, logprobs


def test_concurrent_mixed_requests_equal_the_naive_loop_one_by_one(backend, engine):
    jobs = [(p, name, 4 + (i * 5 + j) % 11) for i, p in enumerate(PROMPTS) for j, name in enumerate(backend.names)]
    expected = [naive(backend, *job) for job in jobs]
    readers: list[Reader] = [Reader()] * len(jobs)

    def send(i):
        prompt, name, n = jobs[i]
        readers[i] = ask(engine, prompt, name, max_tokens=n)

    threads = [threading.Thread(target=send, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for reader, (made, logprobs), (_, _, n) in zip(readers, expected, jobs, strict=True):
        end = reader.wait()
        assert [t.id for t in reader.tokens] == made
        assert [t.logprob for t in reader.tokens] == pytest.approx(logprobs, abs=1e-4)
        assert reader.text == decode(backend.tokenizer, made)
        assert end.reason == ("length" if len(made) == n else "stop")
        assert end.new_tokens == len(made) + (end.reason == "stop")
    assert {r.wait().reason for r in readers} == {"length", "stop"}  # rows left batches at different times
    assert len({r.text for r in readers}) > len(jobs) // 2
    assert engine.steps < engine.tokens / 2  # it did run batches


def test_requests_join_while_others_run(backend):
    engine = engine_of(backend, max_num_seqs=3, batches=3, gather_seconds=0.0)
    long = ask(engine, PROMPTS[1], "default", max_tokens=60, until=lambda pieces, _: len(pieces) >= 60)
    short = [ask(engine, p, "late", max_tokens=3) for p in PROMPTS]
    assert [[t.id for t in r.tokens] for r in short if r.wait()] == [naive(backend, p, "late", 3)[0] for p in PROMPTS]
    long.wait()
    assert [t.id for t in long.tokens] == naive(backend, PROMPTS[1], "default", 60)[0]
    assert engine.stop(20)


def test_detached_engine_equals_the_naive_loop():
    backend = detached()
    engine = engine_of(backend)
    readers = [ask(engine, p, "edge", max_tokens=8) for p in PROMPTS]
    for prompt, reader in zip(PROMPTS, readers, strict=True):
        ids, made = backend.tokenizer(prompt, add_special_tokens=False).input_ids, []
        for _ in range(8):
            logits = backend.model(input_ids=torch.tensor([ids + made])).logits[0, -1]
            if int(logits.argmax()) in backend.stop_token_ids:
                break
            made.append(int(logits.argmax()))
        reader.wait()
        assert [t.id for t in reader.tokens] == made
    engine.stop(20)


def test_scores_are_those_of_float64(backend, engine):
    reader = ask(engine, "sit", "deep", max_tokens=1, top_logprobs=3)
    reader.wait()
    backend.model.set_adapter("deep")
    ids = backend.tokenizer("sit", add_special_tokens=False).input_ids
    log_p = backend.model(input_ids=torch.tensor([ids])).logits[0, -1].detach().double().log_softmax(-1)
    best = log_p.sort(descending=True)
    token = reader.tokens[0]
    assert token.logprob == pytest.approx(float(best.values[0]), abs=1e-4)
    assert token.margin == pytest.approx(float(best.values[0] - best.values[1]), abs=1e-4)
    assert token.entropy == pytest.approx(float(-(log_p.exp() * log_p).sum()), abs=1e-4)
    assert [p for _, p in token.top] == pytest.approx(best.values[:3].tolist(), abs=1e-4)
    assert token.top[0][0] == token.raw


def test_a_seed_gives_the_same_sample_alone_and_in_a_crowd(backend, engine):
    options = {"max_tokens": 12, "temperature": 1.5, "top_p": 0.9}
    alone = ask(engine, "sit", "default", seed=7, **options)
    alone.wait()
    crowd = [ask(engine, p, "deep", seed=3, **options) for p in PROMPTS]
    again = ask(engine, "sit", "default", seed=7, **options)
    other = ask(engine, "sit", "default", seed=8, **options)
    [r.wait() for r in (*crowd, again, other)]
    assert [t.id for t in again.tokens] == [t.id for t in alone.tokens]
    assert [t.id for t in other.tokens] != [t.id for t in alone.tokens]


def test_draws_have_the_models_distribution():
    logits = torch.tensor([1.0, 3.0, 2.0, -1.0])
    generator = torch.Generator().manual_seed(0)
    n = 5000
    for temperature, top_p in ((1.0, 1.0), (2.0, 1.0), (1.0, 0.8)):
        sampling = SamplingParams(temperature=temperature, top_p=top_p)
        found = (
            torch.bincount(torch.tensor([sample_token(logits, sampling, generator) for _ in range(n)]), minlength=4) / n
        )
        p = (logits / temperature).softmax(-1)
        if top_p < 1:  # 0.643 + 0.236 reach 0.8: tokens 1 and 2 are left
            p = torch.tensor([0.0, p[1], p[2], 0.0]) / (p[1] + p[2])
        assert torch.allclose(found, p, atol=4 * 0.5 / n**0.5)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_stop_texts_cut_the_answer_and_never_show(backend, engine, length):
    whole = ask(engine, PROMPTS[1], "late", max_tokens=14).text
    stop = whole[5 : 5 + length]
    cut = ask(engine, PROMPTS[1], "late", max_tokens=14, stop=("~~never~~", stop))
    assert cut.text == whole[: whole.index(stop)]
    assert cut.wait().reason == "stop"
    held = ask(engine, PROMPTS[1], "late", max_tokens=14, stop=(whole[-2:] + "and more",))
    assert held.text == whole  # what could have become a stop text is given at the end


def test_characters_are_given_whole(backend):
    class Spelling:
        """Says one text whatever it is asked, a byte a token."""

        def __init__(self, inner, text):
            self.inner = inner
            self.said = inner.tokenizer(text, add_special_tokens=False).input_ids

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def open(self, names):
            said = iter(self.said)

            class Said(Session):
                def forward(self, ids, mask):
                    return torch.nn.functional.one_hot(torch.tensor([next(said)]), 260).float() * 50

                keep = restart = None

            return Said()

    text = "狗 sits é!"
    engine = engine_of(Spelling(backend, text))
    reader = ask(engine, "x", "default", max_tokens=len(text.encode()))
    assert reader.text == text
    assert all("\ufffd" not in t.text for t in reader.tokens)
    assert [t.text for t in reader.tokens][:4] == ["", "", "狗", " "]
    engine.stop(5)


def test_until_ends_an_answer_with_what_it_saw(engine):
    seen = []

    def until(pieces, scores):
        seen.append((list(pieces), Scores(*(list(x) for x in vars(scores).values()))))
        return len(pieces) == 3

    reader = ask(engine, PROMPTS[1], "late", until, max_tokens=14)
    assert reader.wait().reason == "until"
    assert len(reader.tokens) == 3
    assert seen[-1][0] == [t.piece for t in reader.tokens]
    assert seen[-1][1].margin == [t.margin for t in reader.tokens]


def test_a_cancelled_request_leaves_and_its_neighbours_stay_right(backend, engine):
    started = threading.Event()

    def until(pieces, _):
        started.set()
        return False

    gone = ask(engine, "x", "default", until, max_tokens=200)
    stays = ask(engine, PROMPTS[4], "deep", max_tokens=10)
    assert started.wait(20)
    gone.request.cancelled = True
    stays.wait()
    assert [t.id for t in stays.tokens] == naive(backend, PROMPTS[4], "deep", 10)[0]
    for _ in range(200):
        if engine.running == 0:
            break
        threading.Event().wait(0.02)
    assert engine.running == 0
    assert len(gone.tokens) < 200 or gone.done.is_set()


def test_a_full_queue_refuses_and_serves_those_it_took(backend):
    engine = Engine(backend)  # not started: everything waits
    engine.limits = type(engine.limits)(queue=1, max_num_seqs=2)  # both rows are free
    readers = [ask(engine, "sit", "default", max_tokens=2) for _ in range(3)]
    with pytest.raises(QueueFullError, match="3 requests are waiting"):
        ask(engine, "sit", "default")
    readers[0].request.cancelled = True
    readers.append(ask(engine, "sit", "default", max_tokens=2))  # the cancelled one made room
    engine.start()
    assert len({r.text for r in readers[1:]}) == 1
    assert not readers[0].tokens
    engine.stop(20)


def test_sizes_are_checked(engine):
    with pytest.raises(ConfigError, match=r"'defualt' is not loaded .did you mean 'default'"):
        ask(engine, "sit", "defualt")
    with pytest.raises(DataError, match="no tokens"):
        ask(engine, "", "default")
    with pytest.raises(DataError, match="max_tokens is 4097 but may be 4096"):
        ask(engine, "sit", "default", max_tokens=4097)
    with pytest.raises(DataError, match="longer than the model's context length of 256"):
        ask(engine, "x" * 250, "default", max_tokens=7)
    with pytest.raises(DataError, match="4097 tokens but may have 4096"):
        ask(engine, "x" * 4097, "default", max_tokens=7)


def test_a_failing_batch_fails_its_requests_alone(backend):
    class Breaking:
        def __getattr__(self, name):
            return getattr(backend, name)

        def open(self, names):
            session = backend.open(names)
            if "late" in names:
                session.forward = lambda *_: (_ for _ in ()).throw(RuntimeError("broken"))
            return session

    engine = engine_of(Breaking(), gather_seconds=0.0)
    bad = ask(engine, "sit", "late", max_tokens=3)
    with pytest.raises(RuntimeError, match="broken"):
        bad.wait()
    good = ask(engine, "sit", "default", max_tokens=3)
    good.wait()
    assert [t.id for t in good.tokens] == naive(backend, "sit", "default", 3)[0]
    assert engine.stop(20)


def test_what_fails_beside_a_pass_fails_its_requests_and_no_others(backend, monkeypatch):
    """Rows that cannot be tried alone either; caches that cannot be joined."""
    engine = engine_of(backend, gather_seconds=0.2)
    with monkeypatch.context() as broken:
        for name in ("forward_step", "alone"):
            broken.setattr(Batch, name, lambda *_: (_ for _ in ()).throw(RuntimeError("no memory")))
        for reader in [ask(engine, "sit", "default", max_tokens=3) for _ in range(2)]:
            with pytest.raises(RuntimeError, match="no memory"):
                reader.wait()
    with monkeypatch.context() as broken:
        broken.setattr(module, "join_batches", lambda *_: (_ for _ in ()).throw(RuntimeError("no room")))
        with pytest.raises(RuntimeError, match="no room"):
            ask(engine, "sit", "default", max_tokens=3).wait()
    good = ask(engine, "sit", "default", max_tokens=3)
    good.wait()
    assert [t.id for t in good.tokens] == naive(backend, "sit", "default", 3)[0]
    assert engine.stop(20)


def test_an_engine_that_breaks_tells_everybody(backend, monkeypatch, caplog):
    engine = engine_of(backend, gather_seconds=0.2)
    monkeypatch.setattr(engine, "step", lambda: (_ for _ in ()).throw(RuntimeError("the device is gone")))
    readers = [ask(engine, "sit", "default", max_tokens=3) for _ in range(2)]
    for reader in readers:
        with pytest.raises(StoppedError, match="the engine has stopped after an error"):
            reader.wait()
    assert not engine.ready()
    assert "the device is gone" in caplog.text
    with pytest.raises(StoppedError, match="restart the server"):
        ask(engine, "sit", "default")
    assert engine.stop(20)


def test_stopping_finishes_what_runs_and_takes_nothing_new(backend):
    engine = engine_of(backend)
    reader = ask(engine, PROMPTS[1], "late", max_tokens=14)
    assert engine.stop(20)
    assert [t.id for t in reader.tokens] == naive(backend, PROMPTS[1], "late", 14)[0]
    with pytest.raises(StoppedError):
        ask(engine, "sit", "default")


def test_stopping_in_time_fails_what_is_left(backend):
    engine = engine_of(backend)
    release = threading.Event()

    def until(pieces, _):
        release.wait(2)
        return False

    slow = ask(engine, PROMPTS[1], "late", until, max_tokens=14)
    waiting = ask(engine, PROMPTS[1], "late", max_tokens=14)
    threading.Timer(0.5, release.set).start()
    assert not engine.stop(0.1)
    for reader in (slow, waiting):
        if reader.request.cancelled:
            with pytest.raises(StoppedError):
                reader.wait()
    assert slow.request.cancelled


def test_swap_and_rollback_while_answers_are_made(tmp_path):
    backend = attached()
    model = backend.model
    model.save_pretrained(tmp_path / "a")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "shadowpeft_injection.late" in name:
                parameter.mul_(-3)
    model.save_pretrained(tmp_path / "b")
    a, b = str(tmp_path / "a" / "late"), str(tmp_path / "b" / "late")
    backend.versions["late"] = []
    backend.swap("late", a)
    expected_a = naive(backend, PROMPTS[1], "late", 14)[0]
    engine = engine_of(backend)
    started, release = threading.Event(), threading.Event()

    def until(pieces, _):
        started.set()
        release.wait(20)
        return False

    running = ask(engine, PROMPTS[1], "late", until, max_tokens=14)
    assert started.wait(20)
    backend.swap("late", b)  # in the middle of an answer
    release.set()
    after = ask(engine, PROMPTS[1], "late", max_tokens=14)
    running.wait(), after.wait()
    expected_b = naive(backend, PROMPTS[1], "late", 14)[0]
    assert expected_a != expected_b
    assert [t.id for t in running.tokens] == expected_a
    assert [t.id for t in after.tokens] == expected_b
    assert backend.rollback("late") == a
    back = ask(engine, PROMPTS[1], "late", max_tokens=14)
    back.wait()
    assert [t.id for t in back.tokens] == expected_a
    with pytest.raises(ConfigError, match="nothing to roll back"):
        backend.rollback("late")
    with pytest.raises(ConfigError, match="cannot be swapped"):
        backend.swap("base", a)
    assert [version.folder for version in backend.versions["late"]] == [a]
    engine.stop(20)


class Slow:
    """A backend whose passes take a while and whose answers do not end by themselves."""

    stop_token_ids = frozenset()

    def __init__(self, inner, seconds):
        self.inner, self.seconds = inner, seconds

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def open(self, names):
        session, seconds = self.inner.open(names), self.seconds

        class Late(Session):
            def forward(self, ids, mask):
                time.sleep(seconds)
                return session.forward(ids, mask)

            def keep(self, rows):
                session.keep(rows)

            restart = None

        return Late()


def test_an_answer_ends_in_time_with_what_it_has(backend):
    endless = engine_of(Slow(backend, 0.0))
    unhurried = ask(endless, PROMPTS[1], "late", max_tokens=14)
    assert unhurried.wait().reason == "length"
    assert endless.stop(20)
    whole = [t.id for t in unhurried.tokens]
    engine = engine_of(Slow(backend, 0.05), answer_seconds=0.3)
    reader = ask(engine, PROMPTS[1], "late", max_tokens=14)
    finish = reader.wait()
    assert finish.reason == "time"
    made = [t.id for t in reader.tokens]
    assert 1 <= len(made) < len(whole)
    assert made == whole[: len(made)]
    assert finish.new_tokens == len(made)
    assert engine.stop(20)


def test_a_request_that_has_no_turn_in_time_fails(backend):
    engine = engine_of(Slow(backend, 0.15), max_num_seqs=1, answer_seconds=0.4)
    first = ask(engine, PROMPTS[1], "late", max_tokens=14)
    second = [ask(engine, "x", "late", max_tokens=2) for _ in range(8)]
    assert first.wait().reason == "time"
    with pytest.raises(OverdueError, match=r"waited 0\.4 s"):
        second[-1].wait()
    assert engine.waiting == 0
    assert engine.stop(20)
