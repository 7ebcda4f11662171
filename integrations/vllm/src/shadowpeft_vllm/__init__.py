"""Attached ShadowPEFT adapters on vLLM: the plugin that vLLM loads, and the hot swap."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

RELEASES = ("0.32",)
"""Releases of vLLM whose inner interfaces the model classes here are written for."""
ARCHITECTURES = {
    "llama": "ShadowPeftLlamaForCausalLM",
    "qwen2": "ShadowPeftQwen2ForCausalLM",
    "qwen3": "ShadowPeftQwen3ForCausalLM",
    "mistral": "ShadowPeftMistralForCausalLM",
    "gemma3_text": "ShadowPeftGemma3ForCausalLM",
    "qwen3_moe": "ShadowPeftQwen3MoeForCausalLM",
}
"""``model_type`` of the base -> the architecture to name in ``--hf-overrides``."""
_log = logging.getLogger("vllm.shadowpeft")


def release_problem(version: str) -> str | None:
    """Why a release of vLLM cannot be used; None if it can."""
    release = re.match(r"\d+\.\d+", version)
    if release is not None and release[0] in RELEASES:
        return None
    return (
        f"shadowpeft-vllm is written for vLLM {' and '.join(RELEASES)} but this is {version}, so no shadow architecture was "
        "registered; install one of those releases, or a newer shadowpeft-vllm"
    )


def register() -> None:
    """What vLLM calls in each of its processes: name the architectures, without importing torch or vLLM's models.

    vLLM calls it for every model. So a wrong release does not stop it; it is told in the log, and a shadow architecture is
    then unknown.
    """
    import vllm
    from vllm import ModelRegistry

    problem = release_problem(vllm.__version__)
    if problem is not None:
        _log.warning("%s", problem)
        return
    for name in ARCHITECTURES.values():
        ModelRegistry.register_model(name, f"shadowpeft_vllm.families:{name}")


def overrides(adapter: str | Path, base_type: str) -> dict[str, Any]:
    """``hf_overrides`` that put the adapter in a folder on a base whose configuration has the ``model_type`` ``base_type``.

    Raises:
        AdapterError: if this family of bases has no class here.
    """
    from shadowpeft_vllm.adapter import AdapterError

    if base_type not in ARCHITECTURES:
        raise AdapterError(f"the base is a {base_type} model but shadowpeft-vllm serves {', '.join(ARCHITECTURES)}")
    return {"architectures": [ARCHITECTURES[base_type]], "shadowpeft_adapter": str(Path(adapter).absolute())}


def swap_adapter(llm: Any, adapter: str | Path) -> None:
    """Put the weights of another adapter in place of the one that ``llm``, a ``vllm.LLM``, runs with; no request may run.

    ``llm`` needs ``worker_extension_cls="shadowpeft_vllm.swap.SwapShadow"``. What the prefix cache holds was computed with the
    old weights, so it is emptied.

    Raises:
        AdapterError: if the adapter has another shape or belongs to another base; the old weights stay.
    """
    llm.collective_rpc("swap_shadow", args=(str(Path(adapter).absolute()),))
    if not llm.reset_prefix_cache():
        raise RuntimeError(
            "the prefix cache could not be emptied since requests are running; wait for them and call it again"
        )
