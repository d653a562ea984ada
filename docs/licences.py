"""Write about/licences.md: the licence of each direct dependency, as its installed package states it.

Run it with the Python of .venv.
"""

import re
import sys
from collections import defaultdict
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import tomllib
from packaging.requirements import Requirement

HERE = Path(__file__).resolve().parent
HEAD = """# Licences of dependencies

tailwise itself is under the Apache License 2.0. It contains no code of these packages; pip installs them. `core` comes with every
installation, the other names are extras (`pyproject.toml`). Made by `docs/licences.py` from the metadata of the packages.

| package | needed by | licence |
| --- | --- | --- |
"""


def licence(name: str) -> str:
    """Return the licence that the metadata of an installed package states."""
    try:
        package = distribution(name)
    except PackageNotFoundError:
        sys.exit(f"{name} is not installed: install it and run this again")
    found = package.metadata
    classified = [line.split(" :: ")[-1] for line in found.get_all("Classifier") or [] if line.startswith("License ::")]
    text = found["License-Expression"] or ", ".join(classified) or found["License"] or "UNKNOWN"
    if text == "UNKNOWN":
        text = (
            " ".join(
                (package.read_text("LICENSE") or package.read_text("licenses/LICENSE") or "not stated").split()[:4]
            )
            + " (first words of its LICENSE)"
        )
    return re.sub(r"\s+", " ", text)


def main() -> None:
    """Write the table."""
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]
    users: dict[str, list[str]] = defaultdict(list)
    for extra, lines in {"core": project["dependencies"], **project["optional-dependencies"]}.items():
        for line in lines:
            users[Requirement(line).name].append(extra)
    names = sorted(users, key=str.lower)
    rows = [f"| {name} | {', '.join(dict.fromkeys(users[name]))} | {licence(name)} |\n" for name in names]
    (HERE / "about" / "licences.md").write_text(HEAD + "".join(rows))


main()
