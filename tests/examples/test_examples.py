"""What all examples have in common."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from example_support import EXAMPLES

FILES = sorted(EXAMPLES.glob("*.py"))


def test_each_has_a_test_here() -> None:
    tested = {
        path.name.removeprefix("test_example_")
        for path in Path(__file__).parent.glob("test_example_*.py")
    }
    assert {path.name for path in FILES} == tested
    assert len(tested) >= 7


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_each_says_how_to_start_it(path: Path) -> None:
    text = ast.get_docstring(ast.parse(path.read_text("utf-8")))
    assert text is not None
    assert f"\npython examples/{path.name} --port " in text
