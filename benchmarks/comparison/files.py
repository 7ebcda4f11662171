"""Rows about files: what is refused before it can do harm."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

import tiny
from benchmarks.comparison.peers import Row, attach, load, save
from shadowpeft.errors import ShadowPeftError

CONFIG = {"ours": "adapter_config.json", "peft": "adapter_config.json", "authors": "shadow_config.json"}
ALPHA = {"ours": "shadow_alpha", "peft": "shadow_alpha", "authors": "alpha"}


def _refused(kind: str, change: Callable[[Path], None] = lambda folder: None, **other_base: Any) -> bool:
    """Whether an adapter is refused after ``change`` of its folder, or on another base than its own."""
    with tempfile.TemporaryDirectory() as folder:
        save(kind, attach(kind, tiny.base()), folder)
        change(Path(folder))
        try:
            load(kind, tiny.base(**other_base), folder)
        except (ValueError, RuntimeError, ShadowPeftError):
            return True
    return False


def _edited(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")


def other_base_refused(kind: str) -> bool:
    return _refused(kind, seed=9)


def other_depth_refused(kind: str) -> bool:
    return _refused(kind, num_hidden_layers=6)


def unknown_key_refused(kind: str) -> bool:
    return _refused(kind, lambda folder: _edited(folder / CONFIG[kind], lambda c: c.update(shadow_alpah=0.9)))


def missing_setting_refused(kind: str) -> bool:
    return _refused(kind, lambda folder: _edited(folder / CONFIG[kind], lambda c: c.pop(ALPHA[kind])))


def misspelt_setting_refused(kind: str) -> bool:
    def misspell(content: dict[str, Any]) -> None:
        content["shadow_alfa"] = content.pop(ALPHA[kind])

    return _refused(kind, lambda folder: _edited(folder / CONFIG[kind], misspell))


def _spoil(folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    tensors[max(tensors)].view(-1)[0] = float("nan")
    save_file(tensors, file)


def not_a_number_refused(kind: str) -> bool:
    return _refused(kind, _spoil)


def no_code_from_files(kind: str) -> bool:
    """Whether a module that a file names for a class stays unimported."""
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        (where / "named_in_a_file.py").write_text(f"import pathlib\npathlib.Path({str(where / 'ran')!r}).touch()\n")
        sys.path.insert(0, folder)
        name = "named_in_a_file:x"
        if kind == "authors":
            from shadow_peft import projected_causal_lm as projected

            config = projected.AutoModelForCausalLMWithHiddenProjectionConfig(
                shadow_model_class=name,
                shadow_model_config_class=name,
                shadow_model_config={"hidden_size": 8},
                base_hidden_size=8,
                vocab_size=tiny.V,
            )
            with contextlib.suppress(AttributeError):  # the module has run; only then is the name in it missed
                projected.AutoModelForCausalLMWithHiddenProjection(config)
            return not (where / "ran").exists()
        save(kind, attach(kind, tiny.base()), where / "adapter")
        named = {"auto_map": {"AutoConfig": "named_in_a_file.x"}, "shadow_model_config_class": name, "hidden_act": name}
        for key, value in named.items():

            def insert(content: dict[str, Any], key: str = key, value: Any = value) -> None:
                (content.get("shadow_backbone_config") or content)[key] = value

            _edited(where / "adapter" / CONFIG[kind], insert)
            with contextlib.suppress(ValueError, TypeError, ShadowPeftError):
                load(kind, tiny.base(), where / "adapter")
        return not (where / "ran").exists()


FILES = {
    "other_base": Row("an adapter on another base is refused", other_base_refused, (9,)),
    "other_depth": Row("an adapter on a base with more layers is refused", other_depth_refused, (22,)),
    "unknown_key": Row("an unknown key in an adapter's file is refused", unknown_key_refused, (17,)),
    "missing_setting": Row("a missing setting in an adapter's file is refused", missing_setting_refused, (22,)),
    "misspelt_setting": Row("a misspelt setting in an adapter's file is refused", misspelt_setting_refused, (22,)),
    "not_a_number": Row("weights that are NaN are refused", not_a_number_refused, (22,)),
    "no_code": Row("no code that a file names is imported", no_code_from_files, (20,)),
}
