"""A model for EleutherAI's ``lm-eval``: any of its tasks on an adapter, attached or detached.

``lm-eval`` up to 0.4.13 looks up models in its own list only, so its command is started from here, under the same options::

    python -m shadowpeft.apps.lm_eval --model shadowpeft \\
        --model_args pretrained=BASE,adapter=FOLDER,mode=attached --tasks arc_easy

From Python, importing this module is enough: ``lm_eval.simple_evaluate(model="shadowpeft", model_args=...)``.
"""

from __future__ import annotations

from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from shadowpeft.errors import ConfigError

MODES = ("attached", "detached")


@register_model("shadowpeft")
class ShadowPeftLM(HFLM):  # type: ignore[misc]
    """``lm-eval``'s model of transformers with a shadow adapter.

    Args:
        pretrained: the base: folder, Hub id, or alias. adapter: folder or Hub id of a shadow adapter, in any format that
            :func:`shadowpeft.load` reads. mode: "attached" or "detached".
        options: those of ``lm-eval``'s ``hf`` model.

    Raises:
        ConfigError: for another mode, or options that would adapt the model a second time.
    """

    _model: Any

    def __init__(self, pretrained: str, adapter: str, mode: str = "attached", **options: Any) -> None:
        from shadowpeft.hf.base.aliases import source_of

        if mode not in MODES:
            raise ConfigError(f"mode is '{mode}' but must be attached or detached; the bare base is --model hf")
        for key in ("peft", "delta"):
            if options.get(key):
                raise ConfigError(
                    f"model_args has {key}= beside adapter=, which adapts the model twice; leave {key} out"
                )
        self._adapter, self._mode = adapter, mode
        super().__init__(pretrained=source_of(pretrained), **options)

    def _create_model(self, *args: Any, **options: Any) -> None:
        """The base as ``lm-eval`` makes it, then the adapter."""
        import shadowpeft

        super()._create_model(*args, **options)
        adapted = shadowpeft.load(self._adapter, self._model)
        self._model = adapted if self._mode == "attached" else shadowpeft.detach(adapted)
        self._config = self._model.config


def main() -> None:
    """``lm-eval``'s command, with this model in its list."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
