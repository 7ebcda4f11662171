"""The example in docs/adapters.md runs as it stands."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "adapters.md"


def test_the_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert code.count("assert") >= 5
    exec(compile(code, str(PAGE), "exec"), {})
    assert (tmp_path / "better" / "code" / "adapter_model.safetensors").is_file()
