"""A shadow, a LoRA and a DoRA by name in one cloud server: each answers as it does alone, from folders and in mixed batches."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import shadowpeft
from chatbase import chat_tokenizer, save_base
from serving import ask, detached, engine_of
from shadowpeft.apps.serve import _cloud_backend
from shadowpeft.decode import decode
from shadowpeft.errors import ConfigError
from shadowpeft.serve.cloud_role import CloudRole
from shadowpeft.serve.engine import Engine, EngineLimits
from shadowpeft.serve.guard import Keys
from shadowpeft.serve.loading import load_adapters
from shadowpeft.serve.router import REASONS
from shadowpeft.serve.server import Settings, build
from shadowpeft.serve.several_backends import MultiBackend
from tiny import adapter_config, randomise
from webserver import Running, metric

CPU = torch.device("cpu")
NAMES = ("shadow", "lora", "dora", "base")
PROMPTS = ("sit down", "what?", "a much longer request than the others")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = tmp_path_factory.mktemp("several")
    base = save_base(made / "base")
    targets = ["q_proj", "v_proj"]
    configs = {
        "shadow": adapter_config(),
        "lora": LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=targets),
        "dora": LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=targets, use_dora=True),
    }
    for seed, (name, config) in enumerate(configs.items()):
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        randomise(model, seed=seed)
        model.save_pretrained(made / name)
    return {"base": base, **{name: str(made / name) for name in configs}}


def named(folders, *names):
    return {name: folders[name] for name in names}


def naive(model, prompt, n=8):
    """Greedy, uncached, one row."""
    tokenizer = chat_tokenizer()
    ids, made = tokenizer(prompt, add_special_tokens=False).input_ids, []
    with torch.no_grad():
        while len(made) < n:
            token = int(model(input_ids=torch.tensor([ids + made])).logits[0, -1].argmax())
            if token == 3:
                break
            made.append(token)
    return decode(tokenizer, made)


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_a_folder_of_peft_alone(folders, name):
    backend = _cloud_backend(named(folders, name), None, CPU)
    assert backend.names == (name,)
    engine = engine_of(backend)
    bare = AutoModelForCausalLM.from_pretrained(folders["base"]).eval()
    before = [naive(bare, prompt) for prompt in PROMPTS]
    model = PeftModel.from_pretrained(bare, folders[name]).eval()
    expected = [naive(model, prompt) for prompt in PROMPTS]
    assert [ask(engine, prompt, name, max_tokens=8).text for prompt in PROMPTS] == expected
    assert expected != before
    engine.stop()


def test_mixed_batches_equal_each_alone(folders):
    backend = _cloud_backend(named(folders, "lora", "shadow", "dora"), None, CPU)
    assert isinstance(backend, MultiBackend)
    assert set(backend.names) == set(NAMES)
    lengths = {name: 3 + 2 * i for i, name in enumerate(NAMES)}  # rows leave one by one
    engine = engine_of(backend, gather_seconds=0.1)
    asked = [(prompt, name) for prompt in PROMPTS for name in NAMES]
    together = [ask(engine, prompt, name, max_tokens=lengths[name]) for prompt, name in asked]
    texts = [reader.text for reader in together]
    batched = engine.steps
    alone = [ask(engine, prompt, name, max_tokens=lengths[name]).text for prompt, name in asked]
    assert texts == alone
    assert batched < (engine.steps - batched) / 3, "the requests were not batched"
    by_name = {name: [t for t, (_, n) in zip(texts, asked, strict=True) if n == name] for name in NAMES}
    assert len({tuple(t[:3] for t in by_name[name]) for name in NAMES}) == len(NAMES), "two names answer alike"
    engine.stop()


def test_every_kind_of_model_has_its_own_reason(folders, tmp_path):
    shadowpeft.detach(load_adapters(named(folders, "shadow"), None)).save_pretrained(tmp_path / "edge")
    chat_tokenizer().save_pretrained(tmp_path / "edge")
    backend = _cloud_backend({**named(folders, "shadow", "lora", "dora"), "edge": str(tmp_path / "edge")}, None, CPU)
    role = CloudRole(Engine(backend, EngineLimits()), system=None, default_tokens=2)
    expected = {"shadow": "attached", "base": "base", "lora": "lora", "dora": "lora", "edge": "detached"}
    assert set(expected.values()) <= set(REASONS)
    with Running(build(role, Settings(Keys(None, ())))) as server, server.http() as http:
        for name, reason in expected.items():
            for stream in (False, True):
                answer = http.post("/v1/completions", json={"model": name, "prompt": "sit", "stream": stream})
                assert answer.headers["x-shadow-reason"] == reason
                assert f'"reason":"{reason}"' in answer.text.replace(" ", "")
        text = http.get("/metrics").text
    counted = {reason: metric(text, "shadowpeft_routed_total", where="cloud", reason=reason) for reason in expected.values()}
    assert counted == {"attached": 2, "base": 2, "lora": 4, "detached": 2}


def test_a_shadow_is_swapped_among_others_and_a_lora_is_not(folders, tmp_path):
    backend = _cloud_backend(named(folders, "shadow", "lora"), None, CPU)
    other = get_peft_model(AutoModelForCausalLM.from_pretrained(folders["base"]), adapter_config())
    randomise(other, seed=9)
    other.save_pretrained(tmp_path / "v2")
    engine = engine_of(backend)
    texts = [ask(engine, "sit", "shadow", max_tokens=8).text]
    backend.swap("shadow", str(tmp_path / "v2"))
    texts.append(ask(engine, "sit", "shadow", max_tokens=8).text)
    assert backend.rollback("shadow") == folders["shadow"]
    texts.append(ask(engine, "sit", "shadow", max_tokens=8).text)
    assert texts[0] == texts[2] != texts[1]
    with pytest.raises(ConfigError, match="'lora' is not loaded or cannot be swapped"):
        backend.swap("lora", folders["lora"])
    engine.stop()


def test_what_does_not_go_together():
    with pytest.raises(ConfigError, match="two models are called 'one'"):
        MultiBackend([detached("one"), detached("one")])
    other = detached("two")
    other.tokenizer.add_tokens(["<more>"])
    with pytest.raises(ConfigError, match="'two' and 'one' have different tokenizers"):
        MultiBackend([detached("one"), other])
