"""Every export stops where answers ended in training, in its own runtime, when the base names another end."""

import json

import numpy as np
import onnxruntime
import pytest
import torch
from gguf import GGUFReader
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, TrainingArguments

import edges
import shadowpeft
from chatbase import CHATML, run_file, write_rows
from commands import call
from shadowpeft import ShadowTrainer, export
from shadowpeft.data.chat import prompt_ids
from shadowpeft.errors import UnsupportedModelError
from shadowpeft.export import gguf
from shadowpeft.hf.layer import find_hub
from shadowpeft.train.config import parse_run
from shadowpeft.train.run import train
from tiny import adapt

CHAT = [{"role": "user", "content": "Sit down, please"}]
TRAINED_END = "<|im_end|>"  # what the chat template closes a turn with; tokenizer and base end with <|endoftext|>


def tokenizer():
    words = edges.tokenizer()
    words.eos_token = "<|endoftext|>"
    return words


def chain(words):
    """The prompt's last token, an answer, the end of the turn, and the answer again: without a stop it goes on for ever."""
    answer = words("ok", add_special_tokens=False).input_ids
    return [prompt_ids(words, CHAT)[-1], *answer, words.convert_tokens_to_ids(TRAINED_END), answer[0]]


@torch.no_grad()
def silence(layers):
    """Layers that add nothing, so that the state at a place depends on the token there alone."""
    for name, parameter in layers.named_parameters():
        if any(part in name for part in ("o_proj", "down_proj")):
            parameter.zero_()


@torch.no_grad()
def follow(head, states, tokens):
    """Make ``head`` answer each token's state ``(n, d)`` with the next token."""
    head.weight.zero_()
    for state, following in zip(states[:-1], tokens[1:], strict=True):
        head.weight[following] += state


def edge_model(arch="llama"):
    words, model = tokenizer(), edges.model(arch, eos_token_id=0)
    silence(model)
    tokens = chain(words)
    with torch.no_grad():
        states = model.model(input_ids=torch.tensor([tokens])).last_hidden_state[0]
    follow(model.lm_head, states, tokens)
    return model, words


def answer_of(folder):
    """New tokens of plain transformers' ``generate`` on a folder, nothing passed but the prompt."""
    words, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([prompt_ids(words, CHAT)])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    return out[0, ids.shape[1] :].tolist()


def test_the_source_runs_on(tmp_path):
    model, words = edge_model()
    model.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    assert len(answer_of(tmp_path)) == 12  # as every folder did before ends were written


@pytest.mark.parametrize(("to", "dtype"), [("hf", "f32"), ("hf", "bf16"), ("int8", "int8"), ("int4", "int4")])
def test_transformers_folders(to, dtype, tmp_path):
    model, words = edge_model()
    export.write(to, model, words, tmp_path / "o", dtype)
    assert answer_of(tmp_path / "o") == chain(words)[1:-1]
    assert model.generation_config.eos_token_id == 0  # the source stays as it was


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_gguf_names_every_end(arch, tmp_path):
    model, words = edge_model(arch)
    export.write("gguf", model, words, tmp_path / "m.gguf", "f16")
    fields = GGUFReader(tmp_path / "m.gguf").fields
    assert fields["tokenizer.ggml.eos_token_id"].contents() == words.eos_token_id == 0
    assert fields["tokenizer.ggml.eot_token_id"].contents() == words.convert_tokens_to_ids(TRAINED_END)


def test_gguf_has_room_for_three_ends(tmp_path):
    model, words = edge_model()
    model.generation_config.eos_token_id = [0, 5, 6]
    with pytest.raises(UnsupportedModelError, match=r"4 tokens end an answer .*names at most 3"):
        gguf.write(model, words, tmp_path / "m.gguf", "f16")
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.slow
def test_onnx_for_scoring(tmp_path):
    model, words = edge_model()
    export.write("onnx", model, words, tmp_path / "o", "f32")
    session = onnxruntime.InferenceSession(tmp_path / "o" / "model.onnx")
    ends = json.loads((tmp_path / "o" / "generation_config.json").read_text())["eos_token_id"]
    ids = prompt_ids(words, CHAT)
    new = []
    while len(new) < 12 and (not new or new[-1] not in ends):
        whole = np.array([ids + new])
        inputs = {"input_ids": whole, "attention_mask": np.ones_like(whole)}
        new.append(int(session.run(["logits"], inputs)[0][0, -1].argmax()))
    assert new == chain(words)[1:-1]


@pytest.mark.slow
def test_onnxruntime_genai(tmp_path):
    runtime = pytest.importorskip("onnxruntime_genai")
    model, words = edge_model()
    export.write("onnx-genai", model, words, tmp_path / "o", "f32")
    loaded = runtime.Model(str(tmp_path / "o"))
    generator = runtime.Generator(loaded, runtime.GeneratorParams(loaded))
    ids = prompt_ids(words, CHAT)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    _, *answer, end, _ = chain(words)
    assert [i for i in generator.get_sequence(0)[len(ids) :] if i != end] == answer  # 0.18 leaves the end itself out


@pytest.mark.llamacpp
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_llama_cpp(arch, tmp_path):
    from llama_cpp import Llama

    model, words = edge_model(arch)
    export.write("gguf", model, words, tmp_path / "m.gguf", "f32")
    llama = Llama(str(tmp_path / "m.gguf"), n_ctx=256, n_threads=1, verbose=False)
    choice = llama.create_chat_completion(CHAT, max_tokens=12, temperature=0.0)["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("ok", "stop")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter whose shadow answers like :func:`edge_model`, beside its base."""
    folder = tmp_path_factory.mktemp("ends")
    words = tokenizer()
    base = edges.model(num_hidden_layers=3, eos_token_id=0, tie_word_embeddings=False)
    model, tokens = adapt(base, copy_base=False), chain(words)
    silence(find_hub(model).shadowpeft_backbone["default"])
    with torch.no_grad():
        states = shadowpeft.detach(model).model(input_ids=torch.tensor([tokens])).last_hidden_state[0]
    follow(base.lm_head, states, tokens)
    model.get_base_model().save_pretrained(folder / "base")
    model.save_pretrained(folder / "adapter")
    words.save_pretrained(folder / "adapter")
    return folder


@pytest.mark.parametrize("command", [("detach",), ("export", "--to", "hf")])
def test_commands_from_an_adapter(command, adapter, tmp_path, monkeypatch, capsys):
    arguments = (adapter / "adapter", tmp_path / "o", "--base", adapter / "base", *command[1:], "--json")
    code, out, err = call(monkeypatch, capsys, command[0], *arguments)
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report.get("export", report)["ends"] == ["<|endoftext|>", TRAINED_END]
    assert answer_of(tmp_path / "o") == chain(tokenizer())[1:-1]


def new_tokens(edge):
    """What plain ``generate`` of a model says to the prompt."""
    ids = torch.tensor([prompt_ids(tokenizer(), CHAT)])
    out = edge.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    return out[0, ids.shape[1] :].tolist()


def test_detach_stops_where_the_tokenizer_or_the_adapters_record_says(adapter, tmp_path):
    words, right = tokenizer(), chain(tokenizer())[1:-1]
    model = shadowpeft.load(adapter / "adapter", adapter / "base")
    assert len(new_tokens(shadowpeft.detach(model))) == 12  # nobody has said where answers ended
    assert new_tokens(shadowpeft.detach(model, tokenizer=words)) == right
    assert model.get_base_model().generation_config.eos_token_id == 0  # the base stays as it was

    model.peft_config["default"].trained_ends = [right[-1]]
    model.save_pretrained(tmp_path)
    again = shadowpeft.load(tmp_path, adapter / "base")
    assert new_tokens(shadowpeft.detach(again)) == right
    model.peft_config["default"].trained_ends = None
    shadowpeft.swap(model, tmp_path)
    assert new_tokens(shadowpeft.detach(model)) == right


def test_training_records_where_answers_end(adapter, tmp_path):
    """By a run file, and by a trainer in Python that knows the tokenizer."""
    words = tokenizer()
    words.save_pretrained(adapter / "base")
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "Sit down, please", "response": "ok"}] * 4)
    run = parse_run(run_file(tmp_path / "run", str(adapter / "base"), rows, training={"max_steps": 1}), "the run")
    train(run, quiet=True)

    ids = prompt_ids(words, CHAT)
    model = adapt(AutoModelForCausalLM.from_pretrained(adapter / "base"))
    ShadowTrainer(
        model=model,
        args=TrainingArguments(tmp_path / "python", max_steps=1, report_to=[], use_cpu=True),
        train_dataset=[{"input_ids": ids, "labels": ids}] * 8,
        processing_class=words,
    ).train()

    for folder in (tmp_path / "run" / "adapter", tmp_path / "python" / "checkpoint-1"):
        edge = shadowpeft.detach(shadowpeft.load(folder, adapter / "base"))
        assert edge.generation_config.eos_token_id == [0, words.convert_tokens_to_ids(TRAINED_END)]


@pytest.mark.parametrize("template", ["{{ raise_exception('no system message') }}", {"tools": CHATML}])
def test_a_template_that_refuses_a_users_turn_is_no_obstacle(template, tmp_path):
    model, words = edge_model()
    words.chat_template = template
    model.generation_config.eos_token_id = [0, 5]
    export.write("hf", model, words, tmp_path / "o", "f32")
    assert GenerationConfig.from_pretrained(tmp_path / "o").eos_token_id == [0, 5]


SPECIALS = {text: edges.tokenizer().convert_tokens_to_ids(text) for text in (*edges.SPECIALS, "<tool>")}


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    own=st.sampled_from(sorted(SPECIALS)),
    closing=st.sampled_from(sorted(SPECIALS)),
    configured=st.lists(st.sampled_from(sorted(SPECIALS.values())), max_size=2, unique=True),
)
def test_whatever_ends_an_answer_is_written(own, closing, configured, tmp_path):
    words, model = edges.tokenizer(), edges.model(num_hidden_layers=1)
    words.eos_token = own
    words.chat_template = CHATML.replace(TRAINED_END, closing)
    model.generation_config.eos_token_id = configured or None
    ends = {SPECIALS[own], SPECIALS[closing], *configured}
    export.write("hf", model, words, tmp_path / "o", "f32")
    written = GenerationConfig.from_pretrained(tmp_path / "o").eos_token_id
    assert set(written if isinstance(written, list) else [written]) == ends
    if len(ends) <= 3:
        export.write("gguf", model, words, tmp_path / "m.gguf", "f16")
        fields = GGUFReader(tmp_path / "m.gguf").fields
        keys = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
        assert {int(fields[key].contents()) for key in keys if key in fields} == ends
        assert fields[keys[0]].contents() == SPECIALS[own]
