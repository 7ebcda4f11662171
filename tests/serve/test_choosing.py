"""Actions that are chosen while serving: one row of a batch is held to them, and its neighbours and its later text are not."""

import itertools
import json
import math
import time

import pytest
import torch

from chatbase import chat_tokenizer, save_base, save_sitting_base, write_rows
from commands import call
from serving import Reader, attached, detached, engine_of
from shadowpeft.apps import serve as command
from shadowpeft.constrained import choose
from shadowpeft.data.action_trie import ActionTrie
from shadowpeft.data.actions import REMOTE, parser
from shadowpeft.data.chat import prompt_ids
from shadowpeft.errors import ConfigError
from shadowpeft.serve import engine as engine_module
from shadowpeft.serve.backend import Detached
from shadowpeft.serve.calibration import best_signal
from shadowpeft.serve.client import CloudError
from shadowpeft.serve.edge_role import EdgeRole
from shadowpeft.serve.engine import Engine, EngineLimits
from shadowpeft.serve.guard import Keys
from shadowpeft.serve.requests import SamplingParams
from shadowpeft.serve.router import ACTION, AGREEMENT, SIGNALS, Calibration, Scores, action_probability, decisive
from shadowpeft.serve.scoring import scored_answers
from tiny import base
from webserver import Running

SKILLS = ("Sit", "Stand", "StandUp", "SitDown", "Bark", "开灯")
TRIE = ActionTrie.of(chat_tokenizer(), SKILLS)
PARSE = parser(SKILLS)
PROMPTS = ["sit", "a much longer request, please", "x", "站起来", "say", "another one of middle length"]
NOBODY = Keys(None, ())


@pytest.fixture(scope="module")
def edge():
    return detached()


def submit(engine, prompt, name="edge", until=None, actions=TRIE, **sampling):
    reader = Reader()
    ids = prompt_ids(engine.backend.tokenizer, [{"role": "user", "content": prompt}])
    sampling = {"max_tokens": 24, **sampling}
    reader.request = engine.submit(ids, name, SamplingParams(**sampling), reader, until, actions)
    return reader


def outcome(reader):
    """Its action, the probability that its tokens' log-probabilities say, and how many tokens the action has."""
    reader.wait()
    n, action = decisive([t.piece for t in reader.tokens], PARSE)
    return action, action_probability(Scores.of(reader.tokens).first(n)), n


def test_rows_that_choose_and_rows_that_do_not_share_a_batch(edge):
    free = engine_of(edge)
    alone = [submit(free, p, actions=None).text for p in PROMPTS]
    assert free.stop(20)
    expected = choose(edge.model, edge.tokenizer, PROMPTS, TRIE, exact=False)
    engine = engine_of(edge)
    readers = [(submit(engine, p), submit(engine, p, actions=None)) for p in PROMPTS]
    for (held, other), text, one in zip(readers, alone, expected, strict=True):
        action, probability, _ = outcome(held)
        assert action == one.action
        assert probability == pytest.approx(one.probability, rel=1e-4)  # float32 logits of another batch
        assert other.text == text
    assert any(len(held.tokens) > len(TRIE.tokens[outcome(held)[0]]) for held, _ in readers)  # free text follows
    assert engine.stop(20)


def test_tokens_that_must_follow_cost_no_pass(edge):
    """``[Sit()]`` is seven tokens here: one pass for each branch on its way, and none for the rest."""
    engine = Engine(edge, EngineLimits())
    reader = submit(engine, "sit", until=lambda pieces, _: PARSE("".join(pieces)) is not None)
    while reader.end is None:
        engine.step()
    action, _, n = outcome(reader)
    assert n == len(TRIE.tokens[action])
    branches = [path for path in TRIE.branches if TRIE.tokens[action][: len(path)] == path]
    assert engine.steps == len(branches) < n
    assert engine.tokens == n
    assert reader.end.reason == "until"


def test_the_text_after_an_action_is_what_follows_it_freely(edge):
    engine = engine_of(edge)
    for prompt in PROMPTS:
        reader = submit(engine, prompt)
        text = reader.text
        ids = prompt_ids(edge.tokenizer, [{"role": "user", "content": prompt}])
        ids += edge.tokenizer(text[: text.index("]") + 1], add_special_tokens=False).input_ids
        rest = Reader()
        engine.submit(ids, "edge", SamplingParams(max_tokens=24 - outcome(reader)[2]), rest)
        assert text == text[: text.index("]") + 1] + rest.text
    assert engine.stop(20)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_temperature_applies_among_the_actions_and_the_confidence_does_not_see_it(edge, seed):
    engine = engine_of(edge)
    whole = choose(edge.model, edge.tokenizer, ["sit"], TRIE)[0].probabilities
    options = {"temperature": 3.0, "top_p": 0.95, "max_tokens": 16}
    seen = set()
    for i in range(12):
        action, probability, _ = outcome(submit(engine, "sit", seed=100 * seed + i, **options))
        assert probability == pytest.approx(whole[action], rel=1e-4)
        seen.add(action)
    assert len(seen) > 1
    again = [submit(engine, "sit", seed=seed, **options).text for _ in range(2)]
    assert again[0] == again[1]
    assert engine.stop(20)


def test_the_likeliest_tokens_are_those_that_may_follow(edge):
    engine = engine_of(edge)
    reader = submit(engine, "sit", top_logprobs=5, max_tokens=12)
    reader.wait()
    path: list[int] = []
    for token in reader.tokens:
        allowed = TRIE.allowed(path)
        if not allowed:
            assert len(token.top) == 5
            break
        assert len(token.top) == min(5, len(allowed))
        assert {raw for raw, _ in token.top} <= {edge.tokenizer.decode([t]).encode() for t in allowed} | {b"\xe5"}
        assert sum(math.exp(value) for _, value in token.top) == pytest.approx(1.0)
        assert token.logprob == max(value for _, value in token.top)
        path.append(token.id)
    assert engine.stop(20)


def test_answers_that_end_within_an_action(edge):
    engine = engine_of(edge)
    for n in range(1, 5):
        reader = submit(engine, "sit", max_tokens=n)
        assert len(reader.text) == n
        assert reader.end.reason == "length"
    reader = submit(engine, "sit", stop=("[",))
    assert (reader.text, reader.end.reason) == ("", "stop")
    reader = submit(engine, "sit", stop=("()",))
    assert reader.text.startswith("[")
    assert (PARSE(reader.text), reader.end.reason) == (None, "stop")
    assert engine.stop(20)


def test_every_adapter_of_a_cloud_can_choose():
    backend = attached()
    engine = engine_of(backend)
    readers = {(p, name): submit(engine, p, name) for p in PROMPTS[:3] for name in backend.names}
    for (prompt, name), reader in readers.items():
        action, probability, _ = outcome(reader)
        if name != "base":
            backend.model.set_adapter(name)
            one = choose(backend.model, backend.tokenizer, [prompt], TRIE, exact=False)[0]
            assert (action, probability) == (one.action, pytest.approx(one.probability, rel=1e-4))
    assert engine.stop(20)


@pytest.mark.parametrize("name", ["mistral", "qwen3_next"])
def test_windows_and_recurrent_layers(name):
    """Rows have a different number of tokens to read; no padding may come between them."""
    backend = Detached(base(name, vocab_size=260, eos_token_id=3), chat_tokenizer(), "edge")
    engine = engine_of(backend)
    readers = [submit(engine, p, max_tokens=16) for p in PROMPTS]
    for prompt, reader in zip(PROMPTS, readers, strict=True):
        one = choose(backend.model, backend.tokenizer, [prompt], TRIE, exact=False)[0]
        assert outcome(reader)[:2] == (one.action, pytest.approx(one.probability, rel=1e-4))
    assert engine.stop(20)


def test_rows_are_tried_alone_after_a_pass_that_failed(edge):
    expected = choose(edge.model, edge.tokenizer, PROMPTS, TRIE, exact=False)
    plain, passes = edge.model.forward, [0]

    def failing(**inputs):
        passes[0] += 1
        if inputs["input_ids"].shape[0] > 1 and passes[0] > 2:
            raise RuntimeError("too many rows")
        return plain(**inputs)

    engine = Engine(edge, EngineLimits(gather_seconds=0.05))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(edge.model, "forward", failing)
        readers = [submit(engine, p, max_tokens=16) for p in PROMPTS]
        engine.start()
        assert [outcome(reader)[0] for reader in readers] == [one.action for one in expected]
    assert engine.stop(20)


def test_an_untrained_model_gives_nothing_but_actions():
    for seed in range(5):
        torch.manual_seed(seed)
        backend = Detached(base(seed=seed, vocab_size=260, eos_token_id=3), chat_tokenizer(), "edge")
        engine = engine_of(backend)
        settled = {"until": lambda pieces, _: PARSE("".join(pieces)) is not None}
        drawn = [submit(engine, f"do {i}", temperature=float(i % 3), seed=i, **settled) for i in range(40)]
        assert {outcome(reader)[0] for reader in drawn} <= {*SKILLS, REMOTE}
        assert engine.stop(20)


def test_a_model_that_gives_no_numbers_is_told():
    backend = Detached(base(vocab_size=260, eos_token_id=3), chat_tokenizer(), "edge")
    with torch.no_grad():
        backend.model.lm_head.weight.fill_(math.nan)
    engine = engine_of(backend)
    with pytest.raises(Exception, match="not a number"):
        submit(engine, "sit").wait()
    assert engine.stop(20)


# ------------------------------------------------------------------------------------------------------- the edge's server


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An edge model that says ``[LampOn()]``, one that says nothing known, and files of skills."""
    folder = tmp_path_factory.mktemp("choosing")
    save_sitting_base(folder / "lamp", "[LampOn()]")
    save_base(folder / "random", max_position_embeddings=512)
    (folder / "skills.txt").write_text("LampOn\nLampOff\n")
    rows = [{"prompt": f"light {i}, please", "skill": "LampOn" if i % 3 else "LampOff"} for i in range(60)]
    write_rows(folder / "rows.jsonl", rows)
    return folder


def say(app, text, **more):
    with Running(app) as server, server.http() as http:
        body = {"model": "default", "messages": [{"role": "user", "content": text}], **more}
        answer = http.post("/v1/chat/completions", json=body).json()
    return answer["choices"][0], answer["shadowpeft"]


def options(folder, **more):
    return command.Options(adapters=[str(folder)], role="edge", auth=False, device="cpu", default_tokens=24, **more)


def test_a_device_with_skills_chooses_unless_told_otherwise(folders):
    known = {"skills": str(folders / "skills.txt")}
    choice, note = say(command.application(options(folders / "random", **known), NOBODY), "light!", logprobs=True)
    assert note["action"] in ("LampOn", "LampOff", REMOTE)
    assert choice["message"]["content"].startswith("[")
    expected = "known skill" if note["action"] != REMOTE else "[REMOTE]"
    assert note.get("wanted", note["reason"]) == expected
    content = choice["logprobs"]["content"]
    n, _ = decisive([token["token"] for token in content], parser(("LampOn", "LampOff")))
    assert math.exp(sum(token["logprob"] for token in content[:n])) == pytest.approx(note["probability"], abs=1e-4)
    _, note = say(command.application(options(folders / "random", free_actions=True, **known), NOBODY), "light!")
    assert (note["action"], note.get("probability")) == (None, None)
    _, note = say(command.application(options(folders / "random"), NOBODY), "light!")  # nobody said what it knows
    assert (note["action"], note.get("probability")) == (None, None)
    _, note = say(command.application(options(folders / "random", skills="robot"), NOBODY), "light!")
    assert note["action"] is not None


def test_the_signal_of_a_calibration_decides(folders, tmp_path):
    skills = ("LampOn", "LampOff")
    for signal, chooses in ((ACTION, True), ("logprob", False)):
        file = tmp_path / f"{signal}.json"
        Calibration(signal, (-50.0, 1.0), (0.6, 1.0), 0.5, skills=skills).save(file)
        for told in ({}, {"skills": str(folders / "skills.txt")}):
            _, note = say(command.application(options(folders / "random", routing=str(file), **told), NOBODY), "light!")
            assert (note["action"] is not None) is chooses
            assert ("probability" in note) is chooses
        if chooses:
            _, note = say(command.application(options(folders / "lamp", routing=str(file)), NOBODY), "light!")
            at = Calibration.load(file).at(note["probability"])
            assert note["confidence"] == pytest.approx(at, abs=1e-3)
            with pytest.raises(ConfigError, match="--free-actions contradicts the calibration"):
                command.application(options(folders / "lamp", routing=str(file), free_actions=True), NOBODY)


def test_options_that_do_not_fit(folders):
    with pytest.raises(ConfigError, match="--free-actions: only an edge has this"):
        command.Options(adapters=["x"], role="cloud", free_actions=True).check()


# ------------------------------------------------------------------------------------------------------------ calibration


def test_auto_takes_the_probability_of_the_action_unless_another_signal_is_clearly_better():
    old = dict.fromkeys(SIGNALS, 0.7)
    assert best_signal({**old, ACTION: 0.8}) == ACTION
    assert best_signal({**old, "margin": 0.805, ACTION: 0.8}) == ACTION
    assert best_signal({**old, "margin": 0.82, ACTION: 0.8}) == "margin"
    assert best_signal({**old, "margin": 0.72}) == "margin"
    assert best_signal(dict.fromkeys((*SIGNALS, ACTION))) == ACTION


def calibrated(monkeypatch, capsys, folders, out, *more, model="random"):
    code, text, err = call(
        monkeypatch,
        capsys,
        *("route", "calibrate", folders / model, "--no-cloud", "--skills", folders / "skills.txt", "--json"),
        *("--data", folders / "rows.jsonl", "--target", "0.9", "--out", out, *more),
    )
    return code, (json.loads(text) if code == 0 else err)


def test_a_calibration_of_chosen_actions_is_served_as_it_was_measured(folders, monkeypatch, capsys, tmp_path):
    code, result = calibrated(monkeypatch, capsys, folders, tmp_path)
    assert code == 0, result
    assert result["signal"] == ACTION  # freely it says no known action, so there is no other
    assert result["n"] == 60
    assert 30 <= result["known_actions"] <= 60
    assert set(result["signals_auroc"]) == {ACTION}
    _, note = say(
        command.application(options(folders / "random", routing=str(tmp_path / "routing.json")), NOBODY), "light 3"
    )
    assert note["confidence"] == pytest.approx(
        Calibration.load(tmp_path / "routing.json").at(note["probability"]), abs=0.01
    )
    code, err = calibrated(monkeypatch, capsys, folders, tmp_path, "--signal", "logprob")
    assert code == 2
    assert "0 of 60 device answers have a known action" in err


def test_auto_compares_both_ways_and_says_so(folders, monkeypatch, capsys, tmp_path):
    # with a bound, rows of their own choose; without one, all do
    code, result = calibrated(monkeypatch, capsys, folders, tmp_path, "--no-bound", model="lamp")
    assert code == 0, result
    assert set(result["signals_auroc"]) == {*SIGNALS, ACTION}
    assert result["signal"] == best_signal(result["signals_auroc"])


def test_a_calibration_may_take_longer_than_an_answer(edge, monkeypatch):
    """All rows wait from the beginning, so the time that a server gives an answer must not end a calibration."""

    class Hasty:
        """A clock that goes on by a minute with each look at it."""

        sleep = staticmethod(time.sleep)
        looks = itertools.count()

        def monotonic(self):
            return time.monotonic() + 60.0 * next(self.looks)

    monkeypatch.setattr(engine_module, "time", Hasty())
    assert len(scored_answers(edge, "edge", PROMPTS, system=None, max_tokens=12, rows=1, actions=TRIE)) == len(PROMPTS)


# --------------------------------------------------------------------------------------------------------- second opinion


@pytest.fixture(scope="module")
def second(folders, tmp_path_factory):
    """The untrained edge, calibrated with a second opinion: its folder, and what the command said."""
    folder = tmp_path_factory.mktemp("second")
    learnt = [("brighter", "LampOn"), ("light up", "LampOn"), ("darker", "LampOff"), ("lights out", "LampOff")]
    rows = [{"prompt": f"{words} {n}", "skill": name} for words, name in learnt for n in range(3)]
    rows += [{"prompt": f"why is that so {n}", "skill": REMOTE} for n in range(6)]
    write_rows(folder / "learnt.jsonl", rows)
    asked = [{"prompt": f"{words}, the {n}th", "skill": name} for words, name in learnt for n in range(20)]
    asked += [{"prompt": f"why is that so, the {n}th", "skill": REMOTE} for n in range(8)]
    write_rows(folder / "asked.jsonl", [*asked, rows[0]])
    return folder


def opinionated(monkeypatch, capsys, folders, second, *more):
    return call(
        monkeypatch,
        capsys,
        *("route", "calibrate", folders / "random", "--no-cloud", "--skills", folders / "skills.txt", "--json"),
        *("--data", second / "asked.jsonl", "--target", "0.2", "--out", second, *more),
    )


def test_calibrated_with_a_second_opinion_and_served_with_it(folders, second, monkeypatch, capsys):
    code, out, err = opinionated(monkeypatch, capsys, folders, second, "--second-opinion", second / "learnt.jsonl")
    assert code == 0, err
    assert "1 of 89 prompts are among those of --second-opinion and are left out" in " ".join(err.split())
    result = json.loads(out)
    assert (result["n"], result["signal"], result["learnt_already"]) == (88, AGREEMENT, 1)
    assert set(result["signals_auroc"]) == {ACTION, AGREEMENT}
    about = result["second_opinion"]
    assert about["rows"] == 18
    assert about["without"]["right"] < 60  # an untrained model guesses
    assert result["commands_kept"] > 0.9
    assert result["wrong_on_device"] == 0
    edge = options(folders / "random", routing=str(second / "routing.json"))
    with Running(command.application(edge, NOBODY)) as server, server.http() as http:

        def ask(text, **more):
            body = {"model": "default", "messages": [{"role": "user", "content": text}], "route": "auto", **more}
            return http.post("/v1/chat/completions", json=body).json()

        for text, action in (("light up, please", "LampOn"), ("lights out, please", "LampOff")):
            note = ask(text)["shadowpeft"]
            assert (note["where"], note["action"]) == ("device", action)
            tools = [{"type": "function", "function": {"name": name}} for name in ("LampOn", "LampOff")]
            answer = ask(text, tools=tools)
            (made,) = answer["choices"][0]["message"]["tool_calls"]
            assert made["function"]["name"] == action
            assert answer["shadowpeft"]["probability"] == note["probability"]
            (named,) = ask(text, tools=tools, tool_choice=tools[0], route="device")["choices"][0]["message"]["tool_calls"]
            assert named["function"]["name"] == "LampOn"
        text = http.post("/v1/completions", json={"model": "default", "prompt": "lights out, please", "max_tokens": 24}).json()
        assert text["shadowpeft"]["action"] == "LampOff"
        assert ask("why is that so, tell me")["shadowpeft"]["action"] == REMOTE


def test_what_a_request_does_not_offer_is_handed_on_and_has_no_calibrated_confidence(
    folders, second, monkeypatch, capsys, tmp_path
):
    """The calibration is about a choice among all actions. Among fewer another one looks surer than it is."""
    code, _, err = opinionated(
        monkeypatch, capsys, folders, second, "--second-opinion", second / "learnt.jsonl", "--out", tmp_path
    )
    assert code == 0, err
    tools = [{"type": "function", "function": {"name": name}} for name in ("LampOn", "LampOff")]
    routing = {"routing": str(tmp_path / "routing.json")}

    def called(app, text, **more):
        choice, note = say(app, text, **more)
        return [call["function"]["name"] for call in choice["message"]["tool_calls"]], note

    alone = command.application(options(folders / "random", **routing), NOBODY)
    names, note = called(alone, "light up, please", tools=tools)
    assert (names, note["reason"]) == (["LampOn"], "known skill")
    assert note["confidence"] > 0.9
    for more in ({"tools": tools[1:]}, {"tools": tools, "tool_choice": tools[1]}):
        alone = command.application(options(folders / "random", **routing), NOBODY)
        names, note = called(alone, "light up, please", **more)  # there is no cloud that could do better
        assert (names, note["where"]) == (["LampOff"], "device")
        assert "confidence" not in note

    async def away(self, asked, ids, note, began, declined=None):
        handed_on.append((note["reason"], note["action"]))
        raise CloudError("cloud unavailable", "it is away")

    monkeypatch.setattr(EdgeRole, "_forward", away)
    for more, expected in (({"tools": tools}, []), ({"tools": tools[1:]}, [("unknown answer", None)])):
        handed_on = []
        edge = options(folders / "random", cloud_url="http://127.0.0.1:9", cloud_model="m", **routing)
        names, note = called(command.application(edge, NOBODY), "light up, please", **more)
        assert handed_on == expected
        assert names == [more["tools"][0]["function"]["name"]]  # never what was not offered
        assert note.get("degraded", False) is bool(expected)


def test_without_its_file_a_calibration_is_not_served(folders, second, monkeypatch, capsys, tmp_path):
    code, _, err = opinionated(
        monkeypatch, capsys, folders, second, "--second-opinion", second / "learnt.jsonl", "--out", tmp_path
    )
    assert code == 0, err
    edge = options(folders / "random", routing=str(tmp_path / "routing.json"))
    (file,) = tmp_path.glob("second_opinion-*")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + b"x")
    with pytest.raises(ConfigError, match="is not the one of its calibration"):
        command.application(edge, NOBODY)
    file.unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        command.application(edge, NOBODY)
    file.write_bytes(whole)
    code, _, err = opinionated(monkeypatch, capsys, folders, second, "--target", "0.9", "--out", tmp_path)
    assert code == 0, err
    assert not file.exists()  # the new calibration is without one
    assert Calibration.load(tmp_path / "routing.json").opinion is None


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--signal", "agreement"), "there is no second opinion"),
        (("--signal", "logprob", "--second-opinion", "learnt.jsonl"), "weighs chosen actions but --signal is logprob"),
        (("--skills", "robot_tools", "--second-opinion", "learnt.jsonl"), "knows nothing of arguments"),
        (("--second-opinion", "none.jsonl"), "does not exist"),
        (("--second-opinion", "asked.jsonl"), "every prompt of"),
        (("--second-opinion", "robot"), "'robot' has the packaged skills"),
        (("--second-opinion", "commands.jsonl"), "does not know 'REMOTE'"),
        (("--second-opinion", "one.jsonl"), "does not know 'LampOff'"),
        (("--second-opinion", "other.jsonl"), "has LampOff for the same prompt; correct one of them"),
    ],
)
def test_second_opinions_that_do_not_fit(folders, second, monkeypatch, capsys, more, said):
    write_rows(second / "commands.jsonl", [{"prompt": n, "skill": n} for n in ("LampOn", "LampOff")])
    write_rows(second / "one.jsonl", [{"prompt": "a", "skill": "LampOn"}])
    differing = {"prompt": "brighter, the 0th", "skill": "LampOff"}  # in asked.jsonl it is LampOn
    write_rows(second / "other.jsonl", [differing, *({"prompt": n, "skill": n} for n in ("LampOn", "LampOff", REMOTE))])
    more = [second / word if word.endswith(".jsonl") else word for word in more]
    code, _, err = opinionated(monkeypatch, capsys, folders, second, *more)
    assert code == 2
    assert said in err


def test_rows_to_train_on_may_be_whole_chats(folders, second, monkeypatch, capsys, tmp_path):
    rows = [json.loads(line) for line in (second / "learnt.jsonl").read_text().splitlines()]
    said = {"LampOn": "[LampOn()] On.", "LampOff": "[LampOff()] Off.", REMOTE: "[REMOTE] Let me ask."}
    turns = (("system", "a lamp"), ("user", "hm"), ("assistant", "Yes?"))
    before = [{"role": role, "content": text} for role, text in turns]
    write_rows(
        second / "chats.jsonl",
        [
            {
                "messages": [
                    *before,
                    {"role": "user", "content": row["prompt"]},
                    {"role": "assistant", "content": said[row["skill"]]},
                ]
            }
            for row in rows
        ],
    )
    found = {}
    for name in ("learnt", "chats"):
        code, out, err = opinionated(
            monkeypatch, capsys, folders, second, "--second-opinion", second / f"{name}.jsonl", "--out", tmp_path / name
        )
        assert code == 0, err
        found[name] = json.loads(out)
    assert found["chats"]["commands_kept"] == found["learnt"]["commands_kept"]
    assert Calibration.load(tmp_path / "chats" / "routing.json").opinion == Calibration.load(
        tmp_path / "learnt" / "routing.json"
    ).opinion


def test_a_calibration_that_cannot_be_saved_leaves_the_old_one_whole(folders, second, monkeypatch, capsys, tmp_path):
    with_one = ("--second-opinion", second / "learnt.jsonl", "--out", tmp_path)
    code, _, err = opinionated(monkeypatch, capsys, folders, second, *with_one)
    assert code == 0, err
    before = Calibration.load(tmp_path / "routing.json")
    write_rows(second / "more.jsonl", [json.loads(line) for line in (second / "learnt.jsonl").read_text().splitlines()][:-1])

    def full(self, file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Calibration, "save", full)
    code, _, err = opinionated(monkeypatch, capsys, folders, second, *with_one[2:], "--second-opinion", second / "more.jsonl")
    assert code == 1
    assert "No space left" in err
    edge = options(folders / "random", routing=str(tmp_path / "routing.json"))
    assert say(command.application(edge, NOBODY), "light up, please")[1]["action"] == "LampOn"
    assert Calibration.load(tmp_path / "routing.json") == before
