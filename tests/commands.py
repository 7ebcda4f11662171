"""Running the command line inside the test's own process."""

import sys

from shadowpeft import cli


def call(monkeypatch, capsys, *arguments):
    """Run a command in this process: exit code, standard output, standard error."""
    monkeypatch.setattr(sys, "argv", ["shadowpeft", *map(str, arguments)])
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = stop.code or 0
    out = capsys.readouterr()
    return code, out.out, out.err
