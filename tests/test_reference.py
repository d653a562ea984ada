"""docs/reference.md is made of the commands themselves."""

import runpy
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def test_the_reference_is_that_of_these_commands():
    made = runpy.run_path(str(DOCS / "reference.py"))["page"]()
    assert made == (DOCS / "reference.md").read_text(encoding="utf-8"), "run docs/reference.py"
