"""Several backends in one server."""

from __future__ import annotations

from collections.abc import Sequence

from shadowpeft.errors import ConfigError
from shadowpeft.hf.forward.alone import ShadowAlone
from shadowpeft.serve.backend import Backend, reads_alike
from shadowpeft.serve.sessions import MultiSession, Session, Share


class MultiBackend(Backend):
    """Several backends in one server, to compare them: each row of a batch goes to the backend that has its name.

    Every member keeps its own base in memory and runs its own forward pass.

    Raises:
        ConfigError: if two members share a name, or differ in tokenizer, chat template, end tokens or vocabulary.
    """

    def __init__(self, members: Sequence[Backend]) -> None:
        first = members[0]
        self._member: dict[str, Backend] = {}
        for member in members:
            for name in member.names:
                if name in self._member:
                    raise ConfigError(f"two models are called '{name}'; write NAME=FOLDER with another name for one")
                self._member[name] = member
            alike = reads_alike(member.tokenizer, first.tokenizer) and member.stop_token_ids == first.stop_token_ids
            if not alike or member.model.config.vocab_size != first.model.config.vocab_size:
                raise ConfigError(
                    f"'{member.names[0]}' and '{first.names[0]}' have different tokenizers or chat templates but one server "
                    "uses one; start a server for each"
                )
        versions = {name: folders for member in members for name, folders in member.versions.items()}
        super().__init__(first.model, first.tokenizer, versions)
        self.max_model_len = min(member.max_model_len for member in members)

    def _all_names(self) -> tuple[str, ...]:
        return tuple(self._member)

    def reason(self, name: str) -> str:
        return self._member[name].reason(name)

    def plain(self, name: str) -> str:
        return self._member[name].plain(name) if name in self._member else name

    def system_message(self, name: str) -> str | None:
        return self._member[name].system_message(name) if name in self._member else None

    def shadow(self, name: str) -> ShadowAlone | None:
        return self._member[name].shadow(name)

    def open(self, names: list[str]) -> Session:
        places: dict[Backend, list[int]] = {}
        for row, name in enumerate(names):
            places.setdefault(self._member[name], []).append(row)
        return MultiSession(
            {m: Share(m.open([names[row] for row in rows]), rows) for m, rows in places.items()}, len(names)
        )

    def _replace(self, name: str, folder: str) -> None:
        member = self._member[name]
        member._replace(name, folder)
        self.max_model_len = min(each.max_model_len for each in self._member.values())
        if name in next(iter(self._member.values())).names:  # whose weights stand for all in ``model``
            self.model = member.model
