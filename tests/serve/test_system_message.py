"""Chats that bring no system message get the one of the model's training, as adapters and edge models record it."""

import httpx
import pytest
from transformers import AutoModelForCausalLM

import shadowpeft
from chatbase import chat_tokenizer
from commands import call
from serving import ADAPTERS, attached, ending_model
from several import several
from shadowpeft.apps.common import system_message
from shadowpeft.serve.backend import Attached, Detached
from shadowpeft.serve.cloud_role import CloudRole
from shadowpeft.serve.engine import Engine, EngineLimits
from shadowpeft.serve.guard import Keys
from shadowpeft.serve.router import ACTION, FILE, Calibration
from shadowpeft.serve.server import Settings, build
from shadowpeft.serve.several_backends import MultiBackend
from webserver import Running

KEY, DOG = "user-key-0123456789", "Be a dog."


@pytest.fixture(scope="module")
def model():
    made = several(ending_model(max_position_embeddings=512), ADAPTERS).eval()
    made.peft_config["default"].system_message = DOG
    return made


@pytest.fixture(scope="module")
def backend(model):
    edge = Detached(shadowpeft.detach(model, "default"), chat_tokenizer(), "edge")
    return MultiBackend([Attached(model, chat_tokenizer(), {name: name for name in ADAPTERS}, "base"), edge])


def ask(backend, name, system=None, turns=()):
    role = CloudRole(Engine(backend, EngineLimits()), system=system, default_tokens=6)
    body = {"model": name, "messages": [*turns, {"role": "user", "content": "who?"}]}
    with Running(build(role, Settings(Keys((KEY,), ())))) as server:
        reply = httpx.post(
            f"{server.url}/v1/chat/completions", json=body, headers={"authorization": f"Bearer {KEY}"}, timeout=60
        ).json()
    return reply["usage"]["prompt_tokens"], reply["choices"][0]["message"]["content"]


@pytest.mark.parametrize(("name", "recorded"), [("default", True), ("edge", True), ("late", False), ("base", False)])
def test_each_model_has_its_own(backend, name, recorded):
    named = {text: ask(backend, name, turns=[{"role": "system", "content": text}]) for text in (DOG, "Be a cat.")}
    plain, told = ask(backend, name), ask(backend, name, system="Be a cat.")
    assert (plain == named[DOG]) is recorded
    assert told == named["Be a cat."]
    assert plain[0] == (ask(backend, name, system="")[0] + (named[DOG][0] - ask(backend, "base")[0] if recorded else 0))


def test_an_edge_model_records_it(model, tmp_path):
    edge = shadowpeft.detach(model, "default")
    edge.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.system_message == DOG
    assert (system_message(str(tmp_path), None), system_message(str(tmp_path), "")) == (DOG, None)
    assert not hasattr(shadowpeft.detach(model, "late").config, "system_message")


def test_a_swap_brings_its_own(tmp_path):
    made = attached(max_position_embeddings=512)
    other = several(ending_model(max_position_embeddings=512), {"default": {"r": 4}})
    other.peft_config["default"].system_message = "Be a cat."
    other.save_pretrained(str(tmp_path))
    assert made.system_message("default") is None
    made._replace("default", str(tmp_path))
    assert made.system_message("default") == "Be a cat."
    assert made.system_message("nobody") is None


@pytest.mark.parametrize(
    ("made", "given", "said"),
    [
        ("Be a cat.", None, "but --system is not given and the model was trained under 'Be a dog.'; pass --system 'Be a cat.'"),
        (None, None, "made with no system message but --system is not given and the model was trained under"),
        (DOG, "", "but --system is ''; pass --system 'Be a dog.'"),
        (None, "Be a cat.", "but --system is 'Be a cat.'; pass --system ''"),
        (DOG, None, None),
        (None, "", None),
    ],
)
def test_a_calibration_is_compared_with_what_chats_get(monkeypatch, capsys, tmp_path, model, made, given, said):
    from shadowpeft.apps import serve
    from shadowpeft.serve.options import Options

    shadowpeft.detach(model, "default").save_pretrained(tmp_path)
    Calibration(ACTION, (0.0, 1.0), (0.0, 1.0), 0.5, report={"system": made}).save(tmp_path / FILE)
    if said is None:
        assert serve._router(Options(adapters=[str(tmp_path)], role="edge", system=given), None)[0].calibration is not None
        return
    more = () if given is None else ("--system", given)
    code, _, err = call(monkeypatch, capsys, "serve", tmp_path, "--role", "edge", "--no-auth", *more)
    assert (code, said in " ".join(err.split())) == (2, True), err
