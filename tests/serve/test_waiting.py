"""Nobody waits for long: requests join running ones, adapters take turns, long prompts are read in pieces, a row fails alone.

The engine is driven step by step, so that everything is counted in steps and passes and nothing depends on a clock.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serving import Reader, attached, detached
from several import several
from shadowpeft.serve.backend import Attached
from shadowpeft.serve.batch import NumbersError
from shadowpeft.serve.engine import Engine, EngineLimits
from shadowpeft.serve.requests import Failed, QueueFullError, SamplingParams
from shadowpeft.serve.sampling import sample_token
from shadowpeft.serve.scheduling import group_by_length
from shadowpeft.serve.several_backends import MultiBackend
from tiny import base, tokenizer

LONG = 500
NAMES = ("default", "late", "deep", "base")


class Stepped:
    """An engine without a thread. Columns and rows of every pass are recorded."""

    def __init__(self, backend, **limits):
        self.engine = Engine(backend, EngineLimits(**limits))
        self.shapes = []
        opened = backend.open

        def open_and_record(names):
            session = opened(names)
            self.record(session)
            return session

        backend.open = open_and_record

    def record(self, session):
        forward = session.forward

        def recorded(ids, mask):
            self.shapes.append(tuple(ids.shape))
            return forward(ids, mask)

        session.forward = recorded

    def send(self, ids, name, n, until=None, **sampling):
        reader = Reader()
        params = SamplingParams(max_tokens=n, **sampling)
        reader.request = self.engine.submit(list(ids), name, params, reader, until)
        return reader

    def steps_until(self, condition, most=5000):
        for step in range(most + 1):
            if condition():
                return step
            self.engine.step()
        raise AssertionError("it did not happen")

    def finish(self, *readers):
        return self.steps_until(lambda: all(reader.done.is_set() for reader in readers))


def prompt(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, 60, (n,), generator=generator).tolist()


def endless(**overrides):
    backend = attached(max_position_embeddings=4096, **overrides)
    backend.stop_token_ids = frozenset()
    return backend


def naive(backend, ids, name, n):
    """Greedy tokens of one row alone, uncached."""
    model, new = backend.model, []
    model.set_adapter("default" if name == "base" else name)
    for _ in range(n):
        with torch.no_grad():
            if name == "base":
                with model.disable_adapter():
                    logits = model(input_ids=torch.tensor([ids + new])).logits
            else:
                logits = model(input_ids=torch.tensor([ids + new])).logits
        new.append(int(logits[0, -1].argmax()))
    return new


def ids_of(reader):
    return [token.id for token in reader.tokens]


def test_a_short_request_beside_four_long_ones_starts_at_once_and_is_hardly_slower():
    alone = Stepped(endless())
    lone = alone.send(prompt(8), "late", 12)
    alone.finish(lone)
    lone_passes = alone.engine.steps

    stepped = Stepped(endless())
    long = []
    for i in range(4):  # at different times, so that they are not one batch from the start
        long.append(stepped.send(prompt(20 + i, seed=i), NAMES[i], LONG))
        for _ in range(15):
            stepped.engine.step()
    passes = stepped.engine.steps
    short = stepped.send(prompt(8), "late", 12)
    assert stepped.steps_until(lambda: bool(short.tokens)) <= 2
    stepped.finish(short)
    assert stepped.engine.steps - passes <= 3 * lone_passes
    assert not any(reader.done.is_set() for reader in long)
    assert ids_of(short) == ids_of(lone)


def test_every_free_row_is_used_whatever_runs():
    stepped = Stepped(endless(), max_num_seqs=16, batches=2)
    readers = []
    for i in range(16):
        readers.append(stepped.send(prompt(3 + 40 * (i % 3), seed=i), "default", 40))
        stepped.engine.step()
    assert stepped.engine.running == 16
    assert stepped.engine.waiting == 0
    stepped.finish(*readers)


def test_adapters_take_turns():
    stepped = Stepped(endless(), max_num_seqs=4)
    crowd = [stepped.send(prompt(5, seed=i), "default", 10) for i in range(40)]
    stepped.engine.step()
    late = stepped.send(prompt(5), "late", 10)
    stepped.finish(late)
    assert sum(reader.done.is_set() for reader in crowd) <= 8  # two rounds of four rows, not all ten
    stepped.finish(*crowd)


def test_a_full_queue_of_one_adapter_does_not_shut_out_another():
    stepped = Stepped(endless(), queue=2, max_num_seqs=1)
    for i in range(3):
        stepped.send(prompt(5, seed=i), "default", 2)
    with pytest.raises(QueueFullError, match="3 requests are waiting"):
        stepped.send(prompt(5), "default", 2)
    other = stepped.send(prompt(5), "late", 2)
    with pytest.raises(QueueFullError, match="4 requests are waiting"):
        stepped.send(prompt(5), "late", 2)
    stepped.finish(other)


def test_a_long_prompt_is_read_in_pieces_beside_its_neighbours():
    def run(with_long):
        stepped = Stepped(endless())
        long = [stepped.send(prompt(2000), "default", 2)] if with_long else []
        short = [stepped.send(prompt(20, seed=i), "late", 20) for i in range(8)]
        steps = stepped.finish(*short)
        work = sum(rows * columns for rows, columns in stepped.shapes)
        stepped.finish(*long)
        return steps, work, sum(rows * columns for rows, columns in stepped.shapes)

    steps, work, _ = run(False)
    beside, work_beside, whole = run(True)
    assert beside <= steps + 2
    assert work_beside <= work + beside * 128  # a piece of the long prompt a step, and no padding to its length
    assert whole < 2000 + 2 * work


def test_short_prompts_are_not_padded_to_long_ones():
    requests = [Reader() for _ in range(9)]
    for i, request in enumerate(requests):
        request.ids = prompt(2000 if i == 4 else 20 + i)
    groups = group_by_length(requests)
    assert sorted(len(group) for group in groups) == [1, 8]
    for group in groups:
        lengths = [len(request.ids) for request in group]
        assert max(lengths) * len(lengths) <= 2 * sum(lengths) or max(lengths) <= 64


def test_a_long_answer_that_ends_leaves_no_padding_behind():
    stepped = Stepped(endless())
    long = stepped.send(prompt(200), "default", 3)
    short = stepped.send(prompt(5), "late", 30)
    stepped.finish(long)
    stepped.engine.step()
    (batch,) = stepped.engine._batches
    assert batch.columns <= 5 + 30
    stepped.finish(short)
    assert ids_of(short) == naive(stepped.engine.backend, prompt(5), "late", 30)


@pytest.fixture(scope="module")
def shared():
    return endless()


PLAN = st.lists(
    st.tuples(
        st.integers(0, 4),  # steps before it comes
        st.sampled_from(NAMES),
        st.integers(1, 90),  # tokens of its prompt
        st.integers(1, 12),  # tokens of its answer
        st.booleans(),  # whether its client leaves
    ),
    min_size=2,
    max_size=7,
)
_known = {}


@settings(max_examples=12, deadline=None)
@given(plan=PLAN, rows=st.integers(1, 5), batches=st.integers(1, 3), piece=st.sampled_from([1, 7, 128]))
def test_any_mixture_of_comings_and_goings_gives_everybody_the_lone_answer(shared, plan, rows, batches, piece):
    stepped = Stepped(shared, max_num_seqs=rows, batches=batches, prefill_tokens=piece)
    sent = []
    for pause, name, length, n, leaves in plan:
        for _ in range(pause):
            stepped.engine.step()
        reader = stepped.send(prompt(length, seed=length), name, n)
        sent.append((reader, name, length, n))
        if leaves:
            stepped.engine.step()
            reader.request.cancelled = True
    staying = [job for job in sent if not job[0].request.cancelled]
    stepped.finish(*(reader for reader, *_ in staying))
    for reader, name, length, n in staying:
        key = name, length
        if len(_known.get(key, ())) < n:
            _known[key] = naive(shared, prompt(length, seed=length), name, 12)
        assert ids_of(reader) == _known[key][:n]


@pytest.mark.parametrize("kind", ["mistral", "gemma3", "gpt2", "qwen3_next"])
def test_joined_rows_of_other_kinds_of_caches_are_right(kind):
    """Sliding windows of 6 tokens, learned positions, and recurrent layers, which take whole prompts only."""
    model = several(base(kind), {"default": {}, "late": {"variant": "peft", "shadow_alpha": 0.9}})
    backend = Attached(model, tokenizer(), {"default": "a", "late": "b"}, "base")
    backend.stop_token_ids = frozenset()
    stepped = Stepped(backend, prefill_tokens=8)
    jobs = [("default", 4, 14), ("late", 11, 9), ("base", 7, 12), ("late", 2, 3), ("default", 70, 6)]
    readers = []
    for name, length, n in jobs:
        readers.append(stepped.send(prompt(length, seed=length), name, n))
        stepped.engine.step()
        stepped.engine.step()
    stepped.finish(*readers)
    assert max(rows for rows, _ in stepped.shapes) >= 2  # they were joined
    for reader, (name, length, n) in zip(readers, jobs, strict=True):
        assert ids_of(reader) == naive(backend, prompt(length, seed=length), name, n)


def test_rows_of_several_backends_join_too():
    backends = [endless(), detached("edge", max_position_embeddings=4096)]
    backends[1].stop_token_ids = frozenset()
    backend = MultiBackend(backends)
    backend.stop_token_ids = frozenset()
    stepped = Stepped(backend)
    jobs = [("default", 30, 20), ("edge", 4, 9), ("late", 12, 14), ("edge", 40, 11), ("edge", 3, 4)]
    readers = []
    for name, length, n in jobs:
        readers.append(stepped.send(prompt(length, seed=length), name, n))
        stepped.engine.step()
    assert len(stepped.engine._batches) == 1
    stepped.finish(*readers)
    for reader, (name, length, n) in zip(readers, jobs, strict=True):
        alone = Stepped(backends[name == "edge"])
        lone = alone.send(prompt(length, seed=length), name, n)
        alone.finish(lone)
        assert ids_of(reader) == ids_of(lone)


# ------------------------------------------------------------------------------------------------------ a row fails alone


def breaking(backend, bad, at=1):
    """``backend``, whose passes fail from the ``at``-th on if the row with the token ``bad`` is among them."""
    opened, passes = backend.open, [0]

    def wrap(session, seen):
        forward, restart, join = session.forward, session.restart, session.join

        def broken(ids, mask):
            passes[0] += 1
            seen[0] = seen[0] or bad in ids.flatten().tolist()
            if seen[0] and passes[0] >= at:
                raise RuntimeError("broken")
            return forward(ids, mask)

        def again(row):
            return wrap(restart(row), [False])

        def joined(other):
            seen[0] = seen[0] or other.seen[0]
            join(other)

        session.forward, session.restart, session.join, session.seen = broken, again, joined, seen
        return session

    backend.open = lambda names: wrap(opened(names), [False])
    return backend


@pytest.mark.parametrize("at", [1, 5])
def test_one_row_that_makes_a_pass_fail_fails_alone(at):
    backend = breaking(endless(), bad=3, at=at)
    stepped = Stepped(backend)
    good = [stepped.send(prompt(6, seed=i), name, 12) for i, name in enumerate(NAMES)]
    bad = stepped.send([5, 3, 8, 9], "late", 12)
    stepped.finish(bad, *good)
    assert isinstance(bad.end, Failed)
    for i, (reader, name) in enumerate(zip(good, NAMES, strict=True)):
        assert reader.wait().reason == "length"
        assert ids_of(reader) == naive(backend, prompt(6, seed=i), name, 12)


def test_a_row_of_numbers_that_are_none_fails_alone():
    backend = endless()
    opened = backend.open

    def damaged(names):
        session = opened(names)
        forward = session.forward

        def forward_with_nan(ids, mask):
            logits = forward(ids, mask)
            logits[(ids == 3).any(1)] = torch.nan
            return logits

        session.forward = forward_with_nan
        return session

    backend.open = damaged
    stepped = Stepped(backend)
    bad, good = stepped.send([5, 3, 8], "late", 5), stepped.send([5, 7, 8], "late", 5)
    stepped.finish(bad, good)
    assert isinstance(bad.end.error, NumbersError)
    assert ids_of(good) == naive(backend, [5, 7, 8], "late", 5)


def test_a_reader_that_fails_takes_nobody_along():
    stepped = Stepped(endless())

    def until(pieces, _):
        raise ValueError("a reader's own fault")

    bad, good = stepped.send(prompt(5), "late", 5, until), stepped.send(prompt(5), "late", 5)
    stepped.finish(bad, good)
    assert isinstance(bad.end.error, ValueError)
    assert len(good.tokens) == 5


# --------------------------------------------------------------------------------------------------- numbers at the edge


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.floats(-1e6, 1e6, width=32, allow_subnormal=False), min_size=2, max_size=6, unique=True),
    temperature=st.sampled_from([5e-324, 1e-310, 1e-307]) | st.floats(1e-307, 1e-30, allow_subnormal=False),
    top_p=st.sampled_from([5e-324, 1e-310]) | st.floats(1e-307, 1.0, allow_subnormal=False),
    seed=st.integers(0, 9),
)
def test_the_smallest_temperatures_are_greedy(logits, temperature, top_p, seed):
    values = torch.tensor(logits)
    gap = values.double().sort(descending=True).values
    params = SamplingParams(temperature=temperature, top_p=top_p)
    chosen = sample_token(values, params, torch.Generator().manual_seed(seed))
    if float(gap[0] - gap[1]) > 100 * temperature:
        assert chosen == int(values.argmax())


def test_impossible_tokens_are_never_drawn_at_any_temperature():
    logits = torch.tensor([-torch.inf, 1.0, -torch.inf, 1.0])
    for temperature in (5e-324, 1e-308, 1e-3, 1.0, 1e300):
        params = SamplingParams(temperature=temperature)
        drawn = {sample_token(logits, params, torch.Generator().manual_seed(i)) for i in range(20)}
        assert drawn == ({1, 3} if temperature >= 1e-307 else {1})
