"""The commands of docs/vllm.md, taken from the page: export, vLLM, edge, a question, metrics (marker ``vllm``)."""

import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import shadowpeft_vllm
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_runs import Server, vllm_environment, vllm_python

import shadowpeft
from chatbase import chat_tokenizer, save_base
from pages import ROOT, facts, marked, rows, script
from shadowpeft.data.chat import prompt_ids
from shadowpeft.export import vllm as export
from tiny import adapter_config, randomise
from webserver import free_port

PAGE = (ROOT / "docs" / "vllm.md").read_text(encoding="utf-8")


def commands():
    """The page's five, each as words."""
    blocks = re.findall(r"^   ```bash\n(.*?)^   ```$", PAGE, flags=re.M | re.S)
    return [shlex.split(block) for block in blocks]


def test_the_page_has_five_commands_and_every_architecture():
    assert [words[0].rpartition("/")[2] for words in commands()] == [
        "shadowpeft",
        "python",
        "shadowpeft",
        "curl",
        "curl",
    ]
    assert export.ARCHITECTURES == shadowpeft_vllm.ARCHITECTURES
    assert dict(re.findall(r"^\| `(\w+)` \| `(ShadowPeft\w+)` \|$", PAGE, flags=re.M)) == export.ARCHITECTURES


@pytest.mark.parametrize(("mark", "path"), [("step", "benchmarks/vllm_step.py"), ("engines", "benchmarks/vllm_speed.py")])
def test_the_tables_numbers_are_those_of_the_records(mark, path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    bench = script(path)
    record = json.loads(bench.RECORD.read_text(encoding="utf-8"))
    block = marked(bench.PAGE, mark)
    assert rows(block) == rows(bench.block(record)), f"run `python {path} --page` and commit docs/vllm.md"
    assert facts(block) == facts(bench.block(record))


def test_the_largest_difference_is_the_records():
    record = json.loads((ROOT / "docs" / "records" / "vllm.json").read_text(encoding="utf-8"))
    largest = max(record["equality"]["largest difference of a log-probability"].values())
    assert f"{largest:.1e}".replace("e-0", "e-") in PAGE


def made_ready(words, ports, python):
    """A command with this machine's programs and free ports."""
    programs = {"shadowpeft": [sys.executable, "-m", "shadowpeft"], ".venv/vllm/bin/python": [python]}
    text = [*programs.get(words[0], words[:1]), *words[1:]]
    return [re.sub(r"\b(8000|8001)\b", lambda match: str(ports[match[0]]), word) for word in text]


@pytest.mark.vllm
@pytest.mark.timeout(1200)
def test_the_commands_of_the_page(tmp_path):
    python = vllm_python()
    base = save_base(
        tmp_path / "base",
        hidden_size=64,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), adapter_config())
    randomise(model.eval())
    model.save_pretrained(tmp_path / "run" / "adapter")
    chat_tokenizer().save_pretrained(tmp_path / "run" / "adapter")
    ports = {"8000": free_port(), "8001": free_port()}
    write, serve, edge, ask, look = (made_ready(words, ports, python) for words in commands())
    subprocess.run(write, cwd=tmp_path, check=True)
    cloud_environment = vllm_environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    # what a tiny test adds to the page's command: float32 to compare in, and no compiler
    serve += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512"]
    with (
        Server(serve, tmp_path, f"http://127.0.0.1:{ports['8000']}/health", cloud_environment),
        Server(edge, tmp_path, f"http://127.0.0.1:{ports['8001']}/readyz"),
    ):
        answer = json.loads(subprocess.run(ask, check=True, capture_output=True).stdout)
        assert answer["shadowpeft"]["where"] == "cloud"
        # a random model ends in bytes that are no character, which vLLM leaves out
        assert answer["choices"][0]["message"]["content"] == by_transformers(tmp_path).rstrip("\ufffd")
        url = f"http://127.0.0.1:{ports['8001']}/v1/chat/completions"
        body = {"model": "robot", "messages": [{"role": "user", "content": "sit down"}], "max_tokens": 8}
        device = httpx.post(url, json={**body, "route": "device"}, timeout=60, trust_env=False).json()
        assert device["shadowpeft"]["where"] == "device"
        with httpx.stream(
            "POST", url, json={**body, "route": "cloud", "stream": True}, timeout=60, trust_env=False
        ) as stream:
            pieces = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: {")]
        streamed = "".join(choice["delta"].get("content") or "" for piece in pieces for choice in piece["choices"])
        assert streamed == answer["choices"][0]["message"]["content"]
        routed = httpx.post(url, json=body, timeout=60, trust_env=False).json()
        assert routed["choices"][0]["message"]["content"]
        time.sleep(1)
        counted = subprocess.run(look, check=True, capture_output=True, text=True).stdout
        assert re.search(r"^vllm:spec_decode_num_draft_tokens_total\S* [1-9]", counted, flags=re.M), counted[:2000]
        # an error of the request comes back through the edge as vLLM's
        bad = httpx.post(url, json={**body, "route": "cloud", "max_tokens": 100_000}, timeout=60, trust_env=False)
        assert bad.status_code == 400


def by_transformers(folder: Path) -> str:
    model = shadowpeft.load(str(folder / "run" / "adapter"), str(folder / "base"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "run" / "adapter")
    ids = torch.tensor([prompt_ids(tokenizer, [{"role": "user", "content": "sit down"}])])
    out = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
