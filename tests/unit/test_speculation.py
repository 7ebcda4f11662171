"""Free drafts: greedy answers stay, drawn ones keep their distribution, and drafting ends where it does not pay."""

import math

import pytest
import torch
from scipy.stats import chisquare
from torch import nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
)

from chatbase import chat_tokenizer
from products import covering
from several import several
from shadowpeft.core.speculation import Gate, accept_greedy, accept_sampled, draw
from shadowpeft.data.action_trie import ActionTrie
from shadowpeft.data.frequent import frequent_tokens
from shadowpeft.errors import CacheMismatchError, ConfigError, UnsupportedModelError
from shadowpeft.generate import answer
from shadowpeft.hf.forward import speculation
from shadowpeft.hf.forward.drafting import DraftHead
from shadowpeft.hf.forward.joining import moved_right
from shadowpeft.hf.forward.speculation import Speculation, draft_cost, pass_cost
from shadowpeft.hf.layer import find_hub
from shadowpeft.ops import thin
from tiny import ARCHITECTURES, KINDS, PAD, V, adapt, base, padded, tokenizer, tokens

NEW = 16
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD}


def always(**fields):
    """Drafts in every round."""
    return Speculation(**{"max_draft": 3, "adaptive": False, **fields})


def alike(name="llama", **fields):
    """A base whose shadow has learnt nothing yet and is a copy of all its layers, with the last one blurred: most drafts are
    right."""
    model = adapt(base(name), trained=False, shadow_num_hidden_layers=4, shadow_init="base_layers", **fields)
    with torch.no_grad():
        for parameter in find_hub(model).shadowpeft_backbone["default"].layers[-1].parameters():
            parameter.mul_(1 + 0.15 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    return model


# ------------------------------------------------------------------------------------------------------- which drafts stay


@pytest.mark.parametrize(
    ("drafted", "likeliest", "expected"),
    [
        ([], [5], ([5], 0)),
        ([1, 2], [1, 2, 3], ([1, 2, 3], 2)),
        ([1, 2], [1, 7, 3], ([1, 7], 1)),
        ([1, 2], [9, 2, 3], ([9], 0)),
    ],
)
def test_greedy_keeps_what_the_target_says(drafted, likeliest, expected):
    assert accept_greedy(drafted, likeliest) == expected


def is_distributed(counts, p):
    """Whether counts are those of draws from ``p``; a right sampler fails once in 10,000 runs, and the seed is fixed."""
    scale = sum(counts) / math.fsum(map(float, p))
    kept = [(c, scale * float(q)) for c, q in zip(counts, p, strict=True) if q > 0]
    assert all(c == 0 for c, q in zip(counts, p, strict=True) if q == 0)
    return chisquare(*zip(*kept, strict=True)).pvalue > 1e-4


@pytest.mark.parametrize("kind", ["other", "same", "disjoint", "point"])
def test_drawn_tokens_have_the_targets_distribution(kind):
    generator = torch.Generator().manual_seed(1)
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05, 0.0], [0.1, 0.2, 0.3, 0.15, 0.25]])
    q = {
        "other": torch.tensor([0.1, 0.2, 0.2, 0.2, 0.3]),
        "same": p[0],
        "disjoint": torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0]),
        "point": torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0]),
    }[kind]
    first, second = [0] * 5, [0] * 5
    for _ in range(6000):
        drafted = [draw(q, generator)]
        new, kept = accept_sampled(drafted, [q], list(p), generator)
        assert len(new) == kept + 1
        first[new[0]] += 1
        if kept:
            second[new[1]] += 1
    assert is_distributed(first, p[0])
    assert is_distributed(second, p[1]) if kind != "disjoint" else sum(second) == 0
    if kind == "same":
        assert sum(second) == 6000


def test_a_draw_never_takes_what_has_no_weight():
    weights = torch.tensor([0.0, 1.0, 0.0, 2.0, 0.0])
    generator = torch.Generator().manual_seed(0)
    assert {draw(weights, generator) for _ in range(200)} == {1, 3}


# ------------------------------------------------------------------------------------------------------------- the gate


def test_the_gate_drafts_while_drafts_are_right_and_stops_where_they_are_not():
    gate = Gate(0.05, [1.0 + 0.05 * n for n in range(9)])
    planned = []
    for _ in range(200):
        planned.append(gate.plan())
        gate.learn([0.9] * planned[-1], planned[-1], planned[-1])
    assert planned[-1] == 8
    assert gate.pauses == 0
    assert gate.chance(0.95) > 0.95
    lengths = []
    for _ in range(400):
        planned = gate.plan()
        lengths.append(planned)
        drafted = [0.9] * planned if planned and gate.wants(0, planned, 1.0, 0.9) else []
        if planned:
            gate.learn(drafted, 0, max(len(drafted), 1))
    assert gate.pauses > 1
    assert sum(n == 0 for n in lengths[200:]) > 190  # it looks again now and then, more and more rarely
    assert gate.chance(0.95) < 0.6


def test_a_plan_ends_where_the_next_pass_is_much_dearer():
    """Three drafts and the token before them are one cheap pass; a fourth draft doubles its price."""
    gate = Gate(0.05, [1.0, 1.4, 1.4, 1.4, 2.4, 2.4, 2.4, 2.4, 2.4])
    for _ in range(60):
        gate.learn([0.9] * 3, 2, 3)
    assert gate.plan() == 3
    for _ in range(200):
        gate.learn([0.9] * 8, 8, 8)
    assert gate.plan() == 8


def test_a_drawn_token_of_small_probability_may_be_right():
    greedy, drawn = (Gate(0.1, [1.0, 1.1], sampled=sampled) for sampled in (False, True))
    assert greedy.chance(0.25) == pytest.approx(0.0625)
    assert drawn.chance(0.25) == pytest.approx(0.475)


def test_a_sure_draft_is_wanted_and_an_unsure_one_is_not():
    gate = Gate(0.1, [1.0 + 0.1 * n for n in range(5)])
    assert gate.wants(0, 4, 1.0, 0.9)
    assert not gate.wants(0, 1, 0.2, 0.1)
    assert not gate.wants(0, 4, 1.0, math.nan)
    assert not gate.wants(3, 4, 0.05, 0.9)


# ------------------------------------------------------------------------------------------------------- thin products


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 8), (2, 8), (1, 3, 8), (2, 2, 8), (4, 1, 8)])
def test_a_thin_product_is_the_product(shape, bias):
    layer = nn.Linear(8, 12, bias=bias)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    found = thin.thin_linear(x, layer.weight, layer.bias)
    assert found.shape == expected.shape
    assert found.is_contiguous()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_thin_products_leave_no_trace_and_touch_no_layer_with_a_forward_of_its_own(monkeypatch):
    monkeypatch.setattr(thin, "pays_here", lambda: True)
    monkeypatch.setattr(thin, "_SMALLEST", 1)
    model = base("llama")
    head, first = model.get_output_embeddings(), model.model.layers[0].mlp.up_proj
    first.forward = own = lambda x: nn.functional.linear(x, first.weight)
    ids = tokens(2, 2)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with thin.thin_products(model):
            assert "forward" in vars(head)
            with thin.thin_products(model):
                found = model(input_ids=ids).logits
            assert "forward" in vars(head)
            assert first.forward is own
    assert "forward" not in vars(head)
    assert first.forward is own
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- greedy


@pytest.mark.parametrize(("name", "kind"), covering(ARCHITECTURES, KINDS))
def test_greedy_answers_stay_what_they_are(name, kind):
    model = adapt(base(name), **KINDS[kind])
    for ids, mask in ((tokens(1, 7), torch.ones(1, 7, dtype=torch.long)), padded(tokens(3, 7), [0, 3, 1], "left")):
        expected = model.generate(input_ids=ids, attention_mask=mask, **GREEDY)
        for settings in (always(), Speculation(), always(tokens=range(2, V, 2), max_draft=5)):
            found = model.generate(input_ids=ids, attention_mask=mask, speculative=settings, **GREEDY)
            assert torch.equal(found, expected)
            counts = settings.counts
            assert counts.tokens == len(ids) * NEW
            assert counts.passes + counts.accepted >= counts.tokens - len(ids)
            assert counts.accepted <= counts.drafted


@pytest.mark.parametrize("settings", [always(max_draft=4), Speculation()])
def test_positions_that_were_given_go_on_in_drafts(settings):
    """A mask says how many tokens there are, not where they stand."""
    model = adapt(base("llama")).double()
    rows = (tokens(3, 7), torch.ones(3, 7, dtype=torch.long)), padded(tokens(3, 7), [0, 3, 1], "left")
    for ids, mask in rows:
        own = (mask.cumsum(-1) - 1).clamp(min=0)
        for places in (own + 5, own * 2, own + torch.tensor([[0], [9], [4]])):
            options = {"input_ids": ids, "attention_mask": mask, "position_ids": places, **GREEDY}
            assert torch.equal(model.generate(speculative=settings, **options), model.generate(**options))
        moved = model.generate(input_ids=ids, attention_mask=mask, position_ids=own * 2, **GREEDY)
        assert not torch.equal(moved, model.generate(input_ids=ids, attention_mask=mask, **GREEDY))


def test_right_drafts_save_passes(monkeypatch):
    model = alike()
    ids = tokens(4, 6)
    expected = model.generate(input_ids=ids, **GREEDY)
    settings = always()
    assert torch.equal(model.generate(input_ids=ids, speculative=settings, **GREEDY), expected)
    assert 0.5 < settings.counts.acceptance < 1.0
    assert settings.counts.tokens_per_pass > 2
    settings = Speculation()
    assert torch.equal(model.generate(input_ids=ids, speculative=settings, **GREEDY), expected)
    assert settings.counts.pauses == 4, "a shadow as large as the base cannot pay, and each row says so"
    monkeypatch.setattr(speculation, "draft_cost", lambda *_: 0.05)
    # a random model is never sure, so let the gate begin as for drawn tokens
    monkeypatch.setattr(speculation, "Gate", lambda *prices, sampled: Gate(*prices, sampled=True))
    settings = Speculation()
    assert torch.equal(model.generate(input_ids=ids, speculative=settings, **GREEDY), expected)
    assert settings.counts.tokens_per_pass > 1.5
    assert torch.equal(model.generate(input_ids=ids, speculative=True, **GREEDY), expected)


@pytest.mark.parametrize(("rows", "drafts"), covering([1, 3], [always, Speculation]))
def test_rows_end_one_by_one_as_without_drafts(rows, drafts):
    model = alike()
    ids = tokens(rows, 6)
    free = model.generate(input_ids=ids, **GREEDY)
    ends = [int(free[0, 9]), int(free[-1, 13])]
    options = {**GREEDY, "eos_token_id": ends}
    expected = model.generate(input_ids=ids, **options)
    assert torch.equal(model.generate(input_ids=ids, speculative=drafts(), **options), expected)


class _Alternating(LogitsProcessor):
    """Bars the token of the last place, and even ones at even places of the answer."""

    def __init__(self, prompt):
        self.prompt = prompt

    def __call__(self, input_ids, scores):
        barred = torch.zeros_like(scores, dtype=torch.bool)
        if (input_ids.shape[1] - self.prompt) % 2 == 0:
            barred[:, ::2] = True
        return scores.masked_fill(barred.scatter(1, input_ids[:, -1:], True), -math.inf)


@pytest.mark.parametrize(("tokens_", "rows"), covering([None, range(2, V)], [1, 3]))
def test_processors_see_every_row_with_its_own_text(rows, tokens_):
    model = alike()
    ids, mask = padded(tokens(rows, 7), [2, 0, 1][:rows], "left")
    options = {"input_ids": ids, "attention_mask": mask, "repetition_penalty": 1.2, "min_new_tokens": 5, **GREEDY}
    options["eos_token_id"] = 3
    options["logits_processor"] = LogitsProcessorList([_Alternating(7)])
    options["prefix_allowed_tokens_fn"] = lambda row, ids: range(row, V)
    options |= {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    expected = model.generate(**options)
    settings = always(tokens=tokens_)
    found = model.generate(speculative=settings, **options)
    assert settings.counts.accepted > 0
    assert torch.equal(found.sequences, expected.sequences)
    assert len(found.scores) == len(expected.scores)
    for step, token in enumerate(expected.sequences[:, 7:].T):
        running = token != PAD
        for mine, theirs in ((found.scores, expected.scores), (found.logits, expected.logits)):
            torch.testing.assert_close(mine[step][running], theirs[step][running], rtol=1e-3, atol=1e-4)


def test_what_knows_rows_by_their_place_meets_them_there():
    """Processors and criteria of the caller's may hold something of each row."""
    model, ids = alike(), tokens(3, 7)
    barred, lengths = [[], list(range(0, V, 2)), list(range(V // 2))], torch.tensor([3, 9, 6])

    class Bars(LogitsProcessor):
        def __call__(self, input_ids, scores):
            for row, tokens_ in enumerate(barred[: len(scores)]):
                scores[row, tokens_] = -math.inf
            return scores

    def long_enough(input_ids, scores, **_):
        return input_ids.shape[1] - 7 >= lengths[: len(input_ids)]

    def never(input_ids, scores, **_):  # one value for all
        return torch.tensor([False])

    options = {**GREEDY, "input_ids": ids, "logits_processor": LogitsProcessorList([Bars()]), "eos_token_id": V - 1}
    options["stopping_criteria"] = StoppingCriteriaList([never, long_enough])
    expected = model.generate(**options)
    assert [int((row[7:] != PAD).sum()) for row in expected] == lengths.tolist()
    assert not set(expected[1, 7:].tolist()) & {token for token in barred[1] if token != PAD}
    settings = always()
    assert torch.equal(model.generate(speculative=settings, **options), expected)
    assert settings.counts.accepted > 0


def test_a_row_that_drafts_less_does_not_run_over_the_end_of_the_context():
    model = adapt(base("gpt2"))
    ids = tokens(2, 226)  # of 256 places
    expected = model.generate(input_ids=ids, **{**GREEDY, "max_new_tokens": 30})
    assert torch.equal(model.generate(input_ids=ids, speculative=always(), **{**GREEDY, "max_new_tokens": 30}), expected)


def test_actions_hold_the_rows_of_a_drafted_batch():
    model, words = alike(), tokenizer()
    words.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    asked = {"max_new_tokens": 4, "actions": ActionTrie({"A": [5, 6], "B": [7]})}
    expected = [each.text for each in answer(model, words, ["w3 w4", "w8 w9 w10"], **asked)]
    assert all(text.startswith(("w5 w6", "w7")) for text in expected)
    assert [each.text for each in answer(model, words, ["w3 w4", "w8 w9 w10"], speculative=True, **asked)] == expected


def test_a_mixed_batch_drafts_with_each_rows_own_shadow():
    model = several(base("llama"))
    ids = tokens(4, 6)
    names = ["early", "__base__", "deep", "early"]
    expected = model.generate(input_ids=ids, adapter_names=names, **GREEDY)
    for settings in (always(), Speculation(), always(tokens=range(2, V))):
        found = model.generate(input_ids=ids, adapter_names=names, speculative=settings, **GREEDY)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("drafts", [always, Speculation])
def test_rows_of_a_mixed_batch_end_one_by_one(drafts):
    model = several(base("llama"))
    ids = tokens(4, 6)
    names = ["early", "__base__", "deep", "early"]
    free = model.generate(input_ids=ids, adapter_names=names, **GREEDY)
    options = {**GREEDY, "eos_token_id": [int(free[0, 9]), int(free[2, 12]), int(free[1, 15])]}
    expected = model.generate(input_ids=ids, adapter_names=names, **options)
    assert len({int((row != PAD).sum()) for row in expected}) > 1
    assert torch.equal(model.generate(input_ids=ids, adapter_names=names, speculative=drafts(), **options), expected)
    twice = {"adapter_names": names, "do_sample": True, "num_return_sequences": 2, "top_k": 1}
    found = model.generate(input_ids=ids, speculative=drafts(), **{**options, **twice})
    assert torch.equal(found[::2][:, : expected.shape[1]], expected)


def test_a_trained_head_drafts_and_verifies():
    model = adapt(base("llama"), modules_to_save=["lm_head"])
    ids = tokens(2, 6)
    expected = model.generate(input_ids=ids, **GREEDY)
    for settings in (always(), always(tokens=range(2, V))):
        assert torch.equal(model.generate(input_ids=ids, speculative=settings, **GREEDY), expected)


def test_a_stream_gets_every_token_once():
    class Kept:
        def __init__(self):
            self.got, self.ended = [], 0

        def put(self, value):
            self.got += value.flatten().tolist()

        def end(self):
            self.ended += 1

    model, streamer = alike(), Kept()
    found = model.generate(input_ids=tokens(1, 6), streamer=streamer, speculative=always(), **GREEDY)
    assert streamer.got == found[0].tolist()
    assert streamer.ended == 1


def test_an_answer_goes_on_from_a_returned_cache():
    model = alike()
    ids = tokens(1, 6)
    expected = model.generate(input_ids=ids, **GREEDY)
    first = model.generate(
        input_ids=ids, speculative=always(), return_dict_in_generate=True, **{**GREEDY, "max_new_tokens": 7}
    )
    found = model.generate(
        input_ids=first.sequences, past_key_values=first.past_key_values, **{**GREEDY, "max_new_tokens": NEW - 7}
    )
    assert torch.equal(found, expected)


def test_an_adapter_drafts_the_tokens_that_it_records():
    model = alike()
    ids = tokens(2, 6)
    expected = model.generate(input_ids=ids, **GREEDY)
    model.peft_config["default"].draft_tokens = [2]  # of which no answer consists
    found, all_of_them = always(), always(tokens="all")
    assert torch.equal(model.generate(input_ids=ids, speculative=found, **GREEDY), expected)
    assert torch.equal(model.generate(input_ids=ids, speculative=all_of_them, **GREEDY), expected)
    assert found.counts.acceptance < 0.2 < all_of_them.counts.acceptance


def test_frequent_tokens_are_the_most_frequent():
    assert frequent_tokens([[5, 5, 7], [9, 7, 5]], most=2) == [5, 7]
    assert frequent_tokens([]) == []


# ------------------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(always(), marks=pytest.mark.slow),
        pytest.param(always(tokens=range(2, V, 3)), marks=pytest.mark.slow),
        Speculation(max_draft=2),
    ],
    ids=str,
)
def test_drawn_answers_have_the_distribution_of_the_attached_model(settings):
    """The first three tokens of 3,000 answers against the probabilities that the model gives them."""
    model = adapt(base("llama"), trained=True)
    ids = tokens(1, 5)
    options = {"do_sample": True, "temperature": 0.7, "top_k": 4, "pad_token_id": PAD}
    torch.manual_seed(0)
    drawn = model.generate(input_ids=ids, speculative=settings, max_new_tokens=3, num_return_sequences=3000, **options)[
        :, 5:
    ]
    pairs: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(2):
        longer: dict[tuple[int, ...], float] = {}
        for known, p in pairs.items():
            with torch.no_grad():
                logits = model(input_ids=torch.cat([ids, torch.tensor([known], dtype=torch.long)], 1)).logits[0, -1]
            top = logits.topk(4)
            for token, q in zip(top.indices.tolist(), (top.values / 0.7).softmax(-1).tolist(), strict=True):
                longer[(*known, token)] = p * q
        pairs = longer
    found = [tuple(row) for row in drawn[:, :2].tolist()]
    assert set(found) <= set(pairs)
    assert is_distributed([found.count(pair) for pair in pairs], list(pairs.values()))
    third = {tuple(row) for row in drawn.tolist()}
    assert len(third) > len(set(found))


def test_an_answer_drawn_with_a_seed_can_be_drawn_again():
    model = alike()
    options = {"input_ids": tokens(2, 5), "do_sample": True, "max_new_tokens": 12, "pad_token_id": PAD}
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(model.generate(speculative=True, **options))
    assert torch.equal(*found)


@pytest.mark.parametrize("options", [{"encoder_repetition_penalty": 1.7}, {"encoder_no_repeat_ngram_size": 1}])
def test_what_is_said_of_the_prompt_is_said_of_each_rows_own(options):
    model = alike()
    ids, mask = padded(tokens(3, 7), [2, 0, 1], "left")
    options = {"input_ids": ids, "attention_mask": mask, **GREEDY, **options}
    expected = model.generate(**options)
    free = model.generate(**{"input_ids": ids, "attention_mask": mask, **GREEDY})
    assert not torch.equal(expected, free)
    settings = always()
    assert torch.equal(model.generate(speculative=settings, **options), expected)
    assert settings.counts.accepted > 0


@pytest.mark.parametrize("scores", [True, False])
def test_criteria_see_the_scores_that_they_see_without_drafts(scores):
    model = alike()
    options = {**GREEDY, "return_dict_in_generate": True, "output_scores": scores}
    seen = {True: [], False: []}

    def ended(drafting):
        def criterion(input_ids, given, **_):
            seen[drafting].append(None if given is None else (len(given), given[-1].shape))
            return torch.tensor([given is not None and len(given) >= 5])

        return criterion

    for drafting in (False, True):
        criteria = StoppingCriteriaList([ended(drafting)])
        model.generate(
            input_ids=tokens(1, 6), stopping_criteria=criteria, speculative=always() if drafting else False, **options
        )
    assert seen[True] == seen[False]
    assert (seen[True][-1] == (5, (1, V))) == scores


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 3}, "num_beams=3"),
        ({"use_cache": False}, "use_cache=False"),
        ({"prompt_lookup_num_tokens": 3, "input_ids": tokens(1, 5)}, "assisted_generation"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
        ({"cache_implementation": "static"}, "dynamic cache"),
        ({"speculative": "yes"}, "must be True or a Speculation"),
        ({"watermarking_config": SynthIDTextWatermarkingConfig(ngram_len=2, keys=[1, 2, 3])}, "a SynthID watermark"),
    ],
)
def test_what_cannot_be_drafted_is_refused(options, message):
    model = adapt(base("llama"))
    with pytest.raises(ConfigError, match=message):
        model.generate(**{"input_ids": tokens(2, 5), "speculative": True, **GREEDY, **options})


def test_texts_that_stop_an_answer_stop_a_drafted_one():
    model, words = alike(), chat_tokenizer()
    ids = tokens(1, 5) % len(words)
    said = model.generate(input_ids=ids, **GREEDY)[0, 5:]
    stop = words.decode(said[3:5])
    options = {"input_ids": ids, "stop_strings": [stop], "tokenizer": words, **GREEDY}
    expected = model.generate(**options)
    assert expected.shape[1] < len(said) + 5
    assert torch.equal(model.generate(speculative=True, **options), expected)
    config = GenerationConfig(stop_strings=[stop], pad_token_id=PAD, eos_token_id=None, max_new_tokens=GREEDY["max_new_tokens"])
    said = model.generate(input_ids=ids, tokenizer=words, generation_config=config, speculative=True)
    assert torch.equal(said, expected)
    assert config.stop_strings == [stop]
    model.generation_config.stop_strings = [stop]
    with pytest.raises(ConfigError, match="generation_config has stop_strings, which drafts cannot take"):
        model.generate(speculative=True, **options)


def test_other_ways_to_draft_are_refused():
    model = adapt(base("llama"))
    with pytest.raises(ConfigError, match="leave one out"):
        model.generate(input_ids=tokens(1, 5), speculative=True, assistant_model=base("llama"), **GREEDY)
    with model.disable_adapter(), pytest.raises(ConfigError, match="no adapter is enabled"):
        model.generate(input_ids=tokens(1, 5), speculative=True, **GREEDY)
    with pytest.raises(ConfigError, match="max_draft is 0"):
        Speculation(max_draft=0)
    with pytest.raises(ConfigError, match=f"ids from 0 to {V - 1}"):
        model.generate(input_ids=tokens(1, 5), speculative=always(tokens=[1, V]), **GREEDY)


def test_recurrent_layers_draft_for_one_row_and_are_refused_for_several():
    model = adapt(base("qwen3_next"))
    with pytest.raises(UnsupportedModelError, match="one row at a time"):
        model.generate(input_ids=tokens(2, 5), speculative=always(), **GREEDY)


def test_states_that_do_not_reach_from_the_base_to_the_shadow_are_refused():
    model = adapt(base("llama"))
    ids = tokens(1, 5)
    with torch.no_grad():
        out = model(input_ids=ids, use_cache=True, return_shadow=True)
        with pytest.raises(CacheMismatchError, match="5 tokens of the base and 5 of the shadow"):
            model(input_ids=ids, past_key_values=out.past_key_values, shadow_state=out.shadow_state)


# ----------------------------------------------------------------------------------------------------------------- prices


def test_prices_are_those_of_the_weights_that_are_read():
    model = adapt(base("llama"))
    whole = draft_cost(model, DraftHead())
    assert 0 < draft_cost(model, DraftHead(range(4))) < whole < 1
    model.peft_config["default"].draft_tokens = [2, 3, 4, 5]
    assert draft_cost(model, DraftHead()) == draft_cost(model, DraftHead(range(4)))
    assert draft_cost(model, DraftHead("all")) == whole
    assert pass_cost(model, 1) == 1.0
    assert [pass_cost(model, n) for n in (2, 4, 5, 40)] == sorted(pass_cost(model, n) for n in (2, 4, 5, 40))


def test_rows_are_moved_and_what_comes_in_is_padding():
    x = torch.arange(8).view(2, 4)
    assert moved_right(x, [0, 3], axis=1).tolist() == [[0, 1, 2, 3], [0, 0, 0, 4]]
