"""Hot swap over HTTP, as docs/vllm.md describes it: a server of its own, adapter A, then B, then A (marker ``vllm``)."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest
import torch
from vllm_cases import expected, make_case, prompts
from vllm_runs import SAME, Server, vllm_environment, vllm_python

from pages import ROOT
from webserver import free_port

NEW = 12
PAGE = (ROOT / "docs" / "vllm.md").read_text(encoding="utf-8")
SECTION = re.search(r"^## Hot swap$(.*?)^## ", PAGE, flags=re.M | re.S)[1]  # type: ignore[index]


def said() -> tuple[str, str, str, list[str]]:
    """The extension, the setting, the body and the two routes that the page names."""
    (extension,) = re.findall(r"--worker-extension-cls (\S+?)`", SECTION)
    (setting,) = re.findall(r"`(VLLM_\w+=1)`", SECTION)
    (body,) = re.findall(r"`(\{.*?\})`", SECTION)
    return extension, setting, body, re.findall(r"`POST (/\w+)`", SECTION)


def test_the_page_names_all_that_a_swap_needs() -> None:
    assert [len(part) > 0 for part in said()] == [True] * 4
    assert json.loads(said()[2])["method"] == "swap_shadow"
    assert said()[3] == ["/collective_rpc", "/reset_prefix_cache"]


def assert_answers(url: str, rows: list[list[int]], wanted: list[dict[str, Any]]) -> None:
    """The server's greedy tokens and log-probabilities are those of ``model.generate``; without their ids, vLLM names each
    token ``token_id:N`` when asked."""
    body = {"model": "robot", "prompt": rows, "max_tokens": NEW, "temperature": 0, "ignore_eos": True, "logprobs": 0}
    body |= {"return_tokens_as_token_ids": True}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=300, trust_env=False)
    assert answer.status_code == 200, answer.text
    for choice, row in zip(sorted(answer.json()["choices"], key=lambda each: each["index"]), wanted, strict=True):
        names = choice["logprobs"]["tokens"]
        assert [int(name.removeprefix("token_id:")) for name in names] == row["tokens"]
        found = torch.tensor(choice["logprobs"]["token_logprobs"])
        torch.testing.assert_close(found, torch.tensor(row["logprobs"]), rtol=0, atol=SAME)


@pytest.mark.vllm
@pytest.mark.timeout(900)
def test_a_swap_over_http_and_back(tmp_path) -> None:
    python, (extension, setting, body, (call, reset)) = vllm_python(), said()
    rows = prompts()
    model, base, first = make_case("llama", tmp_path)
    other, _, second = make_case("llama", tmp_path, seed=8)
    _, _, scaled = make_case("llama-scaled", tmp_path)
    wanted = {first: expected(model, rows, NEW), second: expected(other, rows, NEW)}
    assert all(a["tokens"] != b["tokens"] for a, b in zip(wanted[first], wanted[second], strict=True))
    port, name = free_port(), "ShadowPeftLlamaForCausalLM"
    url = f"http://127.0.0.1:{port}"
    words = [python, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    words += ["--model", str(base), "--served-model-name", "robot", "--worker-extension-cls", extension]
    words += ["--hf-overrides", json.dumps({"architectures": [name], "shadowpeft_adapter": str(first)})]
    words += ["--skip-tokenizer-init", "--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--block-size", "32"]
    environment = vllm_environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"} | dict([setting.split("=")])

    def swap(to: Any) -> httpx.Response:
        sent = {**json.loads(body), "args": [str(to)]}
        return httpx.post(url + call, json=sent, timeout=120, trust_env=False)

    with Server(words, tmp_path, f"{url}/health", environment):
        assert_answers(url, rows, wanted[first])
        for to in (second, first):
            assert swap(to).status_code == 200
            assert httpx.post(url + reset, timeout=60, trust_env=False).status_code == 200
            assert_answers(url, rows, wanted[to])
        # another shape is refused; the server goes on with the weights that it has
        assert swap(scaled).status_code >= 400
        assert_answers(url, rows, wanted[first])
