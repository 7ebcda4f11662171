"""Runs vLLM: ``engine.py JOBS OUT``; with vLLM's own Python, which has no shadowpeft.

JOBS is JSON, a list of jobs. A job names a model, perhaps an adapter and arguments for ``vllm.LLM``, and lists what to do.
OUT gets a list of results, one a job: of each step its answers, or the error that refused the model.
"""

from __future__ import annotations

import gc
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

DEFAULTS = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 16,
    "skip_tokenizer_init": True,
    "seed": 0,
    "block_size": 32,
    "enable_prefix_caching": True,
}


def answer(llm: Any, step: dict[str, Any]) -> list[dict[str, Any]]:
    """Greedy answers to the step's prompts, together, one by one or staggered."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=step["new"], logprobs=1, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": row} for row in step["prompts"]]
    if step["how"] == "together":
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
    elif step["how"] == "one by one":
        outputs = [llm.generate([prompt], sampling, use_tqdm=False)[0] for prompt in prompts]
    else:  # staggered: a new request every other step of the engine
        engine, done = llm.llm_engine, {}
        waiting = list(enumerate(prompts))
        while waiting or engine.has_unfinished_requests():
            if waiting:
                place, prompt = waiting.pop(0)
                engine.add_request(f"late-{place}", prompt, sampling)
            for _ in range(2):
                done.update({out.request_id: out for out in engine.step() if out.finished})
        outputs = [done[key] for key in sorted(done, key=lambda key: int(key.split("-")[1]))]
    return [
        {
            "tokens": list(out.outputs[0].token_ids),
            "logprobs": [
                places[token].logprob
                for places, token in zip(out.outputs[0].logprobs, out.outputs[0].token_ids, strict=True)
            ],
            "cached": out.num_cached_tokens,
        }
        for out in outputs
    ]


def metrics(llm: Any) -> dict[str, float]:
    """The counters that the tests look at."""
    wanted = ("vllm:spec_decode_num_draft_tokens", "vllm:spec_decode_num_accepted_tokens", "vllm:prefix_cache_hits")
    return {m.name: m.value for m in llm.get_metrics() if m.name in wanted}


def run(job: dict[str, Any]) -> dict[str, Any]:
    import shadowpeft_vllm
    from shadowpeft_vllm.adapter import AdapterError
    from vllm import LLM

    began, arguments = time.perf_counter(), {**DEFAULTS, **job.get("arguments", {})}
    if "adapter" in job:
        arguments["hf_overrides"] = shadowpeft_vllm.overrides(job["adapter"], job["model_type"])
    arguments["worker_extension_cls"] = "shadowpeft_vllm.swap.SwapShadow"
    result: dict[str, Any] = {"steps": []}
    try:
        llm = LLM(model=job["model"], **arguments)
    except Exception as error:  # noqa: BLE001 - whatever vLLM makes of a refusal is what the test looks at
        return {"refused": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
    result["start seconds"] = round(time.perf_counter() - began, 1)
    for step in job["steps"]:
        if step["how"] == "swap":
            try:
                shadowpeft_vllm.swap_adapter(llm, step["adapter"])
                result["steps"].append("swapped")
            except AdapterError as error:
                result["steps"].append(str(error))
        else:
            result["steps"].append(answer(llm, step))
    result["metrics"] = metrics(llm) if not arguments.get("disable_log_stats", True) else {}
    result["seconds"] = round(time.perf_counter() - began, 1)
    del llm
    return result


def main(jobs: Path, out: Path) -> None:
    import torch

    torch.set_num_threads(1)
    results = []
    for job in json.loads(jobs.read_text()):
        results.append(run(job))
        gc.collect()
        from vllm.distributed import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()
        out.write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
