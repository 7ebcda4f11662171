"""``shadowpeft serve``: what it refuses before anything is loaded, and (marker server) two real processes."""

import dataclasses
import inspect
import os
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import closing

import httpx
import pytest
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import shadowpeft
from chatbase import chat_tokenizer, save_base
from commands import call
from serving import ask, engine_of
from shadowpeft import cli
from shadowpeft.apps import serve as command
from shadowpeft.errors import ConfigError
from shadowpeft.serve.backend import Attached, Detached
from shadowpeft.serve.listener import Listener
from shadowpeft.serve.loading import load_adapters, load_edge, module_name
from shadowpeft.serve.options import Options, parse_adapters
from tiny import adapter_config, randomise
from webserver import free_port, wait_for

KEY = "user-key-0123456789"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, two adapters and an edge model with tokenizers."""
    made = tmp_path_factory.mktemp("serve")
    base = save_base(made / "base")
    for name, seed in (("one", 1), ("two", 2)):
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), adapter_config())
        randomise(model, seed=seed)
        model.save_pretrained(made / name)
        chat_tokenizer().save_pretrained(made / name)
        shadowpeft.detach(model).save_pretrained(made / f"edge-{name}")
        chat_tokenizer().save_pretrained(made / f"edge-{name}")
    return made


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--role", "cloud"), "SHADOWPEFT_API_KEYS is not set"),
        (("--role", "cloud", "--no-auth", "--host", "0.0.0.0"), "--no-auth needs a loopback host"),
        (("--role", "robot", "--no-auth"), "role is 'robot'"),
        (("--role", "cloud", "--no-auth", "--cloud-url", "http://x"), "--cloud-url: only an edge has this"),
        (("--role", "cloud", "--no-auth", "--cloud-model", "x"), "--cloud-model: only an edge has this; leave it out"),
        (("--role", "cloud", "--no-auth", "--cloud-timeout", "3"), "--cloud-timeout: only an edge has this"),
        (
            ("--role", "cloud", "--no-auth", "--when-cloud-down", "error", "--hint"),
            "--when-cloud-down and --hint: only an edge has this",
        ),
        (("--role", "edge", "--no-auth", "--cloud-model", "x"), "--cloud-model: this is about the cloud but there is no"),
        (("--role", "edge", "--no-auth", "--hint"), "--hint: this is about the cloud but there is no --cloud-url; give it"),
        (("--role", "edge", "--no-auth", "more=two"), "an edge server has one"),
        (("--role", "cloud", "--no-auth", "two"), "two adapters are called 'default'"),
        (("--role", "edge", "--no-auth", "--when-cloud-down", "panic"), "when-cloud-down is 'panic'"),
        (("--role", "cloud", "--no-auth", "--versions", "nowhere"), "'nowhere' does not exist"),
        (("--role", "cloud", "--no-auth", "--allow-origin", "*"), "--allow-origin is '*' but must be one page's scheme"),
        (("--role", "cloud", "--no-auth", "--new-tokens", "500", "--default-tokens", "600"), "--default-tokens is 600"),
        (("--role", "edge", "--no-auth", "--cloud-url", "cloud:8000"), "--cloud-url is 'cloud:8000'"),
        (("--role", "edge", "--no-auth", "--cloud-url", "http://cloud:99999"), "must be like http://host:8000"),
        (("--role", "edge", "--no-auth", "--cloud-url", "http://localhost:8000/v1"), "this server's own address"),
        (("--role", "cloud", "--no-auth", "--device", "tpu"), "device is 'tpu' but this machine has cpu"),
        (("--role", "edge", "--no-auth", "--routing", "none.json"), "'none.json' cannot be read"),
    ],
)
def test_what_is_refused(monkeypatch, capsys, folder, arguments, message):
    monkeypatch.delenv("SHADOWPEFT_API_KEYS", raising=False)
    code, _, err = call(monkeypatch, capsys, "serve", folder / "edge-one", *arguments)
    assert code == 2
    assert message in err


def test_short_keys_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("SHADOWPEFT_API_KEYS", "0123456789abcdef,short")
    code, _, err = call(monkeypatch, capsys, "serve", "x", "--role", "cloud")
    assert code == 2
    assert "shorter than 16" in err
    assert "short," not in err


def test_the_options_have_the_commands_defaults():
    defaults = {p.name: p.default for p in inspect.signature(cli.serve).parameters.values()}
    for field in dataclasses.fields(Options):
        if field.name not in ("adapters", "role"):
            assert field.default == defaults[field.name] or defaults[field.name] is inspect.Parameter.empty, field.name
    assert [*defaults] == [field.name for field in dataclasses.fields(Options)]


@pytest.mark.parametrize(
    ("host", "url", "own"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000", True),
        ("127.0.0.1", "http://LOCALHOST:8000/v1", True),
        ("localhost", "http://key@127.0.0.1:8000", True),
        ("0.0.0.0", "http://127.0.0.1:8000", True),
        ("::", "http://[::1]:8000", True),
        ("10.0.0.1", "http://10.0.0.1:8000", True),
        ("127.0.0.1", "http://127.0.0.1:8001", False),
        ("127.0.0.1", "http://127.0.0.2:8000", False),
        ("127.0.0.1", "http://10.0.0.1:8000", False),
        ("10.0.0.1", "http://localhost:8000", False),
        ("0.0.0.0", "http://10.0.0.1:8000", False),
        ("127.0.0.1", "http://127.0.0.1", False),
    ],
)
def test_a_server_is_not_its_own_cloud(host, url, own):
    options = Options(adapters=["x"], role="edge", host=host, cloud_url=url)
    if own:
        with pytest.raises(ConfigError, match="own address") as refused:
            options.check()
        assert "key@" not in str(refused.value)
    else:
        options.check()


def test_names_of_adapters():
    assert parse_adapters(["a=x/y", "b=z=1"]) == {"a": "x/y", "b": "z=1"}
    assert parse_adapters(["./x=y/z"]) == {"default": "./x=y/z"}
    with pytest.raises(ConfigError, match="two adapters are called 'a'"):
        parse_adapters(["a=x", "a=y"])


def test_an_edge_model_is_swapped_and_rolled_back(folder):
    def load(name):
        return AutoModelForCausalLM.from_pretrained(folder / name)

    backend = Detached(load("edge-one"), chat_tokenizer(), "edge", str(folder / "edge-one"))
    engine = engine_of(backend)
    texts = [ask(engine, "sit down", "edge", max_tokens=8).text]
    backend.swap("edge", str(folder / "edge-two"))
    texts.append(ask(engine, "sit down", "edge", max_tokens=8).text)
    assert backend.rollback("edge") == str(folder / "edge-one")
    texts.append(ask(engine, "sit down", "edge", max_tokens=8).text)
    assert texts[0] == texts[2] != texts[1]
    with pytest.raises(ConfigError, match="is no edge model"):
        backend.swap("edge", str(folder / "one"))
    engine.stop()


NAMES = ["robot-v1.2", "robot-v1_2", "keys", "type", "training", "1.2", "a.", "v1..2"]


def test_every_name_that_the_protocol_permits_is_served_swapped_and_deleted(folder):
    """Names with dots or of a module's attributes are none for torch; they are mapped in one place."""
    named = dict.fromkeys(NAMES[:4], str(folder / "one"))
    backend = Attached(load_adapters(named, str(folder / "base")), chat_tokenizer(), named, "base")
    engine = engine_of(backend)
    for name in NAMES[4:]:
        engine.add(name, str(folder / "one"))
    assert set(backend.names) == {*NAMES, "base"}

    def answers():
        return {name: ask(engine, "sit down", name, max_tokens=8).text for name in NAMES}

    before = answers()
    assert len(set(before.values())) == 1
    backend.swap("robot-v1.2", str(folder / "two"))
    assert backend.versions["robot-v1.2"][-1].folder == str(folder / "two")
    after = answers()
    assert after["robot-v1.2"] != before["robot-v1.2"]
    assert {name: text for name, text in after.items() if name != "robot-v1.2"} == {
        name: text for name, text in before.items() if name != "robot-v1.2"
    }
    backend.rollback("robot-v1.2")
    assert answers() == before
    for name in NAMES[:-1]:
        engine.remove(name).result(60)
    assert backend.names == (NAMES[-1], "base")
    assert ask(engine, "sit down", NAMES[-1], max_tokens=8).text == before[NAMES[-1]]
    assert len({module_name(name) for name in NAMES}) == len(NAMES)
    engine.stop()


@pytest.mark.parametrize("change", ["template", "tokens"])
def test_models_that_read_or_write_texts_otherwise_share_no_server(folder, tmp_path, change):
    tokenizer = chat_tokenizer()
    if change == "template":
        tokenizer.chat_template = "{{ messages[0]['content'] }}"
    else:
        tokenizer.add_tokens(["<more>"])
    for name in ("two", "edge-two"):
        shutil.copytree(folder / name, tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    named = {"one": str(folder / "one"), "two": str(tmp_path / "two")}
    model = load_adapters(named, str(folder / "base"))
    with pytest.raises(ConfigError, match="two' was saved with another tokenizer or chat template"):
        Attached(model, chat_tokenizer(), named, "base")
    backend = Attached(model, chat_tokenizer(), {"one": named["one"]}, "base")
    with pytest.raises(ConfigError, match="another tokenizer or chat template"):
        backend.swap("one", named["two"])
    edge = Detached(*load_edge(str(folder / "edge-one")), "edge", str(folder / "edge-one"))
    with pytest.raises(ConfigError, match="another tokenizer, chat template or end token"):
        edge.swap("edge", str(tmp_path / "edge-two"))


def test_an_edge_model_that_is_not_whole_is_neither_loaded_nor_swapped_in(folder, tmp_path):
    model, tokenizer = load_edge(str(folder / "edge-one"))
    backend = Detached(model, tokenizer, "edge", str(folder / "edge-one"))
    for name, message in (("lacking", "lacks 1 of its weights"), ("cut", "could not be loaded")):
        shutil.copytree(folder / "edge-two", tmp_path / name)
        file = tmp_path / name / "model.safetensors"
        if name == "cut":
            file.write_bytes(file.read_bytes()[:-100])
        else:
            tensors = load_file(file)
            del tensors["model.layers.0.self_attn.o_proj.weight"]
            save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(ConfigError, match=message):
            load_edge(str(tmp_path / name))
        with pytest.raises(ConfigError, match=message):
            backend.swap("edge", str(tmp_path / name))
    assert backend.model is model


@pytest.mark.parametrize("role", ["cloud", "edge"])
def test_a_port_that_is_taken_is_found_before_anything_is_loaded_or_said_to_be_ready(monkeypatch, capsys, folder, role):
    for load in ("_cloud_backend", "_edge_backend"):
        monkeypatch.setattr(command, load, lambda *_: pytest.fail("a model was loaded"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, _, err = call(
            monkeypatch, capsys, "serve", folder / "edge-one", "--role", role, "--no-auth", "--device", "cpu", "--port", port
        )
    assert code == 2
    assert f"error: port {port} of 127.0.0.1 is taken by another program; choose another with --port" in err
    assert "on http://" not in err


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_a_host_of_another_machine_is_refused(host):
    with pytest.raises(ConfigError, match=f"--host is '{host}' but must be an address of this machine"):
        Listener(host, free_port()).bind()


def test_a_port_that_another_server_opened_while_this_one_loaded_is_refused_too():
    first, second = (Listener("127.0.0.1", port) for port in [free_port()] * 2)
    with closing(first), closing(second):
        first.bind()
        with pytest.raises(ConnectionRefusedError):  # nobody waits for a server that still loads
            socket.create_connection(("127.0.0.1", first.port))
        second.bind()
        first.listen()
        socket.create_connection(("127.0.0.1", first.port)).close()
        with pytest.raises(ConfigError, match=f"port {first.port} of 127.0.0.1 is taken"):
            second.listen()


def test_the_name_of_this_machine_is_all_its_loopback_addresses():
    port = free_port()
    with closing(Listener("localhost", port)) as listener:
        listener.bind()
        listener.listen()
        socket.create_connection(("127.0.0.1", port)).close()
    assert Listener("::1", 80).url == "http://[::1]:80"


@pytest.mark.server
@pytest.mark.timeout(600)
def test_two_processes_answer_and_end_with_0(folder):
    environment = os.environ | {"SHADOWPEFT_API_KEYS": KEY, "SHADOWPEFT_CLOUD_KEY": KEY}
    ports = free_port(), free_port()
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    one, two, edge = f"one={folder / 'one'}", f"two={folder / 'two'}", f"edge={folder / 'one'}"
    commands = [
        ("serve", one, two, "--role", "cloud", "--port", ports[0]),
        ("serve", edge, "--role", "edge", "--port", ports[1], "--cloud-url", urls[0], "--cloud-model", "two"),
    ]
    made = [
        subprocess.Popen(
            [sys.executable, "-m", "shadowpeft.cli", *map(str, command)], env=environment, stderr=subprocess.PIPE
        )
        for command in commands
    ]
    try:
        for url, process in zip(urls, made, strict=True):

            def ready(url=url, process=process):
                assert process.poll() is None, process.stderr.read().decode()
                try:
                    return httpx.get(url + "/readyz", trust_env=False).status_code == 200
                except httpx.HTTPError:
                    return False

            wait_for(ready, 240)
        body = {"prompt": "sit down", "max_tokens": 6}
        with httpx.Client(headers={"authorization": f"Bearer {KEY}"}, trust_env=False, timeout=60) as http:
            routed = http.post(urls[1] + "/v1/completions", json={"model": "edge", **body}).json()
            straight = http.post(urls[0] + "/v1/completions", json={"model": "two", **body}).json()
            assert routed["shadowpeft"]["where"] == "cloud"
            assert routed["choices"] == straight["choices"]
            assert routed["model"] == "edge"
            assert httpx.get(urls[1] + "/v1/models", trust_env=False).status_code == 401
    finally:
        for process in made:
            process.send_signal(signal.SIGTERM)
        codes = [process.wait(60) for process in made]
        told = b"".join(process.stderr.read() for process in made)
    assert codes == [0, 0]
    assert b"sit down" not in told
    assert b"/v1/completions" in told
