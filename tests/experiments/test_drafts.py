"""Cells of what trains drafts: what is counted is what decoding does, and the page shows the committed records."""

import json

import pytest
import torch

from chatbase import chat_tokenizer
from experiments import drafts
from pages import facts, marked
from shadowpeft import Speculation
from shadowpeft.data.chat import check_row
from shadowpeft.train.rows import robot_rows
from tiny import PAD, V, adapt, base, tokens


@pytest.mark.parametrize(
    ("agrees", "count", "passes"),
    [([], 3, 0), ([False] * 4, 3, 4), ([True] * 8, 3, 2), ([True] * 9, 3, 3), ([True, True, False, True, True], 3, 2)],
)
def test_passes_of_an_answer(agrees, count, passes):
    assert drafts.passes(agrees, count) == passes


@pytest.mark.parametrize("count", [1, 3, 7])
def test_what_is_counted_is_what_decoding_does(count):
    """A copy of the base that was shaken agrees now and then."""
    model = adapt(base("llama"), trained=False, shadow_init="base_layers", shadow_num_hidden_layers=4).eval()
    for name, p in model.named_parameters():
        if "shadowpeft_backbone." in name:
            p.data += 0.05 * torch.randn_like(p)
    ids = tokens(1, 5)
    said = Speculation(max_draft=count, adaptive=False, tokens=range(V))
    options = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": PAD, "eos_token_id": None}
    with torch.no_grad():
        whole = model.generate(input_ids=ids, speculative=said, **options)
        shadow = model(input_ids=whole, return_shadow=True).shadow_logits[0, 4:-1].argmax(-1)
    agrees = (shadow == whole[0, 5:]).tolist()
    assert 0 < sum(agrees) < len(agrees)
    assert abs(drafts.passes(agrees, count) - said.counts.passes) <= 1  # the pass that reads the prompt gives a token, too


def test_the_shadow_gets_the_attached_models_own_answers_and_the_rest_stays(tmp_path, monkeypatch):
    rows = list(robot_rows("train"))
    drawn = [next(row for row in rows if row["path"] == path) for path in ("both", "base", "shadow")]
    monkeypatch.setattr(drafts, "robot_rows", lambda split: drawn)
    monkeypatch.setattr(drafts.shadowpeft, "load", lambda folder: torch.nn.Identity())
    monkeypatch.setattr(drafts, "load_tokenizer", lambda name: chat_tokenizer())
    said = chat_tokenizer()(["[Sit()] ok"], return_tensors="pt").input_ids
    monkeypatch.setattr(drafts, "say", lambda *_: said)
    file = drafts.regenerated(tmp_path / "adapter", tmp_path / "said.jsonl")
    read = [check_row(json.loads(line), str(file)) for line in file.read_text(encoding="utf-8").splitlines()]
    assert read == [{**drawn[0], "shadow_response": "[Sit()] ok"}, *drawn[1:]]


def test_the_page_holds_the_numbers_of_the_records():
    found = drafts.records()
    assert found, "no cell was run"
    shown = marked(drafts.PAGE, "drafts")
    assert facts(shown) == facts(drafts.block(found)), "run `python -m experiments.drafts page`"
