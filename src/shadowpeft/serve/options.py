"""The one declaration of the server's options: the command line, Ray's arguments and the engine's limits derive from it.

No torch here: ``shadowpeft --help`` reads this module.
"""

from __future__ import annotations

import inspect
import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Optional, TypeVar, get_type_hints
from urllib.parse import urlsplit

import typer

from shadowpeft.errors import ConfigError

_ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
T = TypeVar("T")


@dataclass(frozen=True)
class Options:
    """Options of ``shadowpeft serve``; the help of each says what it means."""

    adapters: Annotated[
        list[str], typer.Argument(help="FOLDER or NAME=FOLDER: adapters (cloud: several), or an edge model.")
    ]
    role: Annotated[str, typer.Option(help="cloud (attached) or edge (detached; the router hands on to the cloud).")]
    base: Annotated[
        Optional[str], typer.Option(help="Base model: alias, folder or Hub id. Default: the adapter's own.")
    ] = None
    device: Annotated[
        str, typer.Option(help="Where models run: cpu, cuda, cuda:1, mps; auto: cuda if there is one.")
    ] = "auto"
    host: Annotated[str, typer.Option()] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000
    auth: Annotated[
        bool, typer.Option(help="Take keys from SHADOWPEFT_API_KEYS; --no-auth works on a loopback host only.")
    ] = True
    allow_origin: Annotated[
        Optional[list[str]],
        typer.Option(help="Web pages that may ask, like https://app.example; may be given several times."),
    ] = None
    cloud_url: Annotated[Optional[str], typer.Option(help="Edge: the cloud server.")] = None
    cloud_model: Annotated[str, typer.Option(help="Edge: the model's name there.")] = "default"
    cloud_timeout: Annotated[
        Optional[float],
        typer.Option(
            min=0.1,
            help="Edge: seconds until the cloud's answer is there, or a stream begins, and between its lines. Default: a "
            "stream has 30, a whole answer --answer-seconds.",
        ),
    ] = None
    cloud_delay_ms: Annotated[float, typer.Option(min=0, help="Edge: wait before each request, as a network.")] = 0.0
    when_cloud_down: Annotated[str, typer.Option(help="Edge: local (say so) or error.")] = "local"
    routing: Annotated[
        Optional[str], typer.Option(help="Edge: the calibration. Default: routing.json beside the model, if there.")
    ] = None
    skills: Annotated[
        Optional[str],
        typer.Option(
            help="File of the actions that the model knows, with or without arguments; robot, or robot_tools. Default of an "
            "edge: the calibration's, or the packaged 34."
        ),
    ] = None
    free_actions: Annotated[
        bool, typer.Option("--free-actions", help="Edge: answer freely, where the device would choose a known action.")
    ] = False
    vote: Annotated[
        bool,
        typer.Option("--vote", help="Cloud: an adapter's own shadow weighs the action or call that an answer begins with."),
    ] = False
    hint: Annotated[
        bool, typer.Option("--hint", help="Edge: unsure of arguments alone, ask the cloud for the tool it is sure of.")
    ] = False
    versions: Annotated[Optional[str], typer.Option(help="Folder whose sub-folders may be swapped in.")] = None
    system: Annotated[
        Optional[str],
        typer.Option(help="System message of chats that bring none. Default: that of each model's training; '': none."),
    ] = None
    rows: Annotated[int, typer.Option(min=1, help="Requests that run at the same time.")] = 16
    batches: Annotated[
        int, typer.Option(min=1, help="Forward passes a step, where rows differ so much in length that one is slower.")
    ] = 4
    queue: Annotated[int, typer.Option(min=1, help="Requests that wait; more are refused with 429.")] = 64
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Longest prompt.")] = 4096
    new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 4096
    default_tokens: Annotated[
        Optional[int],
        typer.Option(
            min=1,
            help="Longest answer where a request names no length. Default: as --new-tokens; on the device 256, then the cloud.",
        ),
    ] = None
    answer_seconds: Annotated[
        float, typer.Option(min=0.1, help="Time from a request to the end of its answer; then it is cut, and says so.")
    ] = 120.0
    speculative: Annotated[
        bool,
        typer.Option("--speculative", help="Cloud: shadows draft, where that is faster; a request may say otherwise."),
    ] = False
    drain_seconds: Annotated[float, typer.Option(min=0, help="Time to finish what runs at shutdown.")] = 30.0

    @property
    def named(self) -> dict[str, str]:
        """The adapters by name; see :func:`parse_adapters`."""
        return parse_adapters(self.adapters)

    def check(self) -> None:
        """Raises:
        ConfigError: for options that contradict each other, or name what is not there.
        """
        if self.role not in ("cloud", "edge"):
            raise ConfigError(f"role is '{self.role}' but must be cloud or edge")
        to_cloud = ("cloud_model", "cloud_timeout", "cloud_delay_ms", "hint")
        stray = self._given("cloud_url", "routing", "free_actions", "when_cloud_down", *to_cloud)
        if self.role == "cloud" and stray:
            raise ConfigError(f"{' and '.join(stray)}: only an edge has this; leave it out or set --role edge")
        stray = self._given(*to_cloud)
        if self.role == "edge" and stray and not self.cloud_url:
            raise ConfigError(
                f"{' and '.join(stray)}: this is about the cloud but there is no --cloud-url; give it, or leave this out"
            )
        if self.role == "edge" and self.speculative:
            raise ConfigError(
                "--speculative belongs to the cloud, whose shadows draft; leave it out or set --role cloud"
            )
        for origin in self.allow_origin or []:
            if not re.fullmatch(r"https?://[^/\s*]+", origin):
                raise ConfigError(
                    f"--allow-origin is '{origin}' but must be one page's scheme, host and port, like https://app.example:8443"
                )
        if self.cloud_url and not re.fullmatch(r"https?://[^/\s]+(/.*)?", self.cloud_url):
            raise ConfigError(f"--cloud-url is '{without_password(self.cloud_url)}' but must be like http://host:8000")
        if self.cloud_url and self._is_own(self.cloud_url):
            raise ConfigError(
                f"--cloud-url is '{without_password(self.cloud_url)}', which is this server's own address "
                f"({self.host}:{self.port}); give the cloud's, or another --port"
            )
        if self.role == "edge" and len(self.named) > 1:
            raise ConfigError(f"{len(self.named)} adapters were given but an edge server has one; start one for each")
        if self.vote and self.skills is None:
            raise ConfigError("--vote weighs the actions of --skills, which was not given; name them, or leave --vote out")
        if self.role == "edge" and self.vote:
            raise ConfigError(
                "--vote belongs to the cloud, since the shadow is all that an edge has; leave it out or set --role cloud"
            )
        if self.when_cloud_down not in ("local", "error"):
            raise ConfigError(f"when-cloud-down is '{self.when_cloud_down}' but must be local or error")
        if self.versions and not Path(self.versions).is_dir():
            raise ConfigError(f"the --versions folder '{self.versions}' does not exist")
        if self.default_tokens is not None and self.default_tokens > self.new_tokens:
            raise ConfigError(
                f"--default-tokens is {self.default_tokens} but --new-tokens allows {self.new_tokens}; lower one or raise the "
                "other"
            )

    def _given(self, *names: str) -> list[str]:
        """Those of the options that are not at their default, as they are written."""
        return ["--" + name.replace("_", "-") for name in names if getattr(self, name) != getattr(Options, name)]

    def _is_own(self, url: str) -> bool:
        """Whether a URL leads to this server, as far as its text tells: a loop through a name is found by the first request."""
        try:
            parts = urlsplit(url)
            port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        except ValueError as error:  # no port
            raise ConfigError(f"--cloud-url is '{without_password(url)}' but must be like http://host:8000") from error
        host = (parts.hostname or "").lower()
        if port != self.port:
            return False
        everywhere = self.host in ("0.0.0.0", "::")
        names = ("localhost" in (host, self.host) or everywhere) and is_loopback(host)
        return host == self.host or (names and (everywhere or self.on_loopback))

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine reaches the server."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether a name or address means this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def without_password(url: str) -> str:
    """The URL for logs and messages."""
    before, at, after = url.rpartition("@")
    scheme, slashes, _ = before.rpartition("://")
    return f"{scheme}{slashes}***@{after}" if at else url


def parse_adapters(given: list[str]) -> dict[str, str]:
    """``NAME=FOLDER`` or ``FOLDER`` (called ``default``) to name -> folder.

    Raises:
        ConfigError: if two have one name.
    """
    named: dict[str, str] = {}
    for item in given:
        name, equals, folder = item.partition("=")
        name, folder = (name, folder) if equals and _ADAPTER_NAME.fullmatch(name) else ("default", item)
        if name in named:
            raise ConfigError(f"two adapters are called '{name}'; write NAME=FOLDER for each")
        named[name] = folder
    return named


def command_of(kind: Callable[..., T]) -> Callable[[Callable[[T], None]], Callable[..., None]]:
    """Make ``run(options)`` a typer command whose parameters are the fields of the dataclass ``kind``."""

    def decorate(run: Callable[[T], None]) -> Callable[..., None]:
        def command(**given: Any) -> None:
            run(kind(**given))

        command.__doc__, command.__name__ = run.__doc__, run.__name__
        command.__annotations__ = get_type_hints(kind, include_extras=True)
        parameters = inspect.signature(kind).parameters.values()
        command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [p.replace(annotation=command.__annotations__[p.name]) for p in parameters]
        )
        return command

    return decorate
