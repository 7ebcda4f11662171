"""A tiny base with its tokenizer, text, and a pretraining run over them."""

import pytest

from chatbase import chat_tokenizer, save_base, write_rows
from shadowpeft.train.pretrain_config import parse_pretraining


def documents(n, offset=0):
    return [{"text": f"document {i + offset} " + "word " * (i % 7 + 1)} for i in range(n)]


def run_content(made, output):
    """A run over what the fixture ``made`` holds."""
    return {
        "base": made["base"],
        "backbone": {"layers": "spread", "count": 2},
        "text": {
            "corpora": [{"path": made["text"]}],
            "validation": [{"path": made["held"]}],
            "sequence_length": 32,
            "shuffle_buffer": 5,
            "validation_sequences": 4,
        },
        "training": {
            "max_steps": 6,
            "batch_size": 2,
            "gradient_accumulation": 2,
            "learning_rate": 0.01,
            "warmup": 1,
            "eval_every": 3,
            "save_every": 2,
            "log_every": 1,
            "threads": 1,
        },
        "output": str(output),
    }


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Base, a narrower model with its tokenizer, training and held-out text."""
    folder = tmp_path_factory.mktemp("made")
    save_base(folder / "small", hidden_size=24, num_hidden_layers=2, num_attention_heads=2)
    return {
        "base": save_base(folder / "base"),
        "small": str(folder / "small"),
        "text": write_rows(folder / "text.jsonl", documents(40)),
        "held": write_rows(folder / "held.jsonl", documents(20, 100)),
        "tokenizer": chat_tokenizer(),
    }


@pytest.fixture
def config(made, tmp_path):
    """Makes the configuration of a run; sections extend the defaults."""

    def make(name="run", **sections):
        content = run_content(made, tmp_path / name)
        for section, values in sections.items():
            replaced = section in ("backbone", "teacher") or not isinstance(values, dict)
            content[section] = values if replaced else {**content[section], **values}
        return parse_pretraining(content, "the test's run")

    return make
