"""Hot swap of an adapter, as an extension of vLLM's workers: ``--worker-extension-cls shadowpeft_vllm.swap.SwapShadow``."""

from __future__ import annotations

from typing import Any


class SwapShadow:
    """Methods that each worker of vLLM gets."""

    vllm_config: Any
    model_runner: Any

    def swap_shadow(self, folder: str) -> None:
        """Put the weights of the adapter in ``folder`` in place of the running one's, in place and on every rank.

        No request may run, and the prefix cache must be emptied after it: what both hold was computed with the old weights.
        ``shadowpeft_vllm.swap_adapter(llm, folder)`` does that.

        Raises:
            AdapterError: if the adapter has another shape or belongs to another base; the old weights stay.
        """
        self.model_runner.get_model().swap_shadow(folder, self.vllm_config)
