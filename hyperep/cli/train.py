# SPDX-License-Identifier: Apache-2.0
"""``hyperep train``: train a small mixture-of-experts language model, its experts spread over ranks."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

from hyperep.train.settings import DTYPES, STYLES, Settings

__all__ = ["train"]

_DEFAULTS = Settings()


def _option(setting: str, help_text: str) -> Any:
    """An option whose default is the setting's, or with ``--resume`` the checkpoint's."""
    return typer.Option(help=help_text, show_default=str(getattr(_DEFAULTS, setting)))


def train(
    platform: Annotated[str | None, typer.Option(help="Where to train; see hyperep platforms.")] = None,
    ranks: Annotated[
        int | None, typer.Option(help="Ranks to start; inside a launch (torchrun, ...) leave it out.", show_default="1")
    ] = None,
    steps: Annotated[int | None, _option("steps", "Steps in all, also for a resumed run.")] = None,
    experts: Annotated[int | None, _option("experts", "Experts in each layer.")] = None,
    top_k: Annotated[int | None, _option("top_k", "Experts that a token goes to.")] = None,
    dim: Annotated[int | None, _option("dim", "Size of the model; experts have a hidden size of twice that.")] = None,
    layers: Annotated[int | None, _option("layers", "Layers.")] = None,
    heads: Annotated[int | None, _option("heads", "Attention heads.")] = None,
    batch_tokens: Annotated[int | None, _option("batch_tokens", "Tokens (bytes) of one step, over all ranks.")] = None,
    seq_len: Annotated[int | None, _option("seq_len", "Length of a sequence.")] = None,
    lr: Annotated[float | None, _option("lr", "Learning rate after the warm-up.")] = None,
    balance: Annotated[float | None, _option("balance", "Weight of the load-balancing loss.")] = None,
    seed: Annotated[int | None, _option("seed", "Of the initial weights and the order of the data.")] = None,
    dtype: Annotated[str | None, _option("dtype", f"Precision: {', '.join(DTYPES)}.")] = None,
    text: Annotated[
        str | None,
        typer.Option(help="File or directory to train on.", show_default="source of Python's standard library"),
    ] = None,
    style: Annotated[str | None, _option("style", f"How experts are spread: {', '.join(STYLES)}.")] = None,
    tp: Annotated[int | None, _option("tp", "Ranks that slice one expert, with style tp or etp.")] = None,
    balance_experts: Annotated[
        int | None, _option("balance_experts", "Hot experts of others that a rank computes too, for a step.")
    ] = None,
    chunks: Annotated[int | None, _option("chunks", "Parts in which tokens travel.")] = None,
    out: Annotated[str | None, _option("out", "Directory for metrics, pictures, report and checkpoint.")] = None,
    save_every: Annotated[int | None, _option("save_every", "Steps between checkpoints; 0: one, at the end.")] = None,
    record_trace: Annotated[
        bool | None,
        typer.Option(
            "--record-trace/--no-record-trace",
            help="Leave trace.npz, the experts of all tokens: for hyperep bench --workload trace.",
            show_default="no",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another run in the directory.")] = False,
    resume: Annotated[str | None, typer.Option(help="Go on from the checkpoint in the directory of this run.")] = None,
    timeout: Annotated[
        float | None,
        typer.Option(
            help="Seconds that a step may take before the run is given up.", show_default="$HYPEREP_TIMEOUT or 600"
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Take each step unsharded as well, and fail if the two differ.")
    ] = False,
) -> None:
    """Train a byte-level language model whose feed-forward layers are mixtures of experts, spread over ranks.

    The same seed gives the same losses on every platform and any number of ranks.
    """
    # Here, so that the help of this command needs neither NumPy nor what writes files.
    from hyperep.launch.timeout import use_timeout
    from hyperep.train.launch import start
    from hyperep.train.resume import settings_for

    options = {
        **{"steps": steps, "experts": experts, "top_k": top_k, "dim": dim, "layers": layers, "heads": heads},
        **{"batch_tokens": batch_tokens, "seq_len": seq_len, "lr": lr, "balance": balance, "seed": seed},
        **{"dtype": dtype, "text": text},
        **{
            "style": style,
            "tp": tp,
            "balance_experts": balance_experts,
            "chunks": chunks,
            "out": out,
            "save_every": save_every,
            "record_trace": record_trace,
            "verify": verify or None,
        },
        **{"overwrite": overwrite or None},
    }
    settings = settings_for({name: value for name, value in options.items() if value is not None}, resume)
    with use_timeout(timeout):
        summary = start(settings, platform_name=platform, ranks=ranks)
    console = Console(soft_wrap=True, highlight=False)
    for line in summary["lines"]:
        console.print(line, markup=False)
    if summary["verified"] is False:
        raise typer.Exit(1)
