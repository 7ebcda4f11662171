"""A second opinion: a product at every branch, as a naive loop says; the same wherever actions are chosen; files that hold."""

import json
import math
from hashlib import sha256

import numpy as np
import pytest
from safetensors.numpy import load_file, save
from scripts import second_opinion as measuring

from chatbase import chat_tokenizer
from serving import detached
from shadowpeft.constrained import choose
from shadowpeft.data.action_trie import ActionTrie
from shadowpeft.data.actions import REMOTE, parser
from shadowpeft.data.second_opinion import SecondOpinion, discard_others, features, file_of
from shadowpeft.errors import ConfigError, DataError
from shadowpeft.generate import answer, request_of
from shadowpeft.serve.loading import opinion_of
from shadowpeft.serve.router import ACTION, AGREEMENT, Calibration, Scores, action_probability, agreement, decisive
from shadowpeft.serve.scoring import scored_answers

SKILLS = ("Sit", "Stand", "StandUp", "SitDown", "Bark", "开灯")
PARSE = parser(SKILLS)
SAID = ("sit", "stand still", "stand up", "sit down", "bark", "开灯吧", "why is that")
WORDS = dict(zip((*SKILLS, REMOTE), SAID, strict=True))
ROWS = [(f"{lead} {words}", name) for name, words in WORDS.items() for lead in ("please", "now", "oh dog", "快")]
PROMPTS = ["sit", "stand up, will you?", "why is the sky blue?", "开灯吧", "x"]


@pytest.fixture(scope="module")
def opinion():
    return SecondOpinion.fit(*map(list, zip(*ROWS, strict=True)))


@pytest.fixture(scope="module")
def plain():
    return ActionTrie.of(chat_tokenizer(), SKILLS)


@pytest.fixture(scope="module")
def weighed(opinion):
    return ActionTrie.of(chat_tokenizer(), SKILLS, opinion)


@pytest.fixture(scope="module")
def edge():
    return detached()


def product(own, chances, tokens):
    """From both judges' chances of each action: at each token of an action, the shares of what begins like it."""
    result = {}
    for name, ids in tokens.items():
        whole = 1.0
        for depth in range(len(ids)):
            shares = {}
            for other, its in tokens.items():
                if its[:depth] == ids[:depth]:
                    both = shares.setdefault(its[depth], [0.0, 0.0])
                    both[0] += own[other]
                    both[1] += chances[other]
            total = sum(model * classifier for model, classifier in shares.values())
            whole *= math.prod(shares[ids[depth]]) / total
        result[name] = whole
    return result


def test_probabilities_are_the_product_at_every_branch(edge, plain, weighed, opinion):
    alone = choose(edge.model, edge.tokenizer, PROMPTS, plain)
    both = choose(edge.model, edge.tokenizer, PROMPTS, weighed)
    for prompt, one, other in zip(PROMPTS, alone, both, strict=True):
        expected = product(one.probabilities, opinion.chances(prompt), plain.tokens)
        assert other.probabilities == pytest.approx(expected, rel=1e-9)
        assert sum(other.probabilities.values()) == pytest.approx(1.0, abs=1e-12)
    assert [one.action for one in alone] != [one.action for one in both]
    assert [one.action for one in both][:4] == ["Sit", "StandUp", REMOTE, "开灯"]  # an untrained model is led


def test_a_server_and_generate_choose_what_choose_chooses(edge, weighed):
    expected = choose(edge.model, edge.tokenizer, PROMPTS, weighed, exact=False)
    said = [reply.text for reply in answer(edge.model, edge.tokenizer, PROMPTS, max_new_tokens=24, actions=weighed)]
    served = scored_answers(edge, "edge", PROMPTS, system=None, max_tokens=24, actions=weighed)
    for one, text, (pieces, scores) in zip(expected, said, served, strict=True):
        n, action = decisive(pieces, PARSE)
        assert PARSE(text) == action == one.action
        # float32 logits of another batch
        assert action_probability(scores.first(n)) == pytest.approx(one.probability, rel=1e-4)


def test_agreement_is_the_mean_of_what_each_gives_the_action(edge, plain, weighed, opinion, tmp_path):
    alone = choose(edge.model, edge.tokenizer, PROMPTS, plain)
    served = scored_answers(edge, "edge", PROMPTS, system=None, max_tokens=24, actions=weighed)
    for prompt, one, (pieces, scores) in zip(PROMPTS, alone, served, strict=True):
        n, action = decisive(pieces, PARSE)
        expected = (one.probabilities[action] + opinion.chances(prompt)[action]) / 2
        assert agreement(scores.first(n)) == pytest.approx(expected, rel=1e-4)
        calibration = Calibration(AGREEMENT, (0.0, 1.0), (0.0, 1.0), 0.5, skills=SKILLS, opinion="0" * 64)
        assert calibration.value(scores.first(n)) == agreement(scores.first(n))
    assert agreement(Scores()) == 0.0
    Calibration(AGREEMENT, (0.0,), (1.0,), 0.5).save(tmp_path / "routing.json")
    with pytest.raises(ConfigError, match="has the signal agreement but no second opinion"):
        Calibration.load(tmp_path / "routing.json")
    Calibration(AGREEMENT, (0.0,), (1.0,), 0.5, opinion="../../secret").save(tmp_path / "routing.json")
    with pytest.raises(ConfigError, match="has an opinion that is no digest"):
        Calibration.load(tmp_path / "routing.json")


def test_several_drawn_answers_lean_each_to_their_own_request(edge, weighed):
    options = {"max_new_tokens": 24, "do_sample": True, "temperature": 0.2}
    texts = [reply.text for reply in answer(edge.model, edge.tokenizer, ["bark", "开灯吧"], actions=weighed, **options)]
    assert [PARSE(text) for text in texts] == ["Bark", "开灯"]


def test_the_last_user_message_is_the_request(edge, weighed):
    chat = [{"role": "system", "content": "bark"}, {"role": "user", "content": "bark"}, {"role": "user", "content": "sit"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "bark"}]}]
    chosen = choose(edge.model, edge.tokenizer, [chat], weighed)[0]
    assert chosen.action == "Sit"
    assert request_of(parts) == "bark"
    assert request_of([{"role": "assistant", "content": "bark"}]) == ""


def test_some_of_the_actions(edge, weighed):
    some = weighed.some(["Bark", "Sit"])
    assert set(some.actions) == {"Bark", "Sit", REMOTE}
    chosen = choose(edge.model, edge.tokenizer, ["stand up"], some)[0]
    assert chosen.probabilities.keys() == {"Bark", "Sit", REMOTE}
    assert sum(chosen.probabilities.values()) == pytest.approx(1.0)


def test_chances_are_those_of_scikit_learn(opinion):
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    prompts, actions = zip(*ROWS, strict=True)
    theirs = make_pipeline(features(), LogisticRegression(C=100.0, max_iter=300)).fit(prompts, actions)
    for prompt, row in zip(PROMPTS, theirs.predict_proba(PROMPTS), strict=True):
        expected = dict(zip(theirs.classes_.tolist(), row.tolist(), strict=True))
        assert opinion.chances(prompt) == pytest.approx(expected, rel=1e-3, abs=1e-6)  # ours are kept in float32


def test_two_actions_are_enough_and_one_is_not():
    opinion = SecondOpinion.fit(["sit down", "why", "sit", "who"], ["Sit", REMOTE, "Sit", REMOTE])
    assert opinion.chances("sit")["Sit"] > 0.9 > 0.1 > opinion.chances("why")["Sit"]
    with pytest.raises(DataError, match="1 action but need two"):
        SecondOpinion.fit(["sit", "down"], ["Sit", "Sit"])
    with pytest.raises(DataError, match="no word of two letters"):
        SecondOpinion.fit(["开", "关"], ["Sit", REMOTE])


def test_a_file_gives_the_same_chances(opinion, tmp_path):
    digest = opinion.save(tmp_path)
    assert opinion.save(tmp_path) == digest
    (file,) = tmp_path.iterdir()
    assert file == file_of(tmp_path, digest)
    read = SecondOpinion.load(tmp_path, digest)
    for prompt in (*PROMPTS, "", "\u2028 \x00"):
        assert read.chances(prompt) == opinion.chances(prompt)
    assert read.parameters == opinion.parameters > 0
    with pytest.raises(ConfigError, match=r"^the second opinion '.*' is not the one of its calibration; calibrate"):
        SecondOpinion.load(tmp_path, digest[:12] + "0" * 52)
    with pytest.raises(ConfigError, match="cannot be read"):
        SecondOpinion.load(tmp_path, "0" * 64)


def test_a_new_one_leaves_the_old_one_until_it_is_discarded(opinion, tmp_path):
    old = opinion.save(tmp_path)
    new = SecondOpinion.fit(["sit down", "why", "sit", "who"], ["Sit", REMOTE, "Sit", REMOTE]).save(tmp_path)
    (tmp_path / "second_opinion.md").write_text("mine")
    assert SecondOpinion.load(tmp_path, old).actions == opinion.actions
    discard_others(tmp_path, new)
    assert sorted(tmp_path.iterdir()) == sorted([file_of(tmp_path, new), tmp_path / "second_opinion.md"])
    discard_others(tmp_path, None)
    assert [file.name for file in tmp_path.iterdir()] == ["second_opinion.md"]


def test_beside_a_link_or_where_it_points_to(opinion, tmp_path):
    digest = opinion.save(tmp_path)
    file = tmp_path / "routing.json"
    calibration = Calibration(ACTION, (0.0,), (1.0,), 0.5, skills=SKILLS, opinion=digest)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "routing.json").symlink_to(file)
    for place in (file, tmp_path / "elsewhere" / "routing.json"):
        assert opinion_of(calibration, place).actions == opinion.actions
    assert opinion_of(None, None) is None


def changed_about(arrays, **changes):
    about = json.loads(arrays["about"].tobytes()) | changes
    return {**arrays, "about": np.frombuffer(json.dumps(about).encode(), dtype=np.uint8)}


DAMAGES = {
    "a number that is none": lambda a: {**a, "weights": np.full_like(a["weights"], np.nan)},
    "float64": lambda a: {**a, "bias": a["bias"].astype(np.float64)},
    "too few weights": lambda a: {**a, "weights": a["weights"][:, 1:].copy()},
    "a bias too few": lambda a: {**a, "bias": a["bias"][1:].copy()},
    "rarities of other words": lambda a: {**a, "rarity.words": a["rarity.characters"]},
    "another array": lambda a: {**a, "more": a["bias"]},
    "no description": lambda a: {k: v for k, v in a.items() if k != "about"},
    "a description that is no JSON": lambda a: {**a, "about": np.frombuffer(b"{", dtype=np.uint8)},
    "a list": lambda a: {**a, "about": np.frombuffer(b"[]", dtype=np.uint8)},
    "another format": lambda a: changed_about(a, format=2),
    "an action that is none": lambda a: changed_about(a, actions=["rm -rf", *SKILLS[1:], REMOTE]),
    "actions that are numbers": lambda a: changed_about(a, actions=[1] * 7),
    "an action twice": lambda a: changed_about(a, actions=["Sit"] * 7),
    "texts that are none": lambda a: changed_about(a, texts=[["a"], None]),
    "one list of texts": lambda a: changed_about(a, texts=["a"]),
    "no texts": lambda a: changed_about(a, texts=[[], []]),
}


def write(folder, content):
    """A file under the name that belongs to its content."""
    digest = sha256(content).hexdigest()
    file_of(folder, digest).write_bytes(content)
    return digest


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused(opinion, tmp_path, damage):
    digest = write(tmp_path, save(DAMAGES[damage](load_file(file_of(tmp_path, opinion.save(tmp_path))))))
    with pytest.raises(ConfigError, match=r"is no second opinion of format 1: .*; calibrate again"):
        SecondOpinion.load(tmp_path, digest)


@pytest.mark.parametrize("end", [0, 7, 40, -1])
def test_cut_files_are_refused(opinion, tmp_path, end):
    digest = write(tmp_path, file_of(tmp_path, opinion.save(tmp_path)).read_bytes()[:end])
    with pytest.raises(ConfigError, match="is damaged"):
        SecondOpinion.load(tmp_path, digest)


def test_an_opinion_about_other_actions_is_refused(opinion):
    for skills, said in ((("Sit", "Stand"), "also knows 'Bark'"), ((*SKILLS, "Roll"), "does not know 'Roll'")):
        with pytest.raises(ConfigError, match=said):
            ActionTrie.of(chat_tokenizer(), skills, opinion)
    rows = [(prompt, name) for prompt, name in ROWS if name != REMOTE]
    with pytest.raises(ConfigError, match="does not know 'REMOTE'"):
        ActionTrie.of(chat_tokenizer(), SKILLS, SecondOpinion.fit(*map(list, zip(*rows, strict=True))))


def test_words_alone_rule_nothing_out(weighed, plain):
    held = weighed.start("sit")
    held._chances = {**dict.fromkeys(held._chances, 0.0), "Sit": 1.0}
    assert all(math.isfinite(x) for path in plain.branches for x in held.leaning(path))
    whole = plain.tokens["Sit"]
    assert held.leaning(whole) is None
    assert (held.allowed(whole), held.forced(whole)) == ([], [])


def test_what_the_measuring_script_says_of_a_judge(monkeypatch):
    """Of 200 commands and 60 requests without an action; the wrong answers are those of which the judge is least sure."""
    monkeypatch.setattr(measuring, "DRAWN", 20)
    names = ["Sit", "Bark", REMOTE]
    rows = [{"skill": "Sit", "kind": "skill"}] * 200 + [{"skill": REMOTE, "kind": "remote"}] * 60
    chances = np.array([[0.9, 0.05, 0.05]] * 180 + [[0.2, 0.6, 0.2]] * 20 + [[0.1, 0.1, 0.8]] * 57 + [[0.1, 0.55, 0.35]] * 3)
    found = measuring.worth(chances, names, rows, chances.max(1))
    assert found["commands_right"] == 0.9
    assert found["commands_handed_on"] == 0.0
    assert found["remote_handed_on"] == 0.95
    assert found["auroc"] == 1.0
    assert found["at_0.05"] == {"commands_kept": 0.9, "nothing_kept": 0.0, "wrong_of_kept": 0.0}
    found = measuring.worth(chances, names, rows, -chances.max(1))  # the worst confidence there is
    assert found["auroc"] == 0.0
    assert found["at_0.05"]["nothing_kept"] == 1.0
