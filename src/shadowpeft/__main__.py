"""``python -m shadowpeft``: the command line."""

from __future__ import annotations

from shadowpeft.cli import main

if __name__ == "__main__":
    main()
