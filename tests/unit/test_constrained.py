"""Choosing among actions equals a naive loop in float64, batched or not, on caches that can be carried on and others."""

import json

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from chatbase import chat_model, chat_tokenizer, save_sitting_base
from commands import call
from shadowpeft.apps.common import in_mode
from shadowpeft.constrained import choose, equal_lengths
from shadowpeft.data.action_trie import ActionTrie
from shadowpeft.data.actions import REMOTE, parser
from shadowpeft.data.chat import prompt_ids, with_system
from shadowpeft.data.second_opinion import SecondOpinion
from shadowpeft.data.tasks import get_task
from shadowpeft.errors import ConfigError, DataError
from shadowpeft.evaluate import evaluate_task
from shadowpeft.generate import answer, stream
from shadowpeft.serve.router import ACTION, Calibration
from tiny import adapt, adapter_config, base

PROMPTS = ["sit", "a much longer request, please", "x", "站起来", "say", "another one of middle length"]
SKILLS = ("Sit", "Stand", "StandUp", "SitDown", "Bark", "开灯")
TOKENIZER = chat_tokenizer()
TRIE = ActionTrie.of(TOKENIZER, SKILLS)


def naive(model, prompt, system=None):
    """Probabilities by the plain model, uncached, one action and one token at a time."""
    ids = prompt_ids(TOKENIZER, with_system([{"role": "user", "content": prompt}], system))
    found = {}
    for name, tokens in TRIE.tokens.items():
        chance = 1.0
        for depth, token in enumerate(tokens):
            others = sorted({o[depth] for o in TRIE.tokens.values() if o[:depth] == tokens[:depth]})
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*ids, *tokens[:depth]]])).logits[0, -1, others].double()
            chance *= logits.softmax(-1)[others.index(token)].item()
        found[name] = chance
    return found


@pytest.fixture(scope="module")
def adapted():
    return adapt(chat_model())


@pytest.mark.parametrize("mode", ["attached", "detached", "base"])
def test_probabilities_are_the_naive_loops_and_add_up_to_one(adapted, mode):
    with in_mode(adapted, mode) as model:
        chosen = choose(model, TOKENIZER, PROMPTS, TRIE, system="be brief")
        for prompt, one in zip(PROMPTS, chosen, strict=True):
            expected = naive(model, prompt, "be brief")
            assert list(one.probabilities) == [*SKILLS, REMOTE]
            # float32 logits: another order of summing in a batch and with a cache
            assert one.probabilities == pytest.approx(expected, rel=1e-4)
            assert sum(one.probabilities.values()) == pytest.approx(1.0, abs=1e-12)
            assert one.action == max(expected, key=expected.get)
            assert one.probability == one.probabilities[one.action]
    assert len({one.action for one in chosen}) > 1  # or their order could not be told


@pytest.mark.parametrize(
    ("exact", "name"),
    [
        (True, "mistral"),
        pytest.param(False, "qwen3_next", marks=pytest.mark.slow),
        pytest.param(True, "gemma3", marks=pytest.mark.slow),
        pytest.param(False, "gemma3", marks=pytest.mark.slow),
        pytest.param(False, "mistral", marks=pytest.mark.slow),
        pytest.param(True, "qwen3_next", marks=pytest.mark.slow),
    ],
)
def test_windows_and_recurrent_layers(name, exact):
    """A sliding window counts columns, and a recurrent layer cannot be carried on by several tokens."""
    model = base(name, vocab_size=260, eos_token_id=3)
    for prompt, one in zip(PROMPTS, choose(model, TOKENIZER, PROMPTS, TRIE, exact=exact), strict=True):
        assert one.probability == pytest.approx(naive(model, prompt)[one.action], rel=1e-4)


def test_a_greedy_descent_has_the_same_probability_for_its_action(adapted):
    exact = choose(adapted, TOKENIZER, PROMPTS, TRIE)
    for size in (1, 16):
        for whole, one in zip(
            exact, choose(adapted, TOKENIZER, PROMPTS, TRIE, exact=False, batch_size=size), strict=True
        ):
            assert one.probabilities is None
            assert one.probability == pytest.approx(whole.probabilities[one.action], rel=1e-4)
            assert one.probability <= whole.probability * (1 + 1e-4)


def test_a_branch_of_many_ends_may_be_likelier_than_the_likeliest_token():
    """Why there is an exact mode: greedy takes the branch with the larger sum, whose parts may all be small."""
    model = chat_model(initializer_range=0.02)  # nearly uniform: a token decides by a hair
    trie = ActionTrie.of(TOKENIZER, [f"A{letter}" for letter in "bcdefgh"])
    whole = choose(model, TOKENIZER, PROMPTS, trie)
    greedy = choose(model, TOKENIZER, PROMPTS, trie, exact=False)
    assert all(one.action == REMOTE for one in whole)  # about 1/2 against 1/14 for each of the others
    assert all(one.probability <= best.probability for one, best in zip(greedy, whole, strict=True))


@pytest.mark.parametrize("size", [1, 2, 16])
def test_batches_change_nothing(adapted, size):
    done = []
    chosen = choose(adapted, TOKENIZER, PROMPTS, TRIE, batch_size=size, progress=done.append)
    for prompt, one in zip(PROMPTS, chosen, strict=True):
        assert one.probabilities == pytest.approx(choose(adapted, TOKENIZER, [prompt], TRIE)[0].probabilities, rel=1e-4)
    assert done[-1] == len(PROMPTS)
    assert done == sorted(set(done))


def test_what_is_shared_is_read_once(adapted):
    read = []
    plain = adapted.forward

    def counting(**inputs):
        read.append(inputs["input_ids"].numel())
        return plain(**inputs)

    model, rows = adapted, [prompt_ids(TOKENIZER, [{"role": "user", "content": p}]) for p in ("aaa", "aab", "aac")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "forward", counting)
        choose(model, TOKENIZER, ["aaa", "aab", "aac"], TRIE, exact=False)
    assert read[0] == next(i for i, column in enumerate(zip(*rows, strict=True)) if len(set(column)) > 1)
    assert read[1] == 3 * (len(rows[0]) - read[0] + len(TRIE.stem))


def test_wrong_use(adapted):
    assert choose(adapted, TOKENIZER, [], TRIE) == []
    with pytest.raises(ConfigError, match="batch_size is 0"):
        choose(adapted, TOKENIZER, ["a"], TRIE, batch_size=0)
    with pytest.raises(DataError, match="the model reads 256"):
        choose(adapted, TOKENIZER, ["a" * 240], TRIE)
    with pytest.raises(ConfigError, match=f"max_new_tokens is 3 but an action has {TRIE.longest} tokens"):
        answer(adapted, TOKENIZER, ["a"], max_new_tokens=3, actions=TRIE)


def test_groups_of_equal_length_hold_each_row_once():
    lengths = [3, 5, 3, 3, 5, 4]
    groups = list(equal_lengths(lengths, 2))
    assert sorted(i for group in groups for i in group) == list(range(6))
    assert all(len({lengths[i] for i in group}) == 1 and len(group) <= 2 for group in groups)
    assert len(groups) == 4


# -------------------------------------------------------------------------------------------------------------- answers


def test_an_answer_starts_with_the_greedy_choice_and_goes_on_freely(adapted):
    parse = parser(SKILLS)
    chosen = choose(adapted, TOKENIZER, PROMPTS, TRIE, exact=False)
    answers = answer(adapted, TOKENIZER, PROMPTS, max_new_tokens=24, batch_size=3, actions=TRIE)
    assert [parse(a.text) for a in answers] == [c.action for c in chosen]
    assert any(len(a.text) > len(f"[{c.action}()]") for a, c in zip(answers, chosen, strict=True))
    free = answer(adapted, TOKENIZER, PROMPTS, max_new_tokens=24)
    assert all(parse(a.text) is None for a in free)


def test_a_temperature_applies_among_the_actions(adapted):
    parse = parser(SKILLS)
    prompts = ["sit"] * 64
    texts = answer(
        adapted, TOKENIZER, prompts, max_new_tokens=TRIE.longest, actions=TRIE, do_sample=True, temperature=5.0
    )
    assert {parse(a.text) for a in texts} <= {*SKILLS, REMOTE}
    assert len({parse(a.text) for a in texts}) > 2


@pytest.fixture(scope="module")
def sitting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sitting")
    made = save_sitting_base(folder / "base", "[Sit()] ok")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(made), adapter_config(shadow_init="base_layers"))
    model.save_pretrained(folder / "adapter")
    chat_tokenizer().save_pretrained(folder / "adapter")
    (folder / "skills.txt").write_text("Sit\nBark\n")
    return folder


def test_the_command(sitting, monkeypatch, capsys):
    ask = ("generate", sitting / "adapter", "please", "--mode", "detached", "--skills")
    code, out, err = call(monkeypatch, capsys, *ask, sitting / "skills.txt", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["text"].startswith("[Sit()]")
    assert result["action"] == "Sit"
    assert list(result["probabilities"]) == ["Sit", "Bark", REMOTE]
    assert sum(result["probabilities"].values()) == pytest.approx(1.0)
    assert result["probability"] == result["probabilities"]["Sit"] > 0.5
    code, out, err = call(monkeypatch, capsys, *ask, "robot")
    assert code == 0, err
    assert out.startswith("[Sit()]")
    assert "Sit: probability 0." in err or "Sit: probability 1." in err
    for skills, message in ((sitting / "none.txt", "cannot be read"), (sitting / "empty.txt", "has no skill")):
        (sitting / "empty.txt").write_text("")
        code, _, err = call(monkeypatch, capsys, *ask, skills)
        assert code == 2
        assert message in err


def test_the_command_takes_the_second_opinion_of_the_calibration(sitting, monkeypatch, capsys):
    opinion = SecondOpinion.fit(["sit down", "bark!", "why?"], ["Sit", "Bark", REMOTE])
    digest = opinion.save(sitting / "adapter")
    Calibration(ACTION, (0.0,), (1.0,), 0.5, skills=("Sit", "Bark"), opinion=digest).save(sitting / "adapter" / "routing.json")
    (sitting / "more.txt").write_text("Sit\nBark\nRoll\n")
    found = {}
    for mode, skills in (("detached", "skills.txt"), ("attached", "skills.txt"), ("detached", "more.txt")):
        ask = ("generate", sitting / "adapter", "bark!", "--mode", mode, "--skills", sitting / skills)
        code, out, err = call(monkeypatch, capsys, *ask, "--json")
        assert code == 0, err
        found[mode, skills] = json.loads(out)
    both, attached, other = found.values()
    assert both["second_opinion"] is True
    assert "second_opinion" not in attached  # the cloud's path
    assert "second_opinion" not in other  # it is about other actions
    alone, chances = attached["probabilities"], opinion.chances("bark!")  # both paths say the same here
    odds = alone["Bark"] / alone["Sit"] * chances["Bark"] / chances["Sit"]  # two actions that differ from the first token on
    assert both["probabilities"]["Bark"] / both["probabilities"]["Sit"] == pytest.approx(odds, rel=1e-3)
    code, _, err = call(monkeypatch, capsys, *ask[:-2], "--skills", sitting / "skills.txt")
    assert "with the second opinion of its calibration" in err
    (sitting / "adapter" / "routing.json").unlink()


def test_the_record_of_a_device_has_the_constrained_score_beside_the_free_one(adapted):
    task = get_task("robot")
    task.max_new_tokens = 4
    quiet = {"limit": 20, "batch_size": 8, "progress": lambda done: None}
    record = evaluate_task(adapted, TOKENIZER, task, mode="detached", **quiet)
    beside = record["constrained"]
    assert record["scores"]["tagged"] == 0.0  # free, a random model says nothing known: that hands on everything
    assert set(beside["scores"]) == set(record["scores"])
    assert 0 <= beside["interval"][0] <= beside["score"] <= beside["interval"][1] <= 1
    examples = task.for_path(task.load("test", limit=20), "shadow")
    trie = ActionTrie.of(TOKENIZER, task.actions)
    with in_mode(adapted, "detached") as edge:
        names = [c.action for c in choose(edge, TOKENIZER, [task.chat(e) for e in examples], trie)]
    assert beside["scores"] == task.score(names, examples)
    assert "second_opinion" not in record
    assert "constrained" not in evaluate_task(adapted, TOKENIZER, task, mode="attached", **quiet)


def test_a_device_is_judged_with_its_second_opinion_beside(adapted, tmp_path):
    task = get_task("robot")
    task.max_new_tokens = 1
    names = [*task.actions, "REMOTE"]
    opinion = SecondOpinion.fit([f"word{i} {name}" for i, name in enumerate(names)], names)
    quiet = {"limit": 12, "batch_size": 8, "progress": lambda done: None, "folder": tmp_path / "eval"}
    record = evaluate_task(adapted, TOKENIZER, task, mode="detached", opinion=opinion, **quiet)
    examples = task.for_path(task.load("test", limit=12), "shadow")
    with in_mode(adapted, "detached") as edge:
        weighed = ActionTrie.of(TOKENIZER, task.actions, opinion)
        said = [c.action for c in choose(edge, TOKENIZER, [task.chat(e) for e in examples], weighed)]
    assert record["second_opinion"]["scores"] == task.score(said, examples)
    assert record["second_opinion"]["digest"] == opinion.digest == opinion.save(tmp_path)
    again = evaluate_task(adapted, TOKENIZER, task, mode="detached", opinion=opinion, resume=True, **quiet)
    assert again == record
    without = evaluate_task(adapted, TOKENIZER, task, mode="detached", resume=True, **quiet)  # calibrated anew since
    assert "second_opinion" not in without
    assert without["constrained"] == record["constrained"]


def test_one_text_is_no_list_of_prompts_or_names():
    model = chat_model()
    for ask in (lambda p: choose(model, TOKENIZER, p, TRIE), lambda p: answer(model, TOKENIZER, p, max_new_tokens=2)):
        with pytest.raises(ConfigError, match="prompts is one text; put it into a list"):
            ask("sit")
        with pytest.raises(ConfigError, match="prompts is one message list; put it into a list"):
            ask([{"role": "user", "content": "sit"}])
    with pytest.raises(ConfigError, match="is the text 'LampOn'; give a list of names"):
        ActionTrie.of(TOKENIZER, "LampOn")


def test_a_streamed_answer_takes_a_text_and_a_calibration_a_path_as_text(tmp_path):
    model = chat_model()
    messages = [{"role": "user", "content": "sit"}]
    assert "".join(stream(model, TOKENIZER, "sit", max_new_tokens=4)) == "".join(
        stream(model, TOKENIZER, messages, max_new_tokens=4)
    )
    made = Calibration(ACTION, (0.5,), (1.0,), 0.5)
    made.save(str(tmp_path / "routing.json"))
    assert Calibration.load(str(tmp_path / "routing.json")) == made
