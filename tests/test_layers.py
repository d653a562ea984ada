"""Packages import downwards only."""

import ast
from pathlib import Path

import tailwise

ROOT = Path(tailwise.__file__).parent
LAYERS = (  # from the lowest
    *("text", "errors", "extras", "devices", "requests", "progress", "log", "mapped", "notebook"),
    *("kernels", "storage", "catalog", "execution", "context", "shards", "sources", "encoders", "recipes", "plan"),
    *(
        "loader",
        "train",
        "evaluate",
        "export",
        "steps",
        "demo",
        "pipeline",
        "report",
        "compare",
        "cli",
        "__init__",
        "__main__",
    ),
)


def layer(path):
    first, *rest = path.relative_to(ROOT).parts
    return first if rest else first.removesuffix(".py")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("tailwise."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (name.name.split(".")[1] for name in node.names if name.name.startswith("tailwise."))


def test_packages_import_downwards_only():
    upwards = {
        (str(path.relative_to(ROOT)), other)
        for path in ROOT.rglob("*.py")
        for other in imports(path)
        if LAYERS.index(other) > LAYERS.index(layer(path))
    }
    assert not upwards


def test_all_packages_have_a_layer():
    assert {layer(path) for path in ROOT.rglob("*.py")} == set(LAYERS)
