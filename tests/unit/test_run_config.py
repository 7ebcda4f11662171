"""Run files: what is refused, in which words, and that nothing heavy is imported before."""

import contextlib
import subprocess
import sys

import pytest
import yaml

from chatbase import run_file
from shadowpeft.errors import ConfigError
from shadowpeft.hf.config import ShadowPeftConfig
from shadowpeft.presets import TRAINING
from shadowpeft.train.config import RunConfig, ShadowSection, TrainingSection, parse_run, read_run
from shadowpeft.train.pretrain_config import parse_pretraining
from shadowpeft.train.schedule import check_warmup

BASIC = {"base": "smollm2-135m", "data": {"train": "rows.jsonl"}}
PRETRAINING = {
    "base": "smollm2-135m",
    "backbone": {"layers": "first", "count": 2},
    "text": {"corpora": [{"path": "text.jsonl"}]},
    "training": {"max_steps": 2},
}


def run(**sections):
    return {**BASIC, **sections}


def test_defaults():
    made = parse_run(BASIC, "here")
    assert (made.training.epochs, made.training.max_steps, made.shadow.r) == (1.0, None, 16)
    assert RunConfig.model_validate(made.model_dump()) == made  # config.yaml of a run is a run file


def test_the_papers_preset_has_the_configs_own_defaults():
    config = ShadowPeftConfig(task_type="CAUSAL_LM")
    for name, value in ShadowSection.model_validate({"preset": "paper"}).fields.items():
        assert getattr(config, name) == value, name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (run(bas="x"), "unknown key 'bas' (did you mean 'base'"),
        (run(shadow={"shadow_alfa": 0.5}), "unknown key 'shadow.shadow_alfa' (did you mean 'shadow_alpha'"),
        (run(shadow={"name": "tuned"}), "unknown key 'shadow.name'"),
        (run(shadow={"preset": ["tuned"]}), "shadow.preset"),
        (run(shadow={1: 2}), "shadow"),
        (run(training={"learning_rat": 0.1}), "unknown key 'training.learning_rat' (did you mean 'learning_rate'"),
        (run(learning_rate=0.1), "unknown key 'learning_rate' (did you mean 'training.learning_rate'"),
        (run(training={"r": 8}), "unknown key 'training.r' (did you mean 'shadow.r'"),
        (run(training={"zzz": 8}), "unknown key 'training.zzz'; known keys: max_steps, "),
        ({"data": {"train": "x"}}, "key 'base' is missing"),
        ({"base": "x", "data": {}}, "key 'data.train' is missing"),
        (run(data="rows.jsonl"), "'data' is 'rows.jsonl'"),
        (run(shadow={"r": "sixteen"}), "'shadow.r' is 'sixteen' but must be a valid integer"),
        (run(shadow={"r": 16.0}), "'shadow.r' is 16.0"),
        (run(shadow={"r": 0}), "'shadow.r' is 0 but must be greater than or equal to 1"),
        (run(shadow={"shadow_dropout": 1.0}), "'shadow.shadow_dropout' is 1.0"),
        (run(shadow={"use_update": "no"}), "'shadow.use_update' is 'no'"),
        (run(shadow={"shadow_alpha": float("inf")}), "'shadow.shadow_alpha' is inf"),
        (run(shadow={"shadow_alpha": 0.0}), "shadow.shadow_alpha is 0"),
        (run(training={"learning_rate": -1.0}), "'training.learning_rate' is -1.0"),
        (run(training={"precision": "int8"}), "'training.precision' is 'int8'"),
        (run(training={"report_to": ["mlflow"]}), "'training.report_to.0' is 'mlflow'"),
        (run(training=5), "'training' is 5 but must be a section of keys and values"),
        (run(data={"train": ["a.jsonl", "b.jsonl"]}), "'b.jsonl'] but must be the name of a file, of a folder"),
        (run(training={"epochs": 1, "max_steps": 5}), "epochs and max_steps are both set; keep one"),
        (run(training={"eval_every": 5}), "training.eval_every is set but data.validation is not"),
        (
            run(shadow={"shadow_model": "other", "shadow_intermediate_size": 64}),
            "shadow.shadow_intermediate_size shapes a mirrored shadow but shadow.shadow_model is 'other'",
        ),
        (
            run(shadow={"shadow_model": "other", "shadow_num_hidden_layers": 2}),
            "shadow.shadow_num_hidden_layers shapes a mirrored shadow",
        ),
        (run(shadow={"shadow_model": "other", "shadow_init": "base_layers"}), "base_layers fills a mirrored shadow"),
        (
            run(shadow={"shadow_init": "base_layers", "shadow_head_dim": 8}),
            "base_layers copies the base's own widths but shadow.shadow_head_dim is set",
        ),
        (run(shadow={"projection_init": "pseudo_inverse"}), "pseudo_inverse needs an explicit shadow.shadow_model"),
        ([1], "holds a list but must be a mapping"),
        (None, "holds a NoneType but must be a mapping"),
    ],
)
def test_impossible_runs(content, message):
    with pytest.raises(ConfigError) as caught:
        parse_run(content, "run.yaml")
    assert str(caught.value).startswith("run.yaml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "shadow",
    [
        {"shadow_model": "other", "shadow_hidden_size": 8},
        {"shadow_model": "other", "shadow_init": "base_layers"},
        {"shadow_init": "base_layers", "shadow_num_attention_heads": 2},
        {"projection_init": "pseudo_inverse"},
        {"shadow_alpha": 0.0},
        {"shadow_alpha": 1e7},
        {"auxiliary_loss_weight": 1e10},
    ],
)
def test_whatever_the_config_refuses_the_run_file_refuses_too(shadow):
    with pytest.raises(ConfigError):
        ShadowPeftConfig(task_type="CAUSAL_LM", **shadow)
    with pytest.raises(ConfigError):
        parse_run(run(shadow=shadow), "run.yaml")


@pytest.mark.parametrize(
    "shadow",
    [
        {"shadow_init": "base_layers", "shadow_num_hidden_layers": 2},
        {"shadow_model": "other", "projection_init": "pseudo_inverse"},
        {"shadow_hidden_size": 16, "share_embeddings": False},
    ],
)
def test_possible_combinations(shadow):
    made = parse_run(run(shadow=shadow), "run.yaml").shadow.fields
    assert ShadowPeftConfig(task_type="CAUSAL_LM", **made).r == 16


def test_a_corpus_is_a_mapping():
    with pytest.raises(ConfigError, match=r"'text.corpora.0' is 'a.txt' but must be a mapping such as \{path: FILE\}"):
        parse_pretraining({**PRETRAINING, "text": {"corpora": ["a.txt"]}}, "run.yaml")


@pytest.mark.parametrize(
    ("settings", "alone", "message"),
    [
        ({"warmup": 3, "scheduler": "constant"}, 0, "warmup is 3 but training.scheduler is constant, which has none"),
        ({"warmup": 1.5}, 0, "warmup is 1.5 but must be a share of the steps below 1, or a whole number of them"),
        ({"warmup": 100}, 0, "warmup is 100 steps but there are 100 in all, so the learning rate is never reached"),
        ({"warmup": 20}, 85, "warmup is 20 steps but there are 15 in which both paths train"),
        ({"warmup": 14}, 85, None),
        ({"warmup": 1}, 99, None),  # a course of one step has no warm-up
        ({"scheduler": "constant"}, 0, None),
        ({"warmup": TRAINING["device"]["warmup"], "scheduler": "constant"}, 0, None),  # the preset's own
    ],
)
def test_a_warmup_that_a_new_run_would_not_honour_is_refused(settings, alone, message):
    with contextlib.nullcontext() if message is None else pytest.raises(ConfigError) as refused:
        check_warmup(TrainingSection(**settings), "device", 100, alone)
    assert message is None or message in str(refused.value)


def test_several_mistakes_are_told_at_once():
    with pytest.raises(ConfigError, match=r"shadow\.rr.*training\.batch_size"):
        parse_run(run(shadow={"rr": 1}, training={"batch_size": 0}), "run.yaml")


# --------------------------------------------------------------------------------------------------------------- YAML


def written(tmp_path, text):
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_a_number_without_a_point(tmp_path):
    file = written(
        tmp_path, "base: b\ndata: {train: t}\ntraining: {learning_rate: 1e-3, weight_decay: 1E-2, epochs: 2}\n"
    )
    made = read_run(file).training
    assert (made.learning_rate, made.weight_decay, made.epochs) == (1e-3, 1e-2, 2)


def test_what_yaml_writes_is_read_back(tmp_path):
    content = run_file(tmp_path, "base", "rows.jsonl")
    assert read_run(written(tmp_path, yaml.safe_dump(content))) == parse_run(content, "x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: b\ndata: {train: t\n", "line 3 is not valid YAML"),
        ("base: b\nshadow:\n  r: 8\n  r: 16\n", "line 4 is not valid YAML (key 'r' is given twice)"),
        ("base: !!python/object/apply:os.system ['true']\n", "line 1 is not valid YAML"),
        ("", "holds a NoneType but must be a mapping"),
    ],
)
def test_bad_yaml_names_its_line(tmp_path, text, message):
    file = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        read_run(file)
    assert str(file) in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(("text", "value"), [("010", 10), ("1_000", 1000), ("007", 7), ("0x10", 16), ("-0", None)])
def test_a_whole_number_is_what_people_read(tmp_path, text, value):
    file = written(tmp_path, f"base: b\ndata: {{train: t}}\ntraining: {{max_steps: {text}}}\n")
    if value is None:
        with pytest.raises(ConfigError, match=r"'training\.max_steps' is 0 but"):
            read_run(file)
        return
    assert read_run(file).training.max_steps == value
    bare = written(tmp_path, "base: b\ndata: {train: t}\n")
    assert read_run(bare, [f"training.max_steps={text}"]).training.max_steps == value


def test_a_section_of_which_all_is_commented_out_is_not_there(tmp_path):
    file = written(tmp_path, "base: b\ndata: {train: t}\ntraining:\n  # epochs: 3\nshadow:\n")
    assert read_run(file) == parse_run({"base": "b", "data": {"train": "t"}}, "here")
    assert read_run(file, ["training.epochs=2", "shadow.r=3"]).training.epochs == 2
    with pytest.raises(ConfigError, match="key 'data' is missing"):
        read_run(written(tmp_path, "base: b\ndata:\n"))
    with pytest.raises(ConfigError, match="unknown key 'source'"):
        read_run(written(tmp_path, "base: b\ndata: {train: t}\nsource:\n"))


@pytest.mark.parametrize("key", ["seed", "data_seed"])
def test_a_seed_is_one_that_numpy_takes(key):
    assert getattr(parse_run(run(training={key: 2**32 - 1}), "here").training, key) == 2**32 - 1
    for value in (-1, 2**32):
        with pytest.raises(ConfigError, match=rf"'training\.{key}' is {value} but must be "):
            parse_run(run(training={key: value}), "here")


def test_not_utf8(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_bytes("base: grün".encode("latin-1"))
    with pytest.raises(ConfigError, match="not valid YAML"):
        read_run(file)


def test_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing\.yaml' does not exist"):
        read_run(tmp_path / "nothing.yaml")


@pytest.mark.parametrize("text", ["base: b\ndata: {trian: t}\n", "shadow: {shadow_model: other, shadow_head_dim: 4}\n"])
def test_a_wrong_run_file_is_refused_before_torch_is_imported(tmp_path, text):
    file = written(tmp_path, text)
    code = (
        "import sys\n"
        "from shadowpeft import cli\n"
        f"sys.argv = ['shadowpeft', 'train', {str(file)!r}]\n"
        "try:\n"
        "    cli.main()\n"
        "except SystemExit as stop:\n"
        "    print(stop.code, sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "2 []\n"
    assert done.stderr.startswith(f"error: {file}")


def test_a_frozen_shadow_takes_no_epochs_of_its_own_from_a_preset():
    made = parse_run({"base": "x", "data": {"train": "robot"}, "training": {"freeze_shadow": True}}, "here")
    assert (made.shadow.preset, made.training.shadow_epochs, made.training.learning_rate) == ("device", 0, 1e-2)


def test_settings_of_the_command_line_take_the_place_of_the_files(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(run(training={"epochs": 3.0})))
    made = read_run(
        file,
        ["training.learning_rate=1e-3", "shadow.r=8", "training.epochs=2", "output=elsewhere/x=y", "data.system=null"],
    )
    assert (made.training.learning_rate, made.training.epochs, made.shadow.r) == (1e-3, 2.0, 8)
    assert (made.output, made.data.system) == ("elsewhere/x=y", None)
    assert read_run(file).training.epochs == 3.0
    assert read_run(file, ["training.report_to=[tensorboard]"]).training.report_to == ["tensorboard"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("training.epochs", "is no setting; write KEY=VALUE"),
        ("=3", "is no setting; write KEY=VALUE"),
        ("training..epochs=3", "is no setting; write KEY=VALUE"),
        ("base.name=x", "leads through something that has no keys"),
        ("training.epoch=3", "unknown key 'training.epoch' (did you mean 'epochs'"),
        ("training.epochs=many", "training.epochs"),
        ("data.train=[a", "is no value for 'data.train'"),
    ],
)
def test_a_wrong_setting_of_the_command_line_is_named(tmp_path, setting, message):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(run()))
    with pytest.raises(ConfigError) as refused:
        read_run(file, [setting])
    assert message in str(refused.value)


def test_a_run_file_of_another_kind_names_the_command_that_takes_it():
    other = {**PRETRAINING, "output": "p", "loss": "ce"}
    with pytest.raises(ConfigError) as refused:
        parse_run(other, "p.yaml")
    said = "p.yaml has 'backbone' and no 'data', so it is a run file of another kind; give it to shadowpeft pretrain"
    assert str(refused.value) == said
    with pytest.raises(ConfigError) as refused:
        parse_pretraining(run(shadow={"r": 8}), "run.yaml")
    assert str(refused.value).endswith("give it to shadowpeft train, plan or data check")
    assert parse_pretraining(other, "p.yaml").output == "p"
    with pytest.raises(ConfigError, match="key 'data' is missing"):
        parse_run({"base": "b"}, "here")


def test_plan_and_train_take_settings(tmp_path):
    file = tmp_path / "run.yaml"
    for command, content in (("plan", run()), ("train", run()), ("pretrain", PRETRAINING)):
        file.write_text(yaml.safe_dump(content))
        done = subprocess.run(
            [sys.executable, "-m", "shadowpeft", command, file, "training.nothing=1"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2
        assert "unknown key 'training.nothing'" in done.stderr


def test_paths_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("base: ~/base\noutput: ~/out\ndata: {train: ~/a.jsonl, system: ~/ is home}\n")
    made = read_run(tmp_path / "run.yaml", ["data.validation=~/b.jsonl"])
    home = str(tmp_path)
    assert (made.base, made.output) == (f"{home}/base", f"{home}/out")
    assert (made.data.train, made.data.validation) == (f"{home}/a.jsonl", f"{home}/b.jsonl")
    assert made.data.system == "~/ is home"


def test_the_folder_of_a_run_is_no_run_file(tmp_path):
    (tmp_path / "config.yaml").write_text("base: x")
    with pytest.raises(ConfigError, match=r"is the folder of a run; give its run file, or '.*config.yaml'"):
        read_run(tmp_path)
