"""Draw the pictures of docs/concepts/: one SVG a concept, light or dark as the reader's system is. Run it after a change here."""

from pathlib import Path
from random import Random

FOLDER = Path(__file__).resolve().parent / "concepts"
WIDTH, HEIGHT = 720, 250
STYLE = """
.back { fill: #f4f6f8 } .ink { fill: #23292f } .soft { fill: #5a646e } .line { stroke: #7c8791; fill: none }
.pale { fill: #dfe5ea } .teal { fill: #00897b } .gold { fill: #b26a00 } .rose { fill: #c2185b } .blue { fill: #3c5fc4 }
.cross { stroke: #c2185b; stroke-width: 2.5 }
text { font: 14px system-ui, sans-serif } .on { fill: #fff } .b { font-weight: 600 } .mono { font: 12.5px ui-monospace, monospace }
@media (prefers-color-scheme: dark) {
.back { fill: #171a20 } .ink { fill: #e8ebee } .soft { fill: #a9b3bd } .line { stroke: #8a95a0 }
.pale { fill: #3a424c } .teal { fill: #1f9d8f } .gold { fill: #d08a2a } .rose { fill: #e0568b } .blue { fill: #6f8df0 }
.cross { stroke: #ff7aa8 } .on { fill: #0d1014 } }
"""
ARROW = (
    '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    '<path d="M0 0L8 4L0 8z" class="soft"/></marker></defs>'
)
COLOURS = ("teal", "blue", "gold", "rose")


def text(x: float, y: float, words: str, kind: str = "ink", anchor: str = "start") -> str:
    """Return one line of text."""
    return f'<text x="{x}" y="{y}" class="{kind}" text-anchor="{anchor}">{words}</text>'


def box(x: float, y: float, width: float, height: float, kind: str = "pale", radius: float = 4) -> str:
    """Return a rectangle."""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius}" class="{kind}"/>'


def dot(x: float, y: float, radius: float, kind: str) -> str:
    """Return a filled circle."""
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" class="{kind}"/>'


def line(x: float, y: float, to_x: float, to_y: float, kind: str = "line", arrow: bool = False) -> str:
    """Return a line, or an arrow."""
    head = ' marker-end="url(#head)"' if arrow else ""
    return f'<path d="M{x:g} {y:g}L{to_x:g} {to_y:g}" class="{kind}"{head}/>'


def named(x: float, y: float, width: float, words: str, kind: str = "teal") -> str:
    """Return a box with a name in it."""
    return box(x, y, width, 34, kind) + text(x + width / 2, y + 22, words, "on b", "middle")


def group(seed: int, x: float, y: float, count: int, spread: float) -> list[tuple[float, float]]:
    """Return points around a place."""
    random = Random(seed)
    return [(x + random.gauss(0, spread), y + random.gauss(0, spread)) for _ in range(count)]


def table(x: float, y: float, rows: list[tuple[str, ...]], widths: tuple[int, ...]) -> str:
    """Return a table of words; the first row is its head."""
    parts = []
    for number, row in enumerate(rows):
        left = x
        for words, width in zip(row, widths, strict=True):
            parts.append(box(left, y + 28 * number, width - 3, 25, "pale" if number else "blue", 2))
            parts.append(text(left + 8, y + 17 + 28 * number, words, "mono ink" if number else "on b"))
            left += width
    return "".join(parts)


def catalog() -> str:
    """Your shards on the left, the table of samples on the right."""
    shards = "".join(named(30, 60 + 48 * at, 120, f"0000{at}.tar", "gold") for at in range(3))
    rows = [
        ("sample", "caption", "place"),
        *(
            (f"0000{n}", words, at)
            for n, words, at in (
                (1, "a red fox", "00000.tar, byte 512"),
                (2, "my new shoes", "00000.tar, byte 9,216"),
                (3, "axolotl in a tank", "00001.tar, byte 512"),
                (4, "a red fox, again", "00002.tar, byte 512"),
            )
        ),
    ]
    return (
        text(30, 36, "your shards: only read", "soft")
        + shards
        + line(165, 125, 235, 125, arrow=True)
        + text(172, 112, "import", "soft")
        + text(255, 36, "the catalog: one row a sample", "soft")
        + table(255, 60, rows, (80, 160, 190))
    )


def embedding() -> str:
    """Rows of numbers, and points of which near ones look alike."""
    random, bars = Random(3), []
    for row in range(5):
        bars.append(box(30, 60 + 32 * row, 120, 26, "pale") + text(40, 78 + 32 * row, f"sample {row + 1}", "ink"))
        for at in range(12):
            height = random.uniform(4, 22)
            bars.append(box(165 + 12 * at, 84 + 32 * row - height, 9, height, "teal", 1))
    spots = zip(
        COLOURS, ((450, 95), (590, 80), (520, 185), (650, 180)), ("foxes", "shoes", "cars", "cups"), strict=True
    )
    points = [
        "".join(dot(*place, 4, kind) for place in group(at, *centre, 14, 13))
        + text(centre[0], centre[1] + 48, words, "soft", "middle")
        for at, (kind, centre, words) in enumerate(spots)
    ]
    return (
        text(30, 36, "one vector a sample", "soft")
        + "".join(bars)
        + text(400, 36, "near vectors: alike images", "soft")
        + "".join(points)
    )


def clustering() -> str:
    """Points in groups, and the sizes of the groups."""
    groups = list(
        zip(COLOURS, ((120, 120), (255, 100), (200, 195), (320, 190)), (60, 26, 12, 5), (26, 18, 12, 8), strict=True)
    )
    points = "".join(
        dot(*place, 4, kind)
        for at, (kind, centre, count, spread) in enumerate(groups)
        for place in group(at, *centre, count, spread)
    )
    bars = "".join(
        text(430, 82 + 40 * at, f"cluster {at}")
        + box(505, 66 + 40 * at, 2.4 * count, 24, kind)
        + text(512 + 2.4 * count, 83 + 40 * at, str(count), "soft")
        for at, (kind, _, count, _) in enumerate(groups)
    )
    return (
        text(30, 36, "each sample belongs to its nearest centroid", "soft")
        + points
        + text(430, 36, "sizes: a head and a tail", "soft")
        + bars
    )


def drop_list() -> str:
    """Samples of which some are crossed out, each with its reason."""
    rows = (
        ("a red fox", ""),
        ("a red fox, again", "near-duplicate of a red fox, 0.97"),
        ("axolotl in a tank", ""),
        ("IMG_2041", "clip-score 0.11, below 0.20"),
        ("my new shoes", ""),
    )
    parts = []
    for at, (words, reason) in enumerate(rows):
        y = 56 + 36 * at
        parts.append(box(30, y, 200, 28, "pale") + text(42, y + 19, words, "soft" if reason else "ink"))
        if reason:
            parts.append(line(36, y + 14, 224, y + 14, "cross") + text(255, y + 19, reason, "rose b"))
        else:
            parts.append(text(255, y + 19, "stays", "teal b"))
    return text(30, 36, "drop lists leave samples out; nothing is deleted", "soft") + "".join(parts)


def plan() -> str:
    """Sizes of clusters, and what each gives in an epoch."""
    sizes = [round(300 / (at + 1) ** 0.95) for at in range(24)]
    parts = []
    for at, size in enumerate(sizes):
        give = min(size, 24 * (size / 30) ** 0.2)
        tall, low = 9.4 * size**0.5, 9.4 * give**0.5
        parts.append(
            box(60 + 21 * at, 215 - tall, 17, tall, "pale", 1) + box(60 + 21 * at, 215 - low, 17, low, "teal", 1)
        )
    notes = (
        box(330, 60, 16, 16, "pale")
        + text(354, 73, "samples of the cluster")
        + box(330, 86, 16, 16, "teal")
        + text(354, 99, "its quota: samples in each epoch")
        + text(60, 236, "large clusters give a part", "soft")
        + text(562, 236, "small ones give all", "soft", "end")
    )
    return text(30, 36, "how many samples each cluster gives, and which", "soft") + "".join(parts) + notes


def epoch() -> str:
    """A large and a small cluster in three epochs."""
    parts = []
    for number in range(3):
        x = 165 + 185 * number
        parts.append(text(x + 75, 64, f"epoch {number}", "ink b", "middle"))
        for at in range(24):
            drawn = at % 3 == (number + at // 8) % 3
            parts.append(dot(x + 10 + 18.5 * (at % 8), 90 + 22 * (at // 8), 7, "teal" if drawn else "pale"))
        parts += [dot(x + 10 + 18.5 * at, 195, 7, "gold") for at in range(4)]
    labels = (
        text(30, 104, "large cluster:")
        + text(30, 124, "another third")
        + text(30, 144, "each time")
        + text(30, 200, "small cluster: all")
    )
    return text(30, 36, "which samples an epoch holds: a function of plan and number", "soft") + labels + "".join(parts)


def loader_or_export() -> str:
    """Two ways from an epoch to a trainer."""
    return (
        text(30, 36, "how an epoch reaches a trainer", "soft")
        + named(30, 108, 110, "epoch", "teal")
        + line(145, 115, 205, 85, arrow=True)
        + line(145, 135, 205, 172, arrow=True)
        + named(215, 66, 120, "loader", "blue")
        + line(340, 83, 400, 83, arrow=True)
        + named(410, 66, 130, "batches", "gold")
        + line(545, 83, 590, 83, arrow=True)
        + text(600, 88, "your trainer", "ink b")
        + text(215, 118, "reads the drawn samples from your shards", "soft")
        + named(215, 156, 120, "export", "blue")
        + line(340, 173, 400, 173, arrow=True)
        + named(410, 156, 130, "keys, tars, …", "gold")
        + line(545, 173, 590, 173, arrow=True)
        + text(600, 178, "other tools", "ink b")
        + text(215, 208, "writes the list, or new shards", "soft")
    )


PICTURES = {
    "catalog": catalog,
    "embedding-column": embedding,
    "clustering": clustering,
    "drop-list": drop_list,
    "plan": plan,
    "epoch": epoch,
    "loader-or-export": loader_or_export,
}


def pictures() -> dict[str, str]:
    """Return the text of each picture by the name of its file."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"><style>{STYLE}</style>{ARROW}'
    back = box(0, 0, WIDTH, HEIGHT, "back", 0)
    return {f"{name}.svg": f"{head}{back}{draw()}</svg>\n" for name, draw in PICTURES.items()}


if __name__ == "__main__":
    for file, picture in pictures().items():
        (FOLDER / file).write_text(picture, encoding="utf-8")
