"""``shadowpeft doctor``: silent on a sound set-up of every format, and flags each of the broken ones by name."""

import json
import sys

import peft
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, LlamaForCausalLM

import shadowpeft
from chatbase import CHATML, chat_model, chat_tokenizer, save_base
from commands import call
from shadowpeft import cli, versions
from shadowpeft.apps import doctor, selftest
from shadowpeft.apps.checks import Report
from shadowpeft.apps.common import load_tokenizer_of
from shadowpeft.hf.files import locate
from shadowpeft.hf.forward import hooks, losses
from tiny import adapt, randomise

ALL = {
    "python", "torch", "transformers", "peft", "trl", "accelerate", "device", "denormal numbers", "format", "base", "dtype",
    "vocabulary", "pad token", "padding side", "end of text", "chat template", "adapter's vocabulary",
    "adapter's chat template", "detached = shadow", "cached = uncached", "left padding", "lambda", "shadow targets",
    "stock Trainer", "TRL's SFTTrainer", "disabled = base",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _quick(monkeypatch, request):
    """TRL's import and trainer take seconds; one test has them."""
    if "with_trl" not in request.fixturenames:
        real = selftest.importlib.util.find_spec
        monkeypatch.setattr(
            selftest.importlib.util, "find_spec", lambda name, *a: None if name == "trl" else real(name, *a)
        )


@pytest.fixture
def with_trl():
    """Asks for TRL's part too."""
    pytest.importorskip("trl", reason="TRL is not installed; this one's needs Python 3.11")


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save_base(folder)
    return folder


def make(folder, base_folder, *, trained=True, tokenizer=None, **fields):
    """An adapter with its tokenizer beside it."""
    model = adapt(AutoModelForCausalLM.from_pretrained(base_folder), copy_base=False, trained=trained, **fields)
    model.save_pretrained(folder)
    (tokenizer or chat_tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, base_folder):
    return make(tmp_path_factory.mktemp("adapter"), base_folder)


def run(monkeypatch, capsys, *arguments):
    """Exit code and checks by name."""
    code, out, err = call(monkeypatch, capsys, "doctor", *arguments, "--json")
    if not out:
        return code, err
    found = json.loads(out)
    assert found["passed"] == (code == 0)
    return code, {check["name"]: check for check in found["checks"]}


def states(checks, state):
    return {name for name, check in checks.items() if check["state"] == state}


def sound(checks):
    """Everything ok, but for the padding side that tokenizers have by default."""
    assert not states(checks, "failed"), checks
    assert states(checks, "warning") <= {"padding side"}, checks


def test_a_sound_set_up_passes_every_check(monkeypatch, capsys, adapter, with_trl):
    code, checks = run(monkeypatch, capsys, adapter)
    assert code == 0
    assert set(checks) == ALL
    sound(checks)
    assert "16 of 16" in checks["cached = uncached"]["text"]
    assert "bit-identical" in checks["disabled = base"]["text"]


def test_the_environment_alone(monkeypatch, capsys):
    code, checks = run(monkeypatch, capsys)
    assert code == 0
    assert set(checks) == {"python", *versions.TESTED, "accelerate", "device", "denormal numbers"}


def test_for_people_each_check_is_a_line_and_each_remedy_another(monkeypatch, capsys, adapter):
    monkeypatch.setattr(sys, "argv", ["shadowpeft", "doctor", str(adapter)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    out = capsys.readouterr().out
    assert "ok       cached = uncached" in out
    assert "warning  padding side" in out
    assert "fix: tokenizer.padding_side = 'left'" in out
    assert out.strip().endswith("0 failed")


def test_a_base_without_an_adapter_is_wrong_usage(monkeypatch, capsys, base_folder):
    code, said = run(monkeypatch, capsys, "--base", base_folder)
    assert code == 2
    assert "--base was given without an adapter" in said


def test_no_adapter_there(monkeypatch, capsys, tmp_path):
    code, checks = run(monkeypatch, capsys, tmp_path)
    assert code == 1
    assert states(checks, "failed") == {"adapter"}


@pytest.mark.parametrize("kind", ["authors", "peft"])
def test_other_formats(monkeypatch, capsys, tmp_path, base_folder, kind):
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    torch.manual_seed(5)
    if kind == "peft":
        made = get_peft_model(model, peft.ShadowConfig(task_type="CAUSAL_LM", r=4, shadow_alpha=0.7))
    else:
        authors = pytest.importorskip("shadow_peft")
        made = authors.get_shadow_model(model, authors.ShadowConfig(injection_hidden_size=4, gate_hidden_size=4))
    randomise(made)
    made.save_pretrained(tmp_path)
    code, checks = run(monkeypatch, capsys, tmp_path, "--base", base_folder)
    assert code == 0, checks
    assert checks["format"]["text"].startswith(kind)
    assert states(checks, "warning") == {"base", "padding side"}


def test_a_classifier(monkeypatch, capsys, tmp_path):
    chat_model().save_pretrained(tmp_path / "base")
    chat_tokenizer().save_pretrained(tmp_path / "base")
    torch.manual_seed(2)
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    base.save_pretrained(tmp_path / "classifier")
    chat_tokenizer().save_pretrained(tmp_path / "classifier")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")
    adapt(base, copy_base=False, task_type="SEQ_CLS").save_pretrained(tmp_path / "adapter")
    code, checks = run(monkeypatch, capsys, tmp_path / "adapter")
    assert code == 0, checks
    assert {"left padding", "lambda", "shadow targets", "detached = shadow"} <= states(checks, "ok")


# --------------------------------------------------------------------------------------------------- broken set-ups


def broken(monkeypatch, capsys, *arguments, failed=(), warned=()):
    code, checks = run(monkeypatch, capsys, *arguments)
    assert states(checks, "failed") == set(failed), checks
    assert states(checks, "warning") - {"padding side"} == set(warned), checks
    assert code == (1 if failed else 0)
    for name in (*failed, *warned):
        assert checks[name]["fix"]
        assert "\n" not in checks[name]["text"]
    return checks


def test_another_base(monkeypatch, capsys, tmp_path, adapter):
    torch.manual_seed(99)
    other = LlamaForCausalLM(chat_model().config)
    other.save_pretrained(tmp_path)
    chat_tokenizer().save_pretrained(tmp_path)
    checks = broken(monkeypatch, capsys, adapter, "--base", tmp_path, failed=["base"])
    assert "other weights" in checks["base"]["text"]


def test_a_pad_token_that_the_model_does_not_have(monkeypatch, capsys, tmp_path, base_folder):
    make(tmp_path, base_folder, tokenizer=chat_tokenizer(pad="<eos>"))
    checks = broken(monkeypatch, capsys, tmp_path, failed=["pad token"])
    assert checks["pad token"]["text"] == "the tokenizer's is 1, the model's 0"


def test_lambda_zero(monkeypatch, capsys, tmp_path, base_folder):
    make(tmp_path, base_folder, auxiliary_loss_weight=0.0)
    broken(monkeypatch, capsys, tmp_path, warned=["lambda"])


def test_a_lambda_that_changes_nothing(monkeypatch, capsys, adapter):
    monkeypatch.setattr(losses, "joint_loss", lambda task, shadow, weight: task)
    checks = broken(monkeypatch, capsys, adapter, failed=["lambda"])
    assert "never supervised" in checks["lambda"]["text"]


def test_more_tokens_than_embedding_rows(monkeypatch, capsys, tmp_path, base_folder):
    tokenizer = chat_tokenizer()
    tokenizer.add_tokens(["one", "two"])
    make(tmp_path, base_folder, tokenizer=tokenizer)
    checks = broken(monkeypatch, capsys, tmp_path, failed=["vocabulary", "adapter's vocabulary"])
    assert checks["vocabulary"]["text"] == "262 tokens, 260 embedding rows"


def test_a_missing_and_another_chat_template(monkeypatch, capsys, tmp_path, base_folder):
    make(tmp_path / "none", base_folder, tokenizer=chat_tokenizer(template=None))
    broken(monkeypatch, capsys, tmp_path / "none", warned=["chat template", "adapter's chat template"])
    make(tmp_path / "other", base_folder, tokenizer=chat_tokenizer(template=CHATML.replace("assistant", "bot")))
    broken(monkeypatch, capsys, tmp_path / "other", warned=["adapter's chat template"])


def test_the_tokenizer_of_an_adapter_on_the_hub(monkeypatch, adapter, base_folder):
    def fetch(name, file):
        assert name == "me/robot"
        if not (adapter / file).is_file():
            raise EntryNotFoundError(file)
        return str(adapter / file)

    real = AutoTokenizer.from_pretrained
    asked = []

    def read(name, **options):
        asked.append(name)
        assert options["trust_remote_code"] is False
        return real(adapter if name == "me/robot" else name, **options)

    monkeypatch.setattr(locate, "hf_hub_download", fetch)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", read)
    load_tokenizer_of("me/robot", str(base_folder))
    report = Report()
    doctor.tokenizers(report, shadowpeft.load(adapter), "me/robot", None)
    assert asked == ["me/robot", "me/robot"]
    assert not report.failed


def test_an_adapters_tokenizer_without_a_pad_token(tmp_path):
    chat_tokenizer(pad=None).save_pretrained(tmp_path)
    tokenizer = load_tokenizer_of(str(tmp_path), None)
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"


def test_another_end_of_text(monkeypatch, capsys, tmp_path, base_folder):
    words = chat_tokenizer(eos="<eos>")
    make(tmp_path, base_folder, tokenizer=words)
    checks = broken(monkeypatch, capsys, tmp_path, warned=["end of text"])
    ends = sorted(words.convert_tokens_to_ids(["<eos>", "<|im_end|>"]))
    assert checks["end of text"]["fix"] == f"model.generation_config.eos_token_id = {ends}"


def test_a_template_that_closes_a_turn_otherwise_than_the_base_ends(monkeypatch, capsys, tmp_path, base_folder):
    """Plain ``generate`` would run on after the end that was trained."""
    words = chat_tokenizer(template=CHATML.replace("<|im_end|>", "<eos>"))
    make(tmp_path, base_folder, tokenizer=words)
    checks = broken(monkeypatch, capsys, tmp_path, warned=["end of text", "adapter's chat template"])
    assert f"answers end with {sorted(words.convert_tokens_to_ids(['<eos>', '<|im_end|>']))}" in checks["end of text"]["text"]


def test_no_tokenizer_at_all(monkeypatch, capsys, tmp_path):
    chat_model().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapt(base, copy_base=False).save_pretrained(tmp_path / "adapter")
    broken(monkeypatch, capsys, tmp_path / "adapter", warned=["tokenizer"])


def test_a_layer_that_breaks_the_cache(monkeypatch, capsys, adapter):
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    real = LlamaDecoderLayer.forward

    def forgetful(self, hidden_states, *args, **kwargs):
        """Adds the mean of what it reads: one token sees only itself, a whole prompt everything."""
        return real(self, hidden_states + 0.1 * hidden_states.mean(1, keepdim=True), *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forgetful)
    code, checks = run(monkeypatch, capsys, adapter)
    assert code == 1
    assert {"cached = uncached"} <= states(checks, "failed") <= {"cached = uncached", "left padding"}


def test_a_shadow_without_its_cache(monkeypatch, capsys, adapter):
    from transformers import DynamicCache

    monkeypatch.setattr(hooks, "shadow_views", lambda *a, **k: [DynamicCache()])
    code, checks = run(monkeypatch, capsys, adapter)
    assert code == 1
    assert "cached = uncached" in states(checks, "failed")


def test_a_patched_base(monkeypatch, capsys, adapter):
    real = LlamaForCausalLM.forward

    def restless(self, *args, **kwargs):
        out = real(self, *args, **kwargs)
        restless.calls += 1
        out.logits = out.logits + 1e-6 * restless.calls
        return out

    restless.calls = 0
    monkeypatch.setattr(LlamaForCausalLM, "forward", restless)
    checks = broken(monkeypatch, capsys, adapter, failed=["disabled = base"])
    assert "logits differ by" in checks["disabled = base"]["text"]


def test_an_untrained_adapter(monkeypatch, capsys, tmp_path, base_folder):
    make(tmp_path, base_folder, trained=False)
    broken(monkeypatch, capsys, tmp_path, warned=["effect"])


def test_too_old_a_release_stops_before_it_is_imported(monkeypatch, capsys, adapter):
    monkeypatch.setattr(versions, "installed", lambda name: "5.2.0" if name == "transformers" else "99.0")
    code, checks = run(monkeypatch, capsys, adapter)
    assert code == 1
    assert states(checks, "failed") == {"transformers"}
    assert states(checks, "warning") == {"torch", "peft", "trl"}
    assert "format" not in checks
