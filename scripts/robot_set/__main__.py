"""Writes the rows of the packaged robot set from its seed files: python -m scripts.robot_set

Run it after a change to a seed file and commit what it writes. ``--seed`` with ``--folder`` makes another drawing of wrappers
and replies over the same families; the packaged set is seed 0.
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

from scripts.robot_set.compose import build

from shadowpeft.data.robot import ROWS, json_lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=ROWS)
    options = parser.parse_args()
    if options.seed != 0 and options.folder == ROWS:
        parser.error("the packaged set is seed 0; name another --folder")
    options.folder.mkdir(parents=True, exist_ok=True)
    for split, rows in build(options.seed).items():
        content = json_lines(rows).encode()
        # mtime=0: the same rows give the same file
        (options.folder / f"{split}.jsonl.gz").write_bytes(gzip.compress(content, mtime=0))
        print(f"{split}: {len(rows)} rows")


if __name__ == "__main__":
    main()
