"""Running the command line inside the test's own process."""

import sys

from shadowpeft import cli


def edit(file, instead):
    """Replace parts of a file, each of which stands there once."""
    content = file.read_text(encoding="utf-8")
    for there, here in instead.items():
        assert content.count(there) == 1, there
        content = content.replace(there, here)
    file.write_text(content, encoding="utf-8")


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
