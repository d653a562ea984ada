"""docs/findings/protocol-*.md: every line of a recipe that it quotes is there."""

import re
from pathlib import Path

import pytest

from tailwise.pipeline.steps import load_pipeline
from tailwise.recipes import load_recipe
from tailwise.recipes.recipe import FOLDER

PAGES = sorted((Path(__file__).parents[1] / "docs" / "findings").glob("protocol-*.md"))
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
QUOTED = re.compile(r"`([^`]+)` \(([\w./-]+)\)(?:, )?")


def tables():
    """Yield (section, cells) of each row of the tables of lines."""
    for section in TEXT.split("\n## ")[1:]:
        rows = [line.strip("|").split(" | ") for line in section.splitlines() if line.startswith("| ")]
        yield from (
            (section.splitlines()[0], [cell.strip() for cell in row])
            for row in rows
            if len(row) == 4 and not row[0].startswith((" number", " ---"))
        )


ROWS = list(tables())


def test_each_paper_has_its_table():
    papers = {section.split()[0].rstrip(",") for section, _ in ROWS}
    assert papers == {"DynamiCS", "Density-Based", "SemDeDup", "DataComp"}
    assert len(ROWS) > 50


@pytest.mark.parametrize(
    "row", [row for _, row in ROWS], ids=[f"{section.split()[0]} {row[0]}" for section, row in ROWS]
)
def test_quoted_lines_are_in_the_recipes(row):
    _, _, ours, differs = row
    assert differs
    quoted = QUOTED.findall(ours)
    assert quoted or ours == "–"
    assert QUOTED.sub("", ours).strip(" –") == "", ours
    for line, name in quoted:
        lines = [each.strip() for each in (FOLDER / f"{name}.yaml").read_text().splitlines()]
        assert any(line == each or f"- {line}" == each.partition(" #")[0] for each in lines), (line, name)


def test_numbers_of_the_page_follow_from_the_recipes():
    small, medium = load_recipe("dynamics-vit-b16").phases, load_recipe("datacomp-medium").phases[0]
    for phase in (*small, load_recipe("dynamics-vit-b16-dfn-2.56b").phases[0]):
        assert f"{phase.samples_seen // phase.global_batch:,} " in TEXT
    assert f"{small[0].samples_seen // small[0].global_batch * small[0].global_batch:,}" in TEXT
    assert f"{medium.samples_seen // medium.global_batch:,} steps" in TEXT
    for subset, cost in ((277, 69.25), (166, 41.5), (112, 28.0), (84, 21.0)):
        assert 32 * subset / 12_800 * 100 == pytest.approx(cost)
        assert f"| {subset}M |" in TEXT
    plan = next(step for step in load_pipeline("dbp-laion").steps if step.command == "plan")
    assert round(plan.options["keep"] * 440) == 112
