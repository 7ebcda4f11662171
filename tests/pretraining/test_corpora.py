"""Streams of text: every format, every place to stop at, damaged shards, shares of a mixture, packing."""

import gzip
import json
import random

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from shadowpeft.data.corpora import FileSource, HubSource, find_shards, stable_hash
from shadowpeft.data.packing import Batches, Mixture, PackedStream, StreamState, collate
from shadowpeft.errors import ConfigError, DataError

END = 0


def encode(text):
    return [1 + ord(letter) % 50 for letter in text]


def texts(n, seed=0):
    draw = random.Random(seed)
    return [f"d{i} " + "x" * draw.randrange(1, 40) for i in range(n)]


def write(folder, kind, shards):
    """``shards``: a list of lists of texts."""
    folder.mkdir()
    for number, rows in enumerate(shards):
        lines = "".join(json.dumps({"text": t, "other": 1}) + "\n" for t in rows)
        if kind == "jsonl":
            (folder / f"{number}.jsonl").write_text(lines)
        elif kind == "jsonl.gz":
            with gzip.open(folder / f"{number}.jsonl.gz", "wt") as handle:
                handle.write(lines)
        elif kind == "txt":
            (folder / f"{number}.txt").write_text("\n\n".join(rows) + "\n")
        else:
            parquet.write_table(pa.table({"text": rows}), folder / f"{number}.parquet", row_group_size=3)
    return find_shards(str(folder), None, "train")


def one_pass(source):
    found = []
    while (item := source.next()) is not None:
        found.append(item)
    return found


KINDS = ("jsonl", "jsonl.gz", "txt", "parquet")


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_stopped_anywhere_goes_on_with_the_next_document(tmp_path, kind):
    shards = [texts(8), texts(1, 1), texts(5, 2)]
    files = write(tmp_path / "c", kind, shards)
    whole = FileSource("c", files)
    first, second = one_pass(whole), one_pass(whole)
    assert sorted(text for text, _, _ in first) == sorted(text for shard in shards for text in shard)
    assert sorted(first) == sorted(second)
    assert whole.passes == 2
    for stop in range(len(first) + 1):
        source = FileSource("c", files)
        assert [source.next() for _ in range(stop)] == first[:stop]
        again = FileSource("c", files)
        again.load(json.loads(json.dumps(source.state())))
        assert one_pass(again) == first[stop:]
        assert one_pass(again) == second
    for text, shard, row in first:  # the place that a message would name is right
        line = shards[shard].index(text) + 1
        assert row == (2 * line - 1 if kind == "txt" else line)


def test_each_pass_has_another_order_of_shards_and_the_seed_decides(tmp_path):
    files = write(tmp_path / "c", "jsonl", [[f"shard {i}"] for i in range(6)])
    source = FileSource("c", files, seed=3)
    orders = [[shard for _, shard, _ in one_pass(source)] for _ in range(4)]
    assert len({tuple(order) for order in orders}) > 1
    assert [shard for _, shard, _ in one_pass(FileSource("c", files, seed=3))] == orders[0]
    assert [shard for _, shard, _ in one_pass(FileSource("c", files, shuffle=False))] == list(range(6))


def test_a_streamed_data_set_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    shards = [texts(6), texts(5, 1)]
    write(tmp_path / "c", "jsonl", shards)
    source = HubSource("c", str(tmp_path / "c"))
    first, second = one_pass(source), one_pass(source)
    assert [text for text, _, _ in first] == shards[0] + shards[1]
    assert first == second
    for stop in (0, 3, 6, 8, 11):
        source = HubSource("c", str(tmp_path / "c"))
        assert [source.next() for _ in range(stop)] == first[:stop]
        again = HubSource("c", str(tmp_path / "c"))
        again.load(json.loads(json.dumps(source.state())))
        assert one_pass(again) == first[stop:]
    with pytest.raises(DataError, match="row 1 has no text under 'body'; its fields are text, other"):
        HubSource("c", str(tmp_path / "c"), field="body").next()
    with pytest.raises(DataError, match="cannot be opened"):
        HubSource("c", str(tmp_path / "nothing"))


def damage(file):
    """Break the shard after its first documents."""
    if file.suffix == ".jsonl":
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join(lines[:2]) + '{"text": "cut\n' + "".join(lines[3:]))
    else:
        file.write_bytes(file.read_bytes()[:-12])


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_a_damaged_shard_is_named_and_skipped_if_so_configured(tmp_path, kind):
    files = write(tmp_path / "c", kind, [texts(6), texts(4, 1)])
    damage(files[0])
    with pytest.raises(DataError, match=rf"corpus 'c': shard '.*0\.{kind}' cannot be read .*on_bad_shard: skip"):
        one_pass(FileSource("c", files))
    said = []
    source = FileSource("c", files, on_bad_shard="skip", warn=said.append)
    found = {text for text, shard, _ in one_pass(source) if shard == 1}
    assert found == set(texts(4, 1))
    one_pass(source)
    assert len(said) == len(source.skipped) == 1
    assert str(files[0]) in said[0]
    again = FileSource("c", files, on_bad_shard="skip", warn=said.append)
    again.load(source.state())
    assert again.skipped == source.skipped


def test_what_editors_and_systems_leave_in_files_is_no_text(tmp_path):
    """Byte-order marks, endings in capitals, hidden files, null."""
    folder = tmp_path / "c"
    folder.mkdir()
    (folder / "A.TXT").write_bytes("\ufefffirst\n\nsecond\n".encode())
    (folder / "b.jsonl").write_bytes('\ufeff{"text": "third"}\n{"text": null}\n{"text": "fourth"}\n'.encode())
    (folder / ".c.txt").write_text("not this")
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / ".ipynb_checkpoints" / "d.txt").write_text("nor this")
    files = find_shards(str(folder), None, "train")
    assert [file.name for file in files] == ["A.TXT", "b.jsonl"]
    found = one_pass(FileSource("c", files, shuffle=False))
    assert [text for text, _, _ in found] == ["first", "second", "third", "", "fourth"]
    twice = folder / "twice.jsonl"
    twice.write_text('{"text": "a", "text": "b"}\n')
    with pytest.raises(DataError, match="names the key 'text' twice"):
        FileSource("c", [twice]).next()
    twice.write_text('{"text": 3}\n')
    with pytest.raises(DataError, match="line 1 holds int under 'text', not text"):
        FileSource("c", [twice]).next()


def test_what_is_no_corpus_is_refused(tmp_path):
    with pytest.raises(DataError, match="has no files; give a file, a folder or a pattern"):
        find_shards(str(tmp_path / "*.jsonl"), None, "train")
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(ConfigError, match=r"a\.csv' has an unknown ending"):
        FileSource("c", [tmp_path / "a.csv"])
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(DataError, match=r"line 1 has no text under 'text' \(it has: body\)"):
        FileSource("c", [tmp_path / "a.jsonl"]).next()
    (tmp_path / "empty.jsonl").write_text('\n{"text": "  "}\n')
    empty = Mixture([FileSource("empty", [tmp_path / "empty.jsonl"])], [1.0], encode, END)
    with pytest.raises(DataError, match="corpus 'empty' holds no text: a whole pass gave no document"):
        empty.next()


def stream(tmp_path, *, length=16, buffer=5, repeat=True, weights=(3.0, 1.0), seed=1):
    names = ("a", "b")
    for number, name in enumerate(names):
        if not (tmp_path / name).exists():
            write(tmp_path / name, "jsonl", [texts(9, number), texts(7, 10 + number)])
    sources = [FileSource(name, find_shards(str(tmp_path / name), None, "train")) for name in names]
    mixture = Mixture(sources, list(weights), encode, END, repeat=repeat)
    return PackedStream(mixture, length, buffer=buffer, seed=seed)


def test_each_corpus_gets_the_share_of_tokens_that_its_weight_says(tmp_path):
    made = stream(tmp_path, length=100)
    for _ in range(50):
        next(made)
        a, b = made.mixture.tokens
        assert abs(a - 3 * b) <= 3 * 45  # one document of the lighter corpus, at most
    assert min(made.mixture.passes) >= 2


def same(one, other):
    return one.number == other.number and one.origins == other.origins and np.array_equal(one.ids, other.ids)


@pytest.mark.parametrize("buffer", [0, 5, 100])
def test_a_stream_stopped_anywhere_goes_on_with_the_next_sequence(tmp_path, buffer):
    whole = stream(tmp_path, buffer=buffer)
    expected = [next(whole) for _ in range(40)]
    for stop in (0, 1, 7, 26, 39):
        made = stream(tmp_path, buffer=buffer)
        for _ in range(stop):
            next(made)
        state = made.state()
        for _ in range(3):
            next(made)  # what is read afterwards does not change the state
        state.save(tmp_path)
        again = stream(tmp_path, buffer=buffer)
        again.load(StreamState.read(tmp_path))
        for sequence in expected[stop:]:
            assert same(next(again), sequence)


def test_the_order_is_shuffled_and_depends_on_the_seed(tmp_path):
    plain, one, other = (stream(tmp_path, buffer=b, seed=s) for b, s in ((0, 1), (8, 1), (8, 2)))
    orders = [[tuple(next(made).origins) for _ in range(10)] for made in (plain, one, other)]
    assert len({tuple(order) for order in orders}) == 3


def test_documents_follow_each_other_without_loss_across_the_boundary(tmp_path):
    files = write(tmp_path / "c", "jsonl", [texts(9)])
    made = PackedStream(Mixture([FileSource("c", files)], [1.0], encode, END), 16)
    rebuilt = []
    for _ in range(30):
        sequence = next(made)
        starts = np.flatnonzero(sequence.positions == 0)
        assert len(starts) == len(sequence.origins)
        assert (sequence.labels == np.where(sequence.positions == 0, -100, sequence.ids)).all()
        for begin, end in zip(starts, [*starts[1:], 16], strict=True):
            assert list(sequence.positions[begin:end]) == list(range(end - begin))
        rebuilt += list(sequence.ids)
    # nothing is lost or doubled: the documents in their order, each with its end token, again and again
    expected = [token for text in texts(9) for token in [*encode(text), END]]
    assert rebuilt == (expected * 10)[: len(rebuilt)]
    assert len(rebuilt) > 1.5 * len(expected)


def test_a_corpus_that_ends_ends_the_stream_if_so_configured(tmp_path):
    made = stream(tmp_path, repeat=False)
    sequences = list(made)
    assert made.mixture.sources[made.mixture.ended].passes == 1
    total = sum(made.mixture.tokens)
    assert total - 16 < 16 * len(sequences) <= total
    assert list(made) == []


def test_batches(tmp_path):
    made = stream(tmp_path)
    batch = collate([next(made), next(made)])
    assert {k: tuple(v.shape) for k, v in batch.items()} == {
        "input_ids": (2, 16),
        "position_ids": (2, 16),
        "labels": (2, 16),
        "numbers": (2,),
    }


def without_reading_ahead(tmp_path, batches, size=2):
    whole = stream(tmp_path)
    return [[next(whole) for _ in range(size)] for _ in range(batches)], whole.state()


@pytest.mark.parametrize("keep", [1, 3])
def test_a_state_is_that_of_the_last_batch_given_out_however_far_was_read(tmp_path, keep):
    for taken in (0, 1, 5):
        expected, state = without_reading_ahead(tmp_path, taken)
        batches = Batches(stream(tmp_path), 2, keep=keep)
        for sequences in expected:
            assert next(batches)["input_ids"].tolist() == [s.ids.tolist() for s in sequences]
        if taken:
            batches._ahead[-1].result()
        batches.close()
        assert batches.stream.number == (2 * (taken + keep) if taken else 0)
        assert batches.state.numbers == state.numbers
        batches.save(tmp_path)
        again = Batches(stream(tmp_path), 2)
        again.load(tmp_path)
        assert next(again)["numbers"].tolist() == [2 * taken, 2 * taken + 1]


def test_one_process_reads_for_all(tmp_path, monkeypatch):
    expected, _ = without_reading_ahead(tmp_path, 3, size=4)
    sent = []
    monkeypatch.setattr("torch.distributed.broadcast_object_list", lambda box, src: sent.append(list(box)))
    first = Batches(stream(tmp_path), 2, 0, 2)
    mine = [next(first)["input_ids"].tolist() for _ in range(3)]
    first.close()
    waiting = iter(sent)

    def receive(box, src):
        box[:] = next(waiting)

    monkeypatch.setattr("torch.distributed.broadcast_object_list", receive)
    second = Batches(stream(tmp_path), 2, 1, 2)
    theirs = [next(second)["input_ids"].tolist() for _ in range(3)]
    assert [a + b for a, b in zip(mine, theirs, strict=True)] == [[s.ids.tolist() for s in part] for part in expected]
    assert second.stream.number == 0  # it has read nothing
    assert second.where(11) == "sequence 11 (" + second.where(11).partition("(")[2]
    assert "corpus 'a'" in second.where(11)


def test_an_error_while_reading_ahead_comes_with_its_batch_in_every_process(tmp_path, monkeypatch):
    file = tmp_path / "c.jsonl"
    file.write_text("".join(json.dumps({"text": "x" * 15}) + "\n" for _ in range(5)) + "damage\n")
    sent = []
    monkeypatch.setattr("torch.distributed.broadcast_object_list", lambda box, src: sent.append(list(box)))
    batches = Batches(PackedStream(Mixture([FileSource("c", [file])], [1.0], encode, END), 16), 1, 0, 2, keep=9)
    assert [next(batches)["numbers"].tolist() for _ in range(2)] == [[0], [2]]
    with pytest.raises(DataError, match="line 6 is not valid JSON"):
        next(batches)
    batches.close()
    monkeypatch.setattr("torch.distributed.broadcast_object_list", lambda box, src: box.__setitem__(0, sent[-1][0]))
    with pytest.raises(DataError, match="line 6 is not valid JSON"):
        next(Batches(stream(tmp_path), 1, 1, 2))


def test_the_order_of_the_shards_is_found_once_a_pass(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("shadowpeft.data.corpora.stable_hash", lambda *n: calls.append(n) or stable_hash(*n))
    source = FileSource("c", write(tmp_path / "c", "jsonl", [texts(9), texts(9)]))
    for _ in range(3):
        one_pass(source)
    assert len(calls) == 2 * 4  # three passes and the beginning of a fourth


def test_draws_are_the_same_on_every_machine():
    assert [stable_hash(1, n) % 1000 for n in range(4)] == [105, 73, 165, 992]
