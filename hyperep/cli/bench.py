# SPDX-License-Identifier: Apache-2.0
"""``hyperep bench``: a layer of experts beside its limits on this machine, and beside the naive way."""

from __future__ import annotations

import dataclasses
import enum
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

__all__ = ["bench"]


class Exchanged(enum.StrEnum):
    """What travels."""

    TOKENS = "tokens"
    ROWS = "rows"


_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def bench(
    platform: Annotated[str | None, typer.Option(help="What to measure; see hyperep platforms.")] = None,
    ranks: Annotated[
        int | None, typer.Option(help="Ranks to start; inside a launch (torchrun, ...) leave it out.", show_default="2")
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(help="coarse, fine, finest or dsv3-16b (for GPUs); repeatable.", show_default="all but dsv3-16b"),
    ] = None,
    workload: Annotated[
        list[str] | None,
        typer.Option(
            help="Where tokens go: uniform, zipf, hot-expert, hot-rank, drift, bursts, idle-rank or trace; repeatable.",
            show_default="uniform",
        ),
    ] = None,
    trace: Annotated[
        str | None,
        typer.Option(
            help="What --workload trace is: trace.npz of hyperep train --record-trace.",
            show_default="one that comes with hyperep",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of objects instead of a table.")] = False,
    repetitions: Annotated[int, typer.Option(min=1, help="How often each thing is timed, in turns.")] = 10,
    exchange: Annotated[Exchanged, typer.Option(help="What travels in the layer that is measured.")] = Exchanged.TOKENS,
    chunks: Annotated[
        str, typer.Option(help="Parts in which tokens travel, so that one is computed while another does; or auto.")
    ] = "1",
    balance: Annotated[
        bool, typer.Option("--balance", help="Compute hot experts in several places in the layer that is measured.")
    ] = False,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="Measure the shape (fine) in 1, 2, 4 and 8 chunks, and keep what is hidden for chunks='auto'.",
        ),
    ] = False,
    timeline: Annotated[
        str | None,
        typer.Option(
            help="Draw into this file what was on the wire, and when ranks computed; beside it without chunks."
        ),
    ] = None,
    naive: Annotated[
        bool | None,
        typer.Option(help="Compare with the naive way, which takes its time.", show_default="without --sweep: naive"),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(
            help="Seconds that a repetition may take before all is given up.", show_default="$HYPEREP_TIMEOUT or 600"
        ),
    ] = None,
    sweep: Annotated[
        str | None, typer.Option(help="Vary one thing and draw a picture: experts, tokens, top-k, ranks or skew.")
    ] = None,
    picture: Annotated[
        str | None, typer.Option(help="Where the picture of the sweep goes.", show_default="bench-SWEEP.svg")
    ] = None,
) -> None:
    """Time one routed layer, from tokens to tokens, forward, and forward and backward.

    In the same run, and in turns: the limit, which no implementation can beat, raw exchanges of what must travel (a
    token once to each rank that owns one of its experts) with dense products of the same arithmetic; the same layer
    with an exchange of rows, one for each expert of a token; and the naive way, one expert at a time. Times are medians
    over repetitions, each of them that of the slowest rank. A sweep begins from the shape given, by default fine.
    Workloads of one shape take turns too, so that their times compare.

    Each rank has one thread, unless the environment says otherwise: several ranks share the machine's cores.
    """
    # Before NumPy is loaded, which reads this only then; ranks may be threads of this process.
    if not any(variable in os.environ for variable in _THREADS):
        os.environ.update(dict.fromkeys(_THREADS, "1"))
    # Here, so that the help of this command does not need NumPy.
    from hyperep.bench.launch import start
    from hyperep.bench.report import notes, table
    from hyperep.bench.shapes import preset
    from hyperep.bench.sweep import SWEEPS, draw, require_drawable, swept
    from hyperep.bench.timeline_picture import draw_timeline
    from hyperep.bench.way import Way
    from hyperep.launch.timeout import use_timeout

    # The time of the naive way grows with the square of the experts: half a minute a step at the end of that sweep.
    naive = sweep is None if naive is None else naive
    how: dict[str, Any] = {"platform_name": platform, "ranks": ranks, "repetitions": repetitions, "naive": naive}
    how["way"] = Way(exchange=exchange.value, chunks=_parts(chunks), balance=balance, timeline=timeline is not None)
    _ = how["way"].style  # what does not go together is told before ranks are started
    if calibrate and (sweep is not None or timeline is not None or len(shape or ()) > 1 or workload):
        raise ValueError(
            "--calibrate measures one shape in its own way; leave out --sweep, --timeline, --workload, other shapes"
        )
    if trace is not None and "trace" not in (workload or ()):
        raise ValueError(f"--trace {trace} is for --workload trace; add that, or leave it out")
    shapes = [
        dataclasses.replace(preset(name), workload=where, trace=trace if where == "trace" else None)
        for name in shape or (("fine",) if sweep else ("coarse", "fine", "finest"))
        for where in workload or ("uniform",)
    ]
    path = Path(picture or f"bench-{sweep}.svg")
    if picture is not None and sweep is None:
        raise ValueError(f"--picture {picture} is for a sweep; name one with --sweep, or leave it out")
    if sweep in SWEEPS:  # an unknown one is told by what follows
        require_drawable(path)
    if timeline is not None:
        if sweep is not None:
            raise ValueError(f"--timeline {timeline} shows one layer, and --sweep {sweep} measures many; leave out one")
        require_drawable(Path(timeline), "--timeline")
    if sweep is not None and len(shapes) > 1:
        raise ValueError(
            f"--sweep begins from one shape and workload, but {len(shapes)} were given; leave all but one out"
        )
    if calibrate:
        with use_timeout(timeout):
            _calibrate(preset(shape[0] if shape else "fine"), platform, ranks, repetitions, as_json)
        return
    with use_timeout(timeout):
        records = start(shapes, **how) if sweep is None else swept(sweep, shapes[0], **how)
    if records is None:
        return
    # A table that is wrapped by the terminal can still be read; one whose columns are cut off cannot.
    console = Console(highlight=False, width=max(Console().width, 152))
    if as_json:
        print(json.dumps(records, indent=2), flush=True)
    else:
        console.print(table(records))
        for line in notes(records):
            console.print(line, markup=False)
    # Last, because what was measured is there now, whatever comes of the picture.
    if sweep is not None:
        _drawn(path, lambda: draw(sweep, records, f"{shapes[0].name} on {platform or 'this platform'}", path), as_json)
    if timeline is not None:
        _drawn(Path(timeline), lambda: draw_timeline(records, Path(timeline)), as_json)


def _parts(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"--chunks {text}: give a whole number, 1 or more, or auto")
    return int(text)


def _drawn(path: Path, draw: Callable[[], None], as_json: bool) -> None:
    try:
        draw()
    except Exception as error:
        raise ValueError(f"the picture {path} was not drawn: {type(error).__name__}: {error}") from error
    if not as_json:
        Console(highlight=False).print(f"picture: {path}", markup=False)


def _calibrate(shape: Any, platform: str | None, ranks: int | None, repetitions: int, as_json: bool) -> None:
    from hyperep.bench import calibrate
    from hyperep.bench.launch import start_program
    from hyperep.exchange.calibration import CHUNKS, Calibration, write

    arguments = {"repetitions": repetitions}
    records = start_program(calibrate.PROGRAM, [shape], arguments, platform_name=platform, ranks=ranks)
    if records is None:
        return
    (record,) = records
    path = write([Calibration(**record["calibration"])])
    if as_json:
        print(json.dumps(records, indent=2), flush=True)
        return
    ms, found = record["ms"], record["calibration"]
    told = ", ".join(f"{ms[str(n)]:.0f} ms in {n}" for n in CHUNKS)
    lines = [
        f"{record['shape']} on {found['platform']}, {found['ranks']} ranks: wire {ms['wire']:.0f} ms, arithmetic "
        f"{ms['arithmetic']:.0f} ms; {told} chunks",
        f"{100 * found['hidden']:.0f} % of the smaller one is hidden, and a chunk costs {found['chunk_ms']:.1f} ms",
        f"written to {path}; every machine of a launch needs the same file",
    ]
    for line in lines:
        Console(highlight=False).print(line, markup=False)
