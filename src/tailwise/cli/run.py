"""A pool from import to exports in one command: run."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tailwise.cli.app import AllowCode, AsJson, Workers, app, as_options, tree
from tailwise.cli.printing import say
from tailwise.errors import NotFoundError, UserError
from tailwise.spelling import new_spelling
from tailwise.text import did_you_mean

if TYPE_CHECKING:
    from tailwise.catalog import Catalog
    from tailwise.pipeline.steps import Pipeline, Step

STEPS = ("import", "embed", "dedup", "filter", "cluster", "group", "plan", "train", "draw", "export", "excluded")
OUTPUTS = {"draw": "output", "export": "output", "excluded": "output"}  # what each writes outside of the catalog
TRAINER = "open-clip"  # of train: the arguments of open_clip's trainer, by name
DEFAULTS: Mapping[str, dict[str, Any]] = {"train": {"resume": True}}  # begins what isn't there, goes on with what is
OUTPUT = "{output}"  # in a value of a step: the folder for exports
CHECKPOINT = "checkpoint:"
CODE = {"methods", "allow-code"}  # options of steps that run code of the recipe


@dataclass(frozen=True)
class Prepared:
    """A step, ready to run.

    Attributes:
        step: of the recipe.
        arguments: of its command line.
    """

    step: Step
    arguments: list[str]

    @property
    def line(self) -> str:
        """What a user would type."""
        return shlex.join(["tailwise", self.step.command, *self.arguments])


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A name (see below), or a .yaml file.")],
    paths: Annotated[
        list[str] | None, typer.Argument(metavar="[SOURCE...] [CATALOG]", help="In place of the recipe's own.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for exports.  [default: the recipe's]", show_default=False)
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="STEP.OPTION=VALUE", help="Change an option of a step.", show_default=False),
    ] = None,
    workers: Workers = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print what would be done, and what it costs.")
    ] = False,
    allow_code: AllowCode = False,
    as_json: AsJson = False,
) -> None:
    """Take a pool from import to exports: all commands of a recipe, in order.

    Prints first what it will do. Steps that are done already are skipped, so that the same command goes on after an interruption.
    Recipes that come with tailwise: **dbp-laion**, **dbp-datacomp-medium**, **dynamics**, and **bootstrap**, which trains its encoder on
    the pool itself. A recipe of your own is a list of commands with their options, as on the command line.

    Examples:

      tailwise run dynamics shards/ embeddings/ my-catalog --output exports --dry-run

      tailwise run dbp-laion shards/ embeddings/ my-catalog --output exports --set cluster:main.k=100

      tailwise run my-recipe.yaml
    """
    from tailwise.pipeline.steps import load_pipeline

    pipeline = load_pipeline(recipe)
    given = list(paths or [])
    catalog = Path(given[-1] if given else pipeline.catalog or "")
    sources = given[:-1] or list(pipeline.sources)
    if not given and pipeline.catalog is None:
        raise UserError(f"recipe {recipe!r} names no catalog: tailwise run {recipe} SOURCE... CATALOG")
    folder = output or (Path(pipeline.output) if pipeline.output is not None else None)
    steps = [_placed(step, folder) for step in _with_settings(pipeline.steps, settings or [])]
    prepared = [_prepare(step, catalog, sources, folder, workers, allow_code=allow_code) for step in steps]
    _check_names(steps, catalog)
    with redirect_stdout(sys.stderr) if as_json else nullcontext():  # which leaves standard output to the JSON
        states = _print_plan(pipeline, prepared, catalog, sources)
        if not dry_run:
            _run_all(prepared, catalog, folder)
    if as_json:
        from tailwise.cli.printing import print_json

        listed = [{"step": each.line, "before": state} for each, state in zip(prepared, states, strict=True)]
        print_json({"name": pipeline.name, "dry_run": dry_run, "steps": listed})


def _run_all(prepared: list[Prepared], catalog: Path, folder: Path | None) -> None:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    for number, item in enumerate(prepared, 1):
        say()
        say(f"[{number}/{len(prepared)}] {item.line}")
        if item.step.command not in OUTPUTS:
            _invoke(item)
        elif _exported(catalog, item):
            say("done already")
        else:
            _export(catalog, item)


# --- from a step to a command line ------------------------------------------------------------------------------------


def _with_settings(steps: tuple[Step, ...], settings: list[str]) -> list[Step]:
    from tailwise.pipeline.steps import Step

    changed = list(steps)
    for text in settings:
        target, _, value = text.partition("=")
        label, dot, option = target.rpartition(".")
        exactly = [at for at, step in enumerate(changed) if label == step.label]
        found = exactly or [at for at, step in enumerate(changed) if label == step.command]
        if not dot or not value or len(found) != 1:
            labels = ", ".join(step.label for step in steps)
            raise UserError(f"--set {text!r}: give STEP.OPTION=VALUE, where STEP is one of {labels}")
        step = changed[found[0]]
        changed[found[0]] = Step(
            step.command, {**step.options, new_spelling(step.command, option.replace("_", "-")): value}
        )
    return changed


def _placed(step: Step, output: Path | None) -> Step:
    """The step with the folder for exports in place of {output}."""
    from tailwise.pipeline.steps import Step

    def place(value: Any) -> Any:  # noqa: ANN401  (whatever YAML holds)
        if isinstance(value, Mapping):
            return {name: place(item) for name, item in value.items()}
        if not isinstance(value, str) or OUTPUT not in value:
            return value
        if output is None:
            raise UserError(f"step {step.label} has {value!r}: name the folder with --output")
        return value.replace(OUTPUT, str(output))

    return Step(step.command, place(step.options))


def _made_name(step: Step) -> str:
    """The name of what a step makes."""
    from tailwise.catalog.kinds import MADE_BY
    from tailwise.catalog.scores import plain_name

    if name := step.options.get("clustering" if step.command == "import" else "name"):
        return str(name)
    by = step.options.get("by")
    own = {"group": by or "entries", "filter": plain_name(str(by))}
    made = MADE_BY.get(step.command)
    return str(own.get(step.command, made and made.made_by[step.command]))


def _run_folders(step: Step) -> list[Path]:
    """Where a training's phases go."""
    from tailwise.recipes import Phase, load_recipe

    recipe = load_recipe(str(step.options["recipe"])) if "recipe" in step.options else None
    phases = recipe.phases if recipe is not None else (Phase(),)
    folders = []
    for number, phase in enumerate(phases, 1):
        given = {**phase.open_clip, **_trainer_arguments(step)}
        name = given.get("name") or "-".join([str(step.options.get("name")), *([recipe.name] if recipe else [])])
        folders.append(Path(given.get("logs") or "logs") / (f"{name}-phase{number}" if len(phases) > 1 else str(name)))
    return folders


def _trainer_arguments(step: Step) -> Mapping[str, Any]:
    given = step.options.get(TRAINER) or {}
    if not isinstance(given, Mapping):
        raise UserError(f"step {step.label}: {TRAINER} is {given!r}: must be names and values, such as {{lr: 1.0e-3}}")
    return given


def _trainer_words(step: Step) -> list[str]:
    if step.command != "train" or not (given := _trainer_arguments(step)):
        return []
    from tailwise.text import option_words

    return ["--", *option_words(given)]


def _default_name(step: Step, option: str) -> str | None:
    from tailwise.catalog.kinds import CLUSTERING
    from tailwise.plan.methods import METHODS

    method = METHODS.get(str(step.options.get("method")))
    over_clusters = method is not None and method.grouping == "clusters"
    needed = option == "clustering" and (step.command == "dedup" or over_clusters)
    return CLUSTERING.made_by["cluster"] if needed else None


def _check_names(steps: list[Step], catalog: Path) -> None:
    """Refuses steps that name what neither an earlier step makes nor the catalog holds, and methods that don't exist."""
    from tailwise.catalog.kinds import KINDS
    from tailwise.plan.methods import METHODS
    from tailwise.steps.planning.plan import BY_RATE

    made: set[tuple[str, str]] = set()
    trained: set[Path] = set()
    for step in steps:
        if step.command == "train":
            trained |= set(_run_folders(step))
        encoder = str(step.options.get("encoder"))
        checkpoint = Path(encoder.removeprefix(CHECKPOINT)).expanduser()
        if (
            encoder.startswith(CHECKPOINT)
            and not checkpoint.exists()
            and not trained & {checkpoint, *checkpoint.parents}
        ):
            raise UserError(
                f"step {step.label}: encoder is {encoder!r}, which no step before it trains, and there is none: add a step train"
            )
        for kind in (kind for kind in KINDS if step.command in kind.named_by):
            option, makers = kind.named_by[step.command], kind.makers_for.get(step.command, tuple(kind.made_by))
            value = step.options.get(option, _default_name(step, option))
            for name in map(str, value if isinstance(value, list) else [value] if value is not None else []):
                known = any((maker, name) in made for maker in makers) or (catalog / kind.folder / name).exists()
                if not known:
                    raise UserError(
                        f"step {step.label}: {option} is {name!r}, which no step before it makes, and {catalog} has none: "
                        f"add a step {' or '.join(makers)}"
                    )
        method = step.options.get("method")
        methods = [*METHODS, *BY_RATE]
        if step.command == "plan" and method is not None and method not in methods and not step.options.get("methods"):
            raise UserError(f"step {step.label}: unknown method {method!r}: {did_you_mean(str(method), methods)}")
        entries = step.options.get("entries")
        if step.command == "group" and (entries is None) == (step.options.get("by") is None):
            raise UserError(f"step {step.label}: give it one of by (a column) and entries (a list of words)")
        if entries is not None and not Path(str(entries)).is_file():
            raise NotFoundError(f"step {step.label}: entries is {entries!r}, which is no file")
        made.add((step.command, _made_name(step)))


def _command(name: str) -> Any:  # noqa: ANN401  (Typer's own class, which differs from version to version)
    return tree().commands[name]


def _prepare(
    step: Step,
    catalog: Path,
    sources: list[str],
    output: Path | None,
    workers: int | None,
    *,
    allow_code: bool = False,
) -> Prepared:
    if step.command not in STEPS:
        raise UserError(f"step {step.command!r} is none: {did_you_mean(step.command, STEPS)}")
    parameters = _command(step.command).params
    own = {TRAINER} if step.command == "train" else set()
    options = {
        name: value for name, value in (DEFAULTS.get(step.command, {}) | dict(step.options)).items() if name not in own
    }
    if step.command == "import":
        if not sources:
            raise UserError("the recipe imports, and no source is given: tailwise run RECIPE SOURCE... CATALOG")
        options["paths"] = [*sources, str(catalog)]
    else:
        options["catalog"] = str(catalog)
    if (place := OUTPUTS.get(step.command)) and isinstance(options.get(place), str):
        if output is None and not Path(options[place]).is_absolute():
            raise UserError(f"step {step.label} writes {options[place]!r}: name the folder with --output")
        options[place] = str((output or Path()) / options[place])
    names = {name.lstrip("-"): item for item in parameters for name in (*item.opts, *item.secondary_opts)}
    needed = {"export": options.get("to") == "shards", "group": "entries" in options}
    if workers is not None and "workers" in names and needed.get(step.command, True):
        options.setdefault("workers", workers)
    _refuse_code(step, allowed=allow_code)
    if step.command == "train" and allow_code:
        options["allow-code"] = True
    prepared = Prepared(step, [*_words(step, parameters, names, options), *_trainer_words(step)])
    _parse(prepared)
    return prepared


def _words(step: Step, parameters: list[Any], names: Mapping[str, Any], options: Mapping[str, Any]) -> list[str]:
    """A step's options and arguments, as words of a command line."""
    flags: list[str] = []
    placed: dict[str, list[str]] = {}
    for name, value in options.items():
        if value is None:
            continue
        if name not in names:
            shown = [known for known in names if known not in {"catalog", "paths", "json", "open_clip"}]
            shown += [TRAINER] if step.command == "train" else []
            raise UserError(f"step {step.label} has {name!r}, which means nothing: {did_you_mean(name, shown)}")
        item = names[name]
        values = [str(each) for each in (value if isinstance(value, list) else [value])]
        if item.param_type_name != "argument":
            flags += _flags(step, item, name, value, values)
        elif any(text.startswith("-") for text in values):  # the command would take it for an option
            raise UserError(f"step {step.label}: {name} is {value!r}: must not begin with a dash")
        else:
            placed[item.name] = values
    return [*flags, *(text for item in parameters for text in placed.get(item.name, []))]


def _refuse_code(step: Step, *, allowed: bool) -> None:
    """Refuse a step that runs code of its recipe, unless the user allows that."""
    from tailwise.recipes import load_recipe
    from tailwise.train.arguments import ALLOW_CODE, refuse_code

    for option in () if allowed else CODE & set(step.options):
        raise UserError(f"step {step.label}: {option} is {step.options[option]!r}, which runs code: {ALLOW_CODE}")
    if step.command == "train":
        refuse_code(f"step {step.label}: {TRAINER}", _trainer_arguments(step), allowed=allowed)
        if "recipe" in step.options:
            name = str(step.options["recipe"])
            for phase in load_recipe(name).phases:
                refuse_code(f"recipe {name}: open_clip", phase.open_clip, allowed=allowed)


def _flags(step: Step, item: Any, name: str, value: object, values: list[str]) -> list[str]:  # noqa: ANN401
    if not item.is_flag:
        return [text for each in values for text in (f"--{name}", each)]
    if not isinstance(value, bool) and values[0] not in {"true", "false"}:
        raise UserError(f"step {step.label}: {name} is {value!r}: must be true or false")
    on = value is True or values[0] == "true"
    chosen = [*item.opts, *item.secondary_opts] if on == (f"--{name}" in item.opts) else item.secondary_opts
    return list(chosen[:1])


def _parse(item: Prepared) -> Any:  # noqa: ANN401
    """Typer's context of the command; refuses values that the command would refuse."""
    try:
        return _command(item.step.command).make_context(item.step.command, list(item.arguments))
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        raise UserError(f"step {item.step.label}: {error.format_message()}") from error


def _invoke(item: Prepared) -> None:
    context = _parse(item)
    with context:
        context.command.invoke(context)


# --- what is done, and what it costs ----------------------------------------------------------------------------------


def _open(catalog: Path) -> Catalog | None:
    from tailwise.catalog import Catalog
    from tailwise.catalog.layout import HEADER

    return Catalog.open(catalog) if (catalog / HEADER).exists() else None


def _place(item: Prepared) -> Path:
    """What a step writes outside of the catalog."""
    return Path(_parse(item).params[OUTPUTS[item.step.command]]).absolute()


def _record(catalog: Path, item: Prepared) -> Path:
    from tailwise.catalog.files import digest
    from tailwise.catalog.layout import export_record

    return export_record(catalog, digest(str(_place(item))))


def _made_from(catalog: Path, item: Prepared) -> dict[str, Any]:
    """All that decides what a step writes, the number of processes aside."""
    from tailwise.catalog import Catalog
    from tailwise.catalog.files import file_digest
    from tailwise.catalog.kinds import DROP_LIST, PLAN
    from tailwise.catalog.layout import MANIFEST
    from tailwise.catalog.removals import Removals

    context = _parse(item)
    asked = {name: str(value) for name, value in context.params.items() if name not in {"workers", "catalog"}}
    plan = context.params.get("name") or context.params.get("plan")
    kind, names = (PLAN, [str(plan)]) if plan else (DROP_LIST, DROP_LIST.finished(catalog))
    manifests = {name: catalog / kind.folder / name / MANIFEST for name in names}
    hashes = {name: file_digest(path) for name, path in manifests.items() if path.exists()}
    return {
        "command": item.step.command,
        "asked": asked,
        "from": hashes,
        "removals": Removals.of(Catalog.open(catalog)).id,
    }


def _files(place: Path) -> dict[str, list[int]]:
    """What lies there: size and time of each file."""
    names = sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place]
    return {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in names if path.exists()}


def _exported(catalog: Path, item: Prepared) -> bool:
    """Whether what a step writes is there, as it would be written now."""
    from tailwise.catalog.files import read_json

    if item.step.command not in OUTPUTS or not (path := _record(catalog, item)).exists():
        return False
    found = read_json(path)
    return bool(found["made_from"] == _made_from(catalog, item) and found["files"] == _files(_place(item)))


def _export(catalog: Path, item: Prepared) -> None:
    """Runs a step that writes outside of the catalog; what an earlier run wrote there, and nobody has touched since, is replaced."""
    from tailwise.catalog.files import read_json, write_json

    path, place = _record(catalog, item), _place(item)
    found = read_json(path) if path.exists() else None
    ours = found is not None and found["files"] in (None, _files(place))
    made_from = _made_from(catalog, item)
    if ours and place.is_file():
        item = Prepared(item.step, ["--overwrite", *item.arguments])
    if ours or not place.exists():
        write_json(path, {"made_from": made_from, "files": None})  # whatever is there from here on, is ours
    _invoke(item)
    write_json(path, {"made_from": made_from, "files": _files(place)})


def _is_there(catalog: Path, opened: Catalog | None, item: Prepared) -> bool:
    """Whether something of the name that a step makes is there; whether it is the same, the step itself will see."""
    from tailwise.catalog.embeddings import MODALITIES, part_marker
    from tailwise.catalog.kinds import MADE_BY

    if opened is None or not opened.snapshots():
        return False
    step = item.step
    if step.command in OUTPUTS:
        return _exported(catalog, item)
    if step.command == "embed":
        asked = step.options.get("column", "image")
        names = MODALITIES if asked == "both" else (asked,)
        return all(part_marker(opened, name, part).exists() for name in names for part in opened.parts())
    if step.command == "import":
        return True
    if step.command == "train":
        return all(_is_trained(folder) for folder in _run_folders(step))
    return _made_name(step) in MADE_BY[step.command].finished(catalog)


def _other_settings(catalog: Path, item: Prepared) -> str:
    """Return what differs between a finished artifact and the options that the step gives, or ""."""
    from tailwise.catalog.artifacts import parameters
    from tailwise.catalog.files import read_record
    from tailwise.catalog.kinds import MADE_BY
    from tailwise.catalog.layout import MANIFEST

    kind = MADE_BY.get(item.step.command)
    if kind is None or item.step.command == "import":
        return ""
    made = parameters(read_record(kind.path(catalog, _made_name(item.step)) / MANIFEST)["identity"])
    asked = _parse(item).params
    names = [
        name for name in (option.replace("-", "_") for option in item.step.options) if name in made and name in asked
    ]
    changed = [f"`{name}` {made[name]} → {asked[name]}" for name in names if str(made[name]) != str(asked[name])]
    return as_options(", ".join(changed), item.step.command)


def _is_trained(folder: Path) -> bool:
    from tailwise.train.runs import read_run

    found = read_run(folder)
    return found is not None and bool(found["finished"])


def _print_plan(pipeline: Pipeline, prepared: list[Prepared], catalog: Path, sources: list[str]) -> list[str]:
    """Print what will be done; return the state of each step."""
    from tailwise.pipeline.costs import SECONDS, Pool, matrix_speed

    opened = _open(catalog)
    samples, about = _samples(opened, sources)
    say(f"{pipeline.name}: {' '.join(pipeline.about.split())}")
    say(f"pool: {about}{samples:,} samples")
    pool = Pool(samples, _dimension(opened), matrix_speed())
    sizes: dict[str, Any] = {}
    states = []
    for number, item in enumerate(prepared, 1):
        options: Mapping[str, Any] = item.step.options
        if item.step.command == "cluster":
            sizes[_made_name(item.step)] = options.get("k")
        if item.step.command == "dedup":
            fine = options.get("clustering", _default_name(item.step, "clustering"))
            options = {**options, "k": sizes.get(str(fine))}
        cost = SECONDS.get(item.step.command)
        state = (
            "is there"
            if _is_there(catalog, opened, item)
            else f"about {_duration(cost(pool, options))}"
            if cost
            else "time unknown"
        )
        other = _other_settings(catalog, item) if state == "is there" else ""
        states.append(f"other settings: {other}" if other else state)
        say(f"{number:3d}. {'OTHER SETTINGS' if other else state:>14}  {item.line}")
        if other:
            say(f"{'':>20}refused: it exists with other settings ({other})")
    return states


def _samples(opened: Catalog | None, sources: list[str]) -> tuple[int, str]:
    """How many samples there are, or about how many there will be: by the first tar, if nothing is imported yet."""
    from tailwise.shards.containers import index_shard
    from tailwise.sources import find

    if opened is not None and opened.snapshots():
        return opened.snapshot().rows, ""
    found = find(sources)
    if not found.tars:
        return 0, "an unknown number, for now "
    path, size = next(iter(found.tars.items()))
    total = sum(found.tars.values())
    return round(index_shard(path).samples.num_rows * total / max(size, 1)), f"{len(found.tars):,} tars, about "


def _dimension(opened: Catalog | None) -> int:
    from tailwise.catalog.embeddings import column_dimension

    known = column_dimension(opened, "image") if opened is not None else None
    return known or 768


def _duration(seconds: float) -> str:
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.0f} {unit}"
    return f"{max(seconds, 1):.0f} s"
