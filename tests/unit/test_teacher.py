"""The teacher cache: what it holds, that it continues after a kill, and what it refuses."""

import copy
import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from shadowpeft.core import distillation_kl, teacher_loss
from shadowpeft.data.teacher import INDEX, TeacherCache
from shadowpeft.errors import BaseMismatchError, ConfigError, DataError
from tiny import V, base, tokens

K, T = 5, 12


def stream(rows=11, batch=3, seed=3):
    return list(tokens(rows, T, seed=seed).split(batch))


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_it_holds_what_the_base_says(tmp_path):
    model = base().train()
    seen = []
    cache = TeacherCache.build(
        model, stream(), tmp_path / "c", K, data="abc", rows_per_shard=4, chunk=7, progress=seen.append
    )
    assert model.training  # as it was
    assert seen == [4, 8, 11]
    assert (len(cache), cache.k, cache.length, cache.temperature, cache.data) == (11, K, T, 1.0, "abc")
    all_tokens = torch.cat(stream())
    with torch.no_grad():
        expected = model.eval()(all_tokens).logits.log_softmax(-1)
    for index in (0, 3, 4, 10, -1):
        ids, log_probs = cache[index]
        assert (ids.dtype, log_probs.dtype, ids.shape) == (torch.int64, torch.float32, (T, K))
        assert torch.equal(cache.tokens(index), all_tokens[index])
        values, chosen = expected[index].topk(K)
        assert torch.equal(ids, chosen)
        torch.testing.assert_close(log_probs, values, rtol=2**-11, atol=1e-4)  # kept in float16
    assert torch.equal(cache[-1][0], cache[10][0])
    with pytest.raises(IndexError, match="11 was asked for"):
        cache[11]


def test_its_loss_is_the_divergence_from_the_base(tmp_path):
    model, student = base(), base(seed=9)
    cache = TeacherCache.build(model, stream(), tmp_path / "c", V, temperature=2.0)  # every token is known
    ids, log_probs = (torch.stack(x) for x in zip(*(cache[i] for i in range(11)), strict=True))
    states = student.model(torch.cat(stream())).last_hidden_state.flatten(0, 1)
    found = teacher_loss(
        states, ids.flatten(0, 1), log_probs.flatten(0, 1), student.lm_head, frozen=True, temperature=2.0
    )
    with torch.no_grad():
        teacher = model(torch.cat(stream())).logits.flatten(0, 1)
        expected = distillation_kl(student.lm_head(states), teacher, temperature=2.0).sum()
    torch.testing.assert_close(found.detach(), expected, rtol=1e-3, atol=1e-2)  # log-probabilities in float16
    found.backward()


def test_a_build_that_was_cut_short_continues_to_the_same_files(tmp_path):
    model = base()
    TeacherCache.build(model, stream(), tmp_path / "whole", K, rows_per_shard=4)

    def cut():
        yield from stream()[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TeacherCache.build(model, cut(), tmp_path / "cut", K, rows_per_shard=4)
    with pytest.raises(DataError, match="not finished"):
        TeacherCache(tmp_path / "cut")
    foreign = tmp_path / "cut" / "shard-00001.safetensors.partial"
    foreign.write_bytes(b"half")  # of the user, who may give any name: neither read nor deleted
    run = []
    handle = model.register_forward_pre_hook(
        lambda m, args, kwargs: run.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    TeacherCache.build(model, stream(), tmp_path / "cut", K, rows_per_shard=4)
    assert sum(run) == 7  # four were on disk
    assert foreign.read_bytes() == b"half"
    foreign.unlink()
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    run.clear()
    TeacherCache.build(model, stream(batch=5), tmp_path / "cut", K)  # finished: nothing runs, whatever the batches
    assert run == []
    handle.remove()


_WORKER = """
import sys, os, signal
from tests.unit.test_teacher import K, stream
from shadowpeft.data.teacher import TeacherCache
from tiny import base
kill = int(sys.argv[2])
def progress(done):
    if done >= kill:
        os.kill(os.getpid(), signal.SIGKILL)
TeacherCache.build(base(), stream(), sys.argv[1], K, rows_per_shard=2, progress=progress)
"""


@pytest.mark.slow  # three processes that import everything
def test_killed_twice_it_ends_with_the_same_files(tmp_path):
    TeacherCache.build(base(), stream(), tmp_path / "whole", K, rows_per_shard=2)
    for kill, rc in ((2, -signal.SIGKILL), (6, -signal.SIGKILL), (99, 0)):
        done = subprocess.run([sys.executable, "-c", _WORKER, str(tmp_path / "cut"), str(kill)], env=os.environ)
        assert done.returncode == rc
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_what_does_not_belong_together_is_refused(tmp_path):
    model, folder = base(), tmp_path / "c"
    TeacherCache.build(model, stream(), folder, K, data="abc", rows_per_shard=4)
    other = base(seed=8)
    for arguments, error, message in (
        ({"model": other}, BaseMismatchError, "other weights"),
        ({"data": "xyz"}, DataError, "data = 'abc', not 'xyz'"),
        ({"k": K + 1}, DataError, "k = 5, not 6"),
    ):
        with pytest.raises(error, match=message):
            TeacherCache(folder, **arguments)
    changed = copy.deepcopy(stream())
    changed[2][1, 3] += 1
    with pytest.raises(DataError, match="sequence 7 of the stream differs"):
        TeacherCache.build(model, changed, folder, K, data="abc")
    with pytest.raises(DataError, match="finished with 11 sequences but there are more"):
        TeacherCache.build(model, stream(12), folder, K, data="abc")
    with pytest.raises(DataError, match="10 sequences but the teacher cache"):
        TeacherCache.build(model, [torch.cat(stream())[:10]], folder, K, data="abc")
    with pytest.raises(DataError, match=r"temperature 1\.0, not 2\.0"):
        TeacherCache.build(model, stream(), folder, K, data="abc", temperature=2.0)
    with pytest.raises(BaseMismatchError):
        TeacherCache.build(other, stream(), folder, K, data="abc")


def test_impossible_arguments_are_refused(tmp_path):
    model = base()
    with pytest.raises(ConfigError, match="k is 0"):
        TeacherCache.build(model, stream(), tmp_path / "a", 0)
    with pytest.raises(ConfigError, match=f"k is {V + 1} but the base has a vocabulary of {V}"):
        TeacherCache.build(model, stream(), tmp_path / "b", V + 1)
    with pytest.raises(ConfigError, match=r"must be \(B, 12\)"):
        TeacherCache.build(model, [*stream(), tokens(2, T + 1)], tmp_path / "c", K)
    with pytest.raises(DataError, match="no sequences"):
        TeacherCache.build(model, [], tmp_path / "d", K)
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "thesis.tex").write_text("x")
    with pytest.raises(DataError, match="not empty"):
        TeacherCache.build(model, stream(), tmp_path / "e", K)
    with pytest.raises(DataError, match="no teacher cache"):
        TeacherCache(tmp_path / "nowhere")


def test_damage_is_refused(tmp_path):
    folder = tmp_path / "c"
    TeacherCache.build(base(), stream(), folder, K, rows_per_shard=4)
    shard = folder / "shard-00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    with pytest.raises(DataError, match="cannot be read"):
        TeacherCache(folder)
    shard.unlink()
    with pytest.raises(DataError, match="holds 4 sequences but its index says 11"):
        TeacherCache(folder)
    shard.write_bytes(whole)
    record = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps({**record, "format_version": 9}))
    with pytest.raises(DataError, match="format version 9"):
        TeacherCache(folder)
