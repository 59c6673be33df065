# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind, and what it shows while it goes on."""

import io
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from hyperep.train import pictures
from hyperep.train.metrics import MetricsWriter, imbalance, rank_imbalance, read_metrics
from hyperep.train.pictures import expert_load_picture, loss_picture, rank_load_picture
from hyperep.train.progress import show_progress
from hyperep.train.report import report_page
from hyperep.train.resume import settings_for
from hyperep.train.text import load_text
from hyperep.train.themes import DARK, LIGHT


def record(step, layer_load=((4, 0, 2, 2), (2, 2, 2, 2)), **others):
    layers = [list(layer) for layer in layer_load]
    return {"step": step, "loss": 5.0 / step, "tokens_per_s": 1234.5, "layer_load": layers, **others}


class Page(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self.links = [], "", []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "srcset", "href")]

    def handle_data(self, data):
        self.text += data + " "


def test_a_run_leaves_metrics_pictures_report_and_checkpoint(train, small):
    settings = small(verify=True, steps=3)
    train(2, settings)
    out = Path(settings.out)
    assert {path.name for path in out.iterdir()} == {
        "metrics.jsonl",
        "loss.png",
        "expert_load.png",
        "rank_load.png",
        "report.html",
        "checkpoint",
    }
    (run,) = {json.loads(line)["run"] for line in (out / "metrics.jsonl").read_text().splitlines()}
    assert json.loads((out / "checkpoint" / "state.json").read_text())["run"] == run
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all({"step", "loss", "tokens_per_s", "expert_load"} <= set(line) for line in lines)
    assert all(len(line["expert_load"]) == settings.experts for line in lines)
    page = Page((out / "report.html").read_text())
    assert page.tags.count("img") == 3
    assert page.links
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    for expected in (
        run,
        "Every step agrees",
        f"{lines[-1]['loss']:.6f}",
        "loopback",
        "batch tokens",
        "numpy",
        "SHA-256",
    ):
        assert expected in page.text, expected


def test_the_report_does_not_tell_whose_machine_it_was(train, small, text, tmp_path, monkeypatch):
    home = tmp_path / "home" / "alice"
    (home / "texts").mkdir(parents=True)
    (home / "texts" / "own.txt").write_bytes(Path(text).read_bytes())
    monkeypatch.setenv("HOME", str(home))
    first = small(steps=1, text=str(home / "texts"), out=str(home / "run"))
    train(1, first)
    train(1, settings_for({"steps": 2}, first.out))
    report = (home / "run" / "report.html").read_text()
    assert "alice" not in report
    assert str(tmp_path) not in report
    page = Page(report)
    assert "texts: " in page.text
    assert re.search(r"resume\s+yes", page.text)


def test_the_report_of_a_run_on_the_standard_library_does_not_tell_where_it_lies():
    source = load_text(None).source
    assert re.fullmatch(r"source of the standard library of Python \d\.\d+", source)


BROKEN_MATPLOTLIB = {
    "absent": (sys.modules, "matplotlib.figure", None),
    "wrong": (pictures, "loss_picture", lambda *arguments: 1 / 0),
}


@pytest.mark.parametrize("how", BROKEN_MATPLOTLIB)
def test_pictures_that_cannot_be_drawn_do_not_fail_a_run(train, small, monkeypatch, how):
    where, name, what = BROKEN_MATPLOTLIB[how]
    if where is sys.modules:
        monkeypatch.delitem(sys.modules, "hyperep.train.pictures")
        monkeypatch.setitem(where, name, what)
    else:
        monkeypatch.setattr(where, name, what)
    settings = small(steps=1)
    summary, _ = train(1, settings)
    assert re.match(r"pictures were not drawn: (ZeroDivisionError|ModuleNotFoundError): ", summary["lines"][-1])
    out = Path(settings.out)
    assert {path.name for path in out.iterdir()} == {"metrics.jsonl", "report.html", "checkpoint"}
    page = Page((out / "report.html").read_text())
    assert "Final figures" in page.text
    assert "img" not in page.tags


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "nonsense"])
def test_the_environment_of_a_notebook_changes_nothing(text, tmp_path, backend):
    options = "--platform loopback --dim 8 --heads 2 --experts 2 --top-k 1 --layers 1 --seq-len 8 --batch-tokens 16"
    end = subprocess.run(
        [sys.executable, "-m", "hyperep", "train", *options.split(), "--steps", "1", "--text", text],
        env={**os.environ, "MPLBACKEND": backend},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert end.returncode == 0, end.stderr
    assert "not drawn" not in end.stdout
    assert imread(tmp_path / "run" / "loss.png").shape[0] > 100
    assert imread(tmp_path / "run" / "expert_load.png").shape[0] > 100


def test_matplotlib_is_imported_with_the_backend_of_the_environment_where_it_is_there():
    code = (
        "import os; from hyperep.drawing import import_matplotlib; import_matplotlib(); import matplotlib;"
        "print(matplotlib.rcParams['backend'], os.environ['MPLBACKEND'])"
    )
    for backend, shown in (("svg", "svg svg"), ("nonsense", "nonsense")):
        end = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "MPLBACKEND": backend},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert end.returncode == 0, end.stderr
        assert end.stdout.strip().endswith(shown)


def test_the_report_escapes_what_it_shows():
    page = report_page(
        title="a <b>",
        headline="& more",
        figures=[("<i>", "1", "")],
        verdict=(False, "it <u> differs"),
        pictures=[],
        tables=[("Settings", {"text": "<script>alert(1)</script>"})],
    )
    assert not {"b", "i", "u", "script"} & set(Page(page).tags)
    assert "<script>alert(1)</script>" in Page(page).text
    assert not re.search(r"https?://", page)


def test_the_heat_map_has_a_row_for_each_expert_and_the_load_as_its_colour():
    # Expert 1 gets nothing, so its row is the darkest of the map; expert 3 gets everything.
    picture = imread(io.BytesIO(expert_load_picture([record(s, [(0, 0, 0, 8)]) for s in range(1, 6)])))
    column = picture[:, picture.shape[1] // 2, :3]
    colours = [tuple(np.round(c, 2)) for c in column]
    purple, yellow = (0.27, 0.0, 0.33), (0.99, 0.91, 0.15)
    dark, bright = colours.count(purple), colours.count(yellow)
    assert bright > 20
    assert dark / bright == pytest.approx(3.0, rel=0.1)
    assert colours.index(purple) < colours.index(yellow)  # expert 0 is at the top


@pytest.mark.parametrize("steps", [1, 2, 60])
@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_pictures_of_runs_of_any_length(steps, theme):
    records = [record(step, reference_loss=5.0 / step) for step in range(1, steps + 1)]
    for picture in (loss_picture(records, theme), expert_load_picture(records, owners=2, theme=theme)):
        corner = imread(io.BytesIO(picture))[0, 0, :3]
        assert corner == pytest.approx([int(theme.page[i : i + 2], 16) / 255 for i in (1, 3, 5)], abs=0.01)


def ranks(*rows):
    return [{"rank_rows": list(layer), "rank_max_over_mean": max(layer) * len(layer) / sum(layer)} for layer in rows]


@pytest.mark.parametrize("steps", [1, 60])
def test_the_heat_map_of_ranks_has_a_row_for_each(steps):
    # Rank 1 has most and rank 2 least; the other two are even.
    records = [record(step, load=ranks((8, 12, 4, 8))) for step in range(1, steps + 1)]
    picture = imread(io.BytesIO(rank_load_picture(records)))
    column = [tuple(np.round(c, 2)) for c in picture[:, picture.shape[1] // 2, :3]]
    purple, yellow, middle = (0.27, 0.0, 0.33), (0.99, 0.91, 0.15), (0.13, 0.57, 0.55)
    assert column.count(purple) == pytest.approx(column.count(yellow), abs=2)
    assert column.count(middle) == pytest.approx(2 * column.count(yellow), abs=3)
    assert column.index(middle) < column.index(yellow) < column.index(purple)


def test_the_heat_map_of_ranks_bears_other_numbers_of_ranks_and_records_without():
    assert rank_load_picture([record(1), record(2, load=ranks((8,), (8,)))]) is None
    records = [record(1), record(2, load=ranks((8,), (8,))), record(3, load=ranks((2, 6), (5, 3)))]
    assert rank_load_picture(records, theme=DARK)[:4] == b"\x89PNG"


def test_imbalance_is_that_of_the_worst_layer():
    assert imbalance(record(1)) == 2.0  # 4 against a mean of 2; layer 1 is even
    assert rank_imbalance(record(1, load=ranks((2, 6), (5, 3)))) == 1.5
    assert rank_imbalance(record(1)) is None


def test_metrics_are_never_fewer_than_before_while_a_run_goes_on_from_them(tmp_path, monkeypatch):
    earlier = [record(1), record(2)]
    MetricsWriter(tmp_path, earlier).close()
    seen, path = [], tmp_path / "metrics.jsonl"

    def look(real):
        def looking(*arguments, **keywords):
            seen.append(path.read_text())
            return real(*arguments, **keywords)

        return looking

    with monkeypatch.context() as patch:  # whatever a kill can come between
        for where, name in ((os, "replace"), (os, "fsync"), (Path, "write_bytes")):
            patch.setattr(where, name, look(getattr(where, name)))
        writer = MetricsWriter(tmp_path, earlier)
        writer.write(record(3))
        writer.sync()
    assert len(seen) == 5
    assert all(text.startswith(seen[0]) for text in seen)
    assert [r["step"] for r in read_metrics(tmp_path, last_step=9)] == [1, 2, 3]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_metrics_are_json_and_json_has_no_nan(tmp_path, value):
    writer = MetricsWriter(tmp_path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        writer.write({"step": 1, "loss": value})
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


@pytest.mark.parametrize("line", ["{", "[1]", "null", '"step"', '{"loss": 1}', '{"step": "1"}', '{"step": NaN}', ""])
def test_a_line_that_is_no_record_is_said_with_its_number(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record(1)) + "\n" + line + "\n" + json.dumps(record(2)) + "\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2, is no record of a step"):
        read_metrics(tmp_path, last_step=9)


def test_metrics_survive_a_run_that_was_cut_off(tmp_path):
    writer = MetricsWriter(tmp_path, [record(1)])
    writer.write(record(2))
    with (tmp_path / "metrics.jsonl").open("a") as file:  # not even closed, and the last line not finished
        file.write('{"step": 3, "loss')
    assert [r["step"] for r in read_metrics(tmp_path, last_step=9)] == [1, 2]
    assert [r["step"] for r in read_metrics(tmp_path, last_step=1)] == [1]
    writer.close()
    assert read_metrics(tmp_path / "nowhere", last_step=9) == []


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_loss_speed_and_imbalance(terminal):
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=terminal, width=120)
    with show_progress(100, console=console) as show:
        for step in range(1, 101):
            show(record(step))
    assert "loss 0.0500" in shown.getvalue()
    assert "1,234 tokens/s" in shown.getvalue()
    assert "load max/mean 2.00" in shown.getvalue()
    assert terminal or len(shown.getvalue().splitlines()) == 11
