"""Deciding: plan, explain."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tailwise.cli.app import AsJson, CatalogPath, PlanName, app, open_catalog, open_plan, refuse_given, with_bars
from tailwise.errors import UserError


@app.command()
def plan(
    catalog: CatalogPath,
    name: PlanName,
    method: Annotated[
        str | None, typer.Option(help="dbp, ssp, dynamics, flat, proportional, random.", show_default=False)
    ] = None,
    keep: Annotated[
        float | None,
        typer.Option(help="Budget, as a share of the samples that the method can draw.", show_default=False),
    ] = None,
    budget: Annotated[
        int | None, typer.Option(help="Budget, in samples: per epoch, or in all if static.", show_default=False)
    ] = None,
    clusters: Annotated[
        str | None, typer.Option(help="Name of the clustering.  [default: main]", show_default=False)
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="dynamics: quota in proportion to size^alpha.  [default: 0.2]")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="dbp: of the softmax over complexity.  [default: 0.1]")
    ] = None,
    max_repeats: Annotated[int, typer.Option(help="Copies of a sample per epoch, at most (1 to 255).")] = 1,
    min_per_cluster: Annotated[
        int | None, typer.Option(help="dbp: least quota of a cluster.  [default: 1]", show_default=False)
    ] = None,
    pick: Annotated[
        str | None, typer.Option(help="Members of a cluster: random, hardest or easiest first.", show_default=False)
    ] = None,
    dynamic: Annotated[
        bool | None, typer.Option("--dynamic/--static", help="Draw anew each epoch, or once.", show_default=False)
    ] = None,
    draw: Annotated[str | None, typer.Option(help="stream (exact counts) or bernoulli.  [default: stream]")] = None,
    seed: Annotated[int, typer.Option(help="Decides the draw.")] = 0,
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
    as_json: AsJson = False,
) -> None:
    """Decide how many samples each cluster gives, and which.

    Methods: **dbp** (Density-Based Pruning, ICLR 2024) and **ssp** pick once, hardest samples first; **dynamics** (DynamiCS,
    ECCV 2026), **flat**, **proportional** and **random** draw anew each epoch.

    Examples:

      tailwise plan my-catalog subset --method dbp --keep 0.277

      tailwise plan my-catalog epochs --method dynamics --keep 0.5 --alpha 0.2

      tailwise plan my-catalog theirs --rates sampling_probabilities.json
    """
    from tailwise.plan.explain import explain as figures
    from tailwise.plan.methods import find_method
    from tailwise.printing import print_json
    from tailwise.stages.plan import PlanRequest, make_plan
    from tailwise.stages.plan_rates import make_rate_plan

    opened = open_catalog(catalog)
    if (method is None) == (rates is None):
        raise UserError("give either --method or --rates")
    if rates is not None:
        unused: dict[str, object] = {"--keep": keep, "--budget": budget, "--alpha": alpha, "--temperature": temperature}
        unused |= {
            "--min-per-cluster": min_per_cluster,
            "--pick": pick,
            "--draw": draw if draw != "bernoulli" else None,
        }
        unused |= {"--clusters": clusters, "--max-repeats": max_repeats if max_repeats != 1 else None}
        refuse_given(unused, "with --rates: the rates say it all, and are drawn by bernoulli")
        made = with_bars(
            lambda track: make_rate_plan(
                opened,
                name,
                rates,
                column=rate_column or "rate",
                missing_rate=missing_rate,
                dynamic=dynamic is not False,
                seed=seed,
                track=track,
            )
        )
    else:
        refuse_given({"--missing-rate": missing_rate, "--rate-column": rate_column}, "without --rates")
        if find_method(method or "").grouping == "pool":
            refuse_given({"--clusters": clusters}, f"with method {method!r}, which needs no clusters")
        request = PlanRequest(
            method=method or "",
            keep=keep,
            budget=budget,
            clusters=clusters or "main",
            options={"alpha": alpha, "temperature": temperature},
            max_repeats=max_repeats,
            min_per_cluster=min_per_cluster,
            pick=pick,
            dynamic=dynamic,
            draw=draw,
            seed=seed,
        )
        made = with_bars(lambda track: make_plan(opened, name, request, track))
    if as_json:
        print_json({"name": name, "config": dict(made.config), **made.manifest["summary"]})
        return
    first = figures(made, 1).epochs[0]
    kind = "each epoch draws" if made.dynamic else "draws, the same every epoch,"
    print(f"plan {name!r}: {kind} {first.total:,.0f} of {made.manifest['summary']['eligible']:,} samples")
    newest = opened.snapshot()
    if newest.number > made.snapshot.number:
        print(
            f"note: it speaks of snapshot {made.snapshot.number}; {newest.rows - made.rows:,} newer samples are not in it "
            "(cluster the newest snapshot under another name to have them)"
        )
    unknown = made.manifest["summary"].get("rates_without_sample")
    if unknown:
        print(f"{unknown:,} rates belong to no sample")
    print(f"see more: tailwise explain {catalog} {name}")


@app.command()
def explain(
    catalog: CatalogPath,
    name: PlanName,
    epochs: Annotated[int, typer.Option(min=1, help="How many epochs to look ahead.")] = 10,
    clusters: Annotated[bool, typer.Option("--clusters", help="List every cluster.")] = False,
    as_json: AsJson = False,
) -> None:
    """Tell what a plan will do: totals, coverage, and who gains, before anything is drawn.

    Example:

      tailwise explain my-catalog epochs --epochs 6
    """
    from tailwise.plan.explain import cluster_list
    from tailwise.plan.explain import explain as figures
    from tailwise.printing import print_clusters, print_explanation, print_json

    made = open_plan(catalog, name)
    explanation = figures(made, epochs)
    if as_json:
        listed = {"cluster_list": cluster_list(made)} if clusters else {}
        print_json({**explanation.as_json(), **listed})
        return
    print_explanation(explanation)
    if clusters:
        print_clusters(cluster_list(made))
