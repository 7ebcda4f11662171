"""The options of the system test."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from scripts.system_test import __doc__ as description

from experiments import system
from shadowpeft.errors import ConfigError, ShadowPeftError

METHODS = ("shadow", "lora", "dora")


def run(main: Callable[[], None]) -> None:
    """Run a script; what it refuses is one line, and the exit status 2 for wrong usage, else 1."""
    try:
        main()
    except ShadowPeftError as failure:
        print(f"error: {failure}", file=sys.stderr)
        sys.exit(2 if isinstance(failure, ConfigError) else 1)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options.

    Raises:
        ConfigError: for delays that are negative or twice, or a calibration both given and to be made.
    """
    parser = argparse.ArgumentParser(
        prog="python -m scripts.system_test",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("system-output"))
    parser.add_argument("--base", help="alias, folder or Hub id; default: the adapters' own, to train on smollm2-135m")
    for name in METHODS:
        parser.add_argument(f"--{name}", help="folder of an adapter; default: train one")
        parser.add_argument(f"--{name}-rate", type=float, default=3e-3, help="learning rate (default: 3e-3)")
    parser.add_argument("--train-steps", type=int, default=350, help="of each adapter that is trained (default: 350)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=256, help="of a training row, in tokens (default: 256)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--routing", help="a calibration; default: routing.json beside the shadow's adapter, if it is there"
    )
    parser.add_argument(
        "--calibrate", type=float, metavar="TARGET", help="make one: share of wrong answers on the device"
    )
    parser.add_argument("--calibration-rows", type=int, help="validation requests to calibrate on (default: all)")
    parser.add_argument("--requests", type=int, help="test requests (default: all 324)")
    parser.add_argument("--split", choices=("test", "test_large", "validation"), default="test")
    parser.add_argument(
        "--delays", type=float, nargs="+", default=[0, 50, 200], metavar="MS", help="(default: 0 50 200)"
    )
    parser.add_argument("--systems", nargs="+", choices=list(system.SYSTEMS), default=list(system.COMPARED))
    parser.add_argument("--merged", action="store_true", help="fold LoRA and DoRA into their bases before serving them")
    parser.add_argument("--warmup", type=int, default=3, help="rounds that do not count (default: 3)")
    parser.add_argument("--max-tokens", type=int, default=32, help="of an answer (default: 32)")
    parser.add_argument("--page", action="store_true", help="a picture of the edge's page, page.png; needs a Chromium")
    parser.add_argument("--threads", type=int, help="of each server (default: all cores)")
    options = parser.parse_args(arguments)
    if min(options.delays) < 0 or len(set(options.delays)) < len(options.delays):
        raise ConfigError(f"--delays is {options.delays} but must be different numbers from 0 up, in milliseconds")
    if options.routing is not None and options.calibrate is not None:
        raise ConfigError("--routing and --calibrate are both set; give a calibration or have one made")
    return options
