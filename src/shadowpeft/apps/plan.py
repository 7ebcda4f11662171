"""``shadowpeft plan RUN.yaml``: parameters, memory and time of a run, before anything is trained."""

from __future__ import annotations

import math
import time
from functools import partial
from typing import Any

from shadowpeft.apps.common import quiet_libraries, show
from shadowpeft.apps.options import Json, Overrides, RunFile
from shadowpeft.terminal import terminal

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def main(run_file: RunFile, settings: Overrides = None, as_json: Json = False) -> None:
    """Parameters, memory and time of a run, before it is trained."""
    from shadowpeft.train.config import read_run

    run = read_run(run_file, settings or ())
    quiet_libraries()
    show(plan(run), run_file, as_json)


def plan(run: Any) -> dict[str, Any]:
    """Count on the meta device, tokenise the data, time a matrix product, and estimate.

    Memory is weights + gradients + AdamW states + logits + saved activations (about ``34 d`` values a token and layer, half
    that for what a frozen layer keeps; none below the first refined one); time is 2 FLOP per weight and token forward, as much
    again for gradients that pass through the frozen base, and 4 for trainable weights, over the measured speed of a float32
    product on this device.
    """
    import torch
    from peft import get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    from shadowpeft.hf.base.aliases import source_of
    from shadowpeft.hf.base.structure import find_decoder
    from shadowpeft.hf.config import ShadowPeftConfig
    from shadowpeft.hf.layer import find_hub
    from shadowpeft.runtime import prepare_cpu
    from shadowpeft.tokenizer import load_tokenizer
    from shadowpeft.train.rows import encode_run, shadow_first

    t = run.training
    prepare_cpu(t.threads)
    tokenizer = load_tokenizer(run.base)
    sequences, _, _ = encode_run(run, tokenizer, partial(terminal(stderr=True).print, soft_wrap=True))
    source = source_of(run.base)
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
    base_parameters = sum(p.numel() for p in base.parameters())
    embedding = base.get_input_embeddings().weight.numel()
    layers = find_decoder(base).num_layers
    shadow = {
        **run.shadow.fields_for(layers),
        "projection_init": "random",
    }  # a start needs weights, which meta tensors lack
    model = get_peft_model(base, ShadowPeftConfig(task_type="CAUSAL_LM", **shadow))
    if t.freeze_shadow:
        find_hub(model).freeze_shadow("default")
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    share = (run.shadow.last_layers or layers) / layers  # of the layers that gradients pass through

    count = len(sequences)
    rows, steps, _ = shadow_first(sequences, t, t.batch_size * t.gradient_accumulation)
    sequences = rows.sequences  # of the whole run, where the shadow has epochs of its own
    if steps is None:
        batches = math.ceil(count / t.batch_size)
        steps = math.ceil((t.epochs or 1.0) * max(math.ceil(batches / t.gradient_accumulation), 1))
    mean = sum(len(s.ids) for s in sequences) / len(sequences)
    longest = max(len(s.ids) for s in sequences)
    through_base = sum(len(s.ids) for s in sequences if s.base) / sum(len(s.ids) for s in sequences)
    text = config.get_text_config(decoder=True)
    tied = getattr(text, "tie_word_embeddings", False)
    active = base_parameters - (0 if tied else embedding)  # a tied table is the head, an untied one is only looked up
    forward = share if t.cache_activations else 1.0
    through_layers = (
        2 * (forward + share) * (active - embedding) + 4 * embedding
    )  # the head is as large as the embedding
    per_token = through_base * through_layers + 6 * trainable + 4 * embedding * _answer_share(sequences)
    tokens_per_step = mean * t.batch_size * t.gradient_accumulation
    flops = _measured_flops()
    size = _BYTES[t.precision]
    batch_tokens = longest * t.batch_size
    saved = 17 * text.hidden_size * text.num_hidden_layers * share * batch_tokens * size
    logits = 3 * text.vocab_size * batch_tokens * 4
    memory = base_parameters * size + trainable * 16 + logits + (saved / 8 if t.gradient_checkpointing else saved)
    return {
        "base_parameters": base_parameters,
        "trainable_parameters": trainable,
        "trainable_percent": round(100 * trainable / base_parameters, 3),
        "sequences": count,
        "mean_tokens": round(mean, 1),
        "longest_tokens": longest,
        "steps": steps,
        "tokens": int(tokens_per_step * steps),
        "estimated_peak_memory_gib": round(memory / 2**30, 2),
        "measured_gflops": round(flops / 1e9, 1),
        "estimated_minutes": round(per_token * tokens_per_step * steps / flops / 60, 1),
        "adapter_megabytes": round(trainable * 4 / 1e6, 1),
    }


def _answer_share(sequences: list[Any]) -> float:
    return sum(len(s.ids) - s.start for s in sequences if s.shadow) / sum(len(s.ids) for s in sequences)


def _measured_flops() -> float:
    """FLOP/s of float32 products of the size that layers have, over about half a second."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = torch.randn(512, 768, device=device), torch.randn(768, 2048, device=device)
    for _ in range(3):
        a @ b
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < 0.5:
        a @ b
        count += 1
        if device == "cuda":
            torch.cuda.synchronize()
    return count * 2 * 512 * 768 * 2048 / (time.perf_counter() - began)
