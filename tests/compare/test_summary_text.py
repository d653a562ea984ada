"""Names of rows and sets in the files of a comparison: shown as they are, whatever they hold."""

import csv
import io
import re
from xml.etree import ElementTree

import pytest

from tailwise.cli.run import _print_results
from tailwise.compare.plots import draw_plots
from tailwise.compare.summary import ALL_SETS, figures, markdown, results_csv, summary_markdown, write_summary
from tailwise.text import plain

HOSTILE = "=1+1 <script>a</script> | `b` [l](http://e) $\\foo$ $x_{$ \x1b[31m\u202e www.e.org"
SAFE = "random"


@pytest.fixture
def summary(comparison_summary):
    return comparison_summary(HOSTILE, SAFE)


def test_files_show_names_as_they_are(summary, tmp_path):
    write_summary(tmp_path, summary)
    page = (tmp_path / "summary.html").read_text(encoding="utf-8")
    assert "<script" not in page and "&lt;script&gt;" in page and "<a>" not in page
    assert not re.search("[\x00-\x09\x0b-\x1f\u202e]", page)
    assert page.count("<svg") == page.count("</svg>") == 3  # ticks and a line of differences, and a curve
    ElementTree.fromstring(
        "<a>" + re.search("<section.*</section>", page, re.DOTALL)[0] + "</a>"
    )  # all tags are closed
    text = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert "<script" not in text and not re.search("[\x00-\x09\x0b-\x1f\u202e]", text)
    assert not re.search(r"(?<!\\)[`\[]", text) and "://" not in text and "www." not in text
    tables = [line for line in text.splitlines() if line.startswith("| ")]
    columns = [len(re.findall(r"(?<!\\)\|", line)) for line in tables]
    assert sorted(set(columns)) == [
        3,
        4,
        13,
    ]  # differences and the gate, accuracies and ledger, costs: no cell is split
    for plot in tmp_path.glob("*.svg"):
        ElementTree.parse(plot)
    assert not any(re.search(r"[\[{]('|&#39;)", content) for content in (page, text))  # as Python prints values


def test_the_terminal_gets_names_without_escapes_of_markdown(summary, capsys):
    _print_results(summary)
    said = capsys.readouterr().out
    assert plain(HOSTILE) in said and "50.00 ± 1.00" in said and "+1.00 (-110.00 … +110.00)" in said
    assert "no retrieval set" in said and not re.search("[\x00-\x09\x0b-\x1f\u202e]", said)


def test_cells_of_the_table_are_no_formulas(summary):
    rows = list(csv.DictReader(io.StringIO(results_csv(summary))))
    assert {row["row"] for row in rows} == {SAFE, f"'{HOSTILE}"}
    assert {row["set"] for row in rows} == {f"'{HOSTILE}"}
    assert {float(row["mean"]) for row in rows} == {0.5}
    assert {row["difference_low"] for row in rows} == {"", "-1.1"}


def test_plots_take_dollars_for_dollars(summary):
    assert set(draw_plots(summary)) == {"differences.svg", "accuracies.svg"}


def test_retrieval_stands_beside_accuracy_and_its_absence_is_told(summary):
    groups = {"few": {"accuracy": {"value": 0.1}}}
    values = {"top1": {"value": 0.5}, "mean_per_class": {"value": 0.4}, "groups": groups}
    shops = {"set": "shop", "task": "classification", **values}
    recalls = [
        {"set": name, "task": "retrieval", **{kind: {"1": {"value": value}} for kind, value in shares.items()}}
        for name, shares in (
            ("a", {"text_retrieval": 0.3, "image_retrieval": 0.1, "mean_recall": 0.2}),
            ("b", {"text_retrieval": 0.5, "image_retrieval": 0.3, "mean_recall": 0.4}),
        )
    ]
    found = figures({"evaluations": [shops, *recalls]})
    assert found["a"] == {"text_retrieval@1": 0.3, "image_retrieval@1": 0.1, "mean_recall@1": 0.2}
    assert found[ALL_SETS] == pytest.approx(
        {
            "top1": 0.5,
            "mean_per_class": 0.4,
            "few": 0.1,
            "text_retrieval@1": 0.4,
            "image_retrieval@1": 0.2,
            "mean_recall@1": 0.3,
        }
    )
    assert set(figures({"evaluations": [shops]})) == {"shop"}
    assert "No retrieval set is among the evaluation" in summary_markdown(summary)
    assert "No retrieval set" not in summary_markdown({**summary, "retrieval": True})


def test_markdown():
    assert markdown("a|b `c` <i> [l](http://e) # *d*\n") == (
        "a\\|b \\`c\\` &lt;i&gt; \\[l\\](http&#58;//e) \\# \\*d\\*\\\\n"
    )
    assert markdown("Ångström 50 % ± 2") == "Ångström 50 % ± 2"
