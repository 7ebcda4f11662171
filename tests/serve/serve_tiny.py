"""A server of tiny models as a process of its own: ``serve_tiny.py cloud|edge PORT VERSIONS [CLOUD_URL [SECONDS]]``.

The edge waits ``SECONDS`` for a line of the cloud's stream, and three times as long for a whole answer.
"""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import torch


def main(role: str, port: int, versions: str, cloud_url: str | None, seconds: float | None) -> None:
    from chatbase import chat_tokenizer
    from serving import attached, detached
    from shadowpeft.data.robot import parse_action
    from shadowpeft.serve import connections
    from shadowpeft.serve.client import Breaker, CloudClient
    from shadowpeft.serve.cloud_role import CloudRole
    from shadowpeft.serve.edge_role import EdgeRole
    from shadowpeft.serve.engine import Engine, EngineLimits
    from shadowpeft.serve.guard import Keys
    from shadowpeft.serve.listener import Listener
    from shadowpeft.serve.router import Router
    from shadowpeft.serve.server import Settings, build
    from shadowpeft.serve.versions import Version

    torch.set_num_threads(1)
    keys = Keys(("user-key-0123456789",), ("admin-key-0123456789",))
    limits = EngineLimits(max_num_seqs=16, queue=32)
    if role == "cloud":
        backend = attached(max_position_embeddings=512)
        backend.versions["late"] = [Version.of(str(Path(versions) / "v1"))]
        made = CloudRole(Engine(backend, limits), system=None, default_tokens=8)
    else:
        times = {"timeout": 20.0} if seconds is None else {"timeout": seconds, "answer_seconds": 3 * seconds}
        link = (
            None
            if cloud_url is None
            else CloudClient(cloud_url, "user-key-0123456789", breaker=Breaker(pause=0.5), **times)
        )

        def parse(text: str) -> str | None:  # the tiny shadow speaks no actions: half of what it says counts as one
            return parse_action(text) or (None if not text or ord(text[0]) % 2 else "Sit")

        engine = Engine(detached(max_position_embeddings=512), limits)
        made = EdgeRole(engine, Router(parse), link, "late", system=None, default_tokens=8)
    assert chat_tokenizer().pad_token_id is not None
    app = build(made, Settings(keys, Path(versions)))

    class SmallBuffers(connections.TimelyProtocol):
        """The system keeps little of what a client does not read, so that tiny answers are held back as long ones are."""

        def connection_made(self, transport):
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
            super().connection_made(transport)

    connections.TimelyProtocol = SmallBuffers
    listener = Listener("127.0.0.1", port)
    listener.bind()
    connections.serve(app, listener, 20)


if __name__ == "__main__":
    main(
        sys.argv[1],
        int(sys.argv[2]),
        sys.argv[3],
        sys.argv[4] if len(sys.argv) > 4 else None,
        float(sys.argv[5]) if len(sys.argv) > 5 else None,
    )
