"""What a command prints: texts in whole lines, tables in the width that there is."""

from pathlib import Path

from rich.table import Table
from rich.text import Text

from shadowpeft.terminal import terminal

PATH = "/" + "/".join(["a-long-folder"] * 20) + "/file.jsonl"


def test_a_path_is_not_broken_at_the_width_of_a_terminal_that_nobody_has(capsys):
    console = terminal(stderr=True)
    assert console.width < len(PATH)
    console.print(f"'{PATH}' is skipped")
    console.print("warning:", Text(PATH, style="red"))
    console.print("read", 3, Path(PATH))
    terminal().print(PATH)
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [f"'{PATH}' is skipped", f"warning: {PATH}", f"read 3 {PATH}"]
    assert captured.out == PATH + "\n"


def test_a_table_has_the_width_that_there_is(capsys):
    console, table = terminal(), Table("what", "where")
    table.add_row("a file", "word " * 100)
    console.print(table)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= console.width
    assert sum(line.count("word") for line in lines) == 100


def test_markup_and_pictures_are_text(capsys):
    terminal().print("[red]file[/red] :dog: 3")
    assert capsys.readouterr().out == "[red]file[/red] :dog: 3\n"
