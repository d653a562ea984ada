"""The report in a real browser, from the disk: Debian's chromium, without a graphics card."""

import shutil

import pytest

import tailwise
from tailwise.requests import FilterRequest, ReportRequest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium"),
]

# Pairs of texts that overlap, texts that are cut off, and the width beyond the window.
LAYOUT = """() => {
  const visible = (e) => e.checkVisibility() && e.getClientRects().length && !e.closest("option, dialog, #tip, script, style");
  const texts = [...document.querySelectorAll("body *")].filter((e) => !e.children.length && e.textContent.trim() && visible(e));
  const lines = texts.flatMap((e) => [...e.getClientRects()].map((line) => [e, line])); // a text in a line may have several
  const boxes = lines.filter(([e, b]) => b.width && b.height && !e.closest(".bar"));
  const shared = (low, high, b, o) => Math.min(b[high], o[high]) - Math.max(b[low], o[low]);
  const wrong = [];
  boxes.forEach(([e, b], at) => boxes.slice(at + 1).forEach(([f, o]) => {
    if (shared("left", "right", b, o) > 2 && shared("top", "bottom", b, o) > 3) wrong.push(`${e.textContent} | ${f.textContent}`);
  }));
  for (const [e, b] of boxes) {
    const clip = e.closest(".card, .chart, .fact")?.getBoundingClientRect();
    if (clip && (b.right > clip.right + 1 || b.bottom > clip.bottom + 1)) wrong.push(`cut: ${e.textContent}`);
  }
  if (document.documentElement.scrollWidth > innerWidth) wrong.push(`width ${document.documentElement.scrollWidth}`);
  return wrong;
}"""
DOT = """(name) => {
  const canvas = document.querySelector(`[data-chart="${name}"] canvas.points`), box = canvas.getBoundingClientRect();
  const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  for (let at = 0; at < data.length; at += 4) if (data[at + 3] > 150) {
    const pixel = at / 4, scale = box.width / canvas.width;
    return [box.left + (pixel % canvas.width) * scale + 1, box.top + Math.floor(pixel / canvas.width) * scale + 1];
  }
}"""


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser):
    """`open_page(path, fragment="", width=1440, dark=False)` opens a page that must say and ask nothing; checked at the end."""
    contexts, wrong = [], []

    def show(path, fragment="", width=1440, dark=False, **options):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light", **options
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda said: wrong.append(said.text) if said.type in {"error", "warning"} else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda asked: None if asked.url.startswith(("file:", "data:")) else wrong.append(asked.url))
        page.goto(path.as_uri() + fragment)
        page.wait_for_selector("html[data-ready]", state="attached")
        return page

    yield show
    for context in contexts:
        context.close()
    assert not wrong


def wait(page, condition):
    """Wait until JavaScript is true; the page's policy forbids Playwright's own way."""
    for _ in range(200):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    pytest.fail(f"waited in vain for {condition}")


def cards(page):
    return [int(card.get_attribute("data-cluster")) for card in page.locator("#cards article").all()]


def test_sorting_search_gallery_and_plans(report_folder, open_page):
    page = open_page(report_folder / "index.html")
    sizes = page.evaluate(
        "[...document.querySelectorAll('#cards .chips li:first-child')].map((e) => parseInt(e.textContent))"
    )
    assert len(sizes) == 6 and sizes == sorted(sizes, reverse=True)
    page.click("#direction")
    assert "up=1" in page.url
    page.click("#direction")
    first = cards(page)
    page.select_option("#sort", "complexity")
    assert sorted(cards(page)) == sorted(first) and cards(page) != first
    page.fill("#search", "animal0")
    wait(page, "document.querySelectorAll('#cards article').length < 6")
    assert "q=animal0" in page.url and "animal0" in page.locator("#cards article").first.inner_text()
    page.click("#clear")
    rates = page.locator("#cards .chips li:nth-child(2)").all_inner_texts()
    page.select_option("#plan", "subset")
    assert page.locator("#cards .chips li:nth-child(2)").all_inner_texts() != rates
    shown = page.locator(".legend [data-plan]:visible")
    assert {item.get_attribute("data-plan") for item in shown.all()} == {"1"}
    page.select_option("#versus", "epochs")
    assert page.locator("#two-about").inner_text().startswith("From subset to epochs")
    page.select_option("#color", "group:animals")
    assert page.locator("#key span").count() == 6


def test_brushing_selects_in_all_views_and_links_bring_it_back(report_folder, open_page):
    page = open_page(report_folder / "index.html")
    chart = page.locator('[data-chart="rank"]')
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    before = page.evaluate("document.querySelector('[data-chart=map] canvas').toDataURL()")
    page.mouse.move(box["x"] + 90, box["y"] + 8)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.62, box["y"] + box["height"] - 60, steps=5)
    page.mouse.up()
    wait(page, "location.hash.startsWith('#brush=rank')")
    wait(page, "document.querySelectorAll('#cards article').length < 6")
    selected, count = cards(page), page.locator("#count").inner_text()
    assert 0 < len(selected) < 6 and count.startswith(f"{len(selected)} of 6 clusters")
    assert page.evaluate("document.querySelector('[data-chart=map] canvas').toDataURL()") != before
    again = open_page(report_folder / "index.html", page.evaluate("location.hash"))
    assert cards(again) == selected and again.locator("#count").inner_text() == count
    ticks = "Bokeh.documents[0].roots().flatMap((f) => [...f.below, ...f.left]).map((a) => a.ticker.ticks?.length ?? 3)"
    page.click("#zoom")
    assert all(3 <= count <= 12 for count in page.evaluate(ticks))
    page.click("#unzoom")
    assert all(3 <= count <= 12 for count in page.evaluate(ticks))
    page.click("#clear")
    assert len(cards(page)) == 6 and "brush" not in page.url


def test_a_dot_shows_its_samples_and_a_sample_its_history(report_folder, open_page):
    page = open_page(report_folder / "index.html")
    page.locator('[data-chart="quota"]').scroll_into_view_if_needed()
    place = page.evaluate(DOT, "quota")
    page.mouse.move(*place)
    page.wait_for_selector("#tip img")
    page.mouse.click(*place)
    assert len(cards(page)) == 1
    page.locator("#cards .thumb").first.click()
    dialog = page.locator("dialog[open]")
    assert "plan epochs" in dialog.inner_text() and "tailwise why" in dialog.inner_text()
    again = open_page(report_folder / "index.html", page.evaluate("location.hash"))
    assert again.locator("dialog[open]").inner_text() == dialog.inner_text()
    again.keyboard.press("Escape")
    wait(again, "!location.hash.includes('sample=')")


def test_links_of_another_report_and_a_page_without_clusters(report_folder, small_catalog, tmp_path, open_page):
    for given in (
        "brush=constructor,0,1,0,1",
        "brush=quotas,0,9,0,9",
        "cluster=1.5",
        "sample=__proto__",
        "color=group:no&plan=no",
    ):
        assert len(cards(open_page(report_folder / "index.html", f"#{given}"))) == 6
    tailwise.filter_samples(small_catalog, FilterRequest(by="caption-characters", minimum=8.0, name="short"))
    page = open_page(tailwise.make_report(small_catalog, ReportRequest(output=tmp_path / "r")).page)
    page.locator("#dropped .thumb").first.click()
    assert "dropped" in page.locator("dialog[open]").inner_text() and "sample=" in page.url


def test_hostile_captions_stay_text(report_folder, open_page):
    page = open_page(report_folder / "index.html")
    shown = page.locator(".thumb .caption").all_inner_texts()
    assert any("</script><img src=x" in text for text in shown)
    assert page.title() == "catalog <i> – tailwise report"
    assert page.locator("#cards img:not([src^='data:image/webp'])").count() == 0
    assert page.evaluate("document.querySelectorAll('#cards b, #groups b, #dropped b').length") == 0


@pytest.mark.parametrize("width", [1440, 768, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_no_text_overlaps_or_is_cut(report_folder, open_page, width, dark):
    page = open_page(report_folder / "index.html", width=width, dark=dark)
    assert page.evaluate(LAYOUT) == []


@pytest.mark.parametrize("dark", [False, True])
def test_axe_finds_nothing_serious(report_folder, open_page, dark):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed").Axe()
    page = open_page(report_folder / "index.html", dark=dark, bypass_csp=True)  # axe's script is not the page's
    for opened in (False, True):
        if opened:
            page.locator("#cards .thumb").first.click()
        found = axe.run(page).response["violations"]
        assert [item["id"] for item in found if item["impact"] in {"serious", "critical"}] == []


def test_a_large_report_loads_its_scripts_from_the_disk(report_catalog, tmp_path, open_page, monkeypatch):
    monkeypatch.setattr("tailwise.report.page.ONE_FILE_BYTES", 1000)
    page = open_page(tailwise.make_report(report_catalog, ReportRequest(output=tmp_path / "report")).page)
    page.wait_for_selector("#cards .thumb img")
    assert page.locator("#groups .thumb").count() and page.locator("#dropped .thumb").count()
