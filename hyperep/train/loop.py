# SPDX-License-Identifier: Apache-2.0
"""The program that every rank runs."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from hyperep.launch import step_done
from hyperep.platform.protocol import Platform
from hyperep.sharding import whole_shape
from hyperep.train import checkpoint
from hyperep.train.agreement import agreed
from hyperep.train.batches import global_batch
from hyperep.train.claim import claimed, run_id
from hyperep.train.environment import describe_environment
from hyperep.train.inputs import read_inputs
from hyperep.train.load import load_by_layer
from hyperep.train.metrics import MetricsWriter, record_of
from hyperep.train.outputs import write_outputs
from hyperep.train.precision import choose_dtype
from hyperep.train.progress import show_progress
from hyperep.train.recorder import Recorder
from hyperep.train.settings import Settings
from hyperep.train.summary import summarize
from hyperep.train.text import Text
from hyperep.train.trainer import find_gradients, new_state, require_sound, take_step
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
        ValueError: the settings, the text, the checkpoint or the output directory cannot be used, or training has
            diverged; on all ranks.
        OSError: a file cannot be read or written.
    """
    chosen = Settings.from_dict(settings).check(platform.world_size)
    inputs = agreed(platform, lambda: read_inputs(chosen))
    require_same_text(platform, inputs.text)
    dtype = choose_dtype(platform, chosen.dtype)
    state = new_state(platform, chosen)
    if (resume := inputs.resume) is not None:
        begin = state
        state = agreed(platform, lambda: checkpoint.load(resume, platform, begin, dtype))
    first_step, out = state.step, Path(chosen.out)
    run = run_id(out, resume)
    records = [{**record, "run": run} for record in inputs.earlier]

    with ExitStack() as stack:
        rank_0 = platform.rank == 0
        writer = agreed(platform, lambda: stack.enter_context(_metrics(out, run, chosen, records)) if rank_0 else None)
        show = stack.enter_context(show_progress(chosen.steps, state.step)) if rank_0 else None
        recorder = Recorder(out, chosen.experts, inputs.trace)
        reference = Reference(platform, chosen, state) if chosen.verify else None

        def save() -> None:
            if writer is not None:
                writer.sync()
            if chosen.record_trace:
                agreed(platform, recorder.write if rank_0 else lambda: None)
            directory = out / checkpoint.DIRECTORY
            checkpoint.save(directory, platform, state, chosen, run=run, text=inputs.text.digest)

        while True:
            batch = global_batch(
                inputs.text.tokens,
                seed=chosen.seed,
                step=state.step,
                sequences=chosen.sequences,
                seq_len=chosen.seq_len,
            )
            began = time.perf_counter()
            gradients = find_gradients(platform, chosen, state, batch)
            seconds = time.perf_counter() - began
            last = state.step == chosen.steps
            when = f"after step {state.step}, the last one" if last else f"at step {state.step + 1}"
            require_sound(chosen, gradients.result, when)
            # Only now: weights that give no loss, or no gradient, must not replace a checkpoint that does.
            if last or (chosen.save_every and state.step % chosen.save_every == 0 and state.step > first_step):
                save()
            if last:
                break
            began = time.perf_counter()
            state = take_step(platform, chosen, state, gradients)
            seconds += time.perf_counter() - began
            figures = load_by_layer(chosen, gradients.result)
            record = record_of(run, state.step, gradients.result, chosen.batch_tokens / seconds, figures)
            if reference is not None:
                record["reference_loss"] = reference.step(batch, state, gradients.result)
            records.append(record)
            if writer is not None and show is not None:
                recorder.add(state.step, gradients.result.choices)
                writer.write(record)
                show(record)
            step_done()

        verdict = reference.agree() if reference is not None else None
        summary = summarize(chosen, records, verdict)
        if rank_0:
            remark = write_outputs(
                out,
                settings=chosen,
                text=inputs.text,
                records=records,
                summary=summary,
                verdict=verdict,
                dtype=dtype,
                parameters=sum(math.prod(whole_shape(platform, parameter)) for parameter in state.parameters.values()),
                environment={"Run": run, **describe_environment(platform)},
            )
            summary["lines"] += [remark] if remark else []
    return summary


@contextmanager
def _metrics(out: Path, run: str, settings: Settings, earlier: Sequence[dict[str, Any]]) -> Iterator[MetricsWriter]:
    """The metrics of a run, in a directory that is its own for as long as it writes there."""
    with claimed(out, run, overwrite=settings.overwrite), closing(MetricsWriter(out, earlier)) as writer:
        yield writer


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
