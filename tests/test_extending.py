"""docs/extending.md: what it shows works, as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from forwardtune.method.rules import RULES
from forwardtune.noise import DIRECTIONS

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"


def test_every_block_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 6
    scope: dict[str, Any] = {"__name__": "extending"}
    try:
        for block in blocks:
            exec(compile(block, str(PAGE), "exec"), scope)
        assert scope["loss"] < 0.5
    finally:
        for known, name in ((RULES, "normalised_sgd"), (DIRECTIONS, "four_values")):
            known.pop(name, None)
