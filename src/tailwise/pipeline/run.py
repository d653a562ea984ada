"""Run a pipeline: read each step as its command takes it, refuse what cannot be, and do what is not done."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tailwise.catalog.artifacts import parameters
from tailwise.catalog.catalog import Catalog
from tailwise.catalog.embeddings import MODALITIES, part_marker
from tailwise.catalog.files import digest, file_digest, read_json, read_record, write_json
from tailwise.catalog.kinds import CLUSTERING, CONCEPTS, DROP_LIST, KINDS, MADE_BY, NAMED_SCORE, PLAN, Kind
from tailwise.catalog.layout import EMBEDDINGS, HEADER, MANIFEST, export_record
from tailwise.catalog.removals import Removals
from tailwise.errors import NotFoundError, UserError
from tailwise.pipeline.costs import SECONDS, Pool, duration
from tailwise.pipeline.steps import TRAINER, Command, Option, Step
from tailwise.recipes import Phase, load_recipe
from tailwise.recipes.recipe import Values, read_as, with_folder
from tailwise.requests import FILES, ScoreRequest, as_given
from tailwise.steps.planning.plan import check_method, default_clustering
from tailwise.steps.scoring.mix import Mix
from tailwise.steps.scoring.scores import SCORES, score_inputs
from tailwise.text import did_you_mean, option_words
from tailwise.train.arguments import ALLOW_CODE, refuse_code
from tailwise.train.runs import read_run

DEFAULTS: Mapping[str, dict[str, Any]] = {"train": {"resume": True}}  # begins what isn't there, goes on with what is
OUTPUTS = ("draw", "export", "excluded")  # commands that write to their `output`
OUTPUT = "{output}"  # in a value of a step: the folder for exports
CHECKPOINT = "checkpoint:"
# Options that name scores.
SCORED = {"filter": ("by", "refill"), "plan": ("score",), "dedup": ("score",), "score": ("mix",)}
CODE = {"methods", "allow-code"}  # options of steps that run code of the recipe
GIVEN = ("catalog", "paths", "json", "place", "suggest")  # of commands, and not for recipes to give
# Commands that may refuse a number of workers → whether they do, by the options of the step.
ALONE: Mapping[str, Callable[[Mapping[str, Any]], bool]] = {
    "export": lambda options: options.get("to") != "shards",
    "group": lambda options: "entries" not in options,
    "concepts": lambda options: "entries" not in options,
}


@dataclass(frozen=True)
class Job:
    """A step, ready to run."""

    step: Step  # of the recipe
    asked: Mapping[str, Any]  # values of all parameters of its command, by their names in Python
    line: str  # what a user would type
    run: Callable[..., None]  # the command; takes parameters to change

    @property
    def makes(self) -> str | None:
        """Name of the artifact that it makes; None where users name none."""
        kind = MADE_BY.get(self.step.command)
        return kind.made_by[self.step.command](self.asked) if kind else None

    @property
    def artifacts(self) -> list[str]:
        """Folders, in the catalog, of the artifacts and embedding columns that it makes under a name: clusters/main."""
        if self.step.command == "embed":
            columns = MODALITIES if self.asked["column"] == "both" else (self.asked["column"],)
            return [f"{EMBEDDINGS}/{column}" for column in columns]
        kind = None if self.step.command == "import" else MADE_BY.get(self.step.command)
        return [] if kind is None else [f"{kind.folder}/{self.makes}"]

    def run_folders(self) -> list[Path]:
        """Return the folders of a training's phases."""
        recipe = load_recipe(self.asked["recipe"]) if self.asked["recipe"] else None
        phases = recipe.phases if recipe is not None else (Phase(),)
        folders = []
        for number, phase in enumerate(phases, 1):
            given = {**phase.open_clip, **_trainer(self.step)}
            name = given.get("name") or f"{self.asked['name']}{f'-{recipe.name}' if recipe else ''}"
            folders.append(Path(given.get("logs") or "logs") / f"{name}{f'-phase{number}' * (len(phases) > 1)}")
        return folders


@dataclass(frozen=True)
class Runner:
    """Runs the steps of a pipeline."""

    commands: Mapping[str, Command]  # commands that steps can be, by name
    catalog: Path  # folder of the catalog
    sources: Sequence[str] = ()  # what is imported
    output: Path | None = None  # folder for exports
    workers: int | None = None  # processes, where a step does not say
    allow_code: bool = False  # let steps run code of the recipe

    def job(self, step: Step) -> Job:
        """Return a step as its command takes it.

        Raise a UserError if command or options are unknown, a value is missing or not allowed, or the step runs code of the recipe.
        """
        if step.command not in self.commands:
            raise UserError(f"step {step.command!r} is none: {did_you_mean(step.command, self.commands)}")
        command = self.commands[step.command]
        known = [name for name in command.options if name not in GIVEN]
        for name in step.options:
            if name not in known:
                raise UserError(f"step {step.label} has {name!r}, which means nothing: {did_you_mean(name, known)}")
        with _naming(step):
            step = self._placed(step, command.options.get("output"))
            self._refuse_code(step)
            options = self._options(step, known)
            given = {name: command.options[name].read(name, value) for name, value in options.items()}
            asked = {option.parameter: option.default for option in command.options.values()}
            asked |= {command.options[name].parameter: value for name, value in given.items()}
            for name, option in command.options.items():
                if asked[option.parameter] is inspect.Parameter.empty:
                    raise UserError(f"{name} is missing: add it")
            shown = {name: options[name] if isinstance(value, float) else value for name, value in given.items()}
            line = shlex.join(["tailwise", step.command, *command.words(shown)])
            with as_given(command.options[name].parameter for name in given):
                return Job(step, asked, line, command.ready(**asked))

    def _options(self, step: Step, known: Collection[str]) -> dict[str, Any]:
        """Return the options of a step, with those that all steps share."""
        options = {**DEFAULTS.get(step.command, {}), **step.options}
        options = {name: value for name, value in options.items() if value is not None}
        if TRAINER in options:
            options[TRAINER] = option_words(_trainer(step))
        alone = ALONE.get(step.command)
        if self.workers is not None and "workers" in known and not (alone and alone(options)):
            options.setdefault("workers", self.workers)
        if self.allow_code and "allow-code" in known:
            options["allow-code"] = True
        if step.command != "import":
            return {**options, "catalog": self.catalog}
        if not self.sources:
            raise UserError("no source is given: tailwise run RECIPE SOURCE... CATALOG")
        return {**options, "paths": [*self.sources, str(self.catalog)]}

    def _placed(self, step: Step, output: Option | None) -> Step:
        """Return a step with the folder for exports in its values."""
        options = dict(step.options)
        if output is not None and step.command in OUTPUTS:
            if options.get("output") is None:
                raise UserError("output is missing: name the file to write")
            options["output"] = str(Path(OUTPUT) / output.read("output", options["output"]))
        if self.output is None and OUTPUT in str(options):
            raise UserError(f"a value is in {OUTPUT}: name that folder with `output`")
        return Step(step.command, with_folder(options, self.output or Path(), OUTPUT))

    def _refuse_code(self, step: Step) -> None:
        """Refuse a step that runs code of its recipe, unless the user allows that."""
        for option in () if self.allow_code else CODE & step.options.keys():
            raise UserError(f"{option} is {step.options[option]!r}, which runs code: {ALLOW_CODE}")
        refuse_code(TRAINER, _trainer(step), allowed=self.allow_code)
        if step.command == "train" and (name := step.options.get("recipe")) is not None:
            for phase in load_recipe(str(name)).phases:
                refuse_code(f"recipe {name}: open_clip", phase.open_clip, allowed=self.allow_code)

    def check(self, jobs: Sequence[Job]) -> None:
        """Refuse jobs that name what neither an earlier job makes nor the catalog holds, unknown methods, and lists that are not there."""
        made: set[tuple[str, str | Path | None]] = set()
        for job in jobs:
            with _naming(job.step):
                self._check(job, made)
            made.add((job.step.command, job.makes))
            made |= {("train", folder) for folder in (job.run_folders() if job.step.command == "train" else ())}
            made |= {("output", Path(job.asked["output"]))} if job.step.command in OUTPUTS else set()

    def _check(self, job: Job, made: Collection[tuple[str, str | Path | None]]) -> None:
        command = job.step.command
        _, _, composed = str(job.asked.get("compose") or "").partition(":")
        if composed:
            self._require(CONCEPTS, "compose", composed, made)
        for kind in (kind for kind in KINDS if command in kind.named_by):
            option = kind.named_by[command]
            names = job.asked[option] or []
            if kind is CLUSTERING and command == "dedup" and (job.asked["exact"] or job.asked["against"]):
                names = []  # no clusters are needed
            if not names and kind is CLUSTERING and command == "plan":
                names = default_clustering(str(job.asked["method"])) or []
            for name in [names] if isinstance(names, str) else names:
                self._require(kind, option, name, made, kind.makers_for.get(command))
        self._check_scores(job, made)
        encoder = str(job.asked.get("encoder"))
        checkpoint = Path(encoder.removeprefix(CHECKPOINT)).expanduser()
        trained = any(("train", folder) in made for folder in (checkpoint, *checkpoint.parents))
        if encoder.startswith(CHECKPOINT) and not trained and not checkpoint.exists():
            raise UserError(
                f"encoder is {encoder!r}, which no step before it trains, and there is none: add a step train"
            )
        if (given := job.asked.get("method")) is not None and job.asked["methods"] is None:
            check_method(given)
        for name in sorted(FILES):
            path = job.asked.get(name)
            if isinstance(path, Path) and not path.is_file() and ("output", path) not in made:
                raise NotFoundError(f"{name.replace('_', '-')} is {str(path)!r}, which is no file")

    def _check_scores(self, job: Job, made: Collection[tuple[str, str | Path | None]]) -> None:
        """Refuse the name of a score that there will not be; a step import may bring columns of any name."""
        if job.asked.get("file") or job.asked.get("score_file") or any(command == "import" for command, _ in made):
            return
        options = [option for option in SCORED.get(job.step.command, ()) if job.asked[option]]
        for option, name in ((each, name) for each in options for name in _score_names(each, job.asked[each])):
            if name in SCORES or ("score", name) in made:
                continue
            if (opened := self.open()) is None:
                self._require(NAMED_SCORE, option, name, made)
            else:
                score_inputs(opened, opened.snapshot(), ScoreRequest(name))  # refuses it

    def _require(
        self,
        kind: Kind,
        option: str,
        name: str,
        made: Collection[tuple[str, str | Path | None]],
        makers: Sequence[str] | None = None,
    ) -> None:
        """Refuse the name of an artifact that neither an earlier step makes nor the catalog holds."""
        makers = makers or tuple(kind.made_by)
        if (
            not any((maker, name) in made for maker in makers)
            and not (kind.path(self.catalog, name) / MANIFEST).exists()
        ):
            raise UserError(
                f"{option} is {name!r}, which no step before it makes, and {self.catalog} has none: add a step {' or '.join(makers)}"
            )

    def open(self) -> Catalog | None:
        """Return the catalog; None if nothing has been imported."""
        opened = Catalog.open(self.catalog) if (self.catalog / HEADER).exists() else None
        return opened if opened is not None and opened.snapshots() else None

    def is_there(self, job: Job) -> bool:
        """Return whether something of the name that a job makes is in the catalog."""
        opened = self.open()
        return opened is not None and _is_there(opened, job)

    def states(self, jobs: Sequence[Job], pool: Pool) -> Iterator[tuple[str, str]]:
        """Yield for each job whether its result is there, or the time it takes; and what would have it refused, or ""."""
        opened = self.open()
        for job in jobs:
            if opened is not None and _is_there(opened, job):
                other = _other_settings(opened, job)
                yield "other settings" if other else "is there", other
            elif job.step.command in OUTPUTS and _is_taken(self.catalog, job):
                yield "other contents", f"{job.asked['output']}: give another output, or delete it"
            else:
                cost = SECONDS.get(job.step.command)
                yield f"about {duration(cost(pool, job.asked))}" if cost else "time unknown", ""

    def run(self, job: Job) -> bool:
        """Run a job; return False if the file that it writes is there already. All other commands skip by themselves what is done.

        A file that an earlier job wrote, and that is unchanged since, is replaced.
        """
        if self.output is not None:
            self.output.mkdir(parents=True, exist_ok=True)
        if job.step.command not in OUTPUTS:
            job.run()
            return True
        opened = Catalog.open(self.catalog)
        if _is_exported(opened, job):
            return False
        path, place = _record(self.catalog, job)
        made_from, ours = _made_from(opened, job), _is_ours(self.catalog, job)
        if ours or not place.exists():
            write_json(path, {"made_from": made_from, "files": None})  # whatever is there from here on, is ours
        job.run(**({"overwrite": True} if ours and place.is_file() else {}))
        write_json(path, {"made_from": made_from, "files": _files(place)})
        return True


def _score_names(option: str, text: str) -> list[str]:
    """Return the names of the scores in a value of one of SCORED."""
    if option == "mix":
        return Mix(text).names
    return [] if (option, text) == ("refill", "random") else [text]


@contextmanager
def _naming(step: Step) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        error.args = (f"step {step.label}: {error}",)
        raise


def _trainer(step: Step) -> Mapping[str, Any]:
    return read_as(Values, step.options.get(TRAINER), TRAINER)  # type: ignore[type-abstract]


def _is_there(catalog: Catalog, job: Job) -> bool:
    """Return whether something of the name that a job makes is there; the job itself will see whether it is the same."""
    command = job.step.command
    if command == "embed":
        columns = MODALITIES if job.asked["column"] == "both" else (job.asked["column"],)
        return all(part_marker(catalog, column, part).exists() for column in columns for part in catalog.parts())
    if command == "train":
        return all((read_run(folder) or {}).get("finished") for folder in job.run_folders())
    if command in OUTPUTS:
        return _is_exported(catalog, job)
    return command == "import" or job.makes in MADE_BY[command].finished(catalog.folder)


def _other_settings(catalog: Catalog, job: Job) -> str:
    """Return what differs between a finished artifact and the options that the step gives, or ""."""
    kind = MADE_BY.get(job.step.command)
    if kind is None or job.step.command == "import":
        return ""
    made = parameters(read_record(kind.path(catalog.folder, str(job.makes)) / MANIFEST)["identity"])
    given = [option.replace("-", "_") for option in job.step.options]
    made = {name: value for name, value in made.items() if name not in FILES}  # other texts may mean the same
    made |= {name: value["name"] for name, value in made.items() if isinstance(value, Mapping) and "name" in value}
    both = [(name, made[name], job.asked[name]) for name in given if name in made and name in job.asked]
    both = [(name, old, new) for name, old, new in both if str(old).replace(" ", "") != str(new).replace(" ", "")]
    return ", ".join(f"`{name}` {old} → {new}" for name, old, new in both)


# --- steps that write outside of the catalog, and the records by which their files are known again -----------------------


def _is_exported(catalog: Catalog, job: Job) -> bool:
    """Return whether what a job writes is there, as it would be written now."""
    path, place = _record(catalog.folder, job)
    return path.exists() and read_json(path) == {"made_from": _made_from(catalog, job), "files": _files(place)}


def _is_taken(catalog: Path, job: Job) -> bool:
    """Return True if another file is where a job writes to, so that the job will be refused."""
    return _record(catalog, job)[1].is_file() and not job.asked["overwrite"] and not _is_ours(catalog, job)


def _record(catalog: Path, job: Job) -> tuple[Path, Path]:
    """Return the record of a job, and the place that it writes to."""
    place = Path(job.asked["output"]).absolute()
    return export_record(catalog, digest(str(place))), place


def _is_ours(catalog: Path, job: Job) -> bool:
    path, place = _record(catalog, job)
    return path.exists() and read_json(path)["files"] in (None, _files(place))


def _made_from(catalog: Catalog, job: Job) -> dict[str, Any]:
    """Return all that decides what a job writes, the number of processes aside."""
    plan = job.asked.get("name") or job.asked.get("plan")
    kind, names = (PLAN, [plan]) if plan else (DROP_LIST, DROP_LIST.finished(catalog.folder))
    return {
        "command": job.step.command,
        "asked": {name: str(value) for name, value in job.asked.items() if name not in {"workers", "catalog"}},
        "from": {
            name: file_digest(path) for name in names if (path := kind.path(catalog.folder, name) / MANIFEST).exists()
        },
        "removals": Removals.of(catalog).id,
    }


def _files(place: Path) -> dict[str, list[int]]:
    """Return size and time of each file in a place."""
    names = sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place]
    return {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in names if path.exists()}
