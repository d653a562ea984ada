"""Deciding: plan, explain."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tailwise.cli.app import (
    AsJson,
    CatalogPath,
    PlanName,
    Without,
    app,
    open_catalog,
    open_plan,
    refuse_given,
    say_note,
    with_bars,
)
from tailwise.errors import UserError
from tailwise.printing import budget_text, say

if TYPE_CHECKING:
    from tailwise.catalog import Catalog
    from tailwise.plan.plan import Plan
    from tailwise.stages.candidates import LeftOut


@app.command()
def plan(
    catalog: CatalogPath,
    name: PlanName,
    method: Annotated[str | None, typer.Option(help="See below.", show_default=False)] = None,
    keep: Annotated[
        float | None,
        typer.Option(
            help="Budget, as a share of the pool: all imported samples that are not removed, dropped ones included.",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[
        int | None, typer.Option(help="Budget, in samples: per epoch, or in all if static.", show_default=False)
    ] = None,
    per_cluster: Annotated[
        int | None, typer.Option(help="cap, flat: at most so many samples of each cluster.", show_default=False)
    ] = None,
    clustering: Annotated[
        str | None,
        typer.Option(help="Name of the clustering, or grouping.  [default: main]", show_default=False),
    ] = None,
    without: Without = None,
    alpha: Annotated[
        float | None, typer.Option(help="dynamics: quota in proportion to size^alpha.  [default: 0.2]")
    ] = None,
    alpha_end: Annotated[
        float | None, typer.Option(help="dynamics: alpha after --anneal-epochs; linear until then.", show_default=False)
    ] = None,
    anneal_epochs: Annotated[int | None, typer.Option(help="See --alpha-end.", show_default=False)] = None,
    temperature: Annotated[
        float | None, typer.Option(help="dbp: of the softmax over complexity.  [default: 0.1]")
    ] = None,
    neighbours: Annotated[
        int | None, typer.Option(help="dbp: nearest other centroids that d_inter is taken over.  [default: 20]")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="An option of a method of your own.", show_default=False),
    ] = None,
    max_repeats: Annotated[int, typer.Option(help="Copies of a sample per epoch, at most (1 to 255).")] = 1,
    min_per_cluster: Annotated[
        int | None, typer.Option(help="Least quota of a cluster.  [default: 1 for dbp, else 0]", show_default=False)
    ] = None,
    class_balance: Annotated[
        float | None,
        typer.Option(help="Raises that to this share of budget / clusters (ssp, dbp).", show_default=False),
    ] = None,
    pick: Annotated[
        str | None,
        typer.Option(help="Members first: random, hardest, easiest, highest, lowest (score).", show_default=False),
    ] = None,
    score: Annotated[
        str | None, typer.Option(help="Of --pick highest or lowest.  [default: clip-score]", show_default=False)
    ] = None,
    dynamic: Annotated[
        bool | None, typer.Option("--dynamic/--static", help="Draw anew each epoch, or once.", show_default=False)
    ] = None,
    draw: Annotated[str | None, typer.Option(help="stream (exact counts) or bernoulli.  [default: stream]")] = None,
    seed: Annotated[int, typer.Option(help="Decides the draw.")] = 0,
    methods: Annotated[
        Path | None, typer.Option(help="A .py file that registers methods of your own; it is run.", show_default=False)
    ] = None,
    rates: Annotated[
        Path | None,
        typer.Option(help="In place of a method: .json {key: rate} or .parquet of rates.", show_default=False),
    ] = None,
    rate_column: Annotated[
        str | None, typer.Option(help="Column of the .parquet of rates.  [default: rate]", show_default=False)
    ] = None,
    missing_rate: Annotated[
        float | None, typer.Option(help="Rate of samples that the file doesn't name; without it, an error.")
    ] = None,
    max_rejected: Annotated[
        float | None,
        typer.Option(
            help="Of --rates: refuse if greater shares of its rows and of the samples don't match.  [default: 0.1]",
            show_default=False,
        ),
    ] = None,
    entries: Annotated[
        Path | None,
        typer.Option(help="In place of a method: a list of entries, balanced as in MetaCLIP.", show_default=False),
    ] = None,
    per_entry: Annotated[
        int | None, typer.Option(help="Of --entries: t, samples per entry. MetaCLIP: 20000.", show_default=False)
    ] = None,
    ignore_case: Annotated[bool, typer.Option("--ignore-case", help="Of --entries: compare in lower case.")] = False,
    as_json: AsJson = False,
) -> None:
    """Decide how many samples each cluster gives, and which.

    Methods that draw anew each epoch: **dynamics** (DynamiCS, ECCV 2026), **dbp-dynamic**, **flat**, **proportional**, **random**.
    Methods that pick once: **dbp** (Density-Based Pruning, ICLR 2024) and **ssp**, hardest samples first; **cap**, at most so many of
    a cluster; **top-score**, highest score first. In place of a method: --rates made elsewhere, or --entries, a list of words that
    captions are balanced over (MetaCLIP).

    Examples:

      tailwise plan my-catalog subset --method dbp --keep 0.277

      tailwise plan my-catalog epochs --method dynamics --keep 0.5 --alpha 0.2 --without duplicates

      tailwise plan my-catalog annealed --method dynamics --keep 0.5 --alpha 0 --alpha-end 1 --anneal-epochs 6

      tailwise plan my-catalog best --method top-score --score clip-score --keep 0.3

      tailwise plan my-catalog theirs --rates sampling_probabilities.json

      tailwise plan my-catalog balanced --entries entries.txt --per-entry 20000
    """
    from tailwise.plan.explain import first_epoch
    from tailwise.printing import print_json
    from tailwise.stages.unused_lists import left_out_of_plan, unused_by_plan

    opened = open_catalog(catalog)
    if [method, rates, entries].count(None) != 2:
        raise UserError("give one of --method, --rates and --entries")
    numbers: dict[str, float | None] = {"alpha": alpha, "temperature": temperature, "neighbours": neighbours}
    of_method: dict[str, object] = {f"--{item}": value for item, value in numbers.items()}
    of_method |= {"--per-cluster": per_cluster, "--clustering": clustering, "--alpha-end": alpha_end, "--score": score}
    of_method |= {"--anneal-epochs": anneal_epochs, "--option": option, "--pick": pick, "--methods": methods}
    of_method |= {"--min-per-cluster": min_per_cluster, "--class-balance": class_balance}
    of_method |= {"--max-repeats": max_repeats if max_repeats != 1 else None}
    of_method |= {"--draw": draw if draw != "bernoulli" else None}
    of_rates: dict[str, object] = {"--missing-rate": missing_rate, "--rate-column": rate_column}
    of_rates |= {"--max-rejected": max_rejected}
    of_entries: dict[str, object] = {"--per-entry": per_entry, "--ignore-case": ignore_case or None}
    if rates is not None:
        from tailwise.rejects import MAX_REJECTED
        from tailwise.stages.plan_rates import make_rate_plan

        refuse_given(
            {**of_method, **of_entries, "--keep": keep, "--budget": budget, "--without": without},
            "with --rates: the rates say it all, and are drawn by bernoulli",
        )
        made = with_bars(
            lambda track: make_rate_plan(
                opened,
                name,
                rates,
                column=rate_column or "rate",
                missing_rate=missing_rate,
                max_rejected=MAX_REJECTED if max_rejected is None else max_rejected,
                dynamic=dynamic is not False,
                seed=seed,
                track=track,
            )
        )
    elif entries is not None:
        from tailwise.stages.plan_balance import make_balanced_plan

        refuse_given({**of_method, **of_rates}, "with --entries")
        made = with_bars(
            lambda track: make_balanced_plan(
                opened,
                name,
                entries,
                per_entry=per_entry,
                keep=keep,
                budget=budget,
                ignore_case=ignore_case,
                without=without or (),
                dynamic=dynamic is True,
                seed=seed,
                track=track,
            )
        )
    else:
        from tailwise.plan.methods import find_method, load_methods
        from tailwise.stages.plan import PlanRequest, make_plan
        from tailwise.stages.scores import ScoreRequest

        refuse_given(of_rates, "without --rates")
        refuse_given(of_entries, "without --entries")
        if methods is not None:
            load_methods(methods)
        if find_method(method or "").grouping == "pool":
            refuse_given({"--clustering": clustering}, f"with method {method!r}, which needs no clusters")
        request = PlanRequest(
            method=method or "",
            keep=keep,
            budget=budget,
            per_cluster=per_cluster,
            clustering=clustering or "main",
            options={**numbers, **_pairs(option or [])},
            final_options={"alpha": alpha_end},
            anneal_epochs=anneal_epochs,
            max_repeats=max_repeats,
            min_per_cluster=min_per_cluster,
            class_balance=class_balance,
            pick=pick,
            score=ScoreRequest(score) if score is not None else None,
            without=without or (),
            dynamic=dynamic,
            draw=draw,
            seed=seed,
        )
        made = with_bars(lambda track: make_plan(opened, name, request, track))
    unused = unused_by_plan(made)
    total = first_epoch(made).total
    left_out = left_out_of_plan(made)
    if as_json:
        shares = {
            "pool": made.pool,
            "budget": total,
            "share_of_pool": total / made.pool,
            "left_out": asdict(left_out),
        }
        lists = [asdict(item) for item in unused]
        print_json(
            {
                "name": name,
                "config": dict(made.config),
                **made.manifest["summary"],
                **shares,
                "unused_drop_lists": lists,
            }
        )
        return
    _print_plan(made, total, left_out)
    _print_notes(made, opened, catalog)
    for item in unused:
        say_note(item.note())
    say(f"see more: tailwise explain {catalog} {name}")


def _print_plan(made: Plan, budget: float, left_out: LeftOut) -> None:
    about = "" if made.exact else "about "
    kind = "each epoch" if made.dynamic else "the same every epoch"
    causes = f": {left_out}" if str(left_out) else ""
    say(
        f"plan {made.name!r}, {kind}: {budget_text(budget, made.pool, made.rows, about)}; "
        f"{made.manifest['summary']['eligible']:,} samples can be drawn{causes})"
    )


def _print_notes(made: Plan, opened: Catalog, folder: Path) -> None:
    newest = opened.snapshot()
    if newest.number > made.snapshot.number:
        grouping = made.config.get("clusters")
        remedy = (
            f" (assign them to its clusters: tailwise cluster {folder} --extends {grouping} --name …)"
            if grouping
            else ""
        )
        say(
            f"note: it speaks of snapshot {made.snapshot.number}; {newest.rows - made.rows:,} newer samples are not in it{remedy}"
        )
    summary = made.manifest["summary"]
    if "entries_thinned" in summary:
        thinned, unmatched = summary["entries_thinned"], summary["entries_without_match"]
        say(
            f"{summary['matched']:,} captions hold an entry; {thinned:,} of {summary['entries']:,} entries have more than "
            f"{summary['per_entry']:,.1f} captions and are thinned, {unmatched:,} have none"
        )
    if unknown := summary.get("rates_without_sample"):
        say(f"{unknown:,} rates belong to no sample")


def _pairs(texts: list[str]) -> dict[str, float]:
    pairs: dict[str, float] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name in pairs:
            raise UserError(f"--option {name} is given twice: give it once")
        try:
            pairs[name] = float(value)
        except ValueError as error:
            raise UserError(f"--option {text!r}: give NAME=VALUE, with a number as value") from error
    return pairs


@app.command()
def explain(
    catalog: CatalogPath,
    name: PlanName,
    epochs: Annotated[int, typer.Option(min=1, help="How many epochs to look ahead.")] = 10,
    by_cluster: Annotated[bool, typer.Option("--by-cluster", help="List every cluster.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.svg", help="Draw clusters and coverage.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file of --plot if it exists.")] = False,
    as_json: AsJson = False,
) -> None:
    """Tell what a plan will do: totals, coverage, and who gains, before anything is drawn.

    Example:

      tailwise explain my-catalog epochs --epochs 6 --plot epochs.svg
    """
    from tailwise.plan.explain import cluster_list
    from tailwise.plan.explain import explain as figures
    from tailwise.printing import print_clusters, print_explanation, print_json
    from tailwise.stages.unused_lists import unused_by_plan

    made = open_plan(catalog, name)
    explanation = figures(made, epochs)
    unused = unused_by_plan(made)
    if plot is not None:
        from tailwise.plan.plot import write_plot

        write_plot(made, epochs, plot, overwrite=overwrite)
    if as_json:
        listed = {"cluster_list": cluster_list(made)} if by_cluster else {}
        print_json({**explanation.as_json(), "unused_drop_lists": [asdict(item) for item in unused], **listed})
        return
    print_explanation(explanation)
    for item in unused:
        say_note(item.note())
    if by_cluster:
        print_clusters(cluster_list(made))
