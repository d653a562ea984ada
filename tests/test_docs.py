"""The documentation: each page is in the navigation, its links exist, its lines are short, and every public name is in the reference."""

import re
from pathlib import Path

import pytest
import yaml

import tailwise

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {str(path.relative_to(DOCS)): path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))}


def listed(items):
    """Yield the pages of a part of the navigation."""
    for item in items:
        values = item.values() if isinstance(item, dict) else [item]
        for value in values:
            yield from [value] if isinstance(value, str) else listed(value)


def test_each_page_is_once_in_the_navigation():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(listed(config["nav"])) == sorted(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_links_exist_and_lines_are_short(page):
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", PAGES[page]):
        assert (DOCS / page).parent.joinpath(target).exists(), target
    long = [line for line in PAGES[page].splitlines() if len(line) > 140 and not line.startswith("|")]
    assert "/commands/" in page or not long, long


def test_each_public_name_is_in_the_reference():
    made = "\n".join(text for page, text in PAGES.items() if page.startswith("reference/python/"))
    missing = [name for name in tailwise.__all__ if not re.search(rf"[.`]{name}\b|heading: {name}\n", made)]
    assert not missing
