"""The wheel, installed where no checkout is: what is in it, and that it works. pytest -m wheel; needs `build`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("build")
pytestmark = [pytest.mark.wheel, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "shadowpeft"
SUITE = ["test_ops.py", "test_core.py", "test_persistence.py", "test_detach.py", "test_presets.py", "test_robot_data.py"]
"""Tests that see no file of the repository but those beside them."""

LIBRARIES = [
    path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and not Path(path).is_relative_to(ROOT)
]


def run(*command, cwd, **environment):
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**clean, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Wheel and sdist."""
    folder = tmp_path_factory.mktemp("dist")
    given = {"PIP_CONSTRAINT": str(ROOT / "constraints.txt"), "PYTHONPATH": os.pathsep.join(LIBRARIES)}
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT, cwd=folder, **given)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def python(built, tmp_path_factory):
    """An environment with the wheel; its libraries are those of this one, since what they are is not tested here."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "--no-deps", "--disable-pip-version-check", built[0], cwd=folder)
    (own,) = folder.glob("lib/python*/site-packages")
    libraries = [sysconfig.get_path("purelib"), *LIBRARIES]
    (own / "libraries.pth").write_text("\n".join(libraries) + "\n")  # after the wheel's own folder
    return python


def test_the_wheel_has_the_package_whole_and_nothing_else(built):
    with zipfile.ZipFile(built[0]) as wheel:
        names = set(wheel.namelist())
        info = next(name for name in names if name.endswith("METADATA"))
        metadata = wheel.read(info).decode()
    ours = {f"shadowpeft/{p.relative_to(PACKAGE)}" for p in PACKAGE.rglob("*") if p.is_file() and p.suffix != ".pyc"}
    assert {name for name in names if ".dist-info/" not in name} == ours
    assert any(name.endswith("rows/train_normal.jsonl.gz") for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "Requires-Python: >=3.10" in metadata
    assert re.search(r"^Version: \d+\.\d+\.\d+", metadata, re.M)


def test_the_commands_work_where_no_checkout_is(python, tmp_path):
    said = run(python, "-c", "import shadowpeft; print(shadowpeft.__file__)", cwd=tmp_path).strip()
    assert Path(said).is_relative_to(python.parents[1])
    command = python.parent / "shadowpeft"
    assert run(command, "--version", cwd=tmp_path).startswith("shadowpeft ")
    assert "train" in run(command, "--help", cwd=tmp_path)
    said = run(
        python, "-c", "from shadowpeft.data.robot import SKILLS; from shadowpeft.train.rows import robot_rows; "
        "print(len(SKILLS), len(list(robot_rows('train'))))", cwd=tmp_path
    )
    skills, rows = map(int, said.split())
    assert skills == 34
    assert rows > 3000


def test_tests_of_the_sdist_pass_on_the_installed_wheel(built, python, tmp_path):
    with tarfile.open(built[1]) as sdist:
        sdist.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    for name in ("Makefile", "mkdocs.yml", "Dockerfile", "constraints.txt", "scripts", "benchmarks", "docs", "examples"):
        assert (folder / name).exists()
    (folder / "src").rename(tmp_path / "source")  # whatever is imported is the wheel's
    files = [f"tests/unit/{name}" for name in SUITE]
    said = run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, cwd=folder)
    assert re.search(r"\[100%\]", said)
