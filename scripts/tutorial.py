"""Follow docs/tutorial.md from an empty folder: run every command of the page as it stands, time each, keep what it said.

    python -m scripts.tutorial FOLDER                    # all of it, from the clone on
    python -m scripts.tutorial FOLDER --here             # with this checkout and this environment in place of step 1
    python -m scripts.tutorial FOLDER --first 3 --last 3 # a part, where another call has done what precedes it

``FOLDER/times.json`` holds seconds by step and command; ``python -m scripts.tutorial FOLDER --record`` makes
docs/records/tutorial.json of it, and the numbers on the page.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "tutorial.md"
RECORD = ROOT / "docs" / "records" / "tutorial.json"
_BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_REPORTED = ("target", "level", "tested", "commands", "commands_kept", "open_requests", "open_handed_on", "wrong_share")
_WITHOUT = ("right", "commands_kept")  # of the device without its second opinion
_READY = (
    "for i in $(seq 600); do curl --silent --fail --output /dev/null http://127.0.0.1:{port}/readyz && break; "
    "kill -0 $! || exit 1; sleep 0.5; done"
)


def steps(text: str) -> dict[int, list[str]]:
    """Step -> its commands: a line of bash is one, a block of Python another (it begins with a newline)."""
    found: dict[int, list[str]] = {}
    for number, body in re.findall(r"^## (\d+)\. [^\n]*\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE):
        commands: list[str] = []
        for kind, code in _BLOCK.findall(body):
            commands += [f"\n{code}"] if kind == "python" else code.splitlines()
        found[int(number)] = commands
    return found


def as_script(commands: dict[int, list[str]], folder: Path, ports: dict[str, str], *, here: bool) -> str:
    """A bash script of the commands in one shell, each timed; what each says goes to ``FOLDER/said``."""
    first = min(commands)
    lines = ["set -e", f"cd {shlex.quote(str(folder))}", f"mkdir -p {shlex.quote(str(folder / 'said'))}", "servers="]
    lines += ["trap '[ -z \"$servers\" ] || kill $servers' EXIT"]
    if here:
        lines += ["mkdir -p shadowpeft", f"ln -sfn {shlex.quote(str(ROOT / 'examples'))} shadowpeft/examples"]
    if first > 2:
        lines += ["cd radio"]
    elif first == 2 or here:
        lines += ["cd shadowpeft"]
    if first > 1 and not here:
        lines += [f"source {shlex.quote(str(folder / 'shadowpeft/.venv/bin/activate'))}"]
    for step, several in commands.items():
        if here and step == 1:
            continue
        for place, command in enumerate(several):
            said = shlex.quote(str(folder / "said" / f"{step}-{place}.txt"))
            command = command.replace("ADDRESS_OF_THIS_REPOSITORY", shlex.quote(str(ROOT)))
            for there, free in ports.items():
                command = command.replace(there, free)
            serves = re.match(r"shadowpeft serve .*--port (\d+)", command)
            if serves:
                command = f"{command} &"
                after = f'servers="$servers $!"; {_READY.format(port=serves[1])}'
            else:
                command, after = (f"python -c {shlex.quote(command)}" if command[0] == "\n" else command), ""
            lines += ["began=$EPOCHREALTIME", f"{{ {command}\n{after}\n}} > {said} 2>&1"]
            lines += [f'echo "{step} {place} $began $EPOCHREALTIME" >> {shlex.quote(str(folder / "times.txt"))}']
    return "\n".join(lines) + "\n"


def follow(folder: Path, first: int, last: int, ports: dict[str, str], *, here: bool) -> dict[str, dict[str, float]]:
    """Run the steps ``first`` to ``last``; returns step -> command -> seconds.

    Raises:
        RuntimeError: with what the command said, if one fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "times.txt").unlink(missing_ok=True)
    commands = {n: each for n, each in steps(PAGE.read_text(encoding="utf-8")).items() if first <= n <= last}
    script = as_script(commands, folder, ports, here=here)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=False)
    found: dict[str, dict[str, float]] = {}
    for line in (folder / "times.txt").read_text().splitlines() if (folder / "times.txt").exists() else []:
        step, place, began, ended = line.split()
        command = commands[int(step)][int(place)]
        name = "compare with the classifier" if command[0] == "\n" else command
        found.setdefault(step, {})[name] = round(float(ended.replace(",", ".")) - float(began.replace(",", ".")), 1)
    if done.returncode:
        newest = max((folder / "said").iterdir(), key=lambda file: file.stat().st_mtime)
        raise RuntimeError(f"a command of step {newest.stem} failed: {newest.read_text()[-2000:]}{done.stderr[-500:]}")
    return found


def record(folder: Path, note: str) -> dict[str, Any]:
    """What a whole pass took and reached."""
    times = json.loads((folder / "times.json").read_text(encoding="utf-8"))
    routing = json.loads((folder / "radio" / "run" / "adapter" / "routing.json").read_text(encoding="utf-8"))
    last = max(steps(PAGE.read_text(encoding="utf-8")))
    rival = (folder / "said" / f"{last}-0.txt").read_text(encoding="utf-8").strip().splitlines()[-1]
    minutes = {step: round(sum(each.values()) / 60, 1) for step, each in times.items()}
    answers = [
        json.loads((folder / "said" / f"7-{place}.txt").read_text(encoding="utf-8"))["shadowpeft"] for place in (2, 3)
    ]
    calibration = {key: routing["report"][key] for key in _REPORTED}
    calibration["without"] = {key: routing["report"]["second_opinion"]["without"][key] for key in _WITHOUT}
    alone = routing["report"]["without_confidence"]  # every known action kept
    right = alone["answered_on_device"] - alone["wrong_on_device"]
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} processor cores, of which one was used",
        "note": note,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "seconds": times,
        "minutes": {**minutes, "training": minutes["3"], "whole": round(sum(minutes.values()), 1)},
        "calibration": calibration,
        "answers": answers,
        "rival": rival,
        "device": f"{right} of {calibration['commands']}",
    }


def blocks(found: dict[str, Any]) -> dict[str, str]:
    """What the page says of a record, by the name of the place."""
    minutes, calibration, tested = found["minutes"], found["calibration"], found["calibration"]["tested"]
    install = sum(seconds for name, seconds in found["seconds"]["1"].items() if name.startswith("pip ")) / 60
    kept, commands, without = calibration["commands_kept"], calibration["commands"], calibration["without"]
    device, cloud = found["answers"]
    return {
        "minutes": f"It took {minutes['whole']:.0f} minutes from an empty folder, {minutes['training']:.0f} of them training "
        f"and {install:.0f} installing ({found['machine']}; {found['note']}). Writing sentences of your own comes on top. "
        "[Record](records/tutorial.json), made by `python -m scripts.tutorial`, which runs every command of this page.\n",
        "reached": f"The radio's device keeps {kept:.0%} of {commands} held-out commands, {tested['wrong']} of these "
        f"{tested['kept']} wrong, and hands on {calibration['open_handed_on']:.0%} of {calibration['open_requests']} open "
        f"requests. Without the second opinion it would keep {without['commands_kept']:.0%}. These are the rows that chose the "
        "threshold, so they flatter.\n",
        "rival": f"On the radio's held-out sentences: {found['rival']}; the device before any handing on: {found['device']}, "
        f"{without['right']} without its second opinion.\n",
        "answered": f"In the recorded pass the first was answered by the {device['where']} ({device['reason']}), the second by "
        f"the {cloud['where']} ({cloud['reason']}).\n",
    }


def fill(text: str, found: dict[str, Any]) -> str:
    """The page with the record's numbers between its marks."""
    for name, block in blocks(found).items():
        text = re.sub(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m, b=block: m[1] + b + m[2], text, flags=re.DOTALL)
    return text


def main() -> None:
    """Follow the page, or record what following it gave."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--last", type=int, default=8)
    parser.add_argument("--here", action="store_true", help="this checkout and environment in place of step 1")
    parser.add_argument("--ports", nargs=2, default=("8000", "8001"), help="in place of the page's")
    parser.add_argument("--record", metavar="NOTE", help="write the record; say what else the machine did")
    options = parser.parse_args()
    folder = options.folder.resolve()
    if options.record is not None:
        found = record(folder, options.record)
        RECORD.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")
        return
    ports = dict(zip(("8000", "8001"), options.ports, strict=True))
    found = follow(folder, max(options.first, 2) if options.here else options.first, options.last, ports, here=options.here)
    file = folder / "times.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    file.write_text(json.dumps({**before, **found}, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
