"""The models that are served or calibrated: an edge model's folder, several adapters on a base, a LoRA to compare with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from shadowpeft.errors import ConfigError
from shadowpeft.hf.files.locate import CONFIG, find_file
from shadowpeft.hf.files.reading import read_json
from shadowpeft.hf.layer import check_adapter_name
from shadowpeft.serve.router import Calibration

if TYPE_CHECKING:
    from shadowpeft.data.second_opinion import SecondOpinion


def is_edge_folder(path: str) -> bool:
    """Whether ``path`` is a stand-alone model (``shadowpeft detach``), not an adapter."""
    folder = Path(path)
    return (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file()


def classifies(path: str) -> bool:
    """Whether ``path``, an adapter or an edge model, is a classifier.

    Raises:
        AdapterFileError: if it has no configuration, or a damaged one.
    """
    from shadowpeft.hf import formats

    if is_edge_folder(path):
        made = [str(name) for name in read_json(Path(path) / "config.json").get("architectures") or []]
        return any(name.endswith("ForSequenceClassification") for name in made)
    says = formats.detect(path) in (formats.OURS, formats.PEFT)  # the other formats do not say it
    return bool(says and read_json(find_file(path, CONFIG)).get("task_type") == "SEQ_CLS")


def check_answers(path: str) -> None:
    """Refuse a classifier, an adapter or an edge model, where answers in words are wanted.

    Raises:
        ConfigError: if ``path`` is one. AdapterFileError: if it has no configuration, or a damaged one.
    """
    if classifies(path):
        raise ConfigError(
            f"'{path}' is a classifier, which finds labels and answers nothing in words; judge it with shadowpeft eval, or run "
            "the model that shadowpeft detach makes in Python"
        )


def check_calls(path: str) -> None:
    """Refuse an adapter, or its edge model, that has learnt calls in its template's form, where the compact one is wanted.

    Raises:
        ConfigError: if ``path`` is one. AdapterFileError: if it has no configuration, or a damaged one.
    """
    from shadowpeft.hf import formats

    if is_edge_folder(path):
        content = read_json(Path(path) / "config.json")
    else:  # the other formats do not say it
        content = read_json(find_file(path, CONFIG)) if formats.detect(path) == formats.OURS else {}
    if content.get("call_form") == "template":
        raise ConfigError(
            f"'{path}' has learnt to call tools as its base's chat template writes them but --skills is of the compact form; "
            "leave --skills out, or train with data.call_form: compact"
        )


def load_edge(path: str) -> tuple[Any, Any]:
    """Model and tokenizer of an edge folder.

    Raises:
        ConfigError: if it is a classifier, has no tokenizer, or its weights are damaged or incomplete.
    """
    from transformers import AutoModelForCausalLM

    from shadowpeft.hf.base.load import load_whole
    from shadowpeft.hf.detach import DETACHED
    from shadowpeft.tokenizer import load_tokenizer

    check_answers(path)
    if not (Path(path) / "tokenizer_config.json").is_file():
        raise ConfigError(f"'{path}' has no tokenizer; make the folder with shadowpeft detach")
    model = load_whole(AutoModelForCausalLM, path, f"the edge model in '{path}'").eval()
    setattr(model.config, DETACHED, True)  # older folders do not say it
    return model, load_tokenizer(path)


def opinion_of(calibration: Calibration | None, file: Path | None) -> SecondOpinion | None:
    """The second opinion that a calibration in ``file`` was made with; raises as :meth:`SecondOpinion.load`."""
    if calibration is None or calibration.opinion is None or file is None:
        return None
    from shadowpeft.data.second_opinion import SecondOpinion, file_of

    real = file.resolve().parent  # where a link points to, unless it is there beside the link
    folder = file.parent if file_of(file.parent, calibration.opinion).is_file() else real
    return SecondOpinion.load(folder, calibration.opinion)


def module_name(name: str) -> str:
    """What the adapter that clients call ``name`` is called inside the model: the same where torch permits it.

    Names such as ``robot-v1.2`` or ``keys`` are no names of modules; a ``~``, which no client's name has, takes the place of
    each dot and the end, so two names never become one.
    """
    try:
        return check_adapter_name(name)
    except ConfigError:
        return check_adapter_name(name.replace(".", "~") + "~")


def load_adapters(named: dict[str, str], base: str | None) -> Any:
    """A ``PeftModel`` with every adapter of ``named`` (name -> folder) on one base."""
    import shadowpeft

    model: Any = None
    for name, folder in named.items():
        check_answers(folder)
        if model is None:
            model = shadowpeft.load(folder, base, adapter_name=module_name(name))
        else:
            model.load_adapter(folder, module_name(name))
    return model.eval()


def is_lora(path: str) -> bool:
    """Whether ``path`` is a folder with a LoRA or DoRA adapter."""
    file = Path(path) / "adapter_config.json"
    return file.is_file() and read_json(file).get("peft_type") == "LORA"


def load_lora(path: str, base: str | None) -> tuple[Any, Any]:
    """The base with a LoRA or DoRA adapter, and the base's tokenizer: what a shadow is compared with."""
    from peft import PeftConfig, PeftModel

    from shadowpeft.hf.base.load import load_base
    from shadowpeft.tokenizer import load_tokenizer

    named = base or PeftConfig.from_pretrained(path).base_model_name_or_path
    if not named:
        raise ConfigError("the adapter does not name its base; pass --base")
    model = PeftModel.from_pretrained(load_base(named, "CAUSAL_LM"), path).eval()
    own = (Path(path) / "tokenizer_config.json").is_file()
    return model.get_base_model(), load_tokenizer(path if own else named)
