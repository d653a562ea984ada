"""The documentation: each page is in the navigation, its links exist, its lines are short, and every public name is in the reference."""

import importlib.util
import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

import tailwise
from tailwise.cli import _shared_first
from tailwise.cli.app import tree
from tailwise.steps.planning.plan import check_method
from tailwise.steps.scoring.scores import SCORES

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


def commands(text):
    """Yield the words of each tailwise command in the code blocks and tables of a page, without comments and continuation."""
    tables = ["\n".join(re.findall(r"`(tailwise [^`]* [^`]*)`", row)) for row in re.findall(r"^\|.*", text, re.M)]
    for block in (*re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S), *tables):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(re.sub(r"\s{2,}\(.*\)$", "", line), comments=True) if "tailwise " in line else []
            if "tailwise" in words:  # behind a prompt, variables or torchrun
                yield [word for word in words[words.index("tailwise") + 1 :] if word not in ("…", "...")]


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if any(commands(text))])
def test_commands_are_understood(page):
    """Each command is parsed, not run, also if it needs a bucket, a download or a GPU. tests/end_to_end/test_docs.py runs those of `sh`."""
    for words in commands(PAGES[page]):
        with tree().make_context("tailwise", _shared_first(words)) as context:
            name, command, rest = tree().resolve_command(context, [*context._protected_args, *context.args])
            command.make_context(name, rest, parent=context)


def test_options_that_are_named_exist():
    params = [*tree().params, *(item for command in tree().commands.values() for item in command.params)]
    known = {option for item in params for option in (*item.opts, *item.secondary_opts)}
    known |= {"--help", "--install-completion", "--show-completion"}
    known |= {
        "--requeue",
        "--exclusive",
        "--no_amp",
        "--use-naflex",
    }  # Slurm, clip_benchmark, later versions of open_clip
    spec = importlib.util.find_spec("open_clip_train") or pytest.skip("open_clip's trainer isn't installed")
    known |= set(re.findall(r"['\"](--[\w-]+)", (Path(spec.origin).parent / "params.py").read_text(encoding="utf-8")))
    named = {(page, option) for page, text in PAGES.items() for option in re.findall(r"`(--[a-z][\w-]+)", text)}
    assert not {(page, option) for page, option in named if option not in known}


@pytest.mark.parametrize("page", PAGES)
def test_files_and_extras_that_are_named_exist(page):
    for name in re.findall(r"`(?:python )?((?:benchmarks|examples|tests|src)/[\w./-]+)", PAGES[page]):
        assert (ROOT / name).exists(), name
    extras = {
        name
        for names in re.findall(r"pip install '(?:tailwise|\.)\[([\w,]+)\]'", PAGES[page])
        for name in names.split(",")
    }
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert not {name for name in extras if not re.search(rf"^{name} = \[", project, re.M)}


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if "```python" in text])
def test_python_compiles(page):
    for block in re.findall(r"^```python\n(.*?)^```", PAGES[page], re.M | re.S):
        compile(block.replace(", …)", ")"), page, "exec", dont_inherit=True)


def test_known_names_are_answered_by_options_and_methods_that_exist():
    page, commands = PAGES["reference/known-names.md"], tree().commands
    answers = [shlex.split(code) for row in re.findall(r"^\|.*", page, re.M) for code in re.findall(r"`([^`]*)`", row)]
    answers = [words for words in answers if words[0] in commands]
    assert len(answers) > 30
    for command, *words in answers:
        options = {option for item in commands[command].params for option in item.opts}
        assert {word for word in words if word.startswith("--")} <= options, (command, words)
        for option, value in pairwise(words):
            if option == "--method":
                check_method(value)  # raises an error if there is none
            assert option != "--by" or value in {*SCORES, "X"}, value
