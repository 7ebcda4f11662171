"""What the engine runs: forward passes of a batch whose rows have names, and weights that can be replaced meanwhile."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from shadowpeft.core.speculation import Gate
from shadowpeft.data.chat import stop_tokens
from shadowpeft.errors import ConfigError
from shadowpeft.hf.base.rotary import turns_by_length
from shadowpeft.hf.base.structure import find_decoder
from shadowpeft.hf.detach import SYSTEM_MESSAGE
from shadowpeft.hf.dry_run import check_file
from shadowpeft.hf.forward import rows
from shadowpeft.hf.forward.alone import ShadowAlone
from shadowpeft.hf.forward.call import Scope
from shadowpeft.hf.forward.drafting import DraftHead
from shadowpeft.hf.forward.speculation import DraftCounts, Speculation
from shadowpeft.hf.model import ShadowModel
from shadowpeft.hf.swap import check_fits, swap
from shadowpeft.messages import did_you_mean
from shadowpeft.serve.drafting import MAX_DRAFT
from shadowpeft.serve.loading import module_name
from shadowpeft.serve.router import BARE, BASE_PATH, DETACHED
from shadowpeft.serve.sessions import AttachedSession, DetachedSession, Session
from shadowpeft.serve.versions import Version, own_memory, snapshot
from shadowpeft.tokenizer import Readable


def _max_model_len(model: Any) -> int:
    """Tokens that a model reads at most."""
    limit = getattr(model.config, "max_position_embeddings", None)
    return int(limit) if limit else 1 << 20


class Backend(ABC):
    """A model that answers under one or more names.

    Attributes:
        model: the module whose ``config`` and ``generation_config`` hold.
        tokenizer: its tokenizer.
        versions: for each name that can be swapped, the versions it had, the present one last.
        leaving: names that are taken out; no request may ask for them any more.
        changing: held while weights come or go.
        drafts: what drafting did to all answers so far.
        suits: raises for the folder of a model that this server may not have, however well its weights fit.
    """

    def __init__(self, model: Any, tokenizer: Any, versions: dict[str, list[Version]]) -> None:
        self.model, self.tokenizer, self.versions = model, tokenizer, versions
        self.leaving: set[str] = set()
        self.changing = threading.Lock()
        self.drafts = DraftCounts()
        self.suits: Callable[[str], None] = lambda folder: None
        self.stop_token_ids = frozenset(stop_tokens(model, tokenizer))
        self.max_model_len = _max_model_len(model)

    @property
    def names(self) -> tuple[str, ...]:
        """Every name a request may ask for."""
        return tuple(name for name in self._all_names() if name not in self.leaving)

    @abstractmethod
    def _all_names(self) -> tuple[str, ...]: ...

    @abstractmethod
    def open(self, names: list[str]) -> Session:
        """Start a batch whose row ``i`` belongs to ``names[i]``."""

    @abstractmethod
    def reason(self, name: str) -> str:
        """Which model of a cloud answers under ``name``: one of the router's reasons."""

    def gate(self, name: str, *, sampled: bool) -> Gate | None:
        """What decides how much a shadow drafts of an answer of ``name``, which is drawn or not; None: nothing drafts there."""
        return None

    def plain(self, name: str) -> str:
        """The name of the bare base of ``name``; ``name`` itself where that answers under none."""
        return name

    def system_message(self, name: str) -> str | None:
        """What the model behind ``name`` was trained under, for chats that bring no system message; None: none is recorded."""
        return None

    def shadow(self, name: str) -> ShadowAlone | None:
        """The shadow of ``name`` by itself, with the weights it has now; None: it has none beside a base."""
        return None

    @abstractmethod
    def _replace(self, name: str, folder: str) -> None: ...

    def swap(self, name: str, folder: str) -> None:
        """Replace the weights behind ``name``; batches that run end with the old ones. The present version stays as it is.

        Raises:
            ShadowPeftError: if ``name`` has none that can be replaced or the new ones do not fit; the old ones stay.
        """
        with self.changing:
            self._check(name)
            with snapshot(folder) as (copy, version):
                if self.versions[name] and version.digest == self.versions[name][-1].digest:
                    return
                self.suits(str(copy))
                self._replace(name, str(copy))
            self.versions[name].append(version)

    def rollback(self, name: str) -> str:
        """Go back to the version before the last swap; returns its folder.

        Raises:
            ShadowPeftError: if there was none, or its files are gone or are others now; the present ones stay.
        """
        with self.changing:
            self._check(name)
            if len(self.versions[name]) < 2:
                raise ConfigError(f"'{name}' was not swapped since the start, so there is nothing to roll back to")
            before = self.versions[name][-2]
            if before.digest is None:  # of the Hub, whose files do not change
                self._replace(name, before.folder)
            else:
                with snapshot(before.folder) as (copy, version):
                    if version.digest != before.digest:
                        raise ConfigError(
                            f"version '{before.name}' of '{name}' is gone: the files in '{before.folder}' were changed after "
                            "it was loaded; swap in another version"
                        )
                    self._replace(name, str(copy))
            self.versions[name].pop()
            return before.folder

    def add(self, name: str, folder: str, between: Callable[[Callable[[], None]], None]) -> None:
        """Load one more adapter.

        Args:
            between: runs its argument while no forward pass does, and waits for it; what takes long is done before.

        Raises:
            ShadowPeftError: if it cannot be loaded, or this kind of backend takes no more; everything is as it was.
        """
        raise ConfigError(
            f"this server cannot load '{name}' while it runs; restart it with the folder among its adapters"
        )

    def remove(self, name: str) -> None:
        """Take an adapter out; no forward pass may run meanwhile, and no request may need it any more.

        Raises:
            ConfigError: as :meth:`check_removable`.
        """
        self.check_removable(name)
        raise NotImplementedError

    def check_removable(self, name: str) -> None:
        """Raises:
        ConfigError: if ``name`` has to stay.
        """
        raise ConfigError(f"this server cannot drop '{name}' while it runs; restart it without that adapter")

    def _check(self, name: str) -> None:
        there = sorted(set(self.versions) - self.leaving)
        if name not in there:
            raise ConfigError(
                f"'{name}' is not loaded or cannot be swapped{did_you_mean(name, there)}; there are {there}"
            )


def reads_alike(one: Any, other: Any) -> bool:
    """Whether two tokenizers have the same tokens and write a chat in the same way."""
    same = one.get_vocab() == other.get_vocab()
    return same and getattr(one, "chat_template", None) == getattr(other, "chat_template", None)


def _tokenizer_in(folder: str) -> Any:
    """The tokenizer that was saved in a folder, or None."""
    if not (Path(folder) / "tokenizer_config.json").is_file():
        return None
    with Readable("the tokenizer beside the adapter", private=folder):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


class Attached(Backend):
    """A ``PeftModel`` with shadow adapters: the base answers under ``base_name``, each adapter under its own name.

    Args:
        folders: the folder that each adapter was loaded from.

    Raises:
        ConfigError: if an adapter was saved with another tokenizer or chat template than ``tokenizer``, which all share.
    """

    def __init__(self, model: Any, tokenizer: Any, folders: dict[str, str], base_name: str) -> None:
        if base_name in folders:
            raise ConfigError(f"an adapter is called '{base_name}' like the base; give it another name")
        super().__init__(model.eval(), tokenizer, {name: [Version.of(folder)] for name, folder in folders.items()})
        for folder in folders.values():
            self._check_tokenizer(folder)
        self.base_name = base_name
        self._inner = model.get_base_model()
        self._hub: Any = find_decoder(self._inner).backbone.shadow_hub
        self._draft_head = DraftHead()
        self._gates: dict[tuple[str, bool], Gate | None] = {}
        """Fresh ones, to be copied: their prices are counted over all weights."""

    def open(self, names: list[str]) -> Session:
        scope = Scope(self._inner)
        scope.names = rows.check_names([rows.BASE if n == self.base_name else module_name(n) for n in names], self._hub)  # type: ignore[arg-type]
        return AttachedSession(self._inner, scope, self._draft_head)

    def reason(self, name: str) -> str:
        return BARE if name == self.base_name else BASE_PATH

    def gate(self, name: str, *, sampled: bool) -> Gate | None:
        if name == self.base_name or turns_by_length(self._inner.config):  # drafts may cross the limit
            return None
        if (name, sampled) not in self._gates:
            fresh = Speculation(MAX_DRAFT).gate(self._inner, module_name(name), sampled=sampled)
            self._gates[name, sampled] = fresh
        return deepcopy(self._gates[name, sampled])

    def plain(self, name: str) -> str:
        return self.base_name if name in self.versions else name

    def system_message(self, name: str) -> str | None:
        config = self._hub.configs.get(module_name(name)) if name in self.versions else None
        return None if config is None else config.system_message

    def shadow(self, name: str) -> ShadowAlone | None:
        return None if name == self.base_name else ShadowAlone(self._inner, module_name(name))

    def _forget_gates(self, name: str) -> None:
        for sampled in (False, True):
            self._gates.pop((name, sampled), None)

    def _check_tokenizer(self, folder: str) -> None:
        own = _tokenizer_in(folder)
        if own is not None and not reads_alike(own, self.tokenizer):
            raise ConfigError(
                f"the adapter in '{folder}' was saved with another tokenizer or chat template than this server uses; start a "
                "separate server for it"
            )

    def _replace(self, name: str, folder: str) -> None:
        self._check_tokenizer(folder)
        swap(self.model, folder, module_name(name))
        self._forget_gates(name)

    def add(self, name: str, folder: str, between: Callable[[Callable[[], None]], None]) -> None:
        with self.changing, snapshot(folder) as (copy, version):
            if name in (*self.versions, self.base_name):
                raise ConfigError(f"'{name}' is loaded already; swap its weights, or choose another name")
            self.suits(str(copy))
            config = check_fits(self._inner, copy)
            assert config.weights_file is not None
            check_file(ShadowModel, self._inner, config, config.weights_file)
            self._check_tokenizer(str(copy))
            between(lambda: self._attach(name, copy, version))

    def _attach(self, name: str, copy: Path, version: Version) -> None:
        try:
            self.model.load_adapter(str(copy), module_name(name))
            self.model.eval()
        except BaseException:
            self._detach(name)
            raise
        self.versions[name] = [version]

    def _detach(self, name: str) -> None:
        """Delete an adapter of which everything or only a part is there."""
        inner = module_name(name)
        self._draft_head.forget(inner)
        self._forget_gates(name)
        if inner in self._hub.configs:
            if inner in self._hub.active_adapters:  # rows have names here, so which one is active changes nothing
                other = next(n for n in self.versions if n != name)
                self.model.base_model.set_adapter(module_name(other), inference_mode=True)
            self.model.delete_adapter(inner)
        self.model.peft_config.pop(inner, None)

    def check_removable(self, name: str) -> None:
        self._check(name)
        if len(set(self.versions) - self.leaving) == 1:
            raise ConfigError(f"'{name}' is the only adapter and must stay; add another one first")

    def remove(self, name: str) -> None:
        if name not in self.leaving:
            self.check_removable(name)
        self._detach(name)
        del self.versions[name]

    def _all_names(self) -> tuple[str, ...]:
        return (*self.versions, self.base_name)


class Detached(Backend):
    """A stock model under one name: a detached shadow, or what ``kind`` says as one of the router's reasons."""

    def __init__(
        self, model: Any, tokenizer: Any, name: str, folder: str | None = None, *, kind: str = DETACHED
    ) -> None:
        super().__init__(model.eval(), tokenizer, {} if folder is None else {name: [Version.of(folder)]})
        self._name, self._kind = name, kind

    def _all_names(self) -> tuple[str, ...]:
        return (self._name,)

    def reason(self, name: str) -> str:
        return self._kind

    def system_message(self, name: str) -> str | None:
        recorded = getattr(self.model.config, SYSTEM_MESSAGE, None)
        return recorded if name == self._name and isinstance(recorded, str) else None

    def open(self, names: list[str]) -> Session:
        return DetachedSession(self.model)

    def _replace(self, name: str, folder: str) -> None:
        from transformers import AutoModelForCausalLM

        from shadowpeft.hf.base.load import load_whole

        if not (Path(folder) / "config.json").is_file():
            raise ConfigError(f"'{folder}' is no edge model (it has no config.json); make one with shadowpeft detach")
        loaded: Any = load_whole(AutoModelForCausalLM, folder, f"the edge model in '{folder}'", dtype=self.model.dtype)
        new = own_memory(loaded).to(self.model.device).eval()
        for field in ("model_type", "vocab_size"):
            old, given = getattr(self.model.config, field), getattr(new.config, field)
            if old != given:
                raise ConfigError(
                    f"the edge model in '{folder}' has {field} {given} but the running one has {old}; restart the server "
                    "with it"
                )
        own = _tokenizer_in(folder)
        same = own is None or (
            reads_alike(own, self.tokenizer) and frozenset(stop_tokens(new, own)) == self.stop_token_ids
        )
        if not same:
            raise ConfigError(
                f"the edge model in '{folder}' has another tokenizer, chat template or end token than the running one; restart "
                "the server with it"
            )
        self.model, self.max_model_len = new, _max_model_len(new)
