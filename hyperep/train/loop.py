# SPDX-License-Identifier: Apache-2.0
"""The program that every rank runs."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from hyperep.launch import step_done
from hyperep.platform.protocol import Platform
from hyperep.sharding import whole_shape
from hyperep.train import checkpoint
from hyperep.train.batches import global_batch
from hyperep.train.environment import describe_environment
from hyperep.train.metrics import MetricsWriter, read_metrics, record_of
from hyperep.train.outputs import write_outputs
from hyperep.train.precision import choose_dtype
from hyperep.train.progress import show_progress
from hyperep.train.settings import Settings
from hyperep.train.summary import summarize
from hyperep.train.text import Text, load_text
from hyperep.train.trainer import new_state, train_step
from hyperep.train.verify import Reference

__all__ = ["main"]


def main(platform: Platform[Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Train, and on rank 0 write what the run leaves behind. Collective over the world.

    Args:
        platform: of this rank.
        settings: as :meth:`Settings.as_dict` gives them; the same on every rank.

    Returns:
        The final figures, as :func:`hyperep.train.summary.summarize` makes them.

    Raises:
        ValueError: the settings, the text or the checkpoint cannot be used, or the loss is no longer a number; on all
            ranks.
        OSError: a file cannot be read or written.
    """
    chosen = Settings.from_dict(settings).check(platform.world_size)
    text = load_text(chosen.text, at_least=chosen.seq_len + 1)
    require_same_text(platform, text)
    resume = checkpoint.read_manifest(chosen.resume) if chosen.resume else None
    dtype = choose_dtype(platform, chosen.dtype)
    state = new_state(platform, chosen)
    earlier: list[dict[str, Any]] = []
    if resume is not None:
        state = checkpoint.load(resume, platform, state, dtype)
        earlier = read_metrics(resume.directory.parent, last_step=resume.step)
    reference = Reference(platform, chosen, state) if chosen.verify else None
    records = list(earlier)
    out = Path(chosen.out)

    with ExitStack() as stack:
        write, show = [], None
        if platform.rank == 0:
            out.mkdir(parents=True, exist_ok=True)
            writer = MetricsWriter(out, earlier)
            stack.callback(writer.close)
            show = stack.enter_context(show_progress(chosen.steps, state.step))
            write = [writer.write, show]
        while state.step < chosen.steps:
            batch = global_batch(
                text.tokens, seed=chosen.seed, step=state.step, sequences=chosen.sequences, seq_len=chosen.seq_len
            )
            began = time.perf_counter()
            state, result = train_step(platform, chosen, state, batch)
            record = record_of(state.step, result, chosen.batch_tokens / (time.perf_counter() - began))
            if not math.isfinite(result.loss):
                raise ValueError(f"the loss is {result.loss} at step {state.step}; try a lower --lr than {chosen.lr:g}")
            if reference is not None:
                record["reference_loss"] = reference.step(batch, state, result)
            records.append(record)
            for consume in write:
                consume(record)
            if state.step == chosen.steps or (chosen.save_every and state.step % chosen.save_every == 0):
                checkpoint.save(out / checkpoint.DIRECTORY, platform, state, chosen)
            step_done()

    verdict = reference.agree() if reference is not None else None
    summary = summarize(chosen, records, verdict)
    if platform.rank == 0:
        write_outputs(
            out,
            settings=chosen,
            text=text,
            records=records,
            summary=summary,
            verdict=verdict,
            dtype=dtype,
            parameters=sum(math.prod(whole_shape(platform, parameter)) for parameter in state.parameters.values()),
            environment=describe_environment(platform),
        )
    return summary


def require_same_text(platform: Platform[Any], text: Text) -> None:
    """Check that every rank has read the same bytes. Collective.

    Raises:
        ValueError: on all ranks, if one has another text.
    """
    own = np.array([zlib.crc32(text.tokens.tobytes()), len(text.tokens)], np.int64)
    (everyone,) = platform.to_host(platform.all_gather(platform.from_host(own)))
    lengths = everyone.reshape(-1, 2)[:, 1].tolist()
    if len(set(map(tuple, everyone.reshape(-1, 2).tolist()))) > 1:
        raise ValueError(
            f"ranks have read different texts, of {lengths} bytes; give every machine the same --text "
            f"(by default it is the source of its Python's standard library)"
        )
