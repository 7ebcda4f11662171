"""The model card: how to use both halves, results or their absence, and what a calibration adds."""

from __future__ import annotations

import ast
import re

import pytest

from shadowpeft.train.card import BEGIN, END, model_card, with_calibration
from shadowpeft.train.config import parse_run

SUMMARY = {"steps": 8, "trainable_parameters": 1234}
RECORD = {"train": {"source": "rows.jsonl", "rows": 12, "sha256": "0123456789abcdef" * 4}}
REPORT = {
    "n": 146,
    "open_requests": 32,
    "target": 0.1,
    "level": 0.95,
    "bound": True,
    "commands_kept": 0.6316,
    "open_handed_on": 1.0,
    "wrong_share": 0.0139,
    "data": "held-out.jsonl",
}


def card(summary=SUMMARY, **data):
    return model_card(parse_run({"base": "smollm2-135m", "data": {"train": "rows.jsonl", **data}}, "here"), summary, RECORD)


def test_both_halves_and_the_limits_are_on_it():
    text = card()
    headings = re.findall(r"^## (.*)$", text, re.M)
    assert headings == ["Results", "The cloud's half", "The device's half", "Limits", "Settings"]
    for code in re.findall(r"```python\n(.*?)```", text, re.S):
        ast.parse(code)
    assert "nothing was measured" in text
    assert "--skills" not in text


def test_results_where_there_are_some_and_actions_where_they_are_learnt():
    text = card({**SUMMARY, "eval_task_loss": 1.5, "eval_shadow_loss": 2.25}, shadow_answers="action")
    assert "| attached | 1.5000 |" in text
    assert "| detached | 2.2500 |" in text
    assert "nothing was measured" not in text
    assert "`--skills actions.txt`" in text


def test_a_calibration_writes_its_results_once():
    once = with_calibration(card(), REPORT)
    assert "(146 requests, 32 of them open) so that at most\n10% of what the device keeps is wrong, with 95% confidence" in once
    assert "| commands kept on the device | 63.2% |" in once
    assert "| wrong, of what is kept | 1.4% |" in once
    again = with_calibration(once, {**REPORT, "commands_kept": 0.0, "wrong_share": None, "bound": False})
    assert again.count(BEGIN) == again.count(END) == 1
    assert "63.2%" not in again
    assert "| wrong, of what is kept | - |" in again
    assert "on these rows alone" in again


@pytest.mark.parametrize("text", ["", "# A card of somebody's own\n"])
def test_another_card_stays_as_it_is(text):
    assert with_calibration(text, REPORT) == text
