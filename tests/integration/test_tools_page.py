"""The commands of docs/tools.md, taken from the page and run in its order on the packaged example."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from scripts import voted_tools
from scripts.robot_tools_eval import shown

from chatbase import save_sitting_base
from commands import call, edit
from shadowpeft.apps import serve as command
from shadowpeft.data.chat import read_file
from shadowpeft.data.tool_rows import with_tools
from shadowpeft.data.tools import read_tools
from shadowpeft.serve.guard import Keys
from webserver import Running

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "tools.md").read_text(encoding="utf-8")
TOOLS = ROOT / "examples" / "tools"


def blocks(kind):
    found = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", PAGE, re.DOTALL | re.MULTILINE)  # all kinds, so that no end begins one
    return ["\n".join(line.removeprefix("   ") for line in block.splitlines()) for name, block in found if name == kind]


def test_the_page_and_the_example_have_one_run_file():
    (run,) = blocks("yaml")
    own = (TOOLS / "tools.yaml").read_text(encoding="utf-8").splitlines()
    assert [line for line in own if not line.startswith("#")] == run.splitlines()


@pytest.mark.parametrize(("split", "mark"), [("test", "tools-test"), ("validation", "tools")])
def test_the_tables_are_those_of_the_records(split, mark):
    file = ROOT / "docs" / "records" / f"robot-tools-large-{split}.json"
    record = json.loads(file.read_text(encoding="utf-8"))
    (table,) = re.findall(rf"<!-- {mark} -->\n(.*?)\n<!-- /{mark} -->", PAGE, re.DOTALL)
    assert (table, record["split"]) == (shown(record), split)
    if split == "test":
        calls = {name: method["calls"] for name, method in record["methods"].items()}
        exact = {name: f"{100 * share['accuracy']:.1f}" for name, share in calls.items()}
        n = calls["detached"]["n"]
        assert f"The device has {exact['detached']} % of the {n} test requests exactly right" in PAGE
        assert f"The attached half has {exact['attached']} %" in PAGE
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        said = f"the device has {exact['detached']} % of {n} test requests exactly right"
        assert f"{said}, a classifier with patterns {exact['rival']}" in readme


def test_what_the_vote_changes_is_its_record():
    record = json.loads((ROOT / "docs" / "records" / "robot-tools-voted.json").read_text(encoding="utf-8"))
    (table,) = re.findall(r"<!-- tools-voted -->\n(.*?)\n<!-- /tools-voted -->", PAGE, re.DOTALL)
    assert table == voted_tools.shown(record)
    device = json.loads((ROOT / "docs" / "records" / "robot-tools-four-passes.json").read_text(encoding="utf-8"))
    for split in ("validation", "test"):  # measured twice, by two programs
        one, other = device[split]["detached"], record["splits"][split]["detached"]
        assert one["calls"]["accuracy"] == other["calls"]["score"]
        assert one["cloud_handed_on"]["accuracy"] == other["no_call"]["score"]


def test_what_four_passes_reach_is_their_record():
    record = json.loads((ROOT / "docs" / "records" / "robot-tools-four-passes.json").read_text(encoding="utf-8"))
    (table,) = re.findall(r"<!-- tools-four -->\n(.*?)\n<!-- /tools-four -->", PAGE, re.DOTALL)
    assert table == shown({"split": "test", "methods": record["test"]})
    fit, check = record["calibrated"], record["calibrated"]["check"]
    page = " ".join(PAGE.split())
    assert f"for at most {100 * fit['target']:.0f} % wrong the device keeps {100 * fit['commands_kept']:.1f} % of the" in page
    assert f"it then keeps {100 * check['commands_kept']:.1f} % of the {check['commands']} that call" in page
    assert f"hands on {100 * check['open_handed_on']:.1f} % of the {check['open_requests']} for the cloud" in page
    wrong = f"{check['wrong_on_device']} of the {check['answered_on_device']} answers that it keeps are wrong"
    assert f"{wrong}, {100 * check['wrong_share']:.1f} %" in page
    assert f"it has {100 * record['validation']['detached']['calls']['accuracy']:.1f} % of the 240 exactly right" in page
    assert f"`{record['run']}`" in page


def test_lora_stands_beside_both_halves_on_the_same_rows():
    read = {
        name: json.loads((ROOT / "docs" / "records" / f"robot-tools-{name}.json").read_text(encoding="utf-8"))
        for name in ("large-validation", "four-passes", "lora")
    }
    methods = {"rival": read["large-validation"]["methods"]["rival"], **read["four-passes"]["validation"]}
    methods["lora"] = read["lora"]["methods"]["lora"]
    (table,) = re.findall(r"<!-- tools-lora -->\n(.*?)\n<!-- /tools-lora -->", PAGE, re.DOTALL)
    assert table == shown({"split": "validation", "methods": methods})
    page, training = " ".join(PAGE.split()), read["lora"]["training"]
    assert f"`{read['lora']['run']}`" in page
    assert f"{training['steps']} steps in {training['seconds'] / 60:.0f} minutes" in page
    assert f"has {100 * methods['attached']['calls']['accuracy']:.1f} % of them" in page


def test_the_times_are_their_record():
    record = json.loads((ROOT / "docs" / "records" / "robot-tools-speed.json").read_text(encoding="utf-8"))
    assert f"{record['rows']} validation" in PAGE
    for name, found in record["models"].items():
        took = found["milliseconds"]
        decision = f"{took['a_decision_p50']:.0f} ms | {took['a_decision_p95']:.0f} ms | {found['right']} |"
        share = f"{100 * found['guiding_share_of_a_pass']:.1f} % | {took['a_pass']:.1f} ms"
        assert f"| {name} | {found['parameters'] / 1e6:.1f}M | {share} | {decision}" in PAGE


def test_every_row_of_the_example_calls_its_tools():
    tools = read_tools(TOOLS / "actions.json")
    texts = {}
    for name in ("train", "held-out"):
        rows = [with_tools(row, tools, compact=True) for row in read_file(TOOLS / f"{name}.jsonl")]
        texts[name] = {row["messages"][0]["content"] for row in rows}
        assert all(row["response"].startswith("[") or row["shadow_response"] == "[REMOTE]" for row in rows)
        assert {re.match(r"\[(\w+)", row["response"])[1] for row in rows if row["response"][0] == "["} == set(
            tools.names
        )
    assert len(texts["train"]) == 40  # as the page says
    assert not texts["train"] & texts["held-out"]


def test_the_commands_run(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "tools"
    shutil.copytree(TOOLS, folder)
    base = save_sitting_base(tmp_path / "base", answer="[Set")
    instead = {
        "smollm2-135m": base,
        "last_layers: 10": "last_layers: 2, shadow_num_hidden_layers: 1",
        "shadow_epochs: 20, epochs: 4": "shadow_epochs: 0, max_steps: 2, learning_rate: 1.0e-6",
    }
    edit(folder / "tools.yaml", instead)
    monkeypatch.chdir(folder)
    commands = [line for block in blocks("bash") for line in block.splitlines()]
    assert [shlex.split(line)[:2] for line in commands] == [
        ["shadowpeft", "train"],
        ["shadowpeft", "eval"],
        ["shadowpeft", "route"],
        ["shadowpeft", "detach"],
        ["cp", "run/adapter/routing.json"],
    ]
    for line in commands:
        name, *given = shlex.split(line)
        if name == "cp":
            shutil.copy(given[0], given[1])
            continue
        code, _, err = call(monkeypatch, capsys, *given)
        assert code == 0, err
    routing = json.loads((folder / "edge" / "routing.json").read_text(encoding="utf-8"))
    assert routing["signal"] == "action"
    assert [tool["function"]["name"] for tool in routing["tools"]] == list(read_tools("actions.json").names)
    (serve,) = [block for block in blocks("") if block.startswith("shadowpeft serve")]
    given = shlex.split(serve)
    assert given[2:] == ["robot=edge", "--role", "edge", "--no-auth", "--port", "8001"]
    options = command.Options(adapters=["robot=edge"], role="edge", auth=False)
    said = []
    with Running(command.application(options, Keys(None, ()))) as running:
        for code in blocks("python"):  # the official client, then an agent framework's
            if "pydantic_ai" in code:
                pytest.importorskip("pydantic_ai", reason="pydantic-ai is not installed; it needs Python 3.11")
            assert code.count("http://127.0.0.1:8001") == 1
            exec(compile(code.replace("http://127.0.0.1:8001", running.url), "tools.md", "exec"), {})
            said.append(capsys.readouterr().out)
    assert said[0].startswith("tool_calls [ChatCompletionMessage") or re.match(r"(stop|length) None", said[0])
    assert len(said) == 2
    assert said[1].strip()


@pytest.mark.parametrize("problem", ["another tool", "bad arguments"])
def test_a_wrong_row_is_named_before_anything_is_trained(tmp_path, monkeypatch, capsys, problem):
    folder = tmp_path / "tools"
    shutil.copytree(TOOLS, folder)
    text = (folder / "train.jsonl").read_text(encoding="utf-8")
    old, new = ("StopAll", "Stop") if problem == "another tool" else ('\\"percent\\": 20}', '\\"percent\\": 200}')
    assert old in text
    (folder / "train.jsonl").write_text(text.replace(old, new), encoding="utf-8")
    base = save_sitting_base(tmp_path / "base", answer="[Set")
    run = (folder / "tools.yaml").read_text(encoding="utf-8").replace("smollm2-135m", base)
    (folder / "tools.yaml").write_text(run.replace("last_layers: 10", "last_layers: 2"), encoding="utf-8")
    monkeypatch.chdir(folder)
    code, _, err = call(monkeypatch, capsys, "train", "tools.yaml")
    assert code == 2
    line = 26 if problem == "another tool" else 4
    assert f"train.jsonl, line {line}: message 2 calls" in " ".join(err.split())
