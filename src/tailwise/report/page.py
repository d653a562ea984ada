"""Writing of a page that opens without a server and asks nothing of any other address.

While it is small, all of it is in index.html. Else its data is in scripts beside it, which the page loads when it shows them: a page
opened from a disk may load scripts and images, but may not fetch files.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from contextlib import suppress
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

from tailwise import __version__
from tailwise.storage.local import TEMPORARY_SUFFIX, replacing, scratch
from tailwise.text import plain

ONE_FILE_BYTES = 12_000_000  # of data; a larger page is a folder
PAGE, DATA = "index.html", "data"
SCRIPTS = (f"{DATA}/chunk-*.js", f"{DATA}/lists.js")  # ours; other files may lie beside them


def write_page(
    folder: Path, page: Mapping[str, Any], inline: Mapping[str, str], blocks: Mapping[str, str]
) -> list[Path]:
    """Write the page; return its files. An earlier report stays whole until all files of the new one are on the disk.

    Args:
        folder: made if it does not exist. Scripts of an earlier report are deleted.
        page: values of the template.
        inline: JSON that is in the page, by name.
        blocks: JSON that is in the page too while it is small, else in scripts beside it.
    """
    apart = sum(map(len, blocks.values())) > ONE_FILE_BYTES
    text = render({**inline, **({} if apart else blocks)}, apart=apart, **page)
    data, written = folder / DATA, [folder / PAGE]
    with scratch(folder / f"{DATA}{TEMPORARY_SUFFIX}") as fresh, replacing(folder / PAGE, unique=True) as temporary:
        temporary.write_text(text, encoding="utf-8")
        for name, block in blocks.items() if apart else ():
            (fresh / f"{name}.js").write_text(f"tailwiseData({json.dumps(name)}, {block});\n", encoding="utf-8")
            written.append(data / f"{name}.js")
        if apart:
            data.mkdir(exist_ok=True)
        (folder / PAGE).unlink(missing_ok=True)  # it would load the scripts of the new report
        for old in [path for pattern in SCRIPTS for path in folder.glob(pattern)]:
            old.unlink()
        for path in written[1:]:
            (fresh / path.name).replace(path)
    with suppress(OSError):  # it holds files
        data.rmdir()
    return written


def render(blocks: Mapping[str, str], *, apart: bool = False, **page: Any) -> str:  # noqa: ANN401  (values of the template)
    """Return a page as HTML.

    Args:
        blocks: JSON that is in the page, by name.
        apart: whether it loads scripts beside it.
        page: values of the template. Sections without any are left out.
    """
    page = {**NOTHING, **page}
    source = files("tailwise.report") / "assets"
    css = (source / "report.css").read_text(encoding="utf-8")
    scripts = [_bokeh()] if page["gallery"] else []
    if page["gallery"] or page["duplicates"] or page["filtered"]:
        scripts.append((source / "report.js").read_text(encoding="utf-8"))
    hashes = [f"'sha256-{base64.b64encode(sha256(text.encode()).digest()).decode()}'" for text in scripts] or ["'none'"]
    sources = [*hashes, *(["'self'", "file:"] if apart else [])]
    policy = "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; style-src 'unsafe-inline'; "
    policy += f"script-src {' '.join(sources)}"
    text: str = environment().get_template("report.html.j2").render(
        **page, version=__version__, policy=policy, css=safe(css), scripts=[safe(text) for text in scripts],
        blocks=[(name, safe(text)) for name, text in blocks.items()],
        sections=[(name, title) for name, title in SECTIONS.items() if _has(page, name)],
    )  # fmt: skip
    return text


def environment() -> Any:  # noqa: ANN401  (jinja2's)
    """Return jinja2's environment for our templates: every text is escaped, and shown on one line as `plain` does."""
    import jinja2  # noqa: PLC0415  (an extra)

    return jinja2.Environment(
        loader=jinja2.PackageLoader("tailwise.report", "assets"), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined, finalize=lambda value: plain(value) if type(value) is str else value,
    )  # fmt: skip


SECTIONS = {
    "overview": "Overview", "charts": "Charts", "two-plans": "Two plans", "gallery": "Gallery", "duplicates": "Duplicates",
    "filtered": "Filters", "study": "Study",
}  # fmt: skip
NOTHING: dict[str, Any] = {
    "facts": [], "tables": [], "notes": [], "charts": [], "plans": [], "gallery": False, "duplicates": False,
    "filtered": False, "study": None,
}  # fmt: skip


def _has(page: Mapping[str, Any], section: str) -> bool:
    if section == "two-plans":
        return len(page["plans"]) > 1 and page["gallery"]
    return bool(page["facts" if section == "overview" else section])


def _bokeh() -> str:
    text = (files("bokeh") / "server" / "static" / "js" / "bokeh.min.js").read_text(encoding="utf-8")
    return text.replace("</script", r"<\/script")


def safe(text: str) -> Any:  # noqa: ANN401  (jinja2's)
    """Return text that a template does not escape: our own, HTML that a template made, or JSON without a "<"."""
    from markupsafe import Markup  # noqa: PLC0415  (comes with jinja2)

    return Markup(text)


def script_json(value: Any) -> str:  # noqa: ANN401  (JSON values)
    """Return JSON in ASCII without "<", so that no text ends the script that holds it."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")
