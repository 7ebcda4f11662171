"""Adapters come, go and change beside traffic: each change happens once and whole, and costs nobody else anything.

Folders that are linked anew, overwritten, cut short or damaged change nothing that runs.
"""

import json
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import shadowpeft
from chatbase import chat_tokenizer, save_base
from serving import ask, attached, engine_of
from shadowpeft.apps.serve import _cloud_backend, _edge_backend
from shadowpeft.errors import AdapterFileError, ConfigError, DataError, ShadowPeftError
from shadowpeft.serve.cloud_role import CloudRole
from shadowpeft.serve.engine import Engine, EngineLimits
from shadowpeft.serve.guard import Keys
from shadowpeft.serve.protocol import ChatRequest, CompletionRequest
from shadowpeft.serve.server import Settings, build
from shadowpeft.serve.versions import Version, own_memory, snapshot
from tiny import adapter_config, randomise
from webserver import Running, wait_for

KEY, ADMIN = "user-key-0123456789", "admin-key-0123456789"
CPU = torch.device("cpu")
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base, three adapters of one shape, and their edge models."""
    made = tmp_path_factory.mktemp("versions")
    base = save_base(made / "base", max_position_embeddings=512)
    for name, seed in (("v1", 1), ("v2", 2), ("v3", 3)):
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), adapter_config())
        randomise(model, seed=seed)
        model.save_pretrained(made / name)
        chat_tokenizer().save_pretrained(made / name)
        shadowpeft.detach(model).save_pretrained(made / f"edge-{name}")
        chat_tokenizer().save_pretrained(made / f"edge-{name}")
    return made


@pytest.fixture
def versions(folders, tmp_path):
    """Copies that a test may change."""
    for name in ("v1", "v2", "v3", "edge-v1", "edge-v2", "base"):
        shutil.copytree(folders / name, tmp_path / name)
    return tmp_path


def cloud(folders, *names):
    """A backend with the version ``v1`` under each of ``names``."""
    return _cloud_backend({name: str(folders / "v1") for name in names}, str(folders / "base"), CPU)


def says(backend, name):
    engine = engine_of(backend)
    text = ask(engine, "sit down", name, max_tokens=12).text
    engine.stop()
    return text


@pytest.fixture(scope="module")
def expected(folders):
    """What each version says."""
    texts = {v: says(_cloud_backend({"x": str(folders / v)}, None, CPU), "x") for v in ("v1", "v2", "v3")}
    assert len(set(texts.values())) == 3
    return texts


# ------------------------------------------------------------------------------------------------------- beside traffic


class Gated:
    """A backend whose passes wait for a gate."""

    def __init__(self, inner):
        self.inner, self.gate = inner, threading.Event()
        opened = inner.open

        def open_gated(names):
            session = opened(names)
            forward = session.forward
            session.forward = lambda *inputs: (self.gate.wait(60), forward(*inputs))[1]
            return session

        inner.open = open_gated


def serving(backend, versions=None, **limits):
    role = CloudRole(Engine(backend, EngineLimits(gather_seconds=0.0, **limits)), system=None, default_tokens=8)
    return build(role, Settings(Keys((KEY,), (ADMIN,)), versions))


def test_an_adapter_that_is_deleted_twice_while_it_answers_goes_once_and_takes_nobody_along(folders):
    backend = cloud(folders, "a", "b")
    gated = Gated(backend)
    with (
        Running(serving(backend, folders)) as server,
        server.http(ADMIN) as admin,
        server.http(KEY) as http,
        ThreadPoolExecutor(20) as pool,
    ):

        def say(name):
            return http.post("/v1/completions", json={"model": name, "prompt": "sit", "max_tokens": 4})

        engine = server.app.state.server.role.engine
        last = pool.submit(say, "a")
        wait_for(lambda: engine.running == 1)
        deletes = [pool.submit(admin.delete, "/admin/adapters/a") for _ in range(8)]
        wait_for(lambda: "a" in backend.leaving)
        innocent = [pool.submit(say, "b") for _ in range(10)]
        wait_for(lambda: engine.running + engine.waiting == 11)
        # nothing that takes a thread is held up by the eight that wait
        began = time.monotonic()
        too_many = http.post("/v1/completions", json={"model": "b", "prompt": "sit", "max_tokens": 9999})
        assert too_many.status_code == 400
        assert time.monotonic() - began < 5
        assert say("a").status_code == 404
        assert not any(d.done() for d in deletes)
        gated.gate.set()
        assert last.result().status_code == 200
        assert [i.result().status_code for i in innocent] == [200] * 10
        assert {(d.result().status_code, d.result().text) for d in deletes} == {(200, '{"name":"a","version":"none"}')}
        assert backend.names == ("b", "base")
        assert admin.delete("/admin/adapters/a").status_code == 404
        assert admin.post("/admin/adapters/a", json={"version": "v2"}).status_code == 200
        assert say("a").status_code == 200


def test_a_request_whose_model_is_deleted_while_its_prompt_is_read_gets_404(folders, monkeypatch):
    backend = cloud(folders, "a", "b")
    with Running(serving(backend, folders)) as server, server.http(ADMIN) as admin, server.http(KEY) as http:
        encode = CloudRole._encode

        def slowly(self, asked):
            assert admin.delete("/admin/adapters/a").status_code == 200
            return encode(self, asked)

        monkeypatch.setattr(CloudRole, "_encode", slowly)
        answer = http.post("/v1/completions", json={"model": "a", "prompt": "sit", "max_tokens": 4})
    assert answer.status_code == 404
    assert "model 'a' is not loaded" in answer.json()["error"]["message"]


def test_of_two_adapters_that_are_deleted_at_once_one_stays(folders):
    backend = cloud(folders, "a", "b")
    gated = Gated(backend)
    engine = engine_of(backend)
    reader = ask(engine, "sit", "a", max_tokens=2)
    going = engine.remove("a")
    with pytest.raises(ConfigError, match="'b' is the only adapter"):
        engine.remove("b")
    gated.gate.set()
    reader.wait()
    going.result(20)
    assert backend.names == ("b", "base")
    engine.stop()


def test_a_removal_that_a_shutdown_overtakes_leaves_the_adapter_there(folders):
    backend = cloud(folders, "a", "b")
    gated = Gated(backend)
    engine = engine_of(backend)
    ask(engine, "sit", "a", max_tokens=2)
    going = engine.remove("a")
    threading.Timer(1.0, gated.gate.set).start()
    engine.stop(0.1)
    with pytest.raises(ShadowPeftError, match="shut down before"):
        going.result(20)
    assert backend.names == ("a", "b", "base")


def test_an_adapter_is_read_while_answers_are_made(folders, monkeypatch):
    """Only putting it in its place happens between two steps."""
    backend = cloud(folders, "a")
    engine = engine_of(backend)
    reading, go_on = threading.Event(), threading.Event()
    check = backend._check_tokenizer

    def slow(folder):
        reading.set()
        assert go_on.wait(20)
        check(folder)

    monkeypatch.setattr(backend, "_check_tokenizer", slow)
    adding = threading.Thread(target=engine.add, args=("b", str(folders / "v2")))
    adding.start()
    assert reading.wait(20)
    ask(engine, "sit", "a", max_tokens=5).wait()  # is answered meanwhile
    assert adding.is_alive()
    go_on.set()
    adding.join(20)
    assert ask(engine, "sit down", "b", max_tokens=5).wait()
    engine.stop()


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["add", "remove", "swap", "rollback"]), st.sampled_from("abc"), st.sampled_from("123")),
    min_size=4,
    max_size=12,
)


@settings(max_examples=3, deadline=None)
@given(plan=OPERATIONS)
def test_whatever_is_done_at_once_the_names_say_what_their_versions_say(folders, expected, plan):
    backend = cloud(folders, "a", "b")
    engine = engine_of(backend)
    odd = []

    def operate(what, name, number):
        folder = str(folders / f"v{number}")
        try:
            if what == "add":
                engine.add(name, folder)
            elif what == "remove":
                engine.remove(name).result(60)
            elif what == "swap":
                backend.swap(name, folder)
            else:
                backend.rollback(name)
        except ConfigError:
            pass  # there already, not there, the last one, or nothing to go back to
        except Exception as error:  # noqa: BLE001  (nothing else may come)
            odd.append(error)

    def talk(over):
        while not over.is_set():
            for name in backend.names:
                try:
                    text = ask(engine, "sit down", name, max_tokens=12).text
                except ConfigError:
                    continue  # it went a moment ago
                if name != "base" and text not in expected.values():
                    odd.append(text)

    over = threading.Event()
    talker = threading.Thread(target=talk, args=(over,))
    talker.start()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda operation: operate(*operation), plan))
    over.set()
    talker.join()
    assert not odd
    assert not backend.leaving
    assert set(backend.names) == {*backend.versions, "base"}
    assert len(backend.versions) >= 1
    for name, had in backend.versions.items():
        assert ask(engine, "sit down", name, max_tokens=12).text == expected[had[-1].name]
    engine.stop()


# ------------------------------------------------------------------------------------------------------ lengths, in characters


@pytest.mark.parametrize("kind", ["chat", "text"])
def test_a_prompt_that_must_be_too_long_is_not_tokenized(kind):
    role = CloudRole(Engine(attached(), EngineLimits(prompt_tokens=10)), system=None, default_tokens=8)
    longest = max(map(len, chat_tokenizer().get_vocab()))
    calls = []
    real = role._encode
    role._encode = lambda asked: (calls.append(1), real(asked))[1]

    async def prompt(text):
        if kind == "text":
            return await role.prompt(CompletionRequest(model="base", prompt=text))
        return await role.prompt(ChatRequest(model="base", messages=[{"role": "user", "content": text}]))

    import asyncio

    with pytest.raises(DataError, match=f"has {10 * longest + 1} characters but 10 tokens hold at most {10 * longest}"):
        asyncio.run(prompt("x" * (10 * longest + 1)))
    assert not calls
    assert len(asyncio.run(prompt("x" * 9))) >= 9
    role.close()


# ----------------------------------------------------------------------------------------------------- folders that change


def test_a_link_that_is_flipped_while_it_is_read_gives_one_version_or_the_other(versions, expected):
    backend = cloud(versions, "a")
    link, over = versions / "current", threading.Event()
    link.symlink_to(versions / "v2")

    def flip():
        turn = 0
        while not over.is_set():
            turn += 1
            (versions / "next").symlink_to(versions / ("v2", "v3")[turn % 2])
            os.replace(versions / "next", link)

    flipper = threading.Thread(target=flip)
    flipper.start()
    engine = engine_of(backend)
    try:
        for _ in range(25):
            backend.swap("a", str(link))
            assert backend.versions["a"][-1].name in ("v2", "v3")  # not the link, which says nothing
            assert ask(engine, "sit down", "a", max_tokens=12).text == expected[backend.versions["a"][-1].name]
    finally:
        over.set()
        flipper.join()
    engine.stop()


def test_a_rollback_goes_to_the_version_and_not_to_what_a_link_shows_now(versions, expected):
    backend = cloud(versions, "a")
    link = versions / "current"
    link.symlink_to(versions / "v2")
    backend.swap("a", str(link))
    link.unlink()
    link.symlink_to(versions / "v3")
    backend.swap("a", str(link))
    assert says(backend, "a") == expected["v3"]
    assert backend.rollback("a") == str(versions / "v2")
    assert says(backend, "a") == expected["v2"]


def test_a_version_that_was_overwritten_is_no_rollback(versions, expected):
    backend = cloud(versions, "a")
    backend.swap("a", str(versions / "v2"))
    shutil.copyfile(versions / "v3" / WEIGHTS, versions / "v1" / WEIGHTS)
    with pytest.raises(ConfigError, match=r"version 'v1' of 'a' is gone: the files in .* were changed"):
        backend.rollback("a")
    assert says(backend, "a") == expected["v2"]
    shutil.rmtree(versions / "v1")
    with pytest.raises(AdapterFileError, match="could not be read"):
        backend.rollback("a")
    assert says(backend, "a") == expected["v2"]


def test_a_swap_to_the_present_version_changes_nothing(versions):
    backend = cloud(versions, "a")
    backend.swap("a", str(versions / "v2"))
    shutil.copytree(versions / "v2", versions / "same")
    for folder in ("v2", "same"):
        backend.swap("a", str(versions / folder))
    assert [v.name for v in backend.versions["a"]] == ["v1", "v2"]


@pytest.mark.parametrize("times", [1, 5])
def test_a_folder_that_changes_while_it_is_read_is_read_again_and_in_the_end_refused(versions, monkeypatch, times):
    copy, left = shutil.copyfile, [times]

    def copy_while_another_writes(source, target):
        copy(source, target)
        if source.name == WEIGHTS and left[0]:
            left[0] -= 1
            source.write_bytes((versions / "v3" / WEIGHTS).read_bytes())

    monkeypatch.setattr(shutil, "copyfile", copy_while_another_writes)
    if times == 1:
        with snapshot(str(versions / "v2")) as (private, _):
            assert (private / WEIGHTS).read_bytes() == (versions / "v3" / WEIGHTS).read_bytes()
    else:
        with pytest.raises(AdapterFileError, match="changes while it is read"), snapshot(str(versions / "v2")):
            pass


@pytest.mark.parametrize("role", ["cloud base", "edge", "edge, swapped in"])
def test_files_that_are_overwritten_or_cut_short_change_no_running_answer(versions, role):
    if role == "cloud base":
        backend, name, file = cloud(versions, "a"), "base", versions / "base" / "model.safetensors"
    else:
        backend = _edge_backend({"e": str(versions / "edge-v1")}, None, CPU)
        name, file = "e", versions / "edge-v1" / "model.safetensors"
        if role == "edge, swapped in":
            backend.swap("e", str(versions / "edge-v2"))
            file = versions / "edge-v2" / "model.safetensors"
    before = says(backend, name)
    with open(file, "r+b") as weights:
        size = os.fstat(weights.fileno()).st_size
        weights.seek(size // 2)
        weights.write(b"\x3f" * (size - size // 2))
    assert says(backend, name) == before
    os.truncate(file, 0)
    assert says(backend, name) == before


def test_own_memory_keeps_values_and_ties():
    from chatbase import chat_model

    model = chat_model(tie_word_embeddings=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    old = [p.data for p in model.parameters()]
    own_memory(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not {p.data_ptr() for p in old} & {p.data_ptr() for p in model.parameters()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_version_is_known_by_all_its_files(versions):
    one = Version.of(str(versions / "v1"))
    assert Version.of(str(versions / "v1")) == one
    (versions / "v1" / "checkpoint-1").mkdir()
    (versions / "v1" / "checkpoint-1" / "x").write_text("left by a run")
    assert Version.of(str(versions / "v1")).digest == one.digest
    config = json.loads((versions / "v1" / "adapter_config.json").read_text())
    config["shadow_alpha"] = 0.5
    (versions / "v1" / "adapter_config.json").write_text(json.dumps(config))
    assert Version.of(str(versions / "v1")).digest != one.digest
    assert Version.of("owner/name") == Version("owner/name", None)


# ------------------------------------------------------------------------------------------------------- damaged versions

ODD = st.sampled_from([None, True, "", "x", "a\0b", [], {}, [[]], 0.5, float("nan"), 10**30, -1, 0, "y" * 5000])


@st.composite
def damages(draw):
    """A function that damages a folder."""
    kind = draw(st.sampled_from(["cut", "flip", "gone", "setting", "unknown", "text", "folder"]))
    file = draw(st.sampled_from(["adapter_config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json"]))
    share, value = draw(st.integers(0, 99)), draw(ODD)

    def damage(folder):
        path = folder / file
        data = bytearray(path.read_bytes())
        if kind == "cut":
            path.write_bytes(data[: len(data) * share // 100])
        elif kind == "flip":
            data[len(data) * share // 100] ^= 1 << share % 8
            path.write_bytes(data)
        elif kind == "gone":
            path.unlink()
        elif kind == "folder":
            path.unlink()
            path.mkdir()
        elif kind == "text":
            path.write_bytes(b"\xff\xfe{" + bytes(data[:share]))
        else:
            config = folder / "adapter_config.json"
            content = json.loads(config.read_text())
            key = sorted(content)[len(content) * share // 100] if kind == "setting" else f"key {share}"
            content[key] = value
            config.write_text(json.dumps(content))

    return damage


@pytest.fixture(scope="module")
def one(folders):
    backend = cloud(folders, "a")
    engine = engine_of(backend)
    yield backend, engine
    engine.stop()


@settings(max_examples=20, deadline=None)
@given(damage=damages(), action=st.sampled_from(["add", "swap"]))
def test_damaged_versions_are_refused_in_one_way_and_leave_nothing_behind(
    one, folders, expected, tmp_path_factory, damage, action
):
    backend, engine = one
    folder = tmp_path_factory.mktemp("damaged") / "v"
    shutil.copytree(folders / "v2", folder)
    damage(folder)
    keys = sorted(backend.model.state_dict())
    configs = sorted(backend.model.peft_config)
    refused = None
    try:
        if action == "add":
            engine.add("b", str(folder))
        else:
            backend.swap("a", str(folder))
    except ShadowPeftError as error:
        refused = str(error)
    if refused is not None:
        assert "shadowpeft-" not in refused  # the private copy's name
        assert sorted(backend.model.state_dict()) == keys
        assert sorted(backend.model.peft_config) == configs
        assert backend.names == ("a", "base")
        assert ask(engine, "sit down", "a", max_tokens=12).text == expected["v1"]
    else:  # it took no harm that shows
        assert ask(engine, "sit down", "b" if action == "add" else "a", max_tokens=3).wait()
        if action == "add":
            engine.remove("b").result(20)
        elif len(backend.versions["a"]) > 1:
            backend.rollback("a")
    shutil.rmtree(folder)


def test_damaged_edge_models_are_refused_in_one_way(versions):
    backend = _edge_backend({"e": str(versions / "edge-v1")}, None, CPU)
    before = says(backend, "e")
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        for content in (b"", b"{", b"[1]", b'{"model_type": 3}', b"\xff\xfe", b'{"a": ' * 3000):
            folder = versions / "damaged"
            shutil.copytree(versions / "edge-v2", folder)
            (folder / file).write_bytes(content)
            with pytest.raises(ShadowPeftError):
                backend.swap("e", str(folder))
            shutil.rmtree(folder)
    assert says(backend, "e") == before
    assert len(backend.versions["e"]) == 1
