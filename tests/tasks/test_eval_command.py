"""``shadowpeft eval --task``: shadow, LoRA and classifier adapters from their folders, records on disk, usage errors."""

import gzip
import json
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers import LlamaForSequenceClassification

from chatbase import chat_model, chat_tokenizer, run_file, save_base, save_sitting_base, write_rows
from commands import call
from shadowpeft import generate
from shadowpeft.data.action_trie import ActionTrie
from shadowpeft.data.tasks.rows import Rows
from shadowpeft.evaluate import held
from shadowpeft.train.config import parse_run
from shadowpeft.train.run import train
from tiny import adapt, randomise


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("SHADOWPEFT_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("SHADOWPEFT_DATA_FROM", "folder")
    rows = {
        "mmlu/test": [
            {"question": f"q{i}", "subject": "s", "choices": ["1", "2", "3", "4"], "answer": i % 4} for i in range(6)
        ],
        "clinc150/test": [{"text": f"wake me at {i}", "intent": "alarm"} for i in range(5)],
    }
    for name, content in rows.items():
        file = tmp_path / "data" / f"{name}.jsonl.gz"
        file.parent.mkdir(parents=True)
        with gzip.open(file, "wt") as handle:
            handle.writelines(json.dumps(row) + "\n" for row in content)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base folder, and adapters of several methods trained on it, as far as random weights are trained."""
    root = tmp_path_factory.mktemp("adapters")
    base = save_base(root / "base", max_position_embeddings=512)
    made = {"shadow": adapt(chat_model(max_position_embeddings=512))}
    made["dora"] = get_peft_model(
        chat_model(max_position_embeddings=512),
        LoraConfig(task_type="CAUSAL_LM", r=2, use_dora=True, target_modules=["q_proj"], base_model_name_or_path=base),
    )
    randomise(made["dora"])
    made["classifier"] = adapt(
        LlamaForSequenceClassification.from_pretrained(base, num_labels=151), task_type="SEQ_CLS"
    )
    for name, model in made.items():
        next(iter(model.peft_config.values())).base_model_name_or_path = base
        model.save_pretrained(str(root / name))
        chat_tokenizer().save_pretrained(str(root / name))
    return root


@pytest.mark.parametrize(
    ("adapter", "task", "modes"),
    [
        ("shadow", "mmlu", ["base", "attached", "detached"]),
        ("dora", "mmlu", ["base", "dora"]),
        ("classifier", "clinc150", ["attached", "detached"]),
    ],
)
def test_every_method_of_adaptation(monkeypatch, capsys, tmp_path, data, folders, adapter, task, modes):
    arguments = (folders / adapter, "--task", task, "--out", tmp_path / "out", "--limit", 4, "--json")
    code, out, err = call(monkeypatch, capsys, "eval", *arguments)
    assert code == 0, err
    found = json.loads(out)["modes"]
    assert list(found) == modes
    for mode, record in found.items():
        assert (record["n"], record["mode"], record["data"]["from"]) == (4, mode, "folder")
        assert json.loads((tmp_path / "out" / mode / "record.json").read_text()) == record
        assert (tmp_path / "out" / mode / "predictions.jsonl").read_text().count("\n") == 4
    assert call(monkeypatch, capsys, "eval", *arguments)[1] == out  # resumed: nothing left to do, the same records


def test_rows_of_a_file_are_a_task_like_another(monkeypatch, capsys, tmp_path, folders):
    rows = [{"prompt": f"q{i}", "response": "a" * i, **({"path": "base"} if i < 2 else {})} for i in range(5)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    arguments = ("eval", folders / "shadow", "--data", file, "--out", tmp_path / "out", "--max-new-tokens", 3, "--json")
    code, out, err = call(monkeypatch, capsys, *arguments)
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert (result["data"], result["rows"]) == (file, 5)
    assert {mode: r["n"] for mode, r in result["modes"].items()} == {"base": 5, "attached": 5, "detached": 3}
    for mode, record in result["modes"].items():
        kept = json.loads((tmp_path / "out" / mode / "record.json").read_text())
        assert {"loss", "perplexity", "tokens", "accuracy", "interval", "n"} <= record.keys()  # as ever
        assert kept.keys() <= record.keys()  # and all that a task's record has
        assert (record["accuracy"], record["loss"]) == (kept["score"], kept["loss"])
        assert record["interval"] == [round(end, 4) for end in kept["wilson_interval"]]
        assert record["tokens"] == sum(max(i, 0) + 1 for i in range(5) if mode != "detached" or i >= 2)  # with the turn's end
        assert kept["settings"]["max_new_tokens"] == 3
    assert call(monkeypatch, capsys, *arguments)[1] == out


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    """A device that says [Sit()] to everything, of a run whose shadow learns actions and whose rows have a system message."""
    folder = tmp_path_factory.mktemp("device")
    rows = [{"prompt": f"sit {i}", "response": "[Sit()] Yes, I sit."} for i in range(4)]
    file = write_rows(folder / "rows.jsonl", rows)
    run = run_file(
        folder / "run",
        save_sitting_base(folder / "base"),
        file,
        data={"shadow_answers": "action", "system": "You are a dog."},
        shadow={"shadow_num_hidden_layers": 1},
        training={"max_steps": 1, "shadow_epochs": 0, "learning_rate": 1e-6},
    )
    return train(parse_run(run, "the test's run"), quiet=True)["adapter"], file


def test_a_device_is_judged_by_its_actions_under_the_message_of_its_training(monkeypatch, capsys, device):
    adapter, file = device
    config = json.loads((Path(adapter) / "adapter_config.json").read_text())
    assert (config["system_message"], config["shadow_answers"]) == ("You are a dog.", "action")
    asked = []
    seen = Rows.chat
    monkeypatch.setattr(Rows, "chat", lambda self, example: asked.append(seen(self, example)) or asked[-1])
    code, out, err = call(monkeypatch, capsys, "eval", adapter, "--data", file, "--json")
    assert (code, err) == (0, "")
    scores = {mode: record["score"] for mode, record in json.loads(out)["modes"].items()}
    assert scores == {"base": 0.0, "attached": 0.0, "detached": 1.0}  # [Sit()], and nothing more
    assert {chat[0]["content"] for chat in asked} == {"You are a dog."}


@pytest.mark.parametrize(("given", "expected"), [(None, "You are a dog."), ("A cat.", "A cat."), ("", None)])
def test_a_prompt_has_the_message_of_the_training_unless_another_is_given(monkeypatch, capsys, device, given, expected):
    adapter, _ = device
    seen = []
    answer = generate.answer
    monkeypatch.setattr(generate, "answer", lambda *args, **options: seen.append(options["system"]) or answer(*args, **options))
    more = () if given is None else ("--system", given)
    code, out, err = call(monkeypatch, capsys, "generate", adapter, "sit", "--mode", "detached", *more)
    assert (code, out.strip(), err) == (0, "[Sit()]", "")
    assert seen == [expected]


def test_what_the_table_says_of_shares_and_rows(monkeypatch, capsys, tmp_path, device):
    adapter, _ = device
    rows = [{"prompt": f"sit {i}", "response": "[Sit()]", **({"path": "shadow"} if i else {})} for i in range(3)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    code, out, err = call(monkeypatch, capsys, "eval", adapter, "--data", file, "--mode", "attached", "--mode", "detached")
    assert (code, err) == (0, "")
    assert "the modes are asked different rows: attached 1, detached 3" in " ".join(out.split())
    assert "43.9-100.0%" in out  # Wilson's interval of 3 in 3
    code, _, err = call(monkeypatch, capsys, "eval", adapter, "--data", file, "--split", "validation")
    assert (code, "a file has no splits" in err) == (2, True)


def test_drafts_change_no_score_and_the_record_counts_them(monkeypatch, capsys, tmp_path, folders):
    rows = [{"prompt": f"q{i}", "response": "a" * i} for i in range(1, 6)]
    arguments = ("eval", folders / "shadow", "--data", write_rows(tmp_path / "rows.jsonl", rows), "--max-new-tokens", 12)
    plain, drafted = (
        json.loads(call(monkeypatch, capsys, *arguments, *more, "--out", tmp_path / str(len(more)), "--json")[1])["modes"]
        for more in ((), ("--speculative",))
    )
    assert {mode: r["score"] for mode, r in drafted.items()} == {mode: r["score"] for mode, r in plain.items()}
    texts = [(tmp_path / number / "attached" / "predictions.jsonl").read_text() for number in "01"]
    assert [json.loads(line)["text"] for line in texts[0].splitlines()] == [
        json.loads(line)["text"] for line in texts[1].splitlines()
    ]
    assert drafted["attached"]["speculation"]["tokens"] > 0
    assert drafted["attached"]["settings"]["speculative"] is True
    assert "speculation" not in drafted["detached"]
    assert "speculation" not in plain["attached"]
    for more, message in (
        (("--mode", "detached", "--mode", "base"), "given for --mode detached, base, but the shadow drafts for the attached"),
        (("--data", tmp_path / "rows.jsonl"), "dora' has no shadow beside a base, it is a dora adapter; leave it out"),
    ):
        asked = arguments if "--mode" in more else ("eval", folders / "dora")
        code, _, err = call(monkeypatch, capsys, *asked, "--speculative", *more)
        assert code == 2
        assert message in err
    out = call(monkeypatch, capsys, *arguments, "--speculative", "--mode", "attached")[1]
    assert "tokens a pass" in out or "did not pay" in out


def test_answers_of_the_attached_model_are_held_to_its_shadow_s_vote(monkeypatch, capsys, tmp_path, device):
    adapter, _ = device
    rows = [{"prompt": f"sit {i}", "skill": "Sit"} for i in range(4)]
    file, names = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "names.json"
    names.write_text('["Sit", "Stand"]')
    told = []

    def votes(model, tokenizer, prompts, actions, *, calls):
        assert calls is None
        told.append([prompt[-1]["content"] for prompt in prompts])
        assert actions.actions == ("Sit", "Stand", "REMOTE")
        return [ActionTrie.of(tokenizer, ["Stand", "Lie"])] * len(prompts)  # so that no answer can be right

    monkeypatch.setattr(held, "votes", votes)
    arguments = ("eval", adapter, "--data", file, "--skills", names, "--json")
    both = [json.loads(call(monkeypatch, capsys, *arguments, *more)[1])["modes"] for more in ((), ("--vote",))]
    assert told == [[f"sit {i}" for i in range(4)]]
    assert "vote" not in both[0]["attached"]["settings"]
    assert both[1]["attached"]["settings"]["vote"] is True
    assert "vote" not in both[1]["detached"]["settings"]
    assert both[0]["detached"]["score"] == both[1]["detached"]["score"]
    assert both[0]["attached"]["score"] != both[1]["attached"]["score"] == 0.0
    for more, message in (
        (("eval", adapter, "--data", device[1], "--vote"), "nothing that the shadow could weigh; pass --skills"),
        ((*arguments, "--vote", "--mode", "detached"), "no --mode is attached"),
        ((*arguments, "--vote", "--speculative", "--mode", "attached"), "--vote was given with --speculative"),
        ((*arguments, "--vote", "--method", "likelihood"), "--vote was given with --method likelihood"),
        (("generate", adapter, "sit", "--vote"), "--vote needs --skills and --mode attached"),
        (("generate", adapter, "sit", "--vote", "--skills", names, "--mode", "detached"), "--vote needs --skills"),
    ):
        code, _, err = call(monkeypatch, capsys, *more)
        assert (code, message in " ".join(err.split())) == (2, True), err
    code, out, err = call(monkeypatch, capsys, "generate", adapter, "sit 1", "--skills", names, "--vote", "--json")
    assert code == 0, err
    assert json.loads(out)["action"] in ("Sit", "Stand", None)


def test_the_table_names_score_record_and_data(monkeypatch, capsys, data, folders):
    code, out, err = call(
        monkeypatch, capsys, "eval", folders / "shadow", "--task", "mmlu", "--mode", "base", "--method", "likelihood"
    )
    assert code == 0, err
    assert "mmlu, test" in out
    assert "data from the folder: mmlu/test.jsonl.gz" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--task", "gsm8"), "did you mean 'gsm8k'"),
        (("--task", "mmlu", "--data", "robot"), "leave --data or --task out"),
        (("--task", "mmlu", "--max-new-tokens", "3"), "leave --max-new-tokens or --task out"),
        (("--task", "mmlu", "--mode", "lora"), "mode is 'lora' but the model is shadowpeft"),
        (("--task", "clinc150"), "needs a SEQ_CLS adapter"),
        (("--task", "gsm8k"), "does not exist; set SHADOWPEFT_DATA"),
    ],
)
def test_usage_errors(monkeypatch, capsys, data, folders, arguments, said):
    code, _, err = call(monkeypatch, capsys, "eval", folders / "shadow", *arguments)
    assert code == 2
    assert said in " ".join(err.replace("│", " ").split())
