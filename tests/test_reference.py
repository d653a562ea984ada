"""The pages of commands and requests are made of the commands themselves, and the pictures of the concepts by their script."""

import runpy
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def test_the_reference_is_that_of_these_commands():
    made = runpy.run_path(str(DOCS / "reference.py"))["pages"]()
    pages = [*(DOCS / "reference" / "commands").iterdir(), DOCS / "reference" / "python" / "requests.md"]
    there = {str(path.relative_to(DOCS / "reference")): path.read_text(encoding="utf-8") for path in pages}
    assert made == there, "run docs/reference.py"


def test_the_pictures_are_those_of_their_script():
    made = runpy.run_path(str(DOCS / "pictures.py"))["pictures"]()
    there = {path.name: path.read_text(encoding="utf-8") for path in (DOCS / "concepts").glob("*.svg")}
    assert made == there, "run docs/pictures.py"
