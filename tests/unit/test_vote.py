"""The vote of an attached model's own shadow: the shadow alone, the product of both, and what it leaves free."""

import copy

import pytest
import torch

import shadowpeft
from chatbase import chat_model, chat_tokenizer
from serving import ADAPTERS, ending_model
from several import several
from shadowpeft.constrained import choose
from shadowpeft.data.action_trie import ActionTrie
from shadowpeft.data.actions import REMOTE
from shadowpeft.data.declined import Beginnings, Vote, Voted
from shadowpeft.errors import ConfigError
from shadowpeft.generate import answer
from shadowpeft.hf.forward.alone import ShadowAlone
from shadowpeft.hf.forward.speculation import Speculation
from shadowpeft.hf.swap import swap
from shadowpeft.vote import votes

NAMES = ("Sit", "Stand", "Stretch")
PROMPTS = ["sit", "who is there?", "stand up", "sit down now"]


@pytest.fixture(scope="module")
def adapted():
    return several(ending_model(max_position_embeddings=512), ADAPTERS).eval()


def trie():
    return ActionTrie.of(chat_tokenizer(), NAMES)


@pytest.mark.parametrize("name", list(ADAPTERS))
def test_the_shadow_alone_says_what_the_detached_model_says(adapted, name):
    adapted.set_adapter("late")  # the name decides, not what is active
    alone, edge = ShadowAlone(adapted, name), shadowpeft.detach(adapted, name)
    ours, theirs = (choose(model, chat_tokenizer(), PROMPTS, trie()) for model in (alone, edge))
    for one, other in zip(ours, theirs, strict=True):
        assert one.action == other.action
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-6)
    assert not adapted.training
    greedy = choose(alone, chat_tokenizer(), PROMPTS, trie(), exact=False)
    assert [c.probabilities for c in greedy] == [None] * 4


def test_the_shadow_alone_keeps_the_weights_of_its_first_pass(tmp_path):
    made = several(ending_model(max_position_embeddings=512), {"default": {"r": 4}}).eval()
    alone, actions = ShadowAlone(made), trie()
    before = choose(alone, chat_tokenizer(), PROMPTS[:1], actions)[0].probabilities
    other = copy.deepcopy(made)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "shadowpeft_backbone" in name and parameter.dim() > 1:
                parameter.mul_(1.5)
    other.save_pretrained(tmp_path)
    swap(made, tmp_path)
    assert choose(alone, chat_tokenizer(), PROMPTS[:1], actions)[0].probabilities == before
    assert choose(ShadowAlone(made), chat_tokenizer(), PROMPTS[:1], actions)[0].probabilities != before


def test_no_adapter_and_no_language_model_is_refused(adapted):
    with pytest.raises(ConfigError, match="there is no adapter 'none'"):
        ShadowAlone(adapted, "none")
    with pytest.raises(ConfigError, match="has no shadow adapter"):
        ShadowAlone(chat_model())


def first_token(begin, logits, chances, path=()):
    held = Voted(begin, trie(), chances)
    allowed = held.allowed(list(path))
    leaning = torch.as_tensor(held.leaning(list(path)), dtype=torch.float64)
    return allowed, (logits[torch.as_tensor(allowed)] + leaning).softmax(-1)


def test_an_action_is_as_likely_as_both_together_say():
    begin = Beginnings.of(chat_tokenizer(), chat_model().config.vocab_size)
    logits = torch.randn(chat_model().config.vocab_size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    chances = {"Sit": 0.6, "Stand": 0.1, "Stretch": 0.1, REMOTE: 0.2}
    allowed, both = first_token(begin, logits, chances)
    own = logits.softmax(-1)[begin.tokens].sum().item()
    assert len(allowed) == len(logits)
    assert both[begin.tokens].sum().item() == pytest.approx(own * 0.8 / (own * 0.8 + (1 - own) * 0.2), rel=1e-12)
    # at the branch between Sit and the others: their shares, without what [REMOTE] has
    actions = trie()
    path = actions.tokens["Sit"][: next(n for n in range(20) if actions.tokens["Sit"][n] != actions.tokens["Stand"][n])]
    allowed, branch = first_token(begin, logits, chances, path)
    weights = {actions.tokens["Sit"][len(path)]: 0.6, actions.tokens["Stand"][len(path)]: 0.2}
    expected = torch.tensor([logits[t].exp() * weights.get(t, 1e-12) for t in allowed], dtype=torch.float64)
    torch.testing.assert_close(branch, expected / expected.sum(), rtol=1e-9, atol=1e-12)


def test_words_stay_free_and_an_action_ends_as_one_of_the_known():
    begin = Beginnings.of(chat_tokenizer(), chat_model().config.vocab_size)
    held = Voted(begin, trie(), {"Sit": 0.4, "Stand": 0.3, "Stretch": 0.2, REMOTE: 0.1})
    other = next(token for token in range(10, 60) if token not in begin.tokens)
    assert (len(held.allowed([other])), held.leaning([other]), held.forced([other]), held.forced([])) == (0, None, [], [])
    whole = list(trie().tokens["Stretch"])
    assert held.forced(whole[:-2]) == whole[-2:]
    assert not len(held.allowed(whole))
    assert len(held.allowed([*whole, other])) == 0


def test_a_device_s_word_counts_instead_of_the_shadow_s():
    begin = Beginnings.of(chat_tokenizer(), chat_model().config.vocab_size)
    held = Voted(begin, trie(), {"Sit": 0.9, "Stand": 0.05, "Stretch": 0.04, REMOTE: 0.01}, declined=0.99)
    assert held.leaning([])[begin.tokens[0]].item() < 0


def test_answers_follow_the_vote(adapted):
    adapted.set_adapter("default")
    found = votes(adapted, chat_tokenizer(), PROMPTS, trie())
    edge = choose(shadowpeft.detach(adapted), chat_tokenizer(), PROMPTS, trie())
    leans = found[0].start().leaning([])
    expected = torch.logit(torch.tensor(edge[0].probabilities[REMOTE], dtype=torch.float64)).neg()
    assert leans.max().item() == pytest.approx(max(expected.item(), 0.0), abs=1e-4)
    begin = Beginnings.of(chat_tokenizer(), adapted.config.vocab_size)
    sure = dict.fromkeys((*NAMES, REMOTE), 1e-09)
    surely = [Vote(begin, trie(), {**sure, name: 1.0}) for name in ("Stand", REMOTE)]
    adapted.get_base_model().lm_head.weight.data.mul_(0.01)  # so that the model itself is unsure
    said = answer(adapted, chat_tokenizer(), ["sit", "who is there?"], max_new_tokens=12, actions=surely)
    adapted.get_base_model().lm_head.weight.data.mul_(100.0)
    assert said[0].text.startswith("[Stand()]")
    assert not said[1].text.startswith("[")


def test_one_request_after_different_words_has_a_vote_of_its_own(adapted):
    adapted.set_adapter("default")
    chats = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": "x"}, {"role": "user", "content": "sit"}]
        for text in ("a", "who is there?")
    ]
    found = votes(adapted, chat_tokenizer(), chats, trie())
    alone = [votes(adapted, chat_tokenizer(), [chat], trie())[0].chances for chat in chats]
    for vote, expected in zip(found, alone, strict=True):
        assert vote.chances == pytest.approx(expected, abs=1e-6)
    assert alone[0] != pytest.approx(alone[1], abs=1e-4)


@pytest.mark.parametrize("options", [{}, {"speculative": Speculation(max_draft=2, adaptive=False)}, {"num_beams": 2}])
def test_each_prompt_of_a_batch_is_held_to_its_own_actions(adapted, options):
    adapted.set_adapter("default")
    pairs = [("Sit", "Stand"), ("Stretch", REMOTE)]
    own = [ActionTrie({name: trie().tokens[name] for name in pair}) for pair in pairs]
    for prompts in (["sit", "who is there?"], ["who is there?", "sit"]):  # in a batch they are sorted by length
        said = answer(adapted, chat_tokenizer(), prompts, max_new_tokens=12, actions=own, **options)
        for each, pair in zip(said, pairs, strict=True):
            assert any(each.text.startswith(f"[{name}") for name in pair), (each.text, pair)


def test_as_many_actions_as_prompts(adapted):
    with pytest.raises(ConfigError, match="actions has 2 entries for 1 prompts"):
        answer(adapted, chat_tokenizer(), ["sit"], actions=[trie(), trie()])
