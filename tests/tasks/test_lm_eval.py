"""The ``lm-eval`` model gives the numbers that the adapted and the detached model give, on a task made here."""

import json
import subprocess
import sys

import pytest
import torch

import shadowpeft
from chatbase import chat_model, chat_tokenizer, save_base
from shadowpeft.errors import ConfigError
from tiny import adapt

pytest.importorskip("lm_eval", reason="lm-eval is not installed; pip install 'shadowpeft[eval]'")

ROWS = [
    ("sit", ["a", "bcd"], 0),
    ("stand up", ["zz", "y"], 1),
    ("x", ["abc", "b"], 0),
    ("longer than that", ["q", "rs"], 1),
]
TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    root = tmp_path_factory.mktemp("lm_eval")
    base = save_base(root / "base")
    adapt(chat_model()).save_pretrained(str(root / "adapter"))
    (root / "rows.jsonl").write_text(
        "".join(json.dumps({"text": t, "choices": c, "gold": g}) + "\n" for t, c, g in ROWS)
    )
    (root / "tasks").mkdir()
    (root / "tasks" / "tiny_choice.yaml").write_text(TASK.format(file=root / "rows.jsonl"))
    return root, base


def expected(road, mode):
    """Log-likelihoods of every choice, one sequence at a time."""
    root, base = road
    model = shadowpeft.load(root / "adapter", base)
    model = shadowpeft.detach(model) if mode == "detached" else model
    tokenizer, found = chat_tokenizer(), []
    for text, choices, _ in ROWS:
        for choice in choices:
            ids, start = tokenizer(text + choice).input_ids, len(tokenizer(text).input_ids)
            with torch.no_grad():
                log_p = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            found.append(float(sum(log_p[t - 1, ids[t]] for t in range(start, len(ids)))))
    return found


@pytest.mark.parametrize("mode", ["attached", "detached"])
def test_likelihoods_and_accuracy(road, mode):
    import lm_eval
    from lm_eval.tasks import TaskManager

    import shadowpeft.apps.lm_eval  # noqa: F401  (registers the model)

    root, base = road
    result = lm_eval.simple_evaluate(
        model="shadowpeft",
        model_args=f"pretrained={base},adapter={root / 'adapter'},mode={mode},dtype=float32",
        tasks=["tiny_choice"],
        task_manager=TaskManager(include_path=str(root / "tasks"), include_defaults=False),
        device="cpu",
        batch_size=3,
        bootstrap_iters=0,
    )
    samples = sorted(result["samples"]["tiny_choice"], key=lambda s: s["doc_id"])
    said = [float(answer[0]) for sample in samples for answer in sample["filtered_resps"]]
    wanted = expected(road, mode)
    assert said == pytest.approx(wanted, abs=1e-4)  # float32 sums, padded or not
    hits = [wanted[2 * i + g] > wanted[2 * i + 1 - g] for i, (_, _, g) in enumerate(ROWS)]
    assert result["results"]["tiny_choice"]["acc,none"] == pytest.approx(sum(hits) / 4)


def test_misuse(road):
    from shadowpeft.apps.lm_eval import ShadowPeftLM

    root, base = road
    with pytest.raises(ConfigError, match="mode is 'base' but must be attached or detached"):
        ShadowPeftLM(base, str(root / "adapter"), "base", device="cpu")
    with pytest.raises(ConfigError, match="model_args has peft= beside adapter="):
        ShadowPeftLM(base, str(root / "adapter"), peft="x", device="cpu")


@pytest.mark.slow  # a fresh interpreter imports torch, transformers and lm-eval: ten seconds and more
def test_the_command(road, tmp_path):
    root, base = road
    command = [sys.executable, "-m", "shadowpeft.apps.lm_eval", "--model", "shadowpeft", "--device", "cpu"]
    command += ["--model_args", f"pretrained={base},adapter={root / 'adapter'},mode=detached,dtype=float32"]
    command += ["--tasks", "tiny_choice", "--include_path", str(root / "tasks"), "--output_path", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "tiny_choice" in done.stdout
    [record] = tmp_path.rglob("results*.json")
    wanted = expected(road, "detached")
    hits = [wanted[2 * i + g] > wanted[2 * i + 1 - g] for i, (_, _, g) in enumerate(ROWS)]
    assert json.loads(record.read_text())["results"]["tiny_choice"]["acc,none"] == pytest.approx(sum(hits) / 4)
