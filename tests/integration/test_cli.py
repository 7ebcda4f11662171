"""The command line: help, exit codes, one sentence, JSON, the whole road on a tiny run; and the import hook."""

import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from chatbase import mixed_rows, other_rows, plain_rows, run_file, save_base, write_rows
from commands import call
from shadowpeft import cli
from shadowpeft.apps.common import flat, pick_device, placed
from shadowpeft.errors import ConfigError
from shadowpeft.presets import PRESETS
from shadowpeft.terminal import one_line, terminal
from shadowpeft.train.progress import read_metrics

COMMANDS = ("train", "pretrain", "eval", "generate", "chat", "detach", "convert", "plan", "info", "doctor", "demo")


def python(code, *arguments, **options):
    """Run code in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=120, **options
    )


SERVER = """
import json, os, sys
import accelerate, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
torch.set_num_threads(1)
assert not {"peft", "shadowpeft"} & set(sys.modules)
print("ready", flush=True)
for line in sys.stdin:
    code, arguments, out = json.loads(line)
    if (child := os.fork()) == 0:
        handle = os.open(out, os.O_WRONLY | os.O_CREAT)
        os.dup2(handle, 1), os.dup2(os.open(out + ".err", os.O_WRONLY | os.O_CREAT), 2)
        sys.argv = ["-c", *arguments]
        exec(compile(code, "<case>", "exec"), {"__name__": "__main__"})
        sys.stdout.flush()
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """Run code as in a fresh interpreter that has imported torch and transformers, but neither PEFT nor this package.

    A process with both loaded forks for every case, which saves their import (some five seconds a case).
    """
    folder = tmp_path_factory.mktemp("fresh")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", SERVER], **pipes) as server:
        assert server.stdout.readline() == "ready\n"

        def run(code, *arguments):
            out = folder / f"{len(list(folder.iterdir()))}.txt"  # its errors go beside it
            server.stdin.write(json.dumps([code, [str(a) for a in arguments], str(out)]) + "\n")
            server.stdin.flush()
            status = server.stdout.readline()
            said = out.read_text()
            assert status == "0\n", said + Path(f"{out}.err").read_text()
            return said

        yield run
        server.stdin.close()


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    """A run file for a tiny base, and the folder of its run."""
    folder = tmp_path_factory.mktemp("road")
    content = run_file(
        folder / "run",
        save_base(folder / "base"),
        write_rows(folder / "train.jsonl", plain_rows(8) + mixed_rows()),
        data={"validation": write_rows(folder / "validation.jsonl", other_rows())},
        training={"learning_rate": 0.1},
    )
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    return folder


@pytest.fixture(scope="module")
def adapter(road):
    """The adapter of the run, trained by the command."""
    from shadowpeft.apps import train as command

    if not (road / "run").exists():
        command.main(str(road / "run.yaml"), resume=False, as_json=True)
    return road / "run" / "adapter"


# ---------------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help(monkeypatch, capsys, command):
    code, out, err = call(monkeypatch, capsys, *([command] if command else []), "--help")
    assert (code, err) == (0, "")
    assert "Usage:" in out
    assert "--help" in out
    if not command:
        for name in COMMANDS:
            assert f"\n  {name} " in out


def test_help_is_instant_and_imports_nothing_heavy(tmp_path):
    code = (
        "import sys\n"
        "from shadowpeft import cli\n"
        "sys.argv = ['shadowpeft', '--help']\n"
        "try:\n"
        "    cli.main()\n"
        "except SystemExit:\n"
        "    heavy = {'torch', 'transformers', 'peft', 'numpy', 'matplotlib', 'rich'} & set(sys.modules)\n"
        "    print(sorted(heavy), file=sys.stderr)\n"
    )
    # compiled once and then read, as after an installation, whatever the environment of the tests says
    cached = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path)}
    cached.pop("PYTHONDONTWRITEBYTECODE", None)
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = python(code, env=cached)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)  # of the processor, so that a busy machine does not count
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.stderr == "[]\n"
        assert "Usage:" in done.stdout
    assert min(seconds) < 0.5, seconds


def test_version(monkeypatch, capsys):
    import shadowpeft

    assert call(monkeypatch, capsys, "--version") == (0, f"shadowpeft {shadowpeft.__version__}\n", "")


@pytest.mark.parametrize(("argument", "code"), [("--version", 0), ("fly", 2)])
def test_python_m_is_the_command(argument, code):
    import shadowpeft

    done = subprocess.run([sys.executable, "-m", "shadowpeft", argument], capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    assert done.stdout == ("" if code else f"shadowpeft {shadowpeft.__version__}\n")
    assert ("No such command 'fly'" in done.stderr) == bool(code)


# ---------------------------------------------------------------------------------------------------------- exit codes


@pytest.mark.parametrize(
    "arguments",
    [
        ["eval", "nothing", "--limit", "1", "--out", "file"],
        ["route", "calibrate", "nothing", "--limit", "1", "--out", "file"],
        ["route", "calibrate", "nothing", "--limit", "1", "--out", "file/deeper"],
        ["init", "file/run.yaml", "--for", "edge", "--base", "b", "--data", "d.jsonl", "--minutes", "1"],
        ["demo", "--out", "file/demo"],
    ],
)
def test_a_place_for_results_that_is_none_is_one_sentence(monkeypatch, capsys, tmp_path, arguments):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    code, out, err = call(monkeypatch, capsys, *arguments)
    assert (code, out) == (2, "")
    assert "error: 'file' is no folder, but what is made goes into 'file" in " ".join(err.split())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["fly"], 2, "No such command 'fly'"),
        (["train"], 2, "Missing argument"),
        (["eval", "x", "--limit", "0"], 2, "--limit"),
        (["train", "nothing.yaml"], 2, "error: run file 'nothing.yaml' does not exist"),
        (["plan", "nothing.yaml"], 2, "error: run file 'nothing.yaml' does not exist"),
        (["eval", "nothing", "--mode", "cloud"], 2, "error: mode 'cloud' is unknown"),
        (["eval", "nothing", "--data", "nothing.jsonl"], 2, "error: data file 'nothing.jsonl' does not exist"),
        (["info", "nothing"], 1, "error: 'nothing' is neither a folder nor a Hub id"),
        (["generate", "nothing", "hi"], 1, "error: 'nothing' is neither a folder nor a Hub id"),
        (["generate", "nothing", "hi", "--temperature", "-1"], 2, "error: temperature is -1.0"),
        (["generate", "nothing", "hi", "--seed", "-1"], 2, "Input should be greater than or equal to 0"),
        (["eval", "nothing", "--seed", "-1"], 2, "Input should be greater than or equal to 0"),
        (["generate", "nothing", "hi", "--temperature", "nan"], 2, "error: temperature is nan"),
        (["generate", "nothing", "hi", "--temperature", "inf"], 2, "error: temperature is inf"),
        (["detach", "nothing", "out"], 1, "error: 'nothing' is neither a folder nor a Hub id"),
    ],
)
def test_failures_are_one_sentence(monkeypatch, capsys, tmp_path, arguments, code, said):
    monkeypatch.chdir(tmp_path)
    found, out, err = call(monkeypatch, capsys, *arguments)
    assert (found, out) == (code, "")
    assert said in err
    assert "Traceback" not in err
    if err.startswith("error:"):
        assert err.count("\n") == 1


def test_debug_shows_the_traceback(tmp_path):
    command = [sys.executable, "-m", "shadowpeft.cli"]
    options = {"capture_output": True, "text": True, "cwd": tmp_path, "timeout": 60}
    plain = subprocess.run([*command, "train", "nothing.yaml"], **options)
    assert (plain.returncode, plain.stdout) == (2, "")
    assert plain.stderr == "error: run file 'nothing.yaml' does not exist; check the path\n"
    debug = subprocess.run([*command, "--debug", "train", "nothing.yaml"], **options)
    assert debug.returncode != 0
    assert "Traceback" in debug.stderr
    assert "ConfigError: run file 'nothing.yaml' does not exist" in debug.stderr


def test_an_unforeseen_error_is_one_sentence_too(monkeypatch, capsys, tmp_path):
    from shadowpeft.train import config

    def fails(*_):
        raise ZeroDivisionError("by zero\nsecond line")

    monkeypatch.setattr(config, "read_run", fails)
    code, out, err = call(monkeypatch, capsys, "train", "x.yaml")
    assert (code, out) == (1, "")
    assert err == "error: ZeroDivisionError: by zero (run again with: shadowpeft --debug ...)\n"


# ----------------------------------------------------------------------------------------------------------- the road


def test_train_prints_json_alone_and_refuses_to_start_again(monkeypatch, capsys, tmp_path, road):
    content = yaml.safe_load((road / "run.yaml").read_text())
    content["output"] = str(tmp_path / "run")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    code, out, err = call(monkeypatch, capsys, "train", tmp_path / "run.yaml", "--json")
    summary = json.loads(out)
    assert (code, err) == (0, "")
    assert summary["steps"] == 4
    assert Path(summary["adapter"]).is_dir()
    code, out, err = call(monkeypatch, capsys, "train", tmp_path / "run.yaml")
    assert (code, out) == (2, "")
    assert "is not empty" in err
    code, out, err = call(monkeypatch, capsys, "train", tmp_path / "run.yaml", "--resume")
    assert (code, out) == (2, "")
    assert "no checkpoint" in err


def test_plan_foretells_the_run(monkeypatch, capsys, road, adapter):
    code, out, err = call(monkeypatch, capsys, "plan", road / "run.yaml", "--json")
    plan = json.loads(out)
    summary = json.loads((road / "run" / "summary.json").read_text())
    assert (code, err) == (0, "")
    assert plan["steps"] == summary["steps"]
    assert plan["trainable_parameters"] == summary["trainable_parameters"]
    assert plan["sequences"] == 15
    weights = load_file(road / "base" / "model.safetensors")
    assert plan["base_parameters"] == sum(v.numel() for v in weights.values())
    assert plan["estimated_minutes"] >= 0


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "epochs", "steps"), [(5, 1, 1, 3), (4, 2, 1, 2), (3, 2, 2.5, 8)]
)
def test_plan_counts_the_steps_of_epochs(monkeypatch, capsys, tmp_path, road, batch_size, accumulation, epochs, steps):
    content = yaml.safe_load((road / "run.yaml").read_text())
    content["training"] = {"batch_size": batch_size, "gradient_accumulation": accumulation, "epochs": epochs}
    content["output"] = str(tmp_path / "run")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    _, out, _ = call(monkeypatch, capsys, "plan", tmp_path / "run.yaml", "--json")
    assert json.loads(out)["steps"] == steps
    _, out, _ = call(monkeypatch, capsys, "train", tmp_path / "run.yaml", "--json")
    assert json.loads(out)["steps"] == steps


def test_plan_counts_the_epochs_of_the_shadow_alone(monkeypatch, capsys, tmp_path, road):
    content = yaml.safe_load((road / "run.yaml").read_text())
    content["training"] = {"batch_size": 4, "epochs": 1, "shadow_epochs": 2}
    content["output"] = str(tmp_path / "run")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    _, out, _ = call(monkeypatch, capsys, "plan", tmp_path / "run.yaml", "--json")
    plan = json.loads(out)
    _, out, _ = call(monkeypatch, capsys, "train", tmp_path / "run.yaml", "--json")
    assert plan["steps"] == json.loads(out)["steps"] > 4
    assert plan["sequences"] == 15


def test_plan_with_copied_layers(monkeypatch, capsys, tmp_path, road):
    content = yaml.safe_load((road / "run.yaml").read_text())
    content["shadow"] = {"shadow_init": "base_layers", "shadow_num_hidden_layers": 2}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    code, out, err = call(monkeypatch, capsys, "plan", tmp_path / "run.yaml", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["trainable_parameters"] > 2 * 32 * 48 * 3


def test_plan_with_an_explicit_shadow(monkeypatch, capsys, tmp_path, road):
    content = yaml.safe_load((road / "run.yaml").read_text())
    content["output"] = str(tmp_path / "run")
    other = save_base(tmp_path / "small", hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    content["shadow"] = {"r": 4, "shadow_model": other, "projection_init": "pseudo_inverse"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    code, out, err = call(monkeypatch, capsys, "plan", tmp_path / "run.yaml", "--json")
    assert (code, err) == (0, "")
    plan = json.loads(out)
    code, out, err = call(monkeypatch, capsys, "train", tmp_path / "run.yaml", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["trainable_parameters"] == plan["trainable_parameters"]


def test_info(monkeypatch, capsys, road, adapter):
    code, out, err = call(monkeypatch, capsys, "info", adapter, "--json")
    record = json.loads(out)
    assert (code, err) == (0, "")
    assert record["parameters"] == json.loads((road / "run" / "summary.json").read_text())["trainable_parameters"]
    assert record["parameters"] == sum(v for k, v in record.items() if k.startswith("parameters_"))
    assert (record["rank"], record["alpha"], record["lambda"]) == (4, 0.7, PRESETS["tuned"]["auxiliary_loss_weight"])
    assert record["base"] == str(road / "base")
    code, out, _ = call(monkeypatch, capsys, "info", adapter)
    assert code == 0
    assert "llama, 1 layer(s), width 32" in out


def test_info_describes_the_base_in_words(monkeypatch, capsys, road, adapter):
    record = json.loads(call(monkeypatch, capsys, "info", adapter, "--json")[1])
    config = json.loads((road / "base" / "config.json").read_text())
    sizes = [config[key] for key in ("num_hidden_layers", "hidden_size", "vocab_size")]
    assert record["base_architecture"] == "llama, layers {}, width {}, tokens {}".format(*sizes)
    assert not any(mark in str(value) for value in record.values() for mark in "{}")


# --------------------------------------------------------------------------------------------------------------- names

NAMES = (
    "[red]robot",
    "[@click=app.bell]",
    "[bold",
    ":dog:",
    "a\nb",
    "\x1b[31mred",
    "a\u2028b",
    "robot-v1.2",
    "机器人",
    "keys",
)


@pytest.mark.parametrize("name", NAMES)
def test_names_are_printed_as_they_are(monkeypatch, capsys, tmp_path, adapter, name):
    monkeypatch.setenv("COLUMNS", "250")
    (tmp_path / name).symlink_to(adapter)
    code, out, err = call(monkeypatch, capsys, "info", tmp_path / name)
    assert (code, err) == (0, "")
    assert str(tmp_path / one_line(name)) in out
    code, out, err = call(monkeypatch, capsys, "detach", tmp_path / name, tmp_path / f"{name} edge")
    assert (code, err) == (0, "")
    assert str(tmp_path / one_line(f"{name} edge")) in out
    code, out, err = call(monkeypatch, capsys, "info", tmp_path / name / "missing")
    assert (code, out) == (1, "")
    assert str(tmp_path / one_line(name)) in err
    assert err.count("\n") == 1


def test_a_terminal_without_utf_8_shows_escapes(monkeypatch, tmp_path, adapter):
    (tmp_path / "机器人").symlink_to(adapter)
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "argv", ["shadowpeft", "info", str(tmp_path / "机器人")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out.flush()
    assert not stop.value.code
    assert "\\u673a\\u5668\\u4eba" in out.buffer.getvalue().decode("ascii")


@pytest.mark.parametrize("command", [("info",), ("detach", "edge"), ("train",), ("export", "edge", "--to", "hf")])
def test_names_that_are_not_utf_8_are_refused_at_the_door(monkeypatch, capsys, command):
    name = os.fsdecode(b"robot-\xff")
    code, out, err = call(monkeypatch, capsys, command[0], name, *command[1:])
    assert (code, out) == (2, "")
    assert err == "error: the argument 'robot-\\udcff' is not UTF-8; rename the file or folder that it names\n"


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_subnormal=False), st.text("ab c")),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text("xyz", min_size=1), inner, max_size=3)
    ),
    max_leaves=8,
)
AT_LEISURE = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no failure


@AT_LEISURE
@given(st.dictionaries(st.text("xyz", min_size=1), VALUES, max_size=4))
def test_a_table_shows_nothing_as_python_writes_it(result):
    for key, text in flat(result).items():
        assert not any(mark in f"{key}{text}" for mark in ("{", "}", "[", "]", "'", "None", "True", "False"))


@AT_LEISURE
@given(st.one_of(st.text(), st.binary().map(os.fsdecode)))
def test_whatever_is_printed_stays_on_its_line(text):
    line = one_line(text)
    assert line.isprintable()
    line.encode()
    assert one_line(line) == line
    if text.isprintable():
        assert line == text
    console = terminal()
    with console.capture() as captured:
        console.print(line, soft_wrap=True)
    assert captured.get() == f"{line}\n"


def test_eval_agrees_with_the_runs_own_evaluation(monkeypatch, capsys, road, adapter):
    arguments = ("eval", adapter, "--data", road / "validation.jsonl", "--max-new-tokens", 4)
    code, out, err = call(monkeypatch, capsys, *arguments, "--json")
    record = json.loads(out)
    summary = json.loads((road / "run" / "summary.json").read_text())
    assert (code, err) == (0, "")
    assert list(record["modes"]) == ["base", "attached", "detached"]
    assert record["modes"]["attached"]["loss"] == pytest.approx(summary["eval_task_loss"], rel=1e-5)
    assert record["modes"]["detached"]["loss"] == pytest.approx(summary["eval_shadow_loss"], rel=1e-5)
    assert record["modes"]["base"]["loss"] != pytest.approx(summary["eval_task_loss"], rel=1e-3)
    assert {mode: r["n"] for mode, r in record["modes"].items()} == {"base": 4, "attached": 4, "detached": 5}
    code, out, err = call(monkeypatch, capsys, *arguments, "--mode", "attached", "--limit", 3)
    assert code == 0
    assert "attached" in out
    assert "detached" not in out


def test_eval_refuses_a_mode_without_rows(monkeypatch, capsys, tmp_path, adapter):
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "hi", "response": "ho", "path": "base"}])
    code, out, err = call(monkeypatch, capsys, "eval", adapter, "--data", rows, "--json")
    assert (code, out) == (2, "")
    assert "no row for the shadow path" in err


def test_eval_on_the_packaged_set(monkeypatch, capsys, adapter):
    code, out, err = call(monkeypatch, capsys, "eval", adapter, "--limit", 3, "--mode", "detached", "--json")
    record = json.loads(out)
    assert (code, err) == (0, "")
    assert record["modes"]["detached"]["n"] == 3


WITHOUT = """
import json, sys
sys.modules["shadowpeft"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
import torch
torch.set_num_threads(1)
folder, prompt = sys.argv[1:]
model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
tokenizer = AutoTokenizer.from_pretrained(folder)
text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
new = out[0, inputs["input_ids"].shape[1]:]
print(json.dumps({
    "class": type(model).__name__,
    "text": tokenizer.decode(new, skip_special_tokens=True).strip(),
    "tokens": len(new),
    "dtype": str(model.dtype),
    "loading": {k: sorted(map(str, v)) for k, v in info.items() if v},
    "peft": "peft" in sys.modules,
}))
"""


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_generate_and_detach(monkeypatch, capsys, tmp_path, adapter, fresh, dtype):
    code, out, err = call(monkeypatch, capsys, "detach", adapter, tmp_path / "new" / "edge", "--dtype", dtype, "--json")
    record = json.loads(out)
    assert (code, err) == (0, "")
    assert record["class"] == "LlamaForCausalLM"
    assert record["bytes"] == (tmp_path / "new" / "edge" / "model.safetensors").stat().st_size
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["edge"]  # nothing half-written stays
    plain = json.loads(fresh(WITHOUT, record["folder"], "how?").splitlines()[-1])
    assert plain["class"] == "LlamaForCausalLM"
    assert plain["loading"] == {}
    assert plain["dtype"] == f"torch.{dtype}"
    code, out, err = call(monkeypatch, capsys, "detach", adapter, tmp_path / "new" / "edge")
    assert (code, out) == (2, "")
    assert "exists; choose another folder" in err
    if dtype == "float32":
        arguments = ("generate", adapter, "how?", "--mode", "detached", "--max-new-tokens", 8)
        code, out, err = call(monkeypatch, capsys, *arguments, "--json")
        own = json.loads(out)
        assert (code, err) == (0, "")
        assert (own["mode"], own["tokens"]) == ("detached", plain["tokens"])
        assert own["text"] == plain["text"].removesuffix("\ufffd")  # a last character that has not ended is left out
        assert call(monkeypatch, capsys, *arguments)[1] == own["text"] + "\n"


def test_generate_attached_and_base_differ(monkeypatch, capsys, adapter):
    texts = {}
    for mode in ("attached", "base"):
        code, out, _ = call(monkeypatch, capsys, "generate", adapter, "sit", "--mode", mode, "--json")
        assert code == 0
        texts[mode] = json.loads(out)["text"]
    assert texts["attached"] != texts["base"]
    code, out, err = call(monkeypatch, capsys, "generate", adapter, "sit", "--mode", "cloud")
    assert (code, out) == (2, "")
    assert "mode is 'cloud' but must be one of attached, detached, base" in err


def test_drafts_change_no_answer_and_are_counted(monkeypatch, capsys, adapter):
    options = ("generate", adapter, "sit", "--max-new-tokens", 24)
    plain = json.loads(call(monkeypatch, capsys, *options, "--json")[1])
    code, out, err = call(monkeypatch, capsys, *options, "--speculative", "--json")
    drafted = json.loads(out)
    assert (code, err) == (0, "")
    assert (drafted["text"], drafted["tokens"]) == (plain["text"], plain["tokens"])
    assert drafted["speculation"]["tokens"] == plain["tokens"]
    assert "speculation" not in plain
    code, out, err = call(monkeypatch, capsys, *options, "--speculative")
    assert (code, out) == (0, plain["text"] + "\n")
    assert "tokens a pass" in err or "did not pay" in err
    code, out, err = call(monkeypatch, capsys, *options, "--speculative", "--mode", "detached")
    assert (code, out) == (2, "")
    assert "--speculative was given for --mode detached" in err


def test_the_smallest_temperatures_are_greedy(monkeypatch, capsys, adapter):
    greedy = call(monkeypatch, capsys, "generate", adapter, "sit")[1]
    for temperature in ("1e-320", sys.float_info.min, 1e-40, 1e-29):
        assert call(monkeypatch, capsys, "generate", adapter, "sit", "--temperature", temperature) == (0, greedy, "")


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "sit"),
        ("chat",),
        ("eval",),
        ("eval", "--task", "robot"),
        ("route", "calibrate", "--out", "calibration"),
    ],
)
def test_a_device_that_is_not_there(monkeypatch, capsys, tmp_path, adapter, command):
    monkeypatch.chdir(tmp_path)
    words = 2 if command[0] == "route" else 1
    code, out, err = call(monkeypatch, capsys, *command[:words], adapter, *command[words:], "--device", "npu:7")
    assert (code, out) == (2, "")
    assert err.startswith("error: device is 'npu:7' but this machine has cpu")


def test_models_go_to_the_device_that_is_there(monkeypatch, capsys, adapter):
    def machine(kind, number):
        found = torch.device(kind) if kind else None
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: number)

    machine("cuda", 2)
    assert pick_device("auto") == torch.device("cuda")
    assert pick_device("cuda:1") == torch.device("cuda:1")
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="this machine has cpu, cuda, cuda:0, cuda:1; choose one of these, or auto"):
        pick_device("cuda:2")
    machine("mps", 1)
    assert pick_device("auto") == torch.device("cpu")
    assert pick_device("mps") == torch.device("mps")
    machine(None, 0)
    assert pick_device("auto") == torch.device("cpu")
    went = []
    monkeypatch.setattr("shadowpeft.apps.generate.placed", lambda model, where: went.append(where) or model)
    assert call(monkeypatch, capsys, "generate", adapter, "sit", "--device", "cpu")[0] == 0
    assert went == [torch.device("cpu")]
    model = torch.nn.Linear(2, 2)
    assert placed(model, torch.device("meta")).weight.is_meta
    assert placed(model, torch.device("cpu")) is model
    assert model.weight.is_meta  # what was loaded onto a device stays there


def test_an_impossible_dtype(monkeypatch, capsys, tmp_path, adapter):
    code, _, err = call(monkeypatch, capsys, "detach", adapter, tmp_path / "edge", "--dtype", "int4")
    assert code == 2
    assert "dtype is 'int4' but must be one of" in err
    assert not (tmp_path / "edge").exists()


def test_a_damaged_adapter(monkeypatch, capsys, tmp_path, adapter):
    broken = tmp_path / "adapter"
    shutil.copytree(adapter, broken)
    with (broken / "adapter_model.safetensors").open("r+b") as handle:
        handle.truncate(1000)
    for command in (["info", broken], ["generate", broken, "hi"], ["detach", broken, tmp_path / "edge"]):
        code, out, err = call(monkeypatch, capsys, *command)
        assert (code, out) == (1, "")
        assert "not a whole safetensors file" in err
        assert err.count("\n") == 1


def test_chat_in_the_terminal(monkeypatch, capsys, adapter):
    from rich.console import Console

    lines = iter(["sit", "", "/mode cloud", "/mode detached", "sit", "/reset", "sit", "/quit"])
    monkeypatch.setattr(Console, "input", lambda self, *args, **options: next(lines))
    code, out, _ = call(monkeypatch, capsys, "chat", adapter, "--max-new-tokens", 6)
    assert code == 0
    assert "mode is 'cloud'" in out
    assert out.count("attached ") >= 1
    attached, detached = (
        json.loads(
            call(monkeypatch, capsys, "generate", adapter, "sit", "--mode", mode, "--max-new-tokens", 6, "--json")[1]
        )["text"]
        for mode in ("attached", "detached")
    )
    assert attached.strip() in out
    assert detached.strip() in out


def test_ctrl_c_ends_the_answer_and_not_the_talk(monkeypatch, capsys, adapter):
    from rich.console import Console

    from shadowpeft import generate

    lines = iter(["sit", "/help", "stand", "bark", "turn", "/quit"])
    asked = []

    def cut(runner, tokenizer, history, **options):
        asked.append([turn["content"] for turn in history])
        if len(asked) == 3:
            raise KeyboardInterrupt
        yield "half"
        if len(asked) == 1:
            raise KeyboardInterrupt
        yield " and half"

    monkeypatch.setattr(generate, "stream", cut)
    monkeypatch.setattr(Console, "input", lambda self, *args, **options: next(lines))
    code, out, _ = call(monkeypatch, capsys, "chat", adapter)
    assert code == 0
    assert "half (stopped)" in out
    assert "half and half" in out
    assert "there is no command /help; there are /mode, /reset and /quit" in out
    said = ["sit", "half", "stand", "half and half"]
    assert asked == [["sit"], said[:3], [*said, "bark"], [*said, "turn"]]  # nothing was said to the third


def test_ctrl_c_stops_a_command(monkeypatch, capsys):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("shadowpeft.hf.load.read_config", interrupted)
    assert call(monkeypatch, capsys, "info", "no-such-folder") == (130, "", "stopped\n")


def test_a_message_that_is_too_long_does_not_end_the_conversation(monkeypatch, capsys, adapter):
    from rich.console import Console

    from shadowpeft import generate

    lines = iter(["sit", "x" * 2000, "stand", "/mode", "/mode  ", "/quit"])
    asked = []
    real = generate.stream

    def keep(runner, tokenizer, history, **options):
        asked.append([turn["content"] for turn in history if turn["role"] == "user"])
        return real(runner, tokenizer, history, **options)

    monkeypatch.setattr(generate, "stream", keep)
    monkeypatch.setattr(Console, "input", lambda self, *args, **options: next(lines))
    code, out, _ = call(monkeypatch, capsys, "chat", adapter, "--max-new-tokens", 6)
    assert code == 0
    told = " ".join(out.split())
    assert "shorten the prompt or lower max_new_tokens; your message was left out, and /reset begins anew" in told
    assert asked == [["sit"], ["sit", "x" * 2000], ["sit", "stand"]]
    assert told.count("mode is 'attached' and may be one of attached, detached, base") == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--mode", "nonsense"), "mode is 'nonsense' but must be one of attached, detached, base"),
        (("--mode", "detached", "--speculative"), "--speculative was given for --mode detached"),
    ],
)
def test_chat_refuses_what_has_no_effect_before_it_loads(monkeypatch, capsys, more, message):
    code, _, err = call(monkeypatch, capsys, "chat", "no-such-folder", *more)
    assert code == 2
    assert message in err


def test_calls_that_are_cut_are_refused(monkeypatch, capsys, adapter):
    options = ("generate", adapter, "sit", "--mode", "detached", "--skills", "robot_tools", "--json")
    code, out, err = call(monkeypatch, capsys, *options, "--max-new-tokens", 3)
    assert (code, out) == (2, "")
    assert "max_new_tokens is 3 but the calls do not end within so many tokens ('[" in err
    assert err.rstrip().endswith("raise it")


@pytest.mark.slow
def test_ctrl_c_ends_the_command_with_a_sentence_and_resume_goes_on(tmp_path, road):
    content = yaml.safe_load((road / "run.yaml").read_text())
    content["training"] |= {"max_steps": 300, "save_every": 1000}
    ends = []
    for name in ("whole", "cut"):
        content["output"] = str(tmp_path / name)
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
        command = [sys.executable, "-m", "shadowpeft.cli", "train", str(tmp_path / f"{name}.yaml")]
        if name == "cut":
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for _ in range(1200):
                if len(read_metrics(tmp_path / name)) > 5:
                    break
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
            assert process.returncode == 1
            assert "continue with: shadowpeft train" in err
            assert "Traceback" not in err
            summary = json.loads((tmp_path / name / "summary.json").read_text())
            assert summary["interrupted"]
            assert (tmp_path / name / f"checkpoint-{summary['steps']}").is_dir()
            command.append("--resume")
        subprocess.run(command, check=True, timeout=300, capture_output=True)
        ends.append(load_file(tmp_path / name / "adapter" / "adapter_model.safetensors"))
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


# ---------------------------------------------------------------------------------------------------- without extras

OTHER_EXTRAS = (
    *("jsonschema_rs", "llguidance", "fastapi", "uvicorn", "prometheus_client", "onnx", "onnxruntime", "torchao"),
    *("bitsandbytes", "trl", "shadow_peft", "mkdocs", "nbclient", "bs4", "openai", "tensorboard"),
)


def test_what_the_demo_needs_runs_without_any_other_extra():
    apps = ("data", "demo", "detach", "generate", "init", "plan", "pretrain", "report", "route", "train")
    code = (
        f"import importlib, sys\nsys.modules.update(dict.fromkeys({OTHER_EXTRAS!r}))\n"
        f"for name in {apps!r}: importlib.import_module('shadowpeft.apps.' + name)\n"
        "from shadowpeft.apps import intents\n"
        "from shadowpeft.data.robot_tools import tools_named\n"
        "from shadowpeft.train.rows import read_rows\n"
        "assert len(tools_named('robot')) == 34\n"
        "assert read_rows('robot', 'train', actions=True)\n"
        "print('ok')"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.stdout.strip().endswith("ok"), ran.stderr[-1500:]


# ------------------------------------------------------------------------------------------------------ import hook

KNOWS = """
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
import shadowpeft
assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.SHADOWPEFT] is shadowpeft.ShadowPeftConfig
assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.SHADOWPEFT] is shadowpeft.ShadowModel
assert [m for m in PeftType].count("SHADOWPEFT") == 1
assert not [f for f in sys.meta_path if type(f).__module__ == "shadowpeft._register"]
print("ok")
"""


ORDERS = {
    "alone": "import shadowpeft\nassert 'peft' not in sys.modules",
    "peft first": "import peft\nimport shadowpeft",
    "peft after": "import shadowpeft\nfrom peft import PeftModel",
    "asked where peft is": "import shadowpeft, importlib.util\n"
    "assert importlib.util.find_spec('peft').origin.endswith('__init__.py')\n"
    "assert importlib.util.find_spec('peft').name == 'peft'\nassert 'peft' not in sys.modules",
    "reloaded": "import shadowpeft, importlib\nimportlib.reload(shadowpeft)\nimport shadowpeft",
    "hook reloaded": "import shadowpeft, importlib, shadowpeft._register\nimportlib.reload(shadowpeft._register)\n"
    "importlib.reload(shadowpeft)",
    "imported anew": "import shadowpeft\n[sys.modules.pop(n) for n in list(sys.modules) if n.startswith('shadowpeft')]\n"
    "import shadowpeft",
    "peft reloaded": "import shadowpeft, importlib, peft\nimportlib.reload(peft)\nimportlib.reload(shadowpeft)",
    "imported anew after use": "import shadowpeft\nshadowpeft.ShadowPeftConfig\n"
    "[sys.modules.pop(n) for n in list(sys.modules) if n.startswith('shadowpeft')]\nimport shadowpeft",
    "loader is whole": "import shadowpeft, importlib.util\nspec = importlib.util.find_spec('peft')\n"
    "assert spec.loader.get_source('peft').startswith('#') and spec.submodule_search_locations",
}
"""Ways in which this package and PEFT may be imported."""
USUAL = ("alone", "peft first", "peft after")


@pytest.mark.parametrize("order", [pytest.param(n, marks=[] if n in USUAL else pytest.mark.slow) for n in ORDERS])
def test_peft_knows_the_method(fresh, order):
    assert fresh("import sys\n" + ORDERS[order] + "\n" + KNOWS) == "ok\n"


def test_the_import_alone_brings_nothing_heavy():
    done = python("import sys, shadowpeft\nprint({'torch', 'peft', 'transformers', 'numpy'} & set(sys.modules))")
    assert done.stdout == "set()\n", done.stderr


def test_a_failed_import_of_peft_registers_at_the_next(fresh, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "peft.py").write_text("raise ImportError('broken')\n")
    code = (
        "import sys\nimport shadowpeft\nsys.path.insert(0, sys.argv[1])\n"
        "try:\n    import peft\nexcept ImportError as error:\n    assert str(error) == 'broken'\n"
        "sys.path.remove(sys.argv[1])\n"
    )
    assert fresh(code + KNOWS, tmp_path / "broken") == "ok\n"


LOADERS = {
    "transformers": "from transformers import AutoModelForCausalLM\nm = AutoModelForCausalLM.from_pretrained(sys.argv[1])",
    "peft": "from transformers import AutoModelForCausalLM\nfrom peft import PeftModel\n"
    "m = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[2]), sys.argv[1])",
    "auto": "from peft import AutoPeftModelForCausalLM\nm = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1])",
    "shadowpeft": "m = shadowpeft.load(sys.argv[1])",
}


@pytest.mark.parametrize("how", [pytest.param(n, marks=[pytest.mark.slow] * (n != "peft")) for n in LOADERS])
def test_every_loader_works_after_the_import_alone(road, adapter, fresh, how):
    code = (
        "import sys, shadowpeft\n" + LOADERS[how] + "\n"
        "import torch\ntorch.set_num_threads(1)\nids = torch.arange(10, 20)[None]\n"
        "with torch.no_grad():\n    print(m.eval()(input_ids=ids).logits.double().sum().item())\n"
    )
    said = fresh(code, adapter, road / "base").splitlines()[-1]
    import shadowpeft

    with torch.no_grad():
        expected = shadowpeft.load(adapter)(input_ids=torch.arange(10, 20)[None]).logits.double().sum().item()
    assert float(said) == expected
    assert os.environ["HF_HUB_OFFLINE"] == "1"
