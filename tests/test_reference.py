"""The pages of commands and requests are made of the commands themselves."""

import runpy
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def test_the_reference_is_that_of_these_commands():
    made = runpy.run_path(str(DOCS / "reference.py"))["pages"]()
    pages = [*(DOCS / "reference" / "commands").iterdir(), DOCS / "reference" / "python" / "requests.md"]
    there = {str(path.relative_to(DOCS / "reference")): path.read_text(encoding="utf-8") for path in pages}
    assert made == there, "run docs/reference.py"
