"""``shadowpeft init`` writes run files that train; ``shadowpeft report`` shows a run as one page."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from shutil import copy, which

import pytest
import yaml
from typer.testing import CliRunner

from chatbase import (
    chat_model,
    chat_tokenizer,
    mixed_rows,
    plain_rows,
    run_file,
    save_base,
    save_sitting_base,
    write_rows,
)
from commands import call
from shadowpeft import generate, storage
from shadowpeft.apps.init import ROADS, _quoted
from shadowpeft.cli import app
from shadowpeft.errors import ConfigError
from shadowpeft.serve.router import Calibration
from shadowpeft.train.config import parse_run, read_run
from shadowpeft.train.run import train

# ------------------------------------------------------------------------------------------------------------------ init


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("minutes", [0, 7.5])
def test_a_written_run_file_is_a_run(monkeypatch, capsys, tmp_path, road, minutes):
    file = tmp_path / "mine.yaml"
    options = ["--for", road, "--base", "smollm2-135m", "--data", "my rows.csv", "--minutes", minutes]
    code, out, err = call(monkeypatch, capsys, "init", file, *options, "--validation", "v.jsonl")
    assert (code, err) == (0, "")
    assert f"shadowpeft train {file}" in out
    assert "my rows.csv is not there yet" in out
    run = read_run(file)
    assert (run.base, run.data.train, run.data.validation) == ("smollm2-135m", "my rows.csv", "v.jsonl")
    assert run.output == "runs/mine"
    assert (run.training.epochs, run.training.target_minutes) == ((None, 7.5) if minutes else (1.0, None))
    assert run.task_type == ("SEQ_CLS" if road == "classes" else "CAUSAL_LM")
    assert run.data.learns_actions == (road == "device")
    assert run.training.eval_every == 100
    text = file.read_text()
    assert all("#" in line for line in text.splitlines() if line.strip().startswith(("max_length", "preset", "save_every")))
    for line in re.findall(r"^  # ((?:train|validation|system|assistant|packing|load_best|patience|eval)\w*: .*)$", text, re.M):
        yaml.safe_load(line)  # what is commented out is YAML too
    code, _, err = call(monkeypatch, capsys, "init", file, *options)
    assert (code, "exists; choose another name" in err) == (2, True)


def test_four_questions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answered = CliRunner().invoke(app, ["init"], input="classes\n\nrows.csv\n3\n")
    assert answered.exit_code == 0, answered.output
    run = read_run("run.yaml")
    assert (run.task_type, run.base, run.data.train) == ("SEQ_CLS", "smollm2-135m", "rows.csv")
    assert run.training.target_minutes == 3
    assert answered.output.count("?") == 4
    silent = CliRunner().invoke(app, ["init", "other.yaml"], input="")
    assert isinstance(silent.exception, ConfigError)
    assert "give --for, --base, --data and --minutes" in str(silent.exception)
    wrong = CliRunner().invoke(app, ["init", "other.yaml", "--for", "fun"], input="")
    assert "--for is 'fun' but must be one of adapter, device" in str(wrong.exception)
    wrong = CliRunner().invoke(app, ["init", "other.yaml", "--for", "edge"], input="b\nd\nsoon\n")
    assert "'soon' is no number of minutes" in wrong.output
    assert "give --for, --base, --data and --minutes" in str(wrong.exception)  # asked again, and nobody is there
    wrong = CliRunner().invoke(app, ["init", "other.yaml", "--for", "edge", "--minutes", "nan"], input="b\nd\n")
    assert "'nan' is no number of minutes" in str(wrong.exception)
    wrong = CliRunner().invoke(app, ["init", "run"], input="")
    assert "'run' does not end in .yaml" in str(wrong.exception)
    assert not Path("other.yaml").exists()


def test_a_wrong_answer_is_asked_for_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answered = CliRunner().invoke(app, ["init", "my run.yaml"], input="fun\nEdge\n\n\nten\n-5\n10\n")
    assert answered.exit_code == 0, answered.output
    assert "--for is 'fun' but must be one of adapter, device" in answered.output
    assert "'ten' is no number of minutes" in answered.output
    assert "shadowpeft train 'my run.yaml'" in answered.output
    assert read_run("my run.yaml").training.target_minutes == 10


@pytest.mark.parametrize("data", ["robot", "robot_tools"])
def test_a_packaged_set_has_its_own_validation(tmp_path, monkeypatch, data):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["init", "--for", "device", "--base", "b", "--data", data, "--minutes", "1"])
    assert done.exit_code == 0, done.output
    assert "validation: rows" not in Path("run.yaml").read_text()
    assert read_run("run.yaml").training.eval_every == 100


@pytest.mark.parametrize(
    "text",
    ["a b", "owner/name", "null", "yes", "1e3", "x: y", 'say "a"', "ö", "~", "-", "😀.csv", "\u2028\x7f\u200d", "a\udcff"],
)
def test_texts_are_read_back_from_yaml(text):
    assert yaml.safe_load(f"key: {_quoted(text)}") == {"key": text}


def test_an_init_file_trains(monkeypatch, capsys, tmp_path):
    base, rows = save_base(tmp_path / "base"), write_rows(tmp_path / "rows.jsonl", plain_rows(8))
    monkeypatch.chdir(tmp_path)
    code, *_ = call(monkeypatch, capsys, "init", "--for", "edge", "--base", base, "--data", rows, "--minutes", 0)
    assert code == 0
    code, out, _ = call(monkeypatch, capsys, "train", "run.yaml", "--json")
    assert code == 0
    assert json.loads(out)["adapter"] == "runs/run/adapter"


# ---------------------------------------------------------------------------------------------------------------- report


class Page(HTMLParser):
    """Headings, texts and what a browser would fetch."""

    def __init__(self, text):
        super().__init__()
        self.headings, self.texts, self.fetched, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "path", "use", "line", "br"):
            self.open.append(tag)
        self.fetched += [v for k, v in attributes if k in ("src", "href", "xlink:href") and not (v or "").startswith("#")]
        assert tag not in ("script", "link", "iframe", "img")

    def handle_endtag(self, tag):
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data):
        (self.headings if self.open[-1:] == ["h2"] else self.texts).append(data)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    base = save_sitting_base(folder / "base")
    rows = write_rows(folder / "rows.jsonl", [*plain_rows(8), *mixed_rows(), {"prompt": "<b>&", "response": "<i>no</i>"}])
    run = run_file(folder / "run", base, rows, data={"validation": rows}, training={"max_steps": 6, "eval_every": 3})
    train(parse_run(run, "here"), quiet=True)
    report = {"target": 0.05, "wrong_share": 0.03, "without_confidence": {"wrong_share": 0.3}, "curve": [[0, 1]]}
    Calibration("action", (0.2, 0.5, 0.9), (0.1, 0.6, 1.0), 0.8, report).save(folder / "run" / "adapter" / "routing.json")
    return folder / "run"


def test_the_page_of_a_run(made, monkeypatch, capsys):
    code, out, err = call(monkeypatch, capsys, "report", made, "--examples", 20, "--max-new-tokens", 8)
    assert (code, err) == (0, "")
    assert "report.html" in out
    text = (made / "report.html").read_text()
    page = Page(text)
    assert page.fetched == []  # nothing from elsewhere
    assert page.headings == [
        "Result",
        "Losses of both paths",
        "Evaluations",
        "Learning rate",
        "Examples, before and after",
        "Calibration",
        "Settings",
    ]
    assert text.count("<svg") == 3
    for label in ("attached, training", "detached, training", "attached, validation", "detached, validation", "learning rate"):
        assert label in page.texts, label
    summary = json.loads((made / "summary.json").read_text())
    assert f"{summary['eval_task_loss']:.4f}" in page.texts
    assert "[Sit()]" in page.texts  # what the base says
    assert "<b>&" in page.texts
    assert "<i>no</i>" not in text  # what a row holds is text, not a part of the page
    assert "13 rows of the validation data, evenly spaced." in page.texts
    assert "kept above this" in page.texts
    assert "without confidence: wrong share" in page.texts
    assert not re.search(r"\b(url\(http|@import|fetch\()", text)


def no_space(folder):
    raise OSError(28, "No space left on device")


def test_a_page_without_examples_calibration_or_an_end(made, monkeypatch, capsys, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.yaml", "data.json", "metrics.jsonl"):
        copy(made / name, bare)
    code, out, _ = call(monkeypatch, capsys, "report", bare, "--out", tmp_path / "page.html")
    assert code == 0
    assert "has no adapter yet" in " ".join(out.split())
    texts = " ".join(Page((tmp_path / "page.html").read_text()).texts)
    assert "not ended" in texts
    assert "has no adapter yet" in texts
    assert "shadowpeft route calibrate makes one" in texts
    code, _, err = call(monkeypatch, capsys, "report", tmp_path)
    assert (code, "holds no run of shadowpeft train" in err) == (2, True)
    with monkeypatch.context() as patched:
        patched.setattr(storage, "workspace", no_space)
        code, _, err = call(patched, capsys, "report", bare, "--out", tmp_path / "other.html")
    assert (code, f"the folder '{tmp_path}' cannot be written to (No space left" in " ".join(err.split())) == (2, True)
    code, _, err = call(monkeypatch, capsys, "report", bare, "--out", tmp_path / "no" / "page.html")
    assert (code, "does not exist; make it" in err) == (2, True)


def test_a_page_takes_the_place_of_a_page_alone(made, monkeypatch, capsys, tmp_path):
    out = tmp_path / "page.html"
    for _ in range(2):
        code, *_ = call(monkeypatch, capsys, "report", made, "--examples", 0, "--out", out)
        assert code == 0
    (tmp_path / "mine.html").write_text("<!DOCTYPE html><title>mine</title>")
    config = (made / "config.yaml").read_bytes()
    for file in (made / "config.yaml", tmp_path / "mine.html"):
        code, _, err = call(monkeypatch, capsys, "report", made, "--examples", 0, "--out", file)
        assert (code, f"'{file}' exists and is no report, so it is not written over" in err) == (2, True)
    assert (made / "config.yaml").read_bytes() == config
    code, _, err = call(monkeypatch, capsys, "report", made, "--examples", 0, "--out", tmp_path)
    assert (code, "is a folder; give the name of a file in it" in err) == (2, True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.json", '{"train": null}', "data.json' has None for 'train' but it must be an object; restore it"),
        ("data.json", "{", "data.json', the record of this run, cannot be read"),
        ("data.json", "[]", "data.json', the record of this run, is damaged; restore it"),
        ("summary.json", '{"steps": "1"}', "summary.json' has '1' for 'steps' but it must be a number"),
        ("summary.json", '{"accuracy": {"attached": "1"}}', "summary.json' has '1' for 'attached' but it must be a number"),
        ("metrics.jsonl", '{"task_loss": 1}\n', "metrics.jsonl', line 1 is no record with a number 'step'"),
        ("metrics.jsonl", "[]\n", "metrics.jsonl', line 1 is no record with a number 'step'"),
        ("metrics.jsonl", '{"step": 1, "task_loss": "1"}\n', "metrics.jsonl' has '1' for 'task_loss' but it must be a number"),
        ("summary.json", '{"steps": 7}', None),
    ],
)
def test_the_page_of_a_damaged_run(made, monkeypatch, capsys, tmp_path, name, content, message):
    for other in ("config.yaml", "data.json", "metrics.jsonl", "summary.json"):
        copy(made / other, tmp_path)
    (tmp_path / name).write_text(content)
    code, _, err = call(monkeypatch, capsys, "report", tmp_path, "--examples", 0)
    if message is None:  # what is not there is not shown
        texts = Page((tmp_path / "report.html").read_text()).texts
        assert (code, "Steps" in texts, "7" in texts, "Time" in texts) == (0, True, True, False)
        return
    assert (code, message in err, err.count("\n")) == (2, True, 1), err


TEMPLATE = (
    "{% if tools %}<|im_start|>system\nTOOLS {{ tools|tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments|tojson }}</call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_pretraining_run_is_called_one(monkeypatch, capsys, tmp_path):
    (tmp_path / "config.yaml").write_text("base: b\nbackbone: {layers: first, count: 2}\n")
    (tmp_path / "data.json").write_text('{"train": [], "validation": {"held.jsonl": 4}}')
    code, out, err = call(monkeypatch, capsys, "report", tmp_path)
    assert (code, out) == (2, "")
    assert f"'{tmp_path}' is a run of shadowpeft pretrain, but report reads runs of shadowpeft train" in " ".join(err.split())
    assert "restore" not in err


def test_the_examples_of_rows_with_tools_are_asked_with_them(monkeypatch, capsys, tmp_path):
    chat_model(max_position_embeddings=1024).save_pretrained(tmp_path / "base")
    chat_tokenizer(TEMPLATE).save_pretrained(tmp_path / "base")
    sit = {"type": "function", "function": {"name": "Sit", "description": "d", "parameters": {"type": "object"}}}
    calls = [{"id": "1", "type": "function", "function": {"name": "Sit", "arguments": {"x": "a"}}}]
    asked, called = {"role": "user", "content": "down!"}, {"role": "assistant", "content": "", "tool_calls": calls}
    done = [{"role": "tool", "content": "it sits"}, {"role": "assistant", "content": "done"}]
    rows = [{"messages": [asked, called], "tools": [sit]}, {"messages": [asked, called, *done], "tools": [sit]}]
    content = run_file(tmp_path / "run", str(tmp_path / "base"), write_rows(tmp_path / "rows.jsonl", rows * 2))
    content["data"]["max_length"] = 512
    train(parse_run(content, "here"), quiet=True)
    prompts, stock = [], generate.render_prompt
    monkeypatch.setattr(generate, "render_prompt", lambda *a, **k: prompts.append(stock(*a, **k)) or prompts[-1])
    code, _, err = call(monkeypatch, capsys, "report", tmp_path / "run", "--examples", 4, "--max-new-tokens", 4)
    assert (code, err) == (0, "")
    assert prompts
    assert all(prompt.startswith("<|im_start|>system\nTOOLS ") and '"Sit"' in prompt for prompt in prompts)
    texts = Page((tmp_path / "run" / "report.html").read_text()).texts
    assert '<call>Sit {"x": "a"}</call>' in texts  # what is expected
    assert 'user: down!\nassistant: {"name": "Sit", "arguments": {"x": "a"}}\ntool: it sits' in texts


def test_the_page_of_a_classifier(monkeypatch, capsys, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "ab"[i % 2] * 5, "label": "xy"[i % 2]} for i in range(8)])
    held_out = write_rows(tmp_path / "held-out.jsonl", [{"text": "ab"[i % 2] * 6, "label": "xy"[i % 2]} for i in range(8)])
    content = run_file(tmp_path / "run", save_base(tmp_path / "base"), rows, task_type="SEQ_CLS", data={"validation": held_out})
    train(parse_run(content, "here"), quiet=True)
    code, _, err = call(monkeypatch, capsys, "report", tmp_path / "run")
    assert (code, err) == (0, "")
    texts = Page((tmp_path / "run" / "report.html").read_text()).texts
    assert "Right on validation, attached" in texts
    assert any(re.fullmatch(r"[xy] \(\d+%\)", text) for text in texts)
    assert "before: the base" not in texts


@pytest.mark.slow
def test_a_browser_draws_the_page(made, monkeypatch, capsys):
    """A headless Chromium lays it out on a wide and on a narrow screen, fetches nothing, and has no script to run."""
    play = pytest.importorskip("playwright.sync_api")
    browser_file = which("chromium") or which("google-chrome")
    if browser_file is None:
        pytest.skip("no Chromium")
    call(monkeypatch, capsys, "report", made, "--max-new-tokens", 8)
    with play.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=browser_file, args=["--no-sandbox"])
        for width in (1000, 420):
            page = browser.new_page(viewport={"width": width, "height": 900})
            asked = []
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.goto((made / "report.html").as_uri())
            assert asked == [(made / "report.html").as_uri()]
            assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing sticks out
            boxes = [figure.bounding_box() for figure in page.locator("figure svg").all()]
            assert len(boxes) == 3
            assert all(box["height"] > 60 and box["width"] > 0.8 * (width - 32) for box in boxes)
        browser.close()
