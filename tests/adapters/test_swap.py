"""Hot swap: all or nothing, also for forwards and generations that run in other threads."""

import copy
import json
import shutil
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file

import shadowpeft
from several import BASE, several
from shadowpeft.errors import AdapterFileError, BaseMismatchError, CacheMismatchError, ConfigError
from tiny import PAD, adapt, adapter_config, base, randomise, small_llama, tokens

GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": PAD}
KINDS = {
    "mirror": {},
    "explicit": {"shadow_model": "small_llama"},
    "late": {"variant": "peft", "refined_layers": [2, 3]},
    "own_head": {"own_shadow_head": True, "modules_to_save": ["model.norm"]},
    "own_table": {"shadow_hidden_size": 24, "share_embeddings": False},
}


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


@torch.no_grad()
def logits(model, **inputs):
    return model(input_ids=tokens(), **inputs).logits


def pair(folder, task="CAUSAL_LM", **fields):
    """A model with the weights of ``folder/old`` (which is saved), another adapter's folder ``folder/new``."""
    plain = base("llama", task=task)
    if fields.get("shadow_model") == "small_llama":
        fields["shadow_model"] = small_llama()
    new = adapt(plain, task_type=task, **fields)
    randomise(new, seed=77)
    new.save_pretrained(folder / "new")
    old = adapt(plain, task_type=task, **fields)
    old.save_pretrained(folder / "old")
    return old, new


@pytest.mark.parametrize("kind", KINDS)
def test_swap_and_roll_back(tmp_path, kind):
    model, other = pair(tmp_path, **KINDS[kind])
    old, new = logits(model), logits(other)
    assert not torch.equal(old, new)
    before, learns = state(model), {n: p.requires_grad for n, p in model.named_parameters()}
    shadowpeft.swap(model, tmp_path / "new")
    assert torch.equal(logits(model), new)
    assert torch.equal(
        model(input_ids=tokens(), return_shadow=True).shadow_logits,
        other(input_ids=tokens(), return_shadow=True).shadow_logits,
    )
    assert {n: p.requires_grad for n, p in model.named_parameters()} == learns
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())
    shadowpeft.swap(model, tmp_path / "old")
    assert torch.equal(logits(model), old)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_classifier_with_its_heads(tmp_path):
    model, other = pair(tmp_path, task="SEQ_CLS")
    shadowpeft.swap(model, str(tmp_path / "new"))
    assert torch.equal(logits(model), logits(other))
    ids = tokens()
    found = [m(input_ids=ids, return_shadow=True).shadow_logits for m in (model, other)]
    assert torch.equal(*found)


def test_the_swapped_adapter_trains_saves_and_detaches(tmp_path):
    model, other = pair(tmp_path)
    shadowpeft.swap(model, tmp_path / "new")
    model.save_pretrained(tmp_path / "again")
    found, expected = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("again", "new"))
    assert all(torch.equal(found[k], expected[k]) for k in expected)
    edges = [shadowpeft.detach(m)(input_ids=tokens()).logits for m in (model, other)]
    assert torch.equal(*edges)
    model.train()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    learning = [p for p in model.parameters() if p.requires_grad]
    assert learning
    assert all(p.grad is not None for p in learning)


def test_alpha_is_taken_over_and_the_record_updated(tmp_path):
    model, other = pair(tmp_path, shadow_alpha=0.7)
    other.peft_config["default"].shadow_alpha = 0.2
    other.peft_config["default"].auxiliary_loss_weight = 0.5
    other.save_pretrained(tmp_path / "new")
    shadowpeft.swap(model, tmp_path / "new")
    assert torch.equal(logits(model), logits(shadowpeft.load(tmp_path / "new", base("llama"))))
    assert (model.peft_config["default"].shadow_alpha, model.peft_config["default"].auxiliary_loss_weight) == (0.2, 0.5)
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["shadow_alpha"] == 0.2


def test_the_loss_of_the_shadow_path_is_taken_over(tmp_path):
    model, other = pair(tmp_path)
    other.peft_config["default"].shadow_loss = "kl"
    other.save_pretrained(tmp_path / "new")
    shadowpeft.swap(model, tmp_path / "new")
    assert model.peft_config["default"].shadow_loss == "kl"
    again = shadowpeft.load(tmp_path / "new", base("llama"), is_trainable=True)
    losses = [m.train()(input_ids=tokens(), labels=tokens()).shadow_loss for m in (model, again)]
    assert torch.equal(*losses)


def test_an_adapter_that_leaves_other_weights_frozen_is_refused(tmp_path):
    model, _ = pair(tmp_path)
    change(tmp_path / "new", shadow_frozen=["norm.weight"])
    with pytest.raises(ConfigError, match=r"loaded with shadow_frozen = \[\] but the new one has \['norm\.weight'\]"):
        shadowpeft.swap(model, tmp_path / "new")
    change(tmp_path / "new", shadow_frozen=None)  # an older file does not say
    shadowpeft.swap(model, tmp_path / "new")
    assert model.peft_config["default"].shadow_frozen == []


@pytest.mark.parametrize("trained", ["embed_tokens", "input_layernorm"])
def test_modules_that_an_adapter_trains_do_not_change_what_the_base_is(tmp_path, trained):
    model, other = pair(tmp_path, modules_to_save=[trained])
    shadowpeft.swap(model, tmp_path / "new")
    assert torch.equal(logits(model), logits(other))
    model.add_adapter("beside", adapter_config())
    model.save_pretrained(tmp_path, selected_adapters=["beside"])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*weights differ")
        shadowpeft.load(tmp_path / "beside", base("llama"))


def test_another_adapter_of_the_model_is_untouched(tmp_path):
    _, other = pair(tmp_path)
    plain = base("llama")
    model = several(plain, {"default": {}, "explicit": {"shadow_model": "small_llama"}, "third": {}})
    names = ["default", "explicit", BASE]
    before = {n: logits(model, adapter_names=[n] * 3) for n in ("default", "explicit", BASE, "third")}
    shadowpeft.swap(model, tmp_path / "new", "third")
    for name in (*names,):
        assert torch.equal(logits(model, adapter_names=[name] * 3), before[name])
    assert torch.equal(logits(model, adapter_names=["third"] * 3), logits(other))
    mixed = logits(model, adapter_names=["third", "default", "third"])
    torch.testing.assert_close(mixed[[0, 2]], logits(other)[[0, 2]], rtol=1e-4, atol=1e-5)


def test_on_a_transformers_model(tmp_path):
    _, other = pair(tmp_path)
    model = base("llama")
    model.add_adapter(adapter_config(), adapter_name="mine")
    shadowpeft.swap(model, tmp_path / "new", "mine")
    assert torch.equal(logits(model), logits(other))


# ------------------------------------------------------------------------------------------------------------ refusals


def change(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def damage_value(folder):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[max(tensors)].view(-1)[-1] = float("nan")
    save_file(tensors, path, {"format": "pt"})


def drop_tensor(folder):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors.pop(max(tensors))
    save_file(tensors, path, {"format": "pt"})


def truncate(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])


BROKEN = {
    "nan": (damage_value, AdapterFileError, "NaN"),
    "missing tensor": (drop_tensor, AdapterFileError, "missing"),
    "truncated": (truncate, AdapterFileError, "truncated"),
    "rank": (lambda f: change(f, r=8), ConfigError, "r = 4 but the new one has 8"),
    "width": (lambda f: change(f, update_hidden_size=2), ConfigError, "update_width"),
    "variant": (lambda f: change(f, variant="peft"), ConfigError, "variant"),
    "layers": (lambda f: change(f, refined_layers=[2, 3]), ConfigError, "refined_layers"),
    "task": (lambda f: change(f, task_type="SEQ_CLS"), ConfigError, "task_type"),
    "unknown key": (lambda f: change(f, shadow_alhpa=0.3), ConfigError, "shadow_alpha"),
    "gone": (shutil.rmtree, AdapterFileError, "there is no .* in the folder"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_after_an_error_the_old_weights_are_there_to_the_bit(tmp_path, case):
    model, _ = pair(tmp_path)
    harm, error, said = BROKEN[case]
    harm(tmp_path / "new")
    before, expected, config = state(model), logits(model), copy.deepcopy(model.peft_config["default"])
    with pytest.raises(error, match=said):
        shadowpeft.swap(model, tmp_path / "new")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert list(model.state_dict()) == list(before)
    assert torch.equal(logits(model), expected)
    assert model.peft_config["default"] == config


def test_an_error_at_the_last_moment_takes_everything_back(tmp_path, monkeypatch):
    model, _ = pair(tmp_path)
    before, expected = state(model), logits(model)

    def fail(*args):
        raise MemoryError

    monkeypatch.setattr("shadowpeft.hf.swap.collect", fail)
    with pytest.raises(MemoryError):
        shadowpeft.swap(model, tmp_path / "new")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(logits(model), expected)


def test_another_base_another_shadow_or_no_adapter_are_refused(tmp_path):
    pair(tmp_path)
    with pytest.raises(BaseMismatchError):
        shadowpeft.swap(adapt(base("llama", seed=5)), tmp_path / "new")
    with pytest.raises(ConfigError, match="shadow_backbone_config"):
        shadowpeft.swap(adapt(base("llama"), shadow_intermediate_size=24), tmp_path / "new")
    with pytest.raises(ConfigError, match="did you mean 'default'"):
        shadowpeft.swap(adapt(base("llama")), tmp_path / "new", "defualt")
    with pytest.raises(ConfigError, match="carries no shadow"):
        shadowpeft.swap(base("llama"), tmp_path / "new")


# ------------------------------------------------------------------------------------------------------- while it runs


def hammer(work, swap, kinds, rounds, threads=4, least=200):
    """Run ``work(i)`` in threads while ``swap(name)`` goes there and back ``rounds`` times, and on until results of every kind
    are there (a result can take longer than all rounds; two minutes at most), and ``least`` in all."""
    end = time.monotonic() + 120
    stop, results, lock = threading.Event(), [], threading.Lock()

    def run(worker):
        i = worker
        while not (stop.is_set() and len(results) >= least):
            found = work(i)
            with lock:
                results.append(found)
            i += threads

    with ThreadPoolExecutor(threads) as pool:
        running = [pool.submit(run, worker) for worker in range(threads)]
        while rounds > 0 or not (set(map(kinds, list(results))) >= {0, 1} or time.monotonic() > end):
            swap("new")
            swap("old")
            rounds -= 1
        stop.set()
        for each in running:
            each.result()
    return results


def test_every_concurrent_forward_is_all_old_or_all_new(tmp_path):
    model, other = pair(tmp_path, modules_to_save=["model.norm"], own_shadow_head=True)
    ids = tokens()

    @torch.no_grad()
    def work(i, which=model):
        out = which(input_ids=ids, return_shadow=True)
        return out.logits, out.shadow_logits

    allowed = [work(0), work(0, other)]

    def kind(found):
        return next((i for i, wanted in enumerate(allowed) if all(map(torch.equal, found, wanted))), None)

    results = hammer(work, lambda name: shadowpeft.swap(model, tmp_path / name), kind, rounds=8)
    assert len(results) >= 200
    assert set(map(kind, results)) == {0, 1}


def test_every_concurrent_generation_ends_with_the_weights_it_began_with(tmp_path):
    model, other = pair(tmp_path)
    ids = tokens(2, 6)

    def work(i, which=model):
        return which.generate(input_ids=ids, **GREEDY)

    allowed = [work(0), work(0, other)]
    assert not torch.equal(*allowed)

    def kind(found):
        return next((i for i, wanted in enumerate(allowed) if torch.equal(found, wanted)), None)

    results = hammer(work, lambda name: shadowpeft.swap(model, tmp_path / name), kind, rounds=5, threads=2, least=30)
    assert set(map(kind, results)) == {0, 1}


def test_a_cache_of_the_old_weights_is_not_continued_with_the_new(tmp_path):
    model, _ = pair(tmp_path)
    ids = tokens(2, 8)
    cache = model(input_ids=ids[:, :5], use_cache=True).past_key_values
    shadowpeft.swap(model, tmp_path / "new")
    with pytest.raises(CacheMismatchError, match="replaced after this cache"):
        model(input_ids=ids[:, 5:], past_key_values=cache, use_cache=True)


def test_a_swap_inside_a_forward_leaves_that_forward_alone(tmp_path):
    """Deterministic: the swap happens between two layers of a running forward."""
    model, other = pair(tmp_path, modules_to_save=["model.norm"])
    old, new = logits(model), logits(other)
    layer = model.get_base_model().model.layers[2]
    handle = layer.register_forward_hook(lambda *_: shadowpeft.swap(model, tmp_path / "new"))
    assert torch.equal(logits(model), old)
    handle.remove()
    assert torch.equal(logits(model), new)


def test_a_copy_of_the_model_is_not_swapped(tmp_path):
    model, other = pair(tmp_path)
    old = logits(model)
    twin = copy.deepcopy(model)
    shadowpeft.swap(model, tmp_path / "new")
    assert torch.equal(logits(twin), old)
    shadowpeft.swap(twin, tmp_path / "new")
    assert torch.equal(logits(twin), logits(other))
