"""The cloud's server as replicas under Ray Serve: ``serve run examples/ray-serve.yaml``.

Each replica is the application that ``shadowpeft serve --role cloud`` runs, with an engine and a model of its own; Ray gives
them one address. This module needs ``shadowpeft[ray]`` and is imported by Ray only.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray import serve

from shadowpeft.apps.serve import Options, application, read_keys
from shadowpeft.errors import ConfigError, ShadowPeftError

MANAGED = (
    "adapters are changed in all replicas together here: name the versions in user_config of the deployment and run serve "
    "deploy again"
)
_SPARE = 8
"""Requests beyond rows and queue that Ray lets through to a replica, so that it can refuse them itself, and tell its health."""
_RETRY_SECONDS = 1


class Arguments(BaseModel):
    """What ``args`` of the application may hold; meanings and defaults as in ``shadowpeft serve --role cloud``."""

    model_config = ConfigDict(extra="forbid")

    adapters: list[str] = Field(min_length=1)
    """``NAME=FOLDER``; the folders must be there, under the same path, on every machine that has a replica."""
    base: str | None = None
    device: str = Options.device
    versions: str | None = None
    system: str | None = None
    rows: int = Field(default=Options.rows, ge=1)
    batches: int = Field(default=Options.batches, ge=1)
    queue: int = Field(default=Options.queue, ge=1)
    prompt_tokens: int = Field(default=Options.prompt_tokens, ge=1)
    new_tokens: int = Field(default=Options.new_tokens, ge=1)
    default_tokens: int = Field(default=Options.default_tokens, ge=1)
    answer_seconds: float = Field(default=Options.answer_seconds, gt=0)
    drain_seconds: float = Field(default=Options.drain_seconds, ge=0)

    def options(self) -> Options:
        """As the command's options. Keys are always needed: a replica cannot see who reaches Ray's address."""
        return Options(role="cloud", auth=True, **self.model_dump())


class Wanted(BaseModel):
    """What ``user_config`` of the deployment may hold."""

    model_config = ConfigDict(extra="forbid", strict=True)

    versions: dict[str, str] = {}
    """Adapter -> sub-folder of ``versions``; an adapter that is not named has the folder it was started with."""


@serve.deployment(user_config={"versions": {}})
@serve.ingress()
class Cloud:
    """One replica. Keys come from its environment (``SHADOWPEFT_API_KEYS``), never from arguments, which Ray shows."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.given = Arguments(**arguments).options()

    def __serve_build_asgi_app__(self) -> Any:
        name = serve.get_replica_context().replica_id.unique_id
        made = application(self.given, read_keys(self.given), managed=MANAGED, replica=name)
        self._server = made.state.server
        return made

    def check_health(self) -> None:
        """Ray asks now and then, and replaces a replica that raises."""
        reason = self._server.unready()
        if reason is not None:
            raise ShadowPeftError(f"the replica takes no requests ({reason}); Ray starts another one")

    async def reconfigure(self, wanted: dict[str, Any]) -> None:
        """Bring every adapter to the version that ``user_config`` wants; running answers end with the old weights.

        Raises:
            ShadowPeftError: if one cannot be had; what was changed before it stays changed, and Ray replaces the replica.
        """
        backend = self._server.role.engine.backend
        versions = _checked(Wanted, wanted, "user_config").versions
        for name in versions:
            if name not in backend.versions or self.given.versions is None:
                raise ConfigError(
                    f"user_config has a version of '{name}' but there are {sorted(backend.versions)} and versions is "
                    f"'{self.given.versions}'; name a loaded adapter, and the folder of versions in args"
                )
        for name, had in backend.versions.items():
            folder = str(Path(str(self.given.versions)) / versions[name]) if name in versions else had[0]
            if folder != had[-1]:
                await asyncio.to_thread(self._server.change, backend.swap, name, folder)


def app(args: dict[str, Any]) -> Any:
    """The application: what ``import_path: shadowpeft.apps.ray_serve:app`` with ``args`` deploys.

    Raises:
        ConfigError: for arguments that there are not, or that are no such values.
    """
    if isinstance(args.get("adapters"), str):  # serve run MODULE:app adapters=NAME=FOLDER,NAME=FOLDER
        args = {**args, "adapters": args["adapters"].split(",")}
    checked = _checked(Arguments, args, "args")
    room = checked.rows + checked.queue
    made = Cloud.options(  # type: ignore[attr-defined]
        max_ongoing_requests=room + _SPARE,
        max_queued_requests=room,
        backpressure_config={"status_code": 429, "retry_after_s": _RETRY_SECONDS},
        graceful_shutdown_timeout_s=checked.drain_seconds + 10.0,
        health_check_period_s=5.0,
    )
    return made.bind(checked.model_dump())


def _checked(kind: Any, given: Any, where: str) -> Any:
    try:
        return kind.model_validate(given)
    except ValidationError as failure:
        first = failure.errors()[0]
        at = ".".join(str(part) for part in first["loc"])
        known = ", ".join(kind.model_fields)
        raise ConfigError(f"{where} has '{at}': {first['msg']}; it may hold {known}") from failure
