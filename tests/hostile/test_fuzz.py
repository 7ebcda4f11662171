"""Adapter folders with something wrong in them: a clear error or a correct load, never anything else.

Every case goes through ``shadowpeft.load``, ``read_config``, ``shadowpeft info`` and ``PeftModel.from_pretrained`` in a
process of its own with a memory limit and an alarm. Never a crash, a hang, a large allocation, a partial load, a touched
base, a changed folder or executed code (a pickle in the folder would leave a file).
"""

import json
import os
import shutil
import signal
import struct
import time
from collections import Counter

import judging
import pytest
from damage import CONFIG, DAMAGES, WEIGHTS, canary
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from shadowpeft.hf.formats import write
from tiny import adapt, base

ADAPTERS = {
    "mirror": ("CAUSAL_LM", {}),
    "explicit": ("CAUSAL_LM", {"shadow_model": "small_llama"}),
    "saved whole": ("CAUSAL_LM", {"modules_to_save": ["model.norm"]}),
    "classifier": ("SEQ_CLS", {}),
}
FOREIGN = {
    "authors": ("authors", {"shadow_config.json": CONFIG, "shadow_adapter.safetensors": WEIGHTS}),
    "authors' modules": ("authors", {"shadow_config.json": CONFIG, "shadow_modules.safetensors": WEIGHTS}),
    "peft": ("peft", {}),
}
"""Kind of the format, and which of its files the damages, which know our names, are to hit."""
UNDAMAGEABLE = (
    struct.error,
    ArithmeticError,
    OSError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    RuntimeError,
    SafetensorError,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Bases by task, a whole adapter of each kind, and the worker."""
    bases = {task: base("llama", task=task) for task in ("CAUSAL_LM", "SEQ_CLS")}
    folder = tmp_path_factory.mktemp("adapters")
    for name, (task, fields) in ADAPTERS.items():
        adapt(bases[task], task_type=task, **fields).save_pretrained(folder / name)
    for name, (kind, _) in FOREIGN.items():
        fields = {"own_shadow_head": True} if name.endswith("modules") else {}
        write(adapt(bases["CAUSAL_LM"], variant=kind, **fields), folder / name, kind)
    worker = judging.Worker(bases)
    yield folder, worker
    worker.stop()


def judge(made, tmp_path, name, damages):
    """The outcome of a copy of the adapter ``name`` with ``damages``."""
    folder, worker = made
    shutil.rmtree(tmp_path / "case", ignore_errors=True)
    copied = tmp_path / "case" / "adapter"
    shutil.copytree(folder / name, copied)
    names = FOREIGN[name][1] if name in FOREIGN else {}
    for theirs, ours in names.items():
        (copied / theirs).rename(copied / ours)
    for damage in damages:
        if not all((copied / file).is_file() for file in (CONFIG, WEIGHTS)):
            break
        damage(copied)
    for theirs, ours in names.items():
        if os.path.lexists(copied / ours):
            (copied / ours).rename(copied / theirs)
    outcome = worker.judge(copied, ADAPTERS.get(name, ["CAUSAL_LM"])[0], name in FOREIGN)
    assert not canary(copied).exists(), "something in the folder was executed"
    return outcome


def fuzz(made, tmp_path, cases, kinds=tuple(ADAPTERS)):
    """``cases`` drawn folders; how many were loaded and how many refused by which error."""
    seen, complaints = Counter(), []

    @settings(
        max_examples=cases,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
        phases=[Phase.generate],
    )
    @given(st.sampled_from(sorted(kinds)), DAMAGES, st.booleans(), DAMAGES)
    def case(name, first, twice, second):
        outcome = judge_or_skip(name, [first, second] if twice else [first])
        seen[outcome.get("load", "nothing").partition(":")[0]] += 1
        if outcome["complaint"] is not None:
            complaints.append(outcome)

    def judge_or_skip(name, damages):
        try:
            return judge(made, tmp_path, name, damages)
        except UNDAMAGEABLE:  # the second damage found nothing left to damage
            return judge(made, tmp_path, name, damages[:1])

    case()
    assert not complaints, f"{len(complaints)} complaints, such as " + json.dumps(complaints[:4], indent=1)
    return seen


@pytest.mark.parametrize("name", ADAPTERS)
def test_whole_adapters_load(made, tmp_path, name):
    outcome = judge(made, tmp_path, name, [])
    assert outcome == {"complaint": None, "load": "loaded", "config": "loaded", "info": "loaded", "peft": "loaded"}


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def hang(*_):
    time.sleep(60)


def take_memory(*_):
    bytearray(4 * 2**30)


@pytest.mark.parametrize("deed", [die, hang, take_memory])
def test_the_judge_sees_what_must_not_happen(made, tmp_path, monkeypatch, deed):
    """A loader that dies, hangs or takes 4 GiB ends the process and is a complaint; the next case has a new one."""
    monkeypatch.setattr(judging, "SECONDS", 1)
    monkeypatch.setattr(judging.Judge, "load", deed)
    other = judging.Worker(made[1].bases)
    try:
        assert judge((made[0], other), tmp_path, "mirror", [])["complaint"] is not None
    finally:
        other.stop()
    assert judge(made, tmp_path, "mirror", [])["complaint"] is None


def test_twenty_damaged_folders(made, tmp_path):
    seen = fuzz(made, tmp_path, 20)
    assert sum(seen.values()) >= 20
    assert seen["AdapterFileError"] > 6


@pytest.mark.parametrize("name", FOREIGN)
def test_whole_adapters_of_other_packages_load(made, tmp_path, name):
    assert judge(made, tmp_path, name, []) == {"complaint": None, "load": "loaded"}


def test_thirty_damaged_folders_of_other_packages(made, tmp_path):
    seen = fuzz(made, tmp_path, 30, FOREIGN)
    assert seen["AdapterFileError"] + seen["ConfigError"] > 10


@pytest.mark.fuzz
@pytest.mark.timeout(1800)
def test_a_thousand_damaged_folders_of_other_packages(made, tmp_path):
    seen = fuzz(made, tmp_path, 1000, FOREIGN)
    print(dict(seen))
    assert seen["AdapterFileError"] > 300
    assert seen["loaded"] > 20


@pytest.mark.fuzz
@pytest.mark.timeout(1800)
def test_a_thousand_damaged_folders(made, tmp_path):
    seen = fuzz(made, tmp_path, 1000)
    print(dict(seen))
    assert sum(seen.values()) >= 1000
    assert seen["AdapterFileError"] > 300
    assert seen["ConfigError"] > 50
    assert seen["loaded"] > 20


def test_a_large_file_of_the_right_form_is_no_large_allocation(made, tmp_path):
    """A sparse file of 8 GiB that declares one tensor of that size is refused by its header."""

    def huge(folder):
        size = 8 * 2**30
        head = json.dumps({"w": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
        with (folder / WEIGHTS).open("wb") as handle:
            handle.write(struct.pack("<Q", len(head)) + head)
            handle.truncate(8 + len(head) + size)

    outcome = judge(made, tmp_path, "mirror", [huge])
    assert outcome["complaint"] is None, outcome
    assert outcome["load"].startswith("AdapterFileError")
