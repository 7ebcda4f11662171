"""The cloud's server as replicas under Ray Serve: ``serve run examples/ray-serve.yaml``.

Each replica is the application that ``shadowpeft serve --role cloud`` runs, with an engine and a model of its own; Ray gives
them one address. This module needs ``shadowpeft[ray]`` and is imported by Ray only.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from ray import serve

from shadowpeft.apps.serve import application, read_keys
from shadowpeft.errors import ConfigError, ShadowPeftError
from shadowpeft.serve.options import Options

MANAGED = (
    "adapters are changed in all replicas together here: name the versions in user_config of the deployment and run serve "
    "deploy again"
)
_SPARE = 8
"""Requests beyond rows and queue that Ray lets through to a replica, so that it can refuse them itself, and tell its health."""
_RETRY_SECONDS = 1


_NOT_HERE = {"role", "host", "port", "auth", "when_cloud_down", "routing", "skills"}  # Ray's own, and the edge's
_FIELDS = [f.name for f in fields(Options) if f.name not in _NOT_HERE and not f.name.startswith("cloud_")]
_HINTS = get_type_hints(Options, include_extras=True)


def _field(name: str) -> Any:
    kind, option = get_args(_HINTS[name])
    least = getattr(option, "min", None)
    default = getattr(Options, name, ...)
    return kind, Field(default, min_length=1 if name == "adapters" else None, ge=least, description=option.help)


Arguments: Any = create_model(
    "Arguments", __config__=ConfigDict(extra="forbid"), **{name: _field(name) for name in _FIELDS}
)
"""What ``args`` of the application may hold: the options of ``shadowpeft serve --role cloud`` that Ray does not set itself.

The folders of ``adapters`` must be there, under the same path, on every machine that has a replica.
"""


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
        # keys are always needed: a replica cannot see who reaches Ray's address
        self._options = Options(role="cloud", auth=True, **arguments)

    def __serve_build_asgi_app__(self) -> Any:
        name = serve.get_replica_context().replica_id.unique_id
        replica = application(self._options, read_keys(self._options), managed=MANAGED, replica=name)
        self._server = replica.state.server
        return replica

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
            if name not in backend.versions or self._options.versions is None:
                raise ConfigError(
                    f"user_config has a version of '{name}' but there are {sorted(backend.versions)} and versions is "
                    f"'{self._options.versions}'; name a loaded adapter, and the folder of versions in args"
                )
        for name, had in backend.versions.items():
            folder = (
                str((Path(str(self._options.versions)) / versions[name]).resolve())
                if name in versions
                else had[0].folder
            )
            if folder != had[-1].folder:
                await self._server.administration.change(backend.swap, name, folder)


def app(args: dict[str, Any]) -> Any:
    """The application: what ``import_path: shadowpeft.apps.ray_serve:app`` with ``args`` deploys.

    Raises:
        ConfigError: for unknown arguments, and for values that are not allowed.
    """
    if isinstance(args.get("adapters"), str):  # serve run MODULE:app adapters=NAME=FOLDER,NAME=FOLDER
        args = {**args, "adapters": args["adapters"].split(",")}
    checked = _checked(Arguments, args, "args")
    room = checked.rows + checked.queue
    deployment = Cloud.options(  # type: ignore[attr-defined]
        max_ongoing_requests=room + _SPARE,
        max_queued_requests=room,
        backpressure_config={"status_code": 429, "retry_after_s": _RETRY_SECONDS},
        graceful_shutdown_timeout_s=checked.drain_seconds + 10.0,
        health_check_period_s=5.0,
    )
    return deployment.bind(checked.model_dump())


def _checked(kind: Any, given: Any, where: str) -> Any:
    try:
        return kind.model_validate(given)
    except ValidationError as failure:
        first = failure.errors()[0]
        at = ".".join(str(part) for part in first["loc"])
        known = ", ".join(kind.model_fields)
        raise ConfigError(f"{where} has '{at}': {first['msg']}; it may hold {known}") from failure
