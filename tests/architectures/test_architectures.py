"""A fixed spread of architectures, one of each kind; `make architectures` tries them all and writes docs/architectures.md."""

import json

import matrix
import pytest
import zoo
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pages import ROOT, facts, script
from shadowpeft import ShadowPeftConfig
from shadowpeft.hf.shadow.mirror import mirror_config

SPREAD = {
    "llama": "the usual decoder",
    "gpt2": "one list of merged projections",
    "gptj": "tuples between layers",
    "bloom": "no keyword arguments for its layers, no positions",
    "falcon": "several head layouts",
    "opt": "a decoder inside a model inside a model",
    "openai-gpt": "no cache",
    "cohere": "a logit scale",
    "gemma2": "soft-caps, sliding windows",
    "gemma3n_text": "parallel streams, embeddings per layer",
    "gemma4_text": "widths of its own in each layer",
    "modernbert-decoder": "a dense layer and a norm before the head",
    "trocr": "labels that are shifted already, sinusoidal positions",
    "whisper": "attention to an encoder that is not there",
    "mixtral": "experts",
    "deepseek_v3": "latent attention, shared experts",
    "deepseek_v4": "hyper-connections, hash routing, compressed attention",
    "hy_v4": "hyper-connections, an indexer",
    "llama4_text": "chunked attention, experts in some layers",
    "minimax": "a cache class of its own",
    "mamba": "state space",
    "falcon_h1": "state space and attention in one layer, multipliers on the backbone",
    "recurrent_gemma": "recurrent and attention layers by a cycle of types",
    "qwen3_next": "linear attention, experts",
    "olmo_hybrid": "refuses a shadow of one type of layer",
    "lfm2": "convolutions",
    "inkling_text": "a head with a multiplier",
}
REFUSED = {
    "hrm_text": "runs its layers in cycles",
    "bert": "its layers belong to an encoder",
    "xlnet": "cannot run from a shadow's input",
    "prophetnet": "predicts several tokens at once",
}
USUAL = (
    "gpt2",
    "bloom",
    "cohere",
    "gemma3n_text",
    "gemma4_text",
    "modernbert-decoder",
    "trocr",
    "whisper",
    "mixtral",
    "deepseek_v4",
    "falcon_h1",
    "qwen3_next",
    "lfm2",
)
"""Those that run by default; the rest are slow (pytest -m slow)."""
# Of these the slow run tries the class's own token ids and layer types too; `make architectures` does so for all.
AS_PUBLISHED = (
    "llama",
    "gemma3n_text",
    "deepseek_v4",
    "qwen3_next",
    "falcon_h1",
    "opt",
    "trocr",
)
RECORD = ROOT / "docs" / "records" / "architectures.json"


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in USUAL else pytest.mark.slow) for n in SPREAD])
def test_every_step_holds(name):
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        pytest.skip(f"this transformers has no {name}")
    result = matrix.isolated(matrix.shadowed, name)
    assert result.get("passed"), result


@pytest.mark.slow
@pytest.mark.parametrize("name", dict.fromkeys([*zoo.PUBLISHED, *AS_PUBLISHED]))
def test_every_step_holds_with_the_fields_that_a_checkpoint_has(name):
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        pytest.skip(f"this transformers has no {name}")
    result = matrix.isolated(matrix.published, name)
    assert result.get("passed"), result


def test_a_configuration_without_a_pad_token_or_with_types_of_its_own_is_as_published():
    assert not hasattr(zoo.published("codegen"), "pad_token_id")
    assert set(zoo.published("zaya").layer_types) == {"hybrid"}
    assert zoo.published("gpt2").eos_token_id == 50256 % zoo.VOCAB


def test_numbers_of_attention_layers_become_those_of_the_shadow():
    """Bamba names its attention layers by number; a shadow modelled on layer 3 has its only layer among them."""
    base = zoo.published("bamba")
    shadow = mirror_config(base, ShadowPeftConfig(task_type="CAUSAL_LM"))
    assert (base.attn_layer_indices, shadow.attn_layer_indices) == ([1, 3], [0])
    assert shadow.layers_block_type == ["full_attention"]


def test_a_cache_that_no_shadow_fits_in_is_named():
    from shadowpeft.errors import UnsupportedModelError
    from shadowpeft.hf.base.structure import find_decoder

    model = zoo.build("xlstm", qk_dim_factor=1.0, v_dim_factor=1.0)
    with pytest.raises(UnsupportedModelError, match=r"xLSTMForCausalLM keeps what it has read in a xLSTMCache"):
        find_decoder(model)
    find_decoder(zoo.build("minimax"))  # a cache of its own, of transformers' kind


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_at_attaching_by_name(name):
    result = matrix.isolated(matrix.shadowed, name)
    assert (result.get("passed"), result.get("failed"), result.get("refused")) == (False, "attach", True), result
    assert len(result["reason"]) > 40


def test_the_committed_table_holds_what_is_promised():
    record = json.loads(RECORD.read_text())["architectures"]
    decoders = [n for n in zoo.decoders() if "parameters" in record.get(n, {})]
    passed = [n for n in decoders if record[n]["passed"]]
    assert len(decoders) >= 105
    assert len(passed) >= 0.95 * len(decoders)
    for name in (*decoders, *(n for n in zoo.encoder_families() if "parameters" in record.get(n, {}))):
        assert record[name]["passed"] or record[name]["refused"], f"{name} is neither right nor refused: {record[name]}"


def test_the_committed_page_holds_what_the_committed_record_says():
    page = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
    again = script("scripts/architectures.py").page(json.loads(RECORD.read_text(encoding="utf-8")))
    assert facts(page) == facts(again), "run `make architectures` and commit docs/architectures.md"


def test_a_hang_and_a_crash_are_reported_not_shared():
    import itertools
    import os
    import time

    assert "more than 0.1 s" in matrix.isolated(lambda name: time.sleep(30), "x", limit=0.1)["error"]  # by the clock
    assert "more than 0.2 s" in matrix.isolated(lambda name: max(itertools.count()), "x", limit=0.2)["error"]
    assert "died" in matrix.isolated(lambda name: os.kill(os.getpid(), 9), "x")["error"]
