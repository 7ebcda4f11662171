"""``shadowpeft generate`` and ``shadowpeft chat``."""

from __future__ import annotations

import json
import math
from typing import Annotated, Any, Optional

import typer

from shadowpeft.apps.common import (
    MODES,
    check_drafts,
    in_mode,
    load_tokenizer_of,
    mode_of,
    pick_device,
    placed,
    quiet_libraries,
    system_message,
)
from shadowpeft.apps.options import (
    AdapterOrEdge,
    Base,
    Device,
    Json,
    Mode,
    NewTokens,
    Seed,
    Speculative,
    System,
    Temperature,
    Vote,
)
from shadowpeft.errors import ConfigError, DataError
from shadowpeft.terminal import terminal

GREEDY = 1e-30
"""Below it a logit divided by the temperature is beyond float32; the likeliest token is all that could be drawn."""


def opened(
    adapter: str, base: str | None, device: str, temperature: float, seed: int
) -> tuple[Any, Any, dict[str, Any]]:
    """The adapted model on its device, its tokenizer, and how to sample; :func:`prepared` comes before."""
    from transformers import set_seed

    import shadowpeft
    from shadowpeft.runtime import prepare_cpu
    from shadowpeft.serve.loading import check_answers, is_edge_folder, load_edge

    prepare_cpu()
    where = pick_device(device)
    set_seed(seed)
    check_answers(adapter)
    if is_edge_folder(adapter):
        if base is not None:
            raise ConfigError(f"--base is the base of an adapter but '{adapter}' is an edge model; leave it out")
        model, tokenizer = load_edge(adapter)
    else:
        model, tokenizer = shadowpeft.load(adapter, base), load_tokenizer_of(adapter, base)
    model = placed(model, where)
    return model, tokenizer, {} if temperature < GREEDY else {"do_sample": True, "temperature": temperature}


def prepared(mode: str, speculative: bool, temperature: float) -> None:
    """What needs no model is checked before any library is imported, and these are quiet then.

    Raises:
        ConfigError: if there is no such mode, nothing drafts in it, or the temperature is negative, infinite or no number.
    """
    if not 0 <= temperature < math.inf:
        raise ConfigError(f"temperature is {temperature} but must be a number from 0 up")
    if mode not in MODES:
        raise ConfigError(f"mode is '{mode}' but must be one of {', '.join(MODES)}")
    if speculative:
        check_drafts([mode])
    quiet_libraries()


def drafts_of(wanted: bool) -> dict[str, Any]:
    """What ``generate`` is told, with counts of its own."""
    if not wanted:
        return {}
    from shadowpeft.hf.forward.speculation import Speculation

    return {"speculative": Speculation()}


def generate(
    adapter: AdapterOrEdge,
    prompt: Annotated[str, typer.Argument(help="What to ask.")],
    mode: Mode = None,
    base: Base = None,
    system: System = None,
    max_new_tokens: NewTokens = 64,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    device: Device = "auto",
    speculative: Speculative = False,
    skills: Annotated[
        Optional[str],
        typer.Option(
            help="Start the answer with one of these actions: a file of names or of tools, robot, or robot_tools."
        ),
    ] = None,
    vote: Vote = False,
    as_json: Json = False,
) -> None:
    """Answer one prompt."""
    from shadowpeft.data.robot_tools import tools_named

    mode = mode_of(adapter, mode)
    prepared(mode, speculative, temperature)
    known = None if skills is None else tools_named(skills)
    if vote and (mode != "attached" or speculative or known is None):
        raise ConfigError(
            "--vote needs --skills and --mode attached, whose answers the shadow weighs, without --speculative; leave it out, "
            "or give these"
        )
    system = system_message(adapter, system)
    model, tokenizer, sampling = opened(adapter, base, device, temperature, seed)
    from shadowpeft.apps.second_opinion import beside
    from shadowpeft.constrained import choose
    from shadowpeft.data.action_trie import ActionTrie
    from shadowpeft.data.actions import parser
    from shadowpeft.data.call_guide import Engine
    from shadowpeft.data.calls import CallParser
    from shadowpeft.generate import answer
    from shadowpeft.vote import votes

    plain = known is not None and known.plain
    opinion = beside(adapter, known.names) if known is not None and plain and mode == "detached" else None
    trie = ActionTrie.of(tokenizer, known.names, opinion) if known is not None and (plain or vote) else None
    actions: Any = trie
    if known is not None and not plain:
        rows = model.config.get_text_config().vocab_size
        actions = Engine(tokenizer, rows).calls(known, hand_on=not vote, optional=vote)
    if vote and trie is not None:
        actions = votes(model, tokenizer, [prompt], trie, calls=None if plain else actions, system=system)
        trie = None  # an answer in words has no action
    drafts = drafts_of(speculative)
    with in_mode(model, mode) as runner:
        options: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "system": system,
            "actions": actions,
            **sampling,
            **drafts,
        }
        reply = answer(runner, tokenizer, [prompt], **options)[0]
        chosen = None if trie is None else choose(runner, tokenizer, [prompt], trie, system=system)[0]
    result: dict[str, Any] = {
        "mode": mode,
        "text": reply.text,
        "tokens": reply.tokens,
        "seconds": round(reply.seconds, 4),
    }
    if chosen is not None and known is not None:
        probabilities = chosen.probabilities or {}
        action = parser(known.names)(reply.text)
        result |= {"action": action, "probability": probabilities[str(action)], "probabilities": probabilities}
        result |= {} if opinion is None else {"second_opinion": True}
    if known is not None and known.plain and vote:
        result["action"] = parser(known.names)(reply.text)
    if known is not None and not known.plain:
        found = CallParser(known).found(reply.text)
        words = vote and not reply.text.lstrip().startswith("[")
        if found is None and not words:  # it is held to calls, so it was cut
            raise ConfigError(
                f"max_new_tokens is {max_new_tokens} but the calls do not end within so many tokens ({reply.text!r}); raise it"
            )
        called = [] if found is None else [{"name": call.name, "arguments": call.arguments} for call in found.calls]
        result |= {"action": None if found is None else found.text, "calls": called}
    if drafts:
        result["speculation"] = drafts["speculative"].counts.summary()
    if as_json:
        print(json.dumps(result, ensure_ascii=False))
        return
    print(reply.text)
    if drafts:
        terminal(stderr=True).print(str(drafts["speculative"].counts), highlight=False)
    if chosen is not None:
        weighed = "" if opinion is None else ", with the second opinion of its calibration"
        terminal(stderr=True).print(f"{result['action']}: probability {result['probability']:.4f}{weighed}", highlight=False)


def chat(
    adapter: AdapterOrEdge,
    mode: Mode = None,
    base: Base = None,
    system: System = None,
    max_new_tokens: NewTokens = 256,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    device: Device = "auto",
    speculative: Speculative = False,
) -> None:
    """Talk to the model in the terminal."""
    mode = mode_of(adapter, mode)
    prepared(mode, speculative, temperature)
    system = system_message(adapter, system)
    model, tokenizer, sampling = opened(adapter, base, device, temperature, seed)
    from rich.text import Text

    from shadowpeft.generate import stream

    console = terminal()
    history: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    console.print(Text(mode, style="bold"), " (/mode attached|detached|base, /reset, /quit)")
    while True:
        try:
            text = console.input(Text("you ", style="bold cyan")).strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if text == "/quit":
            return
        if text == "/reset":
            history = history[:1] if system else []
            continue
        if text.split(maxsplit=1)[:1] == ["/mode"]:
            wanted = text.removeprefix("/mode").strip()
            if not wanted:
                console.print(f"mode is '{mode}' and may be one of {', '.join(MODES)}", highlight=False)
                continue
            try:
                with in_mode(model, mode_of(adapter, wanted)):
                    mode = wanted
            except ConfigError as error:
                console.print(str(error))
            continue
        if not text:
            continue
        if text.startswith("/") and len(text.split()) == 1:
            console.print(f"there is no command {text}; there are /mode, /reset and /quit", highlight=False, markup=False)
            continue
        history.append({"role": "user", "content": text})
        console.print(Text(f"{mode} ", style="bold"), end="")
        pieces = []
        drafts = drafts_of(speculative and mode == "attached")
        try:
            with in_mode(model, mode) as runner:
                for piece in stream(runner, tokenizer, history, max_new_tokens=max_new_tokens, **sampling, **drafts):
                    print(piece, end="", flush=True)
                    pieces.append(piece)
        except DataError as error:  # nothing was said yet, and what was said before stays
            console.print(f"{error}; your message was left out, and /reset begins anew", highlight=False, markup=False)
            history.pop()
            continue
        except KeyboardInterrupt:  # of the answer, not of the talk: what was said stays
            console.print(Text(" (stopped)", style="dim"), end="" if pieces else "\n")
            if not pieces:
                history.pop()
                continue
        print()
        if drafts:
            console.print(Text(str(drafts["speculative"].counts), style="dim"))
        history.append({"role": "assistant", "content": "".join(pieces)})
