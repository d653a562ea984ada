"""Steps that write outside of the catalog, and the records by which their files are known again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tailwise.catalog.catalog import Catalog
from tailwise.catalog.files import digest, file_digest, read_json, write_json
from tailwise.catalog.kinds import DROP_LIST, PLAN
from tailwise.catalog.layout import MANIFEST, export_record
from tailwise.catalog.removals import Removals

if TYPE_CHECKING:
    from tailwise.pipeline.run import Job, Runner

OUTPUTS = ("draw", "export", "excluded")  # commands that write to their `output`


def is_exported(catalog: Catalog, job: Job) -> bool:
    """Return whether what a job writes is there, as it would be written now."""
    path, place = _record(catalog.folder, job)
    return path.exists() and read_json(path) == {"made_from": _made_from(catalog, job), "files": _files(place)}


def is_taken(catalog: Path, job: Job) -> bool:
    """Return True if another file is where a job writes to, so that the job will be refused."""
    return _record(catalog, job)[1].is_file() and not job.asked["overwrite"] and not _is_ours(catalog, job)


def run_job(runner: Runner, job: Job) -> bool:
    """Run a job; return False if the file that it writes is there already. All other commands skip by themselves what is done.

    A file that an earlier job wrote, and that is unchanged since, is replaced.
    """
    if runner.output is not None:
        runner.output.mkdir(parents=True, exist_ok=True)
    if job.step.command not in OUTPUTS:
        job.run()
        return True
    opened = Catalog.open(runner.catalog)
    if is_exported(opened, job):
        return False
    path, place = _record(runner.catalog, job)
    made_from, ours = _made_from(opened, job), _is_ours(runner.catalog, job)
    if ours or not place.exists():
        write_json(path, {"made_from": made_from, "files": None})  # whatever is there from here on, is ours
    job.run(**({"overwrite": True} if ours and place.is_file() else {}))
    write_json(path, {"made_from": made_from, "files": _files(place)})
    return True


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
