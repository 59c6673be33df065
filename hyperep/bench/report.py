# SPDX-License-Identifier: Apache-2.0
"""The table that people read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

__all__ = ["notes", "table"]

_COLUMNS = (
    *("shape", "ranks", "fwd", "fwd+bwd", "limit", "x limit", "rows", "rows x", "naive", "naive x", "copies", "coll."),
    *("wire", "saved", "peak"),
)


def table(records: Sequence[Mapping[str, Any]]) -> Table:
    """Lay the records out, a row each: milliseconds with half the width of the middle half, and megabytes."""
    result = Table(
        box=None,
        padding=(0, 1),
        title="ms: median, +- half the width of the middle half; wire MB of all ranks, others of the fullest",
    )
    for i, heading in enumerate(_COLUMNS):
        result.add_column(heading, justify="left" if i == 0 else "right", no_wrap=True)
    for r in records:
        result.add_row(
            _name(r) + (f" {r['value']:g}" if "value" in r else ""),
            str(r["ranks"]),
            _time(r, "forward"),
            _time(r, "forward_backward"),
            _time(r, "limit"),
            f"{r['ratio_to_limit']:.2f}",
            _time(r, "rows"),
            f"{r['speedup_over_rows']:.2f}",
            _time(r, "naive"),
            "-" if r["speedup_over_naive"] is None else f"{r['speedup_over_naive']:.2f}",
            str(r["host_copies"]),
            _collectives(r["collectives"]),
            _megabytes(r["wire_bytes"]),
            _megabytes(r["saved_bytes"]),
            _megabytes(r["peak_bytes"]),
        )
    return result


def notes(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the table leaves open: why the naive way was left out, and bytes that are not those of the theory."""
    lines = [f"{r['shape']}: no naive way ({r['naive_left_out']})" for r in records if r["naive_left_out"]]
    lines = list(dict.fromkeys(lines))  # points of a sweep, and workloads, have one name
    lines += [
        f"{_name(r)} in {r['chunks']} chunks: {r['speedup_over_waiting']:.2f} times as fast as waiting for each "
        f"exchange ({r['waiting_ms']:.0f} ms); the wire alone takes {r['wire_ms']:.0f} ms, the arithmetic "
        f"{r['arithmetic_ms']:.0f} ms. In one run exchanges were under way for {r['overlap_ms']:.0f} ms while "
        f"rank 0 computed, with at most {_megabytes(r['in_flight_bytes'])} MB in flight"
        for r in records
        if r["chunks"] != 1
    ]
    lines += [
        f"{_name(r)}: {r['speedup_over_plain']:.2f} times as fast as without copies ({r['plain_ms']:.0f} ms); "
        f"{r['load']['copies']} copies take {r['load']['rows_saved']} rows from the fullest rank, which has "
        f"{r['load']['rank_max_over_mean']:.2f} times the mean"
        for r in records
        if r["balance"]
    ]
    lines += [
        f"{_name(r)}: {r['wire_bytes']} bytes on the wire, but {r['wire_bytes_theory']} are needed"
        for r in records
        if r["wire_bytes"] != r["wire_bytes_theory"]
    ]
    return lines


def _name(record: Mapping[str, Any]) -> str:
    """The shape, and the workload where it is not the even one."""
    return record["shape"] + ("" if record["workload"] == "uniform" else f" {record['workload']}")


def _time(record: Mapping[str, Any], contestant: str) -> str:
    if record[f"{contestant}_ms"] is None:
        return "-"
    low, high = record["spread_ms"][contestant]
    return f"{record[f'{contestant}_ms']:.4g}+-{(high - low) / 2:.1g}"


def _collectives(collectives: Mapping[str, Mapping[str, int]]) -> str:
    """Small and large ones of the forward, then of the backward."""
    return " ".join(f"{c['small']}+{c['large']}" for c in (collectives["forward"], collectives["backward"]))


def _megabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e6:.1f}"
