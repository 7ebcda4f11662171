"""The table of tested releases: agrees with pyproject.toml, refuses what is too old, warns once about what is newer."""

import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from scripts import pythons

from shadowpeft import _register, versions
from shadowpeft.errors import VersionError

PROJECT = Path(__file__).parents[2] / "pyproject.toml"


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(versions, "_warned", set())


def pretend(monkeypatch, **found):
    monkeypatch.setattr(versions, "installed", lambda name: found.get(name, versions.TESTED[name].newest))


@pytest.mark.parametrize("package", versions.TESTED)
def test_the_lower_bounds_are_those_of_the_project_file(package):
    bounds = re.findall(rf'"{package}>=([\d.]+)[" ]', PROJECT.read_text(encoding="utf-8"))
    assert set(bounds) == {versions.TESTED[package].oldest}


@pytest.mark.parametrize("package", versions.TESTED)
def test_what_is_installed_here_is_the_newest_tested(package):
    if versions.state(package)[0] == versions.MISSING:
        pytest.skip(f"{package} is not installed")
    assert versions.state(package)[0] == versions.OK


@pytest.mark.parametrize(
    ("package", "found"),
    [("transformers", "5.19.0"), ("transformers", "4.57.1"), ("peft", "0.20.0"), ("torch", "2.5.1+cu124")],
)
def test_an_older_release_is_refused_with_the_remedy(monkeypatch, package, found):
    pretend(monkeypatch, **{package: found})
    oldest = versions.TESTED[package].oldest
    said = f"{package} {re.escape(found)} .* needs {oldest} or newer; run: pip install"
    with pytest.raises(VersionError, match=said) as caught:
        versions.check()
    assert "\n" not in str(caught.value)


def test_a_newer_release_gives_one_warning(monkeypatch):
    pretend(monkeypatch, transformers="5.24.1", peft="0.22.0.dev0")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        versions.check()
        versions.check()
    assert [str(w.message).split(" is ")[0] for w in seen] == ["transformers 5.24.1", "peft 0.22.0.dev0"]
    assert "5.23" in str(seen[0].message)


def test_patch_and_development_releases_count_with_theirs(monkeypatch):
    pretend(monkeypatch, transformers="5.20.0rc1", peft="0.21.9")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        versions.check()
    assert [versions.state(name)[0] for name in ("transformers", "peft")] == [versions.OK] * 2


def test_an_optional_package_is_not_asked_for(monkeypatch):
    monkeypatch.setattr(versions, "installed", lambda name: None if name == "trl" else versions.TESTED[name].newest)
    versions.check()
    assert versions.state("trl") == (versions.MISSING, None)


def test_an_old_release_is_refused_before_anything_is_registered(monkeypatch):
    pretend(monkeypatch, transformers="5.1.0")
    with pytest.raises(VersionError, match=r"transformers 5\.1\.0 is installed but shadowpeft needs 5\.20 or newer"):
        _register._register()


@pytest.mark.slow  # a fresh interpreter imports PEFT
def test_an_old_release_is_refused_when_peft_is_imported():
    code = (
        "import shadowpeft\n"
        "from shadowpeft import versions\n"
        "versions.installed = lambda name: '5.1.0' if name == 'transformers' else versions.TESTED[name].newest\n"
        "try:\n"
        "    import peft\n"
        "except ImportError as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("VersionError transformers 5.1.0 is installed but shadowpeft needs 5.20 or newer"), (
        done
    )


def test_what_a_report_of_pytest_counts(tmp_path):
    report = tmp_path / "report.xml"
    cases = ["", "", "<failure/>", "<error/>", "<skipped/>"]
    lines = "".join(f'<testcase classname="tests.unit.test_a" name="t{i}">{x}</testcase>' for i, x in enumerate(cases))
    report.write_text(f"<testsuites><testsuite>{lines}</testsuite></testsuites>", encoding="utf-8")
    failed = ["tests.unit.test_a::t2", "tests.unit.test_a::t3"]
    assert pythons.counted(report) == {"passed": 2, "skipped": 1, "failed": failed}
