"""docs/device.md has the record of what a decision takes; the script measures what it says."""

from __future__ import annotations

import json

import torch
from scripts import decision

from chatbase import chat_model, chat_tokenizer
from pages import marked
from shadowpeft.data.action_trie import ActionTrie


def test_the_table_is_the_records():
    assert marked(decision.PAGE, "decision") == decision.table(json.loads(decision.RECORD.read_text(encoding="utf-8")))


def test_every_request_is_asked_of_every_model_alone():
    model, tokenizer = chat_model(), chat_tokenizer()
    asked = {"sit": "Sit", "up": "Up", "why": "REMOTE", "go": "Sit"}
    rows = [{"prompt": text, "skill": skill} for text, skill in asked.items()]
    actions = {name: ActionTrie.of(tokenizer, ("Sit", "Up")) for name in "ab"}
    found = decision.measure(dict.fromkeys("ab", (model, tokenizer)), actions, rows)
    assert [each["requests"] for each in found.values()] == [4, 4]
    assert found["a"]["right"] == found["b"]["right"]
    assert 0 < found["a"]["p50_ms"] <= found["a"]["p95_ms"]
    assert torch.is_grad_enabled()
