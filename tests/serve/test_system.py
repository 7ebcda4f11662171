"""The system test: what is made of measurements, and (marker server) the whole script with two processes on a tiny model."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from experiments.system import SYSTEMS, Reply
from peft import LoraConfig, get_peft_model
from rich.console import Console
from scripts.system_test import adapters
from scripts.system_test.options import parse
from scripts.system_test.servers import Server
from transformers import AutoModelForCausalLM

import shadowpeft
from chatbase import chat_tokenizer, save_sitting_base
from experiments import system
from shadowpeft.apps.serve import _cloud_backend
from shadowpeft.data.tasks import get_task
from shadowpeft.errors import ConfigError, ShadowPeftError
from shadowpeft.serve.loading import is_lora
from shadowpeft.train.baselines import count_trainable
from tiny import adapter_config, randomise

ROOT = Path(__file__).parents[2]
DELAY = 400


def reply(text, milliseconds, where="cloud", **fields):
    return Reply(text, milliseconds, 4, where, "known skill", **fields)


def replies_to(examples, right):
    """A right answer to the first ``right`` examples, a wrong one to the others, in 100, 200, ... ms."""
    return [
        reply(e.answer if i < right else "[Bark()] woof", 100.0 * (i + 1), "device" if i % 2 else "cloud")
        for i, e in enumerate(examples)
    ]


@pytest.fixture(scope="module")
def examples():
    found = [e for e in get_task("robot").load("test") if e.gold not in ("Bark", "REMOTE")]
    return found[:20]


def test_a_summary_counts_what_it_should(examples):
    made = system.summarise(replies_to(examples, 15), examples, get_task("robot"))
    assert made["accuracy"] == 0.75
    assert made["interval"] == [0.5313, 0.8881]  # Wilson's, from a table
    assert (made["p50_ms"], made["p95_ms"], made["mean_ms"]) == (1050.0, 1905.0, 1050.0)
    assert made["on_device"] == 0.5
    assert made["parts"]["skill"] == 0.75
    assert (made["tokens"], made["degraded"]) == (4.0, 0)


def test_an_open_request_is_right_without_an_action():
    task = get_task("robot")
    (one,) = [e for e in task.load("test") if e.gold == "REMOTE"][:1]
    for text, right in (("Rome.", 1.0), ("[REMOTE] ask", 1.0), ("[Sit()] I sit.", 0.0)):
        assert system.summarise([reply(text, 1.0)], [one], task)["accuracy"] == right
    with pytest.raises(ShadowPeftError, match="no answers to summarise"):
        system.summarise([], [], task)


def test_systems_take_turns_and_the_warm_up_is_left_out():
    asked = []

    async def ask(what, prompt):
        asked.append((what.model, prompt))
        return reply(f"{what.model} {prompt}", 1.0)

    systems = {name: SYSTEMS[name] for name in system.COMPARED}
    done = []
    made = asyncio.run(system.measure(ask, systems, ["a", "b", "c"], warmup=1, progress=done.append))
    assert {name: [r.text for r in part] for name, part in made.items()} == {
        "routed": ["robot a", "robot b", "robot c"],
        "lora": ["lora a", "lora b", "lora c"],
        "dora": ["dora a", "dora b", "dora c"],
    }
    assert done == list(range(1, 13))
    kept = asked[3:]
    assert [model for model, _ in kept] == ["robot", "lora", "dora", "lora", "dora", "robot", "dora", "robot", "lora"]


def test_the_rival_answers_with_actions(examples):
    replies = system.ask_rival([e.prompt for e in examples])
    found = system.summarise(replies, examples, get_task("robot"))
    assert found["accuracy"] >= 0.7  # 88.9 % of all test rows (experiments/records/rivals)
    assert {r.where for r in replies} == {"device"}
    assert all((r.text == "[REMOTE]") == (r.reason == "[REMOTE]") for r in replies)
    assert system.by_delay({"delays": [{"milliseconds": 0, "systems": {system.RIVAL: found}}]}).count("LinearSVC") == 1


def result_of(examples):
    task = get_task("robot")
    rows = {
        name: system.summarise(replies_to(examples, right), examples, task)
        for name, right in (("routed", 20), ("lora", 10), ("dora", 0))
    }
    rows["routed"]["degraded"] = 2
    return {"n": 20, "delays": [{"milliseconds": 0, "systems": rows}, {"milliseconds": 50, "systems": rows}]}


def test_tables_and_picture(tmp_path, examples):
    result = result_of(examples)
    lines = system.by_delay(result).splitlines()
    assert len(lines) == 2 + 6
    assert lines[2] == (
        "| 0 | shadow, routed | 100.0% | 83.9% - 100.0% | 1050 | 1905 | 50.0% (2 for want of a cloud) |"
    )
    assert lines[7].startswith("| 50 | DoRA, always cloud | 0.0% |")
    system.draw(result, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"


def test_ten_requests_side_by_side():
    made = system.side_by_side(
        ["sit | down"], {"routed": [reply("[Sit()] a\n*b*", 12.4, "device")], "lora": [reply("", 3.0)]}
    )
    assert made.splitlines() == [
        "| request | shadow, routed | LoRA, always cloud |",
        "|---|---|---|",
        r"| sit \| down | \[Sit()\] a \*b\* (device, 12 ms) | (nothing) (cloud, 3 ms) |",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--delays", "0", "0"], "must be different numbers"),
        (["--delays", "-1"], "from 0 up"),
        (["--routing", "x", "--calibrate", "0.1"], "are both set"),
    ],
)
def test_wrong_options(arguments, message):
    with pytest.raises(ConfigError, match=message):
        parse(arguments)


def test_an_adapter_that_is_none(tmp_path):
    options = parse(["--out", str(tmp_path), "--lora", str(tmp_path)])
    with pytest.raises(ConfigError, match=r"--lora is .* which holds no adapter_config.json"):
        adapters.prepare(options, None)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_sitting_base(tmp_path_factory.mktemp("system") / "base")


def saved(base, folder, config):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(folder)
    return str(folder)


def test_the_edge_model_and_its_calibration(tmp_path, base):
    shadow = saved(base, tmp_path / "shadow", adapter_config(shadow_init="base_layers"))
    given = ["--out", str(tmp_path), "--base", base]
    options = parse([*given, "--calibrate", "1", "--calibration-rows", "80"])
    assert adapters.routing(shadow, parse(given)) is None
    made = adapters.routing(shadow, options)
    assert made == tmp_path / "routing" / "routing.json"
    report = json.loads(made.read_text())["report"]
    assert report["n"] == report["known_actions"] == report["answered_on_device"] == 80
    shutil.copy(made, shadow)
    assert adapters.routing(shadow, parse(given)) == tmp_path / "shadow" / "routing.json"
    assert adapters.detach(shadow, options.base, options.out / "edge")["folder"] == str(tmp_path / "edge")
    edge = AutoModelForCausalLM.from_pretrained(tmp_path / "edge")
    ids = chat_tokenizer()("\n[S", add_special_tokens=False, return_tensors="pt").input_ids
    assert chat_tokenizer().decode(edge(input_ids=ids).logits[0].argmax(-1)) == "[Si"


def test_trained_adapters_are_taken_again_and_only_with_the_same_settings(tmp_path, base):
    shadow = saved(base, tmp_path / "shadow", adapter_config(shadow_init="base_layers"))
    given = ["--out", str(tmp_path), "--shadow", shadow, "--dora", shadow, "--batch-size", "2", "--max-length", "400"]
    quiet = Console(quiet=True)
    made = adapters.prepare(parse([*given, "--train-steps", "2"]), quiet)
    assert list(made) == ["shadow", "lora", "dora"]
    budget = count_trainable(shadowpeft.load(shadow, is_trainable=True))
    assert abs(made["lora"]["training"]["trainable_parameters"] / budget - 1) <= 0.03
    assert made["lora"]["settings"]["base"] == base  # the shadow's
    assert is_lora(made["lora"]["folder"])
    weights = Path(made["lora"]["folder"]) / "adapter_model.safetensors"
    written = weights.stat().st_mtime_ns
    assert adapters.prepare(parse([*given, "--train-steps", "2"]), quiet) == made
    assert weights.stat().st_mtime_ns == written
    with pytest.raises(ConfigError, match="was trained with other settings"):
        adapters.prepare(parse([*given, "--train-steps", "3"]), quiet)


@pytest.mark.parametrize("dora", [False, True])
def test_a_merged_adapter_is_a_model_of_its_own(tmp_path, base, dora):
    config = LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["q_proj", "down_proj"], use_dora=dora)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    randomise(model, scale=0.5)
    model.save_pretrained(tmp_path / "lora")
    options = parse(["--out", str(tmp_path)])
    folder = adapters.merge("lora", str(tmp_path / "lora"), options)
    ids = torch.arange(4, 24)[None]
    with torch.no_grad():
        expected, bare = model.eval()(input_ids=ids).logits, AutoModelForCausalLM.from_pretrained(base)(ids).logits
        found = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)  # rounding of the folded weights
    assert (expected - bare).abs().max() > 0.1
    assert _cloud_backend({"lora": folder}, None, torch.device("cpu")).names == ("lora",)


# ------------------------------------------------------------------------------------------------------------ two processes


@pytest.mark.server
@pytest.mark.timeout(900)
def test_the_whole_script(tmp_path, base):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "scripts.system_test", "--out", str(out), "--base", base, "--threads", "1"]
    command += ["--train-steps", "2", "--batch-size", "2", "--max-length", "400", "--requests", "12", "--warmup", "1"]
    command += ["--shadow-rate", "1e-6", "--lora-rate", "1e-6", "--dora-rate", "1e-6", "--max-tokens", "12"]
    command += ["--delays", "0", str(DELAY), "--systems", *SYSTEMS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=800, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert done.stdout == (out / "table.md").read_text()

    result = json.loads((out / "result.json").read_text())
    counts = [result["adapters"][m]["training"]["trainable_parameters"] for m in ("shadow", "lora", "dora")]
    assert all(abs(n / counts[0] - 1) <= 0.03 for n in counts)
    assert len({result["adapters"][m]["training"]["order"] for m in ("shadow", "lora", "dora")}) == 1
    near, far = (delay["systems"] for delay in result["delays"])
    assert [delay["milliseconds"] for delay in result["delays"]] == [0, DELAY]
    for rows in (near, far):
        assert set(rows) == {*SYSTEMS, system.RIVAL}
        assert all(row["n"] == 12 and row["degraded"] == 0 for row in rows.values())
        assert rows["routed"]["on_device"] == rows["device"]["on_device"] == 1.0  # it says [Sit()] to everything
        assert rows["lora"]["on_device"] == rows["dora"]["on_device"] == rows["attached"]["on_device"] == 0.0
    singles = json.loads((out / "replies.json").read_text())
    sits = sum(p["gold"] == "Sit" for p in singles["prompts"]) / 12
    for name in ("routed", "lora", "attached"):
        assert near[name]["accuracy"] == far[name]["accuracy"] == pytest.approx(sits)
        assert {r["text"] for r in singles["delays"]["0"][name]} == {"[Sit()]"}
    for name in ("lora", "dora", "attached"):
        assert min(r["milliseconds"] for r in singles["delays"][str(DELAY)][name]) >= DELAY
    assert far["routed"]["p50_ms"] < DELAY, "an answer of the device went over the network"
    requests = (out / "requests.md").read_text().splitlines()
    assert len(requests) == 12
    assert "Stand up, please!" in requests[2]
    assert r"\[Sit()\] (device," in requests[2]
    assert (out / "system.png").read_bytes()[:4] == b"\x89PNG"
    assert "/v1/chat/completions" in (out / "logs" / "cloud.log").read_text()


@pytest.mark.server
@pytest.mark.timeout(600)
def test_servers_end_with_the_block_also_on_failure(tmp_path, base):
    environment = {"SHADOWPEFT_API_KEYS": "user-key-0123456789"}
    server = Server("cloud", [f"robot={base}"], tmp_path / "cloud.log", environment)

    def fail():
        with server:
            server.wait()
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert server.process.returncode == 0
    broken = Server("edge", [f"robot={base}", "--routing", "none.json"], tmp_path / "edge.log", environment)
    with pytest.raises(ShadowPeftError, match=r"edge server ended with status 2.*'none.json' cannot be read"), broken:
        broken.wait()
    assert broken.process.poll() == 2
