"""Options that several commands have, declared once; typer reads them from the signatures of the commands."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Base = Annotated[Optional[str], typer.Option(help="Base model: alias, folder or Hub id. Default: the adapter's own.")]
Adapter = Annotated[str, typer.Argument(help="Folder or Hub id of an adapter.")]
AdapterOrEdge = Annotated[str, typer.Argument(metavar="ADAPTER", help="Folder or Hub id of an adapter, or an edge folder.")]
RunFile = Annotated[str, typer.Argument(metavar="RUN", help="YAML file that describes the run.")]
Overrides = Annotated[
    Optional[list[str]],
    typer.Argument(metavar="[KEY=VALUE]...", help="In the place of the file's, such as training.learning_rate=1e-3."),
]
Mode = Annotated[
    Optional[str], typer.Option("--mode", help="attached (default), detached or base; of an edge folder: detached.")
]
System = Annotated[Optional[str], typer.Option(help="System message. Default: that of the training; an empty one: none.")]
NewTokens = Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")]
Temperature = Annotated[float, typer.Option(help="0: greedy.")]
Device = Annotated[str, typer.Option(help="Where models run: cpu, cuda, cuda:1, mps; auto: cuda if there is one.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed for sampling.")]
Vote = Annotated[
    bool,
    typer.Option("--vote", help="Attached: let the adapter's own shadow weigh the action or call that an answer begins with."),
]
Speculative = Annotated[
    bool, typer.Option("--speculative", help="Let the shadow draft, where that is faster; answers stay what they are.")
]
