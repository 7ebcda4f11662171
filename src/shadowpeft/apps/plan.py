"""``shadowpeft plan RUN.yaml``: parameters, memory and time of a run, before anything is trained."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shadowpeft.apps.common import quiet_libraries, show
from shadowpeft.apps.options import Json, Overrides, RunFile
from shadowpeft.terminal import terminal

if TYPE_CHECKING:
    from shadowpeft.data.chat import ChatDataset

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
    product on this device. Both are of the rows that the steps reach.
    """
    import torch
    from peft import get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    from shadowpeft.hf.base.aliases import source_of
    from shadowpeft.hf.base.load import of_labels
    from shadowpeft.hf.base.structure import find_decoder
    from shadowpeft.hf.config import ShadowPeftConfig
    from shadowpeft.hf.layer import find_hub
    from shadowpeft.runtime import prepare_cpu
    from shadowpeft.tokenizer import load_tokenizer
    from shadowpeft.train.paths import check_paths
    from shadowpeft.train.rows import load_run_data, shadow_first, steps_by_epochs

    t = run.training
    prepare_cpu(t.threads)
    tokenizer = load_tokenizer(run.words, run.data.chat_template)
    data = load_run_data(run, tokenizer, terminal(stderr=True).print)
    check_paths(run, data)
    sequences, classifies = data.training, data.labels is not None
    source = source_of(run.base)
    config = AutoConfig.from_pretrained(source, trust_remote_code=False, **of_labels(data.labels))
    auto: Any = AutoModelForSequenceClassification if classifies else AutoModelForCausalLM
    with torch.device("meta"):
        base = auto.from_config(config)
    base_parameters = sum(p.numel() for p in base.parameters())
    embedding = base.get_input_embeddings().weight.numel()
    layers = find_decoder(base).num_layers
    shadow = {
        **run.shadow.fields_for(layers),
        "projection_init": "random",
    }  # a start needs weights, which meta tensors lack
    model = get_peft_model(base, ShadowPeftConfig(task_type=run.task_type, **shadow))
    if t.freeze_shadow and not t.shadow_epochs:
        find_hub(model).freeze_shadow("default")
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    share = (run.shadow.last_layers or layers) / layers  # of the layers that gradients pass through

    count = len(sequences)
    pack_to = run.data.max_length if run.data.packing else None
    rows, steps, _ = shadow_first(sequences, t, t.batch_size * t.gradient_accumulation, pack_to)
    packed = rows.parts[-1] if pack_to is not None else None  # of an epoch of both paths
    steps = steps if t.target_minutes is None else None
    if steps is None and t.target_minutes is None:
        steps = steps_by_epochs(t, packed or count)
    drawn = None if steps is None else steps * t.batch_size * t.gradient_accumulation
    seen = shape_of(rows, drawn, answers=not classifies)
    mean, longest, through_base = seen.mean, seen.longest, seen.through_base
    text = config.get_text_config(decoder=True)
    tied = getattr(text, "tie_word_embeddings", False) and not classifies
    active = base_parameters - (0 if tied else embedding)  # a tied table is the head, an untied one is only looked up
    forward = share if t.cache_activations else 1.0
    head = 0 if classifies else embedding  # a language model's is as large as the embedding
    through_layers = 2 * (forward + share) * (active - head) + 4 * head
    per_token = through_base * through_layers + 6 * trainable + 4 * head * seen.answers
    tokens_per_step = mean * t.batch_size * t.gradient_accumulation
    flops = _measured_flops()
    if steps is None:
        steps = max(int(60 * (t.target_minutes or 0) * flops / (per_token * tokens_per_step)), 1)
    size = _BYTES[t.precision]
    batch_tokens = longest * t.batch_size
    saved = 17 * text.hidden_size * text.num_hidden_layers * share * batch_tokens * size
    logits = 0 if classifies else 3 * text.vocab_size * batch_tokens * 4
    memory = base_parameters * size + trainable * 16 + logits + (saved / 8 if t.gradient_checkpointing else saved)
    states = {"adafactor": 0, "adamw_bnb_8bit": 2, "adamw_torch_8bit": 2, "muon": 4}.get(t.optimizer, 8)  # bytes each
    memory += trainable * (states - 8)
    about: dict[str, Any] = {} if data.labels is None else {"labels": data.labels}
    if packed is not None:
        about["packed_rows"] = packed
        about["packing"] = "batch_size counts packed rows; that attention stays inside each sequence is checked at the start"
    if data.stream is not None:
        about["streaming"] = (
            f"how many rows there are, and whether all can be learnt, is not known; lengths are those of the first {count} "
            "sequences"
        )
    if t.target_minutes is not None:
        about["steps_are"] = "an estimate; the run chooses them by the speed that it measures"
    return {
        "base_parameters": base_parameters,
        "trainable_parameters": trainable,
        "trainable_percent": round(100 * trainable / base_parameters, 3),
        "sequences": count if data.stream is None else "not known (streamed)",
        **about,
        "mean_tokens": round(mean, 1),
        "longest_tokens": longest,
        "steps": steps,
        "tokens": int(tokens_per_step * steps),
        "estimated_peak_memory_gib": round(memory / 2**30, 2),
        "measured_gflops": round(flops / 1e9, 1),
        "estimated_minutes": round(per_token * tokens_per_step * steps / flops / 60, 1),
        "adapter_megabytes": round(trainable * 4 / 1e6, 1),
    }


@dataclass(frozen=True)
class Shape:
    """What the rows of a run cost."""

    mean: float
    """Tokens of a row."""
    longest: int
    through_base: float
    """Share of the tokens that the base computes."""
    answers: float
    """Tokens that the shadow learns to say, for each token; 0 of a classifier's rows."""


def shape_of(rows: ChatDataset, drawn: int | None, *, answers: bool = True) -> Shape:
    """The shape of the first ``drawn`` rows in the order of training; None: of all.

    The parts of ``rows`` follow one another, the shadow's own epochs before those of both paths. Each is shuffled, so what is
    drawn of the last one counts as its average. ``answers``: the rows have any, as a classifier's do not.
    """
    count = tokens = based = learnt = 0.0
    longest = start = 0
    for size in rows.parts:
        share = 1.0 if drawn is None else min((drawn - start) / size, 1.0)
        if share <= 0:
            break
        part = rows.sequences[start : start + size]
        count += share * size
        tokens += share * sum(len(s.ids) for s in part)
        based += share * sum(len(s.ids) for s in part if s.base)
        learnt += share * sum(len(s.learnt) for s in part if answers and s.shadow)
        longest = max(longest, *(len(s.ids) for s in part))
        start += size
    return Shape(tokens / count, longest, based / tokens, learnt / tokens)


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
