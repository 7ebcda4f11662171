"""Every test can fail: it asserts, expects an error or a warning, or calls a helper of the tests that does."""

import ast
import functools
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
EXPECTS = {"raises", "warns", "deprecated_call", "fail"}


def called(function: ast.AST) -> set[str]:
    """The last part of each name that is called or handed on: ``a.b(c)`` gives ``b`` and ``c``."""
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
    names = [name for call in calls for name in (call.func, *call.args)]
    return {n.attr if isinstance(n, ast.Attribute) else n.id for n in names if isinstance(n, ast.Attribute | ast.Name)}


@functools.cache
def looked_at(function: ast.AST) -> tuple[bool, set[str]]:
    """Whether ``function`` has an assertion of its own, and what it calls."""
    names = called(function)
    own = any(isinstance(node, ast.Assert) for node in ast.walk(function))
    return own or bool(names & EXPECTS) or any(name.startswith("assert_") for name in names), names


def asserts(function: ast.AST, helpers: set[str]) -> bool:
    """Whether ``function`` has an assertion of its own, or calls one of ``helpers``."""
    own, names = looked_at(function)
    return own or bool(names & helpers)


def without_assertion(trees: dict[str, ast.Module]) -> list[str]:
    """``file: test`` for each test that cannot fail by an assertion; a helper counts in its own file or where imported."""
    functions = {
        file: {f.name: f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef)}
        for file, tree in trees.items()
    }
    imported = {
        file: {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
        for file, tree in trees.items()
    }
    asserting: dict[str, set[str]] = {file: set() for file in trees}
    while True:
        shared = set().union(*asserting.values())
        grown = {
            file: {
                name
                for name, function in own.items()
                if not name.startswith("test_") and asserts(function, asserting[file] | shared & imported[file])
            }
            for file, own in functions.items()
        }
        if grown == asserting:
            break
        asserting = grown
    return [
        f"{file}: {name}"
        for file, own in functions.items()
        for name, function in own.items()
        if name.startswith("test_") and not asserts(function, asserting[file] | shared & imported[file])
    ]


def test_every_test_asserts():
    trees = {str(p.relative_to(TESTS)): ast.parse(p.read_text(encoding="utf-8")) for p in TESTS.rglob("*.py")}
    assert len(trees) > 100
    assert without_assertion(trees) == []


@pytest.mark.parametrize(
    ("body", "counts"),
    [
        ("assert x", True),
        ("check(x)", True),
        ("with pytest.raises(ValueError): f()", True),
        ("torch.testing.assert_close(x, y)", True),
        ("f(x)", False),
        ("other(x)", False),  # asserts, but is not imported here
    ],
)
def test_what_counts_as_an_assertion(body, counts):
    trees = {
        "helpers.py": ast.parse("def check(x):\n    deep(x)\ndef deep(x):\n    assert x\ndef other(x):\n    assert x"),
        "test_a.py": ast.parse(f"from helpers import check\ndef f(x):\n    return x\ndef test_a():\n    {body}"),
    }
    assert without_assertion(trees) == ([] if counts else ["test_a.py: test_a"])
