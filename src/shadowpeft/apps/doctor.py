"""``shadowpeft doctor [ADAPTER]``: whether this set-up works; each check with its reason and the remedy."""

from __future__ import annotations

import json
import platform
import sys
import warnings
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from shadowpeft import versions
from shadowpeft.apps.checks import FAILED, OK, WARNING, Check, Report
from shadowpeft.apps.common import has_tokenizer
from shadowpeft.apps.options import Base, Json
from shadowpeft.errors import ConfigError, ShadowPeftError
from shadowpeft.terminal import one_line, terminal

if TYPE_CHECKING:
    from rich.console import Console

_COLOURS = {OK: "green", WARNING: "yellow", FAILED: "red"}


def main(
    adapter: Annotated[
        Optional[str],
        typer.Argument(help="Folder or Hub id of an adapter of any format. Default: the environment alone."),
    ] = None,
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Check versions, device, adapter, base and tokenizer, and test the model on itself."""
    if adapter is None and base is not None:
        raise ConfigError(
            "--base was given without an adapter; give the adapter too, or neither for the environment alone"
        )
    console = terminal()
    report = Report(None if as_json else lambda check: _print(console, check))
    diagnose(report, adapter, base)
    if as_json:
        print(json.dumps({"passed": not report.failed, "checks": [vars(c) for c in report.checks]}, indent=2))
    else:
        counts = {state: sum(c.state == state for c in report.checks) for state in (OK, WARNING, FAILED)}
        console.print(f"{counts[OK]} ok, {counts[WARNING]} warnings, {counts[FAILED]} failed")
    if report.failed:
        sys.exit(1)


def diagnose(report: Report, adapter: str | None, base: str | None) -> None:
    """Run the checks in order; what needs a part that failed is left out."""
    from shadowpeft.apps.common import quiet_imports, quiet_libraries

    quiet_imports()
    if not check_environment(report) or adapter is None:
        return
    from shadowpeft.apps.selftest import self_test

    quiet_libraries()
    model, name = loaded(report, adapter, base)
    if model is None:
        return
    tokenizer = tokenizers(report, model, adapter, name)
    self_test(report, model, tokenizer)


def _print(console: Console, check: Check) -> None:
    from rich.text import Text

    state = Text(f"{check.state:<8}", style=_COLOURS[check.state])
    console.print(state, f"{check.name}: {one_line(check.text)}")
    if check.fix:
        console.print(f"         fix: {check.fix}")


# --------------------------------------------------------------------------------------------------------- environment


def check_environment(report: Report) -> bool:
    """Python, packages, device; whether the packages can be imported."""
    report.require(
        sys.version_info >= (3, 10), "python", platform.python_version(), "shadowpeft needs Python 3.10 or newer"
    )
    usable = True
    for package, limits in versions.TESTED.items():
        kind, version = versions.state(package)
        tested = f"tested: {limits.oldest} to {limits.newest}"
        upgrade = f"pip install '{package}>={limits.oldest}'"
        if kind == versions.OK:
            report.ok(package, f"{version} ({tested})")
        elif kind == versions.MISSING and not limits.required:
            report.ok(package, f"not installed; only needed for its trainers ({tested})")
        elif kind == versions.NEW:
            report.warn(package, f"{version} is newer than what was tested ({tested})", "watch the self-test below")
        else:
            usable = usable and not limits.required
            report.fail(package, f"{version or 'not installed'} ({tested})", upgrade)
    version = versions.installed("accelerate")
    report.require(version is not None, "accelerate", version or "not installed", "pip install accelerate")
    if usable:
        device(report)
    return usable


def device(report: Report) -> None:
    """Where models run by default, threads, denormal numbers."""
    import torch

    from shadowpeft.runtime import prepare_cpu

    prepare_cpu()
    if torch.cuda.is_available():
        report.ok("device", f"CUDA, {torch.cuda.get_device_name(0)}; the checks below run on the CPU")
    elif torch.backends.mps.is_available():
        report.ok("device", "MPS; the checks below run on the CPU")
    else:
        report.ok("device", f"CPU, {torch.get_num_threads()} threads")
    report.require(
        float(torch.tensor([1e-39]).mul(1.0)) == 0.0,
        "denormal numbers",
        "flushed to zero by every command of this package; in your own script call torch.set_flush_denormal(True) first",
        "this processor cannot flush them; a random shadow may take twice as long to train on it",
        otherwise=WARNING,
    )


# --------------------------------------------------------------------------------------------------- adapter and base


def loaded(report: Report, adapter: str, base: str | None) -> tuple[Any, str | None]:
    """The adapted model and the name of its base; None and a failed check where it does not load."""
    import torch

    import shadowpeft
    from shadowpeft.errors import BaseMismatchError
    from shadowpeft.hf import formats

    try:
        kind = formats.detect(adapter)
        report.ok("format", f"{kind}, {adapter}")
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            model = shadowpeft.load(adapter, base, is_trainable=True)
    except BaseMismatchError as error:
        report.fail("base", str(error), "pass the base that the adapter was trained on with --base")
        return None, None
    except ShadowPeftError as error:
        report.fail("adapter", str(error), "see the message; nothing after it was checked")
        return None, None
    config = model.peft_config["default"]
    name = base or config.base_alias or config.base_model_name_or_path or model.get_base_model().name_or_path
    differing = [str(w.message) for w in seen if "base's weights differ" in str(w.message)]
    if differing:
        report.warn("base", differing[0], "use the base of the training run unless this is its quantised copy")
    elif kind == formats.OURS:
        report.ok(
            "base", f"{name}: architecture, shapes, vocabulary and sampled weights are those of the adapter's record"
        )
    else:
        report.warn(
            "base", f"{name}: shapes fit, but the {kind} format records no identity of the base", "shadowpeft convert"
        )
    trained = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad}
    inner = model.get_base_model()
    report.require(
        trained == {"float32"},
        "dtype",
        f"base {str(inner.dtype).removeprefix('torch.')}, trained weights {', '.join(sorted(trained))}, on {inner.device}",
        "keep the trained weights in float32, or small steps are lost in rounding",
        otherwise=WARNING,
    )
    if inner.dtype == torch.float16 and inner.device.type == "cpu":
        report.warn(
            "dtype of the base", "float16 on a CPU is slow and overflows early", "load the base in float32 or bfloat16"
        )
    return model, name


# --------------------------------------------------------------------------------------------------------- tokenizer


def tokenizers(report: Report, model: Any, adapter: str, base: str | None) -> Any:
    """Compare the tokenizer with the model, and the adapter's own with the base's; the tokenizer in use, or None."""
    own = _tokenizer(adapter) if has_tokenizer(adapter) else None
    of_base = None if base is None else _tokenizer(base)
    used = own or of_base
    if used is None:
        report.warn(
            "tokenizer",
            "neither the adapter nor its base has one",
            "save one beside the base or the adapter with save_pretrained",
        )
        return None
    config = model.get_base_model().config.get_text_config(decoder=True)
    classifier = model.get_base_model().get_output_embeddings() is None
    rows = model.get_input_embeddings().weight.shape[0]
    report.require(
        len(used) <= rows,
        "vocabulary",
        f"{len(used)} tokens, {rows} embedding rows",
        "the tokenizer belongs to another model or has added tokens; use the base's, or resize the base before training",
    )
    _padding(report, used, config, classifier)
    if not classifier:
        _end_of_text(report, used, model)
    if not classifier:
        templates = used.chat_template
        there = templates is not None and (not isinstance(templates, dict) or "default" in templates)
        report.require(
            there,
            "chat template",
            "present" if there else "missing or none called 'default': the commands cannot render prompts",
            "set tokenizer.chat_template (a run file: data.chat_template), or use an instruction-tuned base",
            otherwise=WARNING,
        )
    if own is not None and of_base is not None:
        same = own.get_vocab() == of_base.get_vocab()
        report.require(
            same,
            "adapter's vocabulary",
            f"the adapter's tokenizer and the base's have {'the same' if same else 'different'} tokens",
            "use the base that the adapter was trained on",
        )
        if not classifier:
            same = own.chat_template == of_base.chat_template
            report.require(
                same,
                "adapter's chat template",
                f"{'the same as' if same else 'differs from'} the base's",
                "take the tokenizer from the adapter's folder, as the commands do; the adapter was trained with it",
                otherwise=WARNING,
            )
    return used


def _tokenizer(source: str) -> Any:
    from transformers import AutoTokenizer

    from shadowpeft.hf.base.aliases import source_of

    try:
        return AutoTokenizer.from_pretrained(source_of(source), trust_remote_code=False)
    except (OSError, ValueError, KeyError):
        return None  # there is none: the caller says so


def _padding(report: Report, tokenizer: Any, config: Any, classifier: bool) -> None:
    ours, models = tokenizer.pad_token_id, getattr(config, "pad_token_id", None)
    models = models[0] if isinstance(models, list) else models
    if ours is None:
        report.warn("pad token", "the tokenizer has none", "tokenizer.pad_token = tokenizer.eos_token")
    elif models is None and classifier:
        report.fail(
            "pad token", "the model has none, so a batch cannot be pooled", f"model.config.pad_token_id = {ours}"
        )
    elif models is not None and ours != models:
        report.fail(
            "pad token", f"the tokenizer's is {ours}, the model's {models}", f"model.config.pad_token_id = {ours}"
        )
    else:
        report.ok("pad token", f"{ours}" + ("" if models is not None else " (the model names none)"))
    if tokenizer.padding_side == "right" and not classifier:
        report.warn(
            "padding side",
            "right: correct for training, but a padded batch must not be generated from",
            "tokenizer.padding_side = 'left' before generate (the commands of this package pad on the left themselves)",
        )
    else:
        report.ok("padding side", tokenizer.padding_side)


def _end_of_text(report: Report, tokenizer: Any, model: Any) -> None:
    from shadowpeft.ends import end_tokens

    base = model.get_base_model()
    ends = getattr(base.generation_config, "eos_token_id", None)
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    trained = end_tokens(base, tokenizer)
    report.require(
        not ends or set(trained) <= set(ends),
        "end of text",
        f"answers end with {trained}, plain generate stops at {ends or 'nothing'} (the commands stop at all)",
        f"model.generation_config.eos_token_id = {trained}",
        otherwise=WARNING,
    )
