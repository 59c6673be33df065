# SPDX-License-Identifier: Apache-2.0
"""The benchmark itself: what it measures, that it compares equals, and its command."""

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
from rich.console import Console

from hyperep.bench.case import Case, WrongResult
from hyperep.bench.limit import Limit
from hyperep.bench.naive import reason_against
from hyperep.bench.program import run
from hyperep.bench.progress import show_progress
from hyperep.bench.report import table
from hyperep.bench.shapes import PRESETS, Shape, preset
from hyperep.bench.sweep import SWEEPS, points
from hyperep.bench.timing import interleaved
from hyperep.bench.way import Way
from hyperep.cli import main
from hyperep.loopback import LoopbackPlatform
from hyperep.loopback import run as on_ranks
from hyperep.mesh import init_device_mesh
from hyperep.workloads import Trace, write_trace

SMALL = Shape(name="small", tokens=24, dim=6, hidden=10, experts=8, top_k=3)
KEYS = {
    *("shape", "workload", "ranks", "exchange", "forward_ms", "forward_backward_ms", "limit_ms", "ratio_to_limit"),
    *("rows_ms", "speedup_over_rows", "rows_limit_ms", "naive_ms", "speedup_over_naive", "host_copies", "collectives"),
    *("wire_bytes", "wire_bytes_theory", "saved_bytes", "peak_bytes"),
}


def test_a_record_has_every_key_and_its_ratio_is_that_of_its_medians():
    ((found,), _) = on_ranks(lambda platform: run(platform, [vars(SMALL)], repetitions=3, naive=True), 2)
    assert set(found) >= KEYS
    assert found["ratio_to_limit"] == pytest.approx(found["forward_backward_ms"] / found["limit_ms"])
    assert found["speedup_over_rows"] == pytest.approx(found["rows_ms"] / found["forward_backward_ms"])
    assert found["exchange"] == "tokens"
    assert "assignment by index" in found["naive_left_out"]
    assert found["naive_ms"] is None


def test_presets():
    sizes = {n: (s.tokens, s.dim, s.hidden, s.experts, s.top_k, s.shared) for n, s in PRESETS.items()}
    assert sizes == {
        "coarse": (2048, 512, 1024, 8, 2, 0),
        "fine": (2048, 512, 128, 64, 6, 0),
        "finest": (2048, 256, 64, 128, 8, 0),
        "dsv3-16b": (16384, 2048, 1408, 64, 6, 2),
    }
    with pytest.raises(ValueError, match="'medium'; choose one of coarse, fine, finest, dsv3-16b"):
        preset("medium")


@pytest.mark.parametrize("hot", [0.0, 0.5])
def test_choices_differ_between_ranks_and_are_hot_where_asked(hot):
    shape = Shape(**{**vars(PRESETS["fine"]), "hot": hot})
    counts = shape.counts(2)
    assert counts.shape == (2, 2, 32)
    assert (counts.sum(axis=(1, 2)) == shape.rows).all()
    assert not np.array_equal(counts[0], counts[1])
    share = counts[:, 0, 0].sum() / counts.sum()
    assert abs(share - (hot + (1 - hot) / 64)) < 0.01


def test_choices_of_a_token_are_different_experts_where_none_is_hot():
    choices = np.sort(SMALL.choices(1, 2), axis=1)
    assert choices.shape == (24, 3)
    assert (choices[:, 1:] > choices[:, :-1]).all()


def test_copies_are_tokens_with_an_expert_there():
    copies = SMALL.copies(2)
    for source in range(2):
        owners = SMALL.choices(source, 2) // 4
        assert copies[source].tolist() == [sum(owner in row for row in owners.tolist()) for owner in range(2)]
    assert SMALL.copies(4, owners=2).shape == (4, 2)


def test_experts_that_do_not_divide():
    with pytest.raises(ValueError, match=r"8 experts, which do not divide by 3 ranks; choose a number of ranks"):
        SMALL.counts(3)


@pytest.mark.parametrize("way", ["naive", "by_rows"])
def test_a_wrong_way_is_an_error_and_no_time(way):
    def on_rank(platform):
        case = Case(init_device_mesh(platform, (1,), ("ep",)), SMALL, Way())
        wrong = getattr(case, way)
        wrong._routed = lambda *inputs, **how: case.layer._routed(*inputs, **how) * 1.01
        case.check(naive=True)

    with pytest.raises(Exception, match="differs from the layer in the tokens by 1") as caught:
        on_ranks(on_rank, 1)
    assert isinstance(caught.value.__cause__, WrongResult)


def test_shared_experts_count_in_the_layer_and_in_the_limit():
    def on_rank(platform):
        mesh = init_device_mesh(platform, (1,), ("ep",))
        plain, shared = (Case(mesh, Shape(**{**vars(SMALL), "shared": shared}), Way()) for shared in (0, 2))
        difference = np.abs(shared.layer.forward() - plain.layer.forward()).max()
        return difference, [of.hidden.shape for of in shared.limit.products]

    difference, hidden = on_ranks(on_rank, 1)[0]
    assert difference > 0.1
    assert hidden == [(72, 10), (24, 20)]


def test_the_limit_of_a_rank_without_tokens_has_no_shared_experts_to_compute():
    shape = Shape(**{**vars(SMALL), "shared": 2, "workload": "idle-rank"})

    def on_rank(platform):
        return [len(of.x) for of in Limit(init_device_mesh(platform, (2,), ("ep",)), shape).products]

    routed = shape.counts(2)[0].sum(axis=1).tolist()
    assert on_ranks(on_rank, 2) == [[routed[0], 24], [routed[1], 0]]


def test_contestants_take_turns_and_the_slowest_rank_counts():
    def on_rank(platform):
        calls = []
        work = platform.from_host(np.zeros((1,), dtype=np.float32))
        named = {name: (lambda name=name: calls.append(name) or work) for name in "abc"}
        return calls, interleaved(platform, named, repetitions=4)

    (calls, times), (_, others) = on_ranks(on_rank, 2)
    assert [sorted(calls[i : i + 3]) for i in range(0, 15, 3)] == [list("abc")] * 5
    assert len({calls[i] for i in range(3, 15, 3)}) == 3
    assert all(np.array_equal(times[name], others[name]) and times[name].shape == (4,) for name in "abc")


def test_shapes_of_a_sweep_take_turns_and_keep_their_own_times(monkeypatch):
    calls = []

    class Spy(Case):
        def contestants(self, naive):
            def forward():
                calls.append(self.shape.tokens)
                time.sleep(self.shape.tokens / 1000)
                return self.layer.forward()

            return {**super().contestants(naive), "forward": forward}

    monkeypatch.setattr("hyperep.bench.program.Case", Spy)
    shapes = [{**vars(SMALL), "name": str(tokens), "tokens": tokens} for tokens in (8, 64)]
    for together in (True, False):
        calls.clear()
        ((first, second),) = on_ranks(
            lambda platform, together=together: run(platform, shapes, 2, naive=False, together=together), 1
        )
        assert sorted(calls) == [8] * 3 + [64] * 3
        assert (calls[:3] != [8] * 3) == together
        assert 8 <= first["forward_ms"] < 64 <= second["forward_ms"]


def test_progress_is_told_between_repetitions_and_at_the_end():
    def on_rank(platform):
        told, work = [], platform.from_host(np.zeros((1,), dtype=np.float32))
        interleaved(platform, {"a": lambda: work}, repetitions=2, progress=lambda *done: told.append(done))
        return told

    assert on_ranks(on_rank, 1) == [[(0, 3), (1, 3), (2, 3), (3, 3)]]


@pytest.mark.parametrize(("terminal", "visible"), [(True, True), (False, True), (True, False)])
def test_progress_is_a_bar_on_a_terminal_a_line_elsewhere_and_nothing_on_other_ranks(terminal, visible):
    screen = io.StringIO()
    with show_progress(visible, console=Console(file=screen, force_terminal=terminal, width=80)) as progress:
        for done in range(4):
            progress("fine", done, 3)
    shown = screen.getvalue()
    assert ("3/3" in shown) == (visible and terminal)
    assert ("timing fine: 3 repetitions" in shown) == (visible and not terminal)
    assert bool(shown) == visible


@pytest.mark.parametrize(("chosen", "threads"), [({}, "1"), ({"OMP_NUM_THREADS": "2"}, None)])
def test_ranks_that_are_threads_have_one_thread_each_unless_somebody_chose(chosen, threads):
    # What the environment is when NumPy is first looked for; the benchmark itself is of no interest here.
    program = (
        "import os, sys; from hyperep.cli import main\n"
        "def told(name, *_):\n"
        "    if name == 'numpy':\n"
        "        os.write(1, f'threads {os.environ.get(\"OPENBLAS_NUM_THREADS\")}\\n'.encode())\n"
        "        os._exit(0)\n"
        "sys.meta_path.insert(0, type('Spy', (), {'find_spec': staticmethod(told)}))\n"
        "main(['bench', '--platform', 'loopback', '--repetitions', '1', '--shape', 'finest', '--no-naive'])"
    )
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    environment |= chosen
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"threads {threads}\n"


def test_no_naive_way_without_assignment_by_index():
    assert "assignment by index" in reason_against(LoopbackPlatform())


@pytest.mark.parametrize("sweep", SWEEPS)
def test_points_of_a_sweep_vary_one_thing(sweep):
    found = points(sweep, PRESETS["fine"], 2)
    assert list(dict.fromkeys(point.value for point in found)) == list(SWEEPS[sweep])
    if sweep == "skew":
        received = {(p.value, p.line): p.shape.counts(2)[:, 0].sum() for p in found}
        for value in SWEEPS[sweep]:
            one, spread = (n for (v, _), n in received.items() if v == value)
            assert abs(one - spread) < 0.02 * one
        return
    base, field = PRESETS["fine"], {"experts": "experts", "top-k": "top_k"}.get(sweep, "tokens")
    for point in found:
        differing = {f.name for f in dataclasses.fields(base) if getattr(point.shape, f.name) != getattr(base, f.name)}
        assert differing <= {field}
        # The rows of all ranks are those of the base, unless they are what is varied.
        varied = {"tokens": point.value / base.tokens, "top-k": point.value / base.top_k}.get(sweep, 1)
        assert point.shape.rows * point.ranks == 24576 * varied
    assert len({(point.shape, point.ranks) for point in found}) == len(SWEEPS[sweep])


def test_command_prints_json(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["bench", "--platform", "loopback", "--repetitions", "1", "--shape", "finest", "--json", "--no-naive"])
    assert ended.value.code == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert set(record) >= KEYS
    assert (record["shape"], record["ranks"]) == ("finest", 2)
    assert record["naive_left_out"] == "not asked for"


def test_command_measures_each_workload_of_each_shape_in_turns(tmp_path, capsys, monkeypatch):
    calls = []

    class Spy(Case):
        def contestants(self, naive):
            return {"forward": lambda: calls.append(self.shape.workload) or self.layer.forward()} | {
                name: function for name, function in super().contestants(naive).items() if name != "forward"
            }

    monkeypatch.setattr("hyperep.bench.program.Case", Spy)
    monkeypatch.setattr("hyperep.bench.shapes.PRESETS", {"a": SMALL, "b": Shape(**{**vars(SMALL), "name": "b"})})
    drawn = np.random.default_rng(4).random((1, 1, 9, 8)).argsort(axis=3)[..., :3].astype(np.uint8)
    write_trace(tmp_path / "trace.npz", Trace(choices=drawn, experts=8))
    options = "--platform loopback --repetitions 1 --ranks 1 --shape a --shape b --json --no-naive --workload trace"
    with pytest.raises(SystemExit) as ended:
        main(["bench", *options.split(), "--workload", "zipf", "--trace", str(tmp_path / "trace.npz")])
    assert ended.value.code == 0
    found = [(record["shape"], record["workload"]) for record in json.loads(capsys.readouterr().out)]
    assert found == [("small", "trace"), ("small", "zipf"), ("b", "trace"), ("b", "zipf")]
    assert sorted(calls[:2]) == sorted(calls[2:4]) == ["trace", "zipf"]  # a warm-up, and a repetition


def test_a_workload_stands_beside_its_shape_in_the_table():
    shapes = [{**vars(SMALL), "workload": name} for name in ("uniform", "hot-expert")]
    (found,) = on_ranks(lambda platform: run(platform, shapes, 1, naive=False), 1)
    screen = io.StringIO()
    Console(file=screen, width=160).print(table(found))
    assert re.search(r"^ *small +1 .*\n *small hot-expert +1 ", screen.getvalue(), flags=re.M)


SWEEP = ["bench", "--platform", "loopback", "--sweep", "experts", "--repetitions", "1"]


@pytest.fixture
def two_points(monkeypatch):
    monkeypatch.setattr("hyperep.bench.sweep.SWEEPS", {"experts": (4, 8)})
    monkeypatch.setattr("hyperep.bench.shapes.PRESETS", {"fine": SMALL})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing/a.svg", "there is no folder .*missing; make it, or name another file"),
        ("a.gif7", "'gif7' is no format of pictures; choose one of .*'svg'"),
        ("", "is a directory; name a file in it"),
        ("file/a.svg", "there is no folder .*file"),
    ],
)
def test_a_picture_that_cannot_be_written_is_told_before_anything_is_measured(
    tmp_path, capsys, monkeypatch, two_points, name, message
):
    (tmp_path / "file").touch()
    monkeypatch.setattr("hyperep.bench.sweep.start", lambda *a, **k: pytest.fail("something was measured"))
    with pytest.raises(SystemExit) as ended:
        main([*SWEEP, "--picture", str(tmp_path / name)])
    errors = capsys.readouterr().err
    assert (ended.value.code, errors.count("\n")) == (2, 1)
    assert re.match(rf"hyperep: error: --picture .*{message}", errors)


@pytest.mark.parametrize("as_json", [True, False])
def test_results_are_there_before_the_picture_and_without_it(tmp_path, capsys, monkeypatch, two_points, as_json):
    monkeypatch.setattr("hyperep.bench.sweep.draw", lambda *arguments: 1 / 0)
    with pytest.raises(SystemExit) as ended:
        main([*SWEEP, "--picture", str(tmp_path / "a.svg"), *(["--json"] if as_json else [])])
    shown = capsys.readouterr()
    assert ended.value.code == 2
    assert shown.err.splitlines()[-1].startswith(f"hyperep: error: the picture {tmp_path / 'a.svg'} was not drawn: ")
    if as_json:
        assert [record["value"] for record in json.loads(shown.out)] == [4, 8]
    else:
        assert "small 4" in shown.out


def test_a_sweep_does_not_need_matplotlib_until_it_draws(tmp_path, capsys, monkeypatch, two_points):
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit) as ended:
        main([*SWEEP, "--picture", str(tmp_path / "a.svg"), "--json"])
    shown = capsys.readouterr()
    assert ended.value.code == 2
    assert len(json.loads(shown.out)) == 2
    assert "was not drawn: ModuleNotFoundError" in shown.err


def test_a_picture_of_no_sweep_is_an_error(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["bench", "--platform", "loopback", "--picture", "a.svg"])
    assert ended.value.code == 2
    assert "--picture a.svg is for a sweep" in capsys.readouterr().err


def test_command_draws_a_sweep(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hyperep.bench.sweep.SWEEPS", {"experts": (4, 8)})
    monkeypatch.setattr("hyperep.bench.shapes.PRESETS", {"fine": SMALL})
    picture = tmp_path / "experts.svg"
    arguments = [
        "bench",
        "--platform",
        "loopback",
        "--sweep",
        "experts",
        "--repetitions",
        "1",
        "--picture",
        str(picture),
    ]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    assert "experts, at the same rows" in picture.read_text() or "<svg" in picture.read_text()
    shown = capsys.readouterr()
    assert "small 4" in shown.out
    assert "small 8" in shown.out
    assert shown.err.count("timing small") == 1  # one block, in which both points take turns
    assert shown.out.count("no naive way (not asked for)") == 1  # it would take most of the time


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "3", "--shape", "coarse"], "8 experts, which do not divide by 3 ranks"),
        (["--ranks", "0"], "ranks=0"),
        (["--sweep", "speed"], "unknown sweep 'speed'; choose one of experts, tokens, top-k, ranks, skew"),
        (["--shape", "huge"], "unknown shape 'huge'"),
        (["--workload", "cold"], "unknown workload 'cold'; choose one of uniform, zipf, hot-expert, hot-rank"),
        (["--trace", "a.npz"], "--trace a.npz is for --workload trace; add that"),
        (["--workload", "trace", "--trace", "nowhere/a.npz"], "nowhere/a.npz"),
        (["--sweep", "skew", "--workload", "zipf"], "leave out --workload zipf"),
        (["--sweep", "top-k", "--workload", "zipf", "--workload", "drift"], "2 were given"),
        (["--balance", "--chunks", "2"], "chunks=2 with Balance"),
        (["--balance", "--exchange", "rows"], "exchange='rows' with Balance"),
        (["--calibrate", "--workload", "zipf"], "leave out --sweep, --timeline, --workload"),
        (["--sweep", "ranks", "--shape", "fine", "--shape", "coarse"], "2 were given"),
    ],
)
def test_command_says_what_is_wrong(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["bench", "--platform", "loopback", *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
