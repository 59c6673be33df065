# SPDX-License-Identifier: Apache-2.0
"""The suite on the reference platform, its verdicts, reports, matrix, command line and pytest plugin."""

import json
import os
import platform as host
import re
import subprocess
import sys
from pathlib import Path

import pytest
from mutants import target

import hyperep
from hyperep.cli import main
from hyperep.conformance import check_platform
from hyperep.conformance.catalogue import requirements
from hyperep.conformance.matrix import as_markdown, cell, counts
from hyperep.conformance.page import as_html
from hyperep.conformance.pytest_session import SuiteSession, selection_of
from hyperep.conformance.report import Report, Result, merged
from hyperep.conformance.requirement import Level
from hyperep.conformance.suite import check_target, selected
from hyperep.conformance.target import Target
from hyperep.conformance.text import failure, listing, summary
from hyperep.conformance.verdict import Verdict, judge
from hyperep.loopback import LoopbackPlatform
from hyperep.loopback.launch import LoopbackLauncher, run
from hyperep.writable import require_writable_file

DOCS = Path(__file__).parents[2] / "docs"
MET = {"outcome": "met"}
WRONG = {
    "outcome": "failed",
    "message": "rows differ",
    "traceback": "Traceback ...",
    "where": [],
    "notes": {"splits": "[1]"},
}
REFUSED = {**WRONG, "outcome": "refused", "capability": "reduce_scatter", "message": "platform 'x' does not support it"}


def verdict(id, outcomes, **supports):
    every = dict.fromkeys(("reduce_scatter", "all_to_all"), "full")
    return judge(requirements()[id], outcomes, {**every, **supports})


@pytest.fixture(scope="module")
def loopback():
    return check_platform("loopback", (1, 2, 3, 4))


def test_the_reference_platform_conforms(loopback):
    assert loopback.conforms, summary(loopback, details=True)
    assert {r.id for r in loopback.results} == set(requirements())
    assert loopback.count(Verdict.PASSED) > 500


def test_every_requirement_says_what_it_demands():
    assert len(requirements()) >= 60
    for r in requirements().values():
        assert r.demand.endswith("."), r.id
        assert r.id.isprintable(), r.id
        assert " " not in r.id
    assert {r.level for r in requirements().values()} == set(Level)


def test_what_is_needed_comes_first():
    order = list(requirements())
    assert all(order.index(need) < order.index(r.id) for r in requirements().values() for need in r.needs)
    assert [r.id for r in selected(["A2A-uneven-splits"])][-1] == "A2A-uneven-splits"
    assert "A2A-even" in [r.id for r in selected(["A2A-uneven-splits"])]
    with pytest.raises(ValueError, match="no requirement 'A2A-unheard-of'"):
        selected(["A2A-unheard-of"])


def test_declared_support_must_be_met():
    assert verdict("RS-values", [MET, MET]).verdict is Verdict.PASSED
    found = verdict("RS-values", [MET, WRONG])
    assert (found.verdict, found.message) == (Verdict.FAILED, "on rank 1 only: rows differ")
    assert "splits: [1]" in found.detail
    refused = verdict("RS-values", [REFUSED, REFUSED])
    assert refused.verdict is Verdict.FAILED
    assert "reduce_scatter is declared FULL" in refused.message


def test_what_is_declared_unsupported_must_be_refused():
    assert verdict("RS-values", [REFUSED, REFUSED], reduce_scatter="unsupported").verdict is Verdict.UNSUPPORTED
    assert verdict("RS-values", [MET, MET], reduce_scatter="unsupported").verdict is Verdict.FAILED
    assert verdict("RS-values", [REFUSED, MET], reduce_scatter="unsupported").verdict is Verdict.FAILED
    assert verdict("RS-values", [WRONG, WRONG], reduce_scatter="unsupported").verdict is Verdict.FAILED
    other = {**REFUSED, "capability": "all_to_all"}
    assert "['all_to_all']" in verdict("RS-values", [other, other], reduce_scatter="unsupported").message


def test_a_core_capability_cannot_be_left_out():
    refused = {**REFUSED, "capability": "all_to_all"}
    assert verdict("A2A-even", [refused, refused], all_to_all="unsupported").verdict is Verdict.MISSING


def test_one_fault_is_one_line():
    report = check_target(target("ValuesAllZero"), [2], only=["EP-balanced"])
    verdicts = {r.id: r.verdict for r in report.results}
    assert verdicts["A2A-even"] is Verdict.FAILED
    assert verdicts["EP-balanced"] is Verdict.BLOCKED
    assert next(r.message for r in report.results if r.id == "EP-balanced") == "blocked by A2A-even"
    text = summary(report)
    assert text.count("world size 2)") == 1
    assert "blocks" in text
    assert "hyperep conformance run --platform loopback --world-size 2 --only A2A-even --seed 0 --details" in text


def test_a_failure_shows_seed_splits_and_how_to_run_it_again():
    report = check_target(target("SplitsSwapped"), [2], only=["A2A-uneven-splits"], seed=5)
    result = next(r for r in report.results if r.verdict is Verdict.FAILED)
    text = failure("loopback", result, report.seed)
    assert "seed: 5" in text
    assert "splits: [[1, 2], [3, 4]]" in text
    assert "--only A2A-uneven-splits --seed 5" in text
    assert "Traceback" in text


def test_expected_failures_are_strict_and_have_a_reason():
    known = target("SplitsSwapped", expected_failures={"A2A-uneven-splits@2": "splits are swapped, see issue 7"})
    report = check_target(known, [2], only=["A2A-uneven-splits"])
    (result,) = (r for r in report.results if r.id == "A2A-uneven-splits")
    assert result.verdict is Verdict.EXPECTED
    assert "see issue 7" in result.message
    assert report.passed

    stale = target("SplitsSwapped", expected_failures={"A2A-even": "fails no more"})
    report = check_target(stale, [2], only=["A2A-even"])
    assert next(r for r in report.results if r.id == "A2A-even").verdict is Verdict.UNEXPECTED
    assert not report.passed


def test_ranks_that_do_not_start_are_one_line():
    class Unstartable(type(target("SplitsSwapped").launcher)):
        def plan(self, ranks):
            from hyperep.platform.errors import RankFailure

            raise RankFailure("no scheduler on this machine")

    unstartable = target("SplitsSwapped")
    object.__setattr__(unstartable, "launcher", Unstartable("SplitsSwapped"))
    report = check_target(unstartable, [2], only=["A2A-even"])
    assert {r.verdict for r in report.results if r.id != "WORLD-starts"} == {Verdict.BLOCKED}
    assert "no scheduler on this machine" in summary(report)


class RacingLauncher(LoopbackLauncher):
    """Ranks that lose a race at their first starts, each time in another way or always in the same; and print."""

    def __init__(self, folder, races, say="race {}"):
        self.folder, self.races, self.say = folder, races, say

    def host(self, process, function, platform_name):
        print("noise of the framework", flush=True)
        number = len(os.listdir(self.folder))
        (Path(self.folder) / str(number)).touch()
        if number < self.races:
            raise OSError(self.say.format(number))
        return super().host(process, function, platform_name)


def racing(folder, *arguments):
    declared = target("SplitsSwapped").declared
    return Target(name="loopback", launcher=RacingLauncher(folder, *arguments), declared=declared)


def test_a_race_at_the_start_is_tried_again_and_not_judged(tmp_path):
    report = check_target(racing(tmp_path, 2), [2], only=["HOST-roundtrip"])
    assert report.passed, summary(report)
    assert report.remarks == tuple(
        f"ranks started at another try only, at world size 2; before: rank 0 of 2 raised: OSError: race {n}"
        for n in (0, 1)
    )
    assert f"Remark: {report.remarks[1]}" in summary(report)
    assert len(os.listdir(tmp_path)) == 3


@pytest.mark.parametrize(("races", "say", "starts"), [(99, "no licence", 2), (99, "race {}", 3)])
def test_what_fails_in_the_same_way_or_ever_again_is_no_race(tmp_path, races, say, starts):
    report = check_target(racing(tmp_path, races, say), [2], only=["HOST-roundtrip"])
    assert [r.verdict for r in report.results] == [Verdict.FAILED, Verdict.BLOCKED]
    assert say.format(starts - 1) in report.results[0].message
    assert len(os.listdir(tmp_path)) == starts
    assert report.remarks == ()


def test_what_ranks_print_is_kept_apart_and_told_on_request(tmp_path):
    quiet = check_target(racing(tmp_path, 0), [1], only=["HOST-roundtrip"])
    assert quiet.output == {}
    assert "noise" not in summary(quiet, details=True)
    told = check_target(racing(tmp_path, 0), [1, 2], only=["HOST-roundtrip"], output=True)
    assert told.output == {
        "world size 1, rank 0": "noise of the framework\n",
        "world size 2, ranks 0, 1": "noise of the framework\n",
    }
    assert "--- printed by world size 1, rank 0:\nnoise of the framework" in summary(told)
    assert Report.from_json(told.to_json()) == told


class Moody(LoopbackPlatform):
    """Its copies to the host are lost every third time."""

    calls = 0

    def to_host(self, *tensors):
        Moody.calls += 1
        arrays = super().to_host(*tensors)
        return tuple(a * 0 for a in arrays) if Moody.calls % 3 == 0 else arrays


class MoodyLauncher(LoopbackLauncher):
    def host(self, process, function, platform_name):
        def moody(platform):
            platform.__class__ = Moody
            return function(platform)

        return run(moody, len(process.ranks))


def test_what_passes_once_is_caught_by_running_it_again():
    moody = Target(name="loopback", launcher=MoodyLauncher(), declared=target("SplitsSwapped").declared)
    once = check_target(moody, [1], only=["HOST-several"])
    often = check_target(moody, [1], only=["HOST-several"], repeat=6)
    assert once.passed
    assert [r.id for r in often.results] == [r.id for r in once.results], "one result for each requirement"
    (worst,) = (r for r in often.results if r.verdict is Verdict.FAILED)
    assert re.match(r"in 3 of 6 runs: ", worst.message)
    assert (once.repeat, often.repeat) == (1, 6)
    assert "world size 1 (2, 3, 4 not run) on cpu, run 6 times, " in summary(often)
    assert "--repeat 20" in summary(often)
    with pytest.raises(ValueError, match="repeat=0"):
        check_target(moody, [1], repeat=0)


def test_several_runs_are_as_good_as_the_worst():
    def result(verdict, message="", id="X"):
        return Result(id=id, ranks=2, verdict=verdict, message=message, seconds=0.5)

    runs = [result(Verdict.PASSED), result(Verdict.PASSED, id="Y"), result(Verdict.FAILED, "a"), result(Verdict.FAILED)]
    assert merged(runs) == [
        Result(id="X", ranks=2, verdict=Verdict.FAILED, message="in 2 of 3 runs: a", seconds=1.5),
        result(Verdict.PASSED, id="Y"),
    ]
    assert merged(runs[2:3] * 2)[0].message == "a"


def test_a_report_is_read_as_it_was_written(loopback, tmp_path):
    path = tmp_path / "report.json"
    loopback.save(path)
    assert Report.load(path) == loopback
    data = json.loads(path.read_text())
    assert data["conforms"] is True
    assert data["platform"] == "loopback"
    for broken in ("{}", "[]", "nonsense", path.read_text().replace('"schema": 2', '"schema": 99')):
        path.write_text(broken)
        with pytest.raises(ValueError, match=r"report\.json"):
            Report.load(path)


def test_a_report_says_what_made_it(loopback, tmp_path):
    path = tmp_path / "report.json"
    loopback.save(path)
    data = json.loads(path.read_text())
    assert data["suite"] == f"hyperep {hyperep.__version__}"
    assert re.fullmatch(r"([0-9a-f]{12}\+?)?", data["commit"])
    assert data["requirements"] == len(requirements())
    assert data["selection"] is None
    assert data["machine"].startswith(host.system())
    assert data["machine"].endswith(f"{os.cpu_count()} CPUs")
    assert re.fullmatch(r"20\d\d-[01]\d-[0-3]\d [0-2]\d:[0-5]\d UTC", data["date"])


def test_a_report_of_the_form_before_is_read_too(loopback, tmp_path):
    path = tmp_path / "report.json"
    data = json.loads(loopback.to_json())
    for new in ("selection", "date", "requirements"):
        del data[new]
    path.write_text(json.dumps({**data, "schema": 1}))
    found = Report.load(path)
    assert found.results == loopback.results
    assert (found.conforms, found.selection, found.date) == (True, None, "")


HOST_IDS = [id for id in requirements() if id.startswith("HOST-")]


def test_a_part_of_the_suite_is_no_verdict(tmp_path):
    whole = len(requirements())
    report = check_platform("loopback", (1, 2), only=["HOST", "A2A-even"])
    assert (report.passed, report.conforms, report.selection) == (True, None, ("HOST", "A2A-even"))
    assert set(report.asked) == {*HOST_IDS, "A2A-even"}
    assert set(report.ran) > set(report.asked)
    line = summary(report).splitlines()[-1]
    assert "conform" not in line
    assert f"at world size 1, 2 (3, 4 not run) on cpu, {len(HOST_IDS) + 1} of {whole} asked for: passed" in line
    path = tmp_path / "report.json"
    report.save(path)
    data = json.loads(path.read_text())
    assert data["conforms"] is None
    assert data["selection"] == ["HOST", "A2A-even"]
    assert Report.load(path) == report

    wrong = check_target(target("SplitsSwapped"), [2], only=["A2A-uneven-splits"])
    assert (wrong.passed, wrong.conforms) == (False, None)
    assert f"1 of {whole} asked for: not passed" in summary(wrong)
    text = as_markdown([report, wrong])
    assert f"| 1, 2 (3, 4 not run) | partial: {len(HOST_IDS) + 1} of {whole} asked for: passed |" in text
    assert f"| 2 (1, 3, 4 not run) | partial: 1 of {whole} asked for: not passed |" in text
    assert "conform" not in text
    assert [p["class"] for p in data_of(as_html([report, wrong]))["platforms"]] == ["partial", "partial"]


def test_an_id_that_others_begin_with_is_asked_for_alone():
    report = check_platform("loopback", (1,), only=["SUM-rows", "TOKENS-random"])
    assert "SUM-rows-no-row" in report.ran, "what tokens rest on"
    assert report.asked == ("SUM-rows", "TOKENS-random")


def test_pytest_was_confined_to_what_ran_in_every_world():
    every = [Result(id=id, ranks=n, verdict=Verdict.PASSED) for n in (1, 2) for id in requirements()]
    assert selection_of(every, (1, 2)) is None
    assert selection_of(every[:-1], (1, 2)) == tuple(requirements())[:-1]
    assert selection_of(every[:-1], (1,)) is None


def test_what_a_whole_run_left_out_is_named(loopback):
    assert summary(loopback).splitlines()[-1].startswith("loopback conforms at world size 1, 2, 3, 4 on cpu: ")
    two = tuple(r for r in loopback.results if r.ranks == 2 and r.id != "HOST-several")
    older = Report(**{**vars(loopback), "world_sizes": (2,), "results": two})
    assert "loopback conforms at world size 2 (1, 3, 4 not run) on cpu" in summary(older)
    assert "| 2 (1, 3, 4 not run) | conforms, 1 not run |" in as_markdown([older])
    assert [p["class"] for p in data_of(as_html([loopback, older]))["platforms"]] == ["passed", "partial"]


def worse(report, id, verdict, message="</script> | bad"):
    results = tuple(
        Result(id=r.id, ranks=r.ranks, verdict=verdict, message=message) if r.id == id else r for r in report.results
    )
    return Report(**{**vars(report), "results": results, "device": "gpu"})


def test_the_matrix_shows_the_worst_of_all_world_sizes(loopback):
    broken = worse(loopback, "A2A-even", Verdict.FAILED)
    assert cell(loopback, "A2A-even")[0] is Verdict.PASSED
    assert cell(broken, "A2A-even")[0] is Verdict.FAILED
    text = as_markdown([loopback, broken])
    assert "| requirement | loopback (cpu) | loopback (gpu) |" in text
    assert "| `A2A-even` | ✓ | [✗](#A2A-even-2) |" in text
    assert text.count('<a id="A2A-even-2"></a>') == 1, "a failure is linked to its message"
    assert counts(broken)[Verdict.FAILED] == 1
    assert counts(broken)[Verdict.PASSED] == counts(loopback)[Verdict.PASSED] - 1
    assert f"| 1 requirements not met | {counts(broken)[Verdict.PASSED]} passed, " in text
    assert "| float16 | unsupported | unsupported |" in text
    assert "1 requirements not met" in text
    with pytest.raises(ValueError, match="at least one report"):
        as_markdown([])


def data_of(page):
    """What a browser's JSON parser makes of the data in the page's one script."""
    (script,) = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)
    assert script.startswith("\nconst data = ")
    return json.JSONDecoder().raw_decode(script.removeprefix("\nconst data = "))[0]


def test_the_page_is_self_contained(loopback):
    page = as_html([worse(loopback, "A2A-even", Verdict.FAILED)])
    assert page.count("</script>") == 1, "a message must not end the script"
    assert "src=" not in page
    assert "http" not in page
    rows = data_of(page)["rows"]
    assert len(rows) == len(requirements())
    ports = [row["port"] for row in rows]
    assert ports == sorted(ports, key=ports.index), "each heading once"
    (failed,) = (c for row in rows for c in row["cells"] if "anchor" in c)
    assert (failed["anchor"], failed["verdict"]) == ("A2A-even-1", "failed")
    (platform,) = data_of(page)["platforms"]
    assert dict(platform["counts"])["failed"] == 1
    assert sum(dict(platform["counts"]).values()) == len(requirements())
    assert "position: sticky" in page.partition("thead th {")[2].partition("}")[0], "the head stays in sight"


HOSTILE = "<!--<script> @TITLE@ </script> <b>x</b> a|b `c` *d* __e__ [f](g) 1 & 2 $x$ ~~y~~ # h\nnext \\ line float32_t"


def test_a_message_stays_text_on_the_page(loopback):
    page = as_html([worse(loopback, "A2A-even", Verdict.FAILED, HOSTILE)])
    # "<!--<script>" in a script makes "</script>" part of it: a browser would show an empty page.
    assert page.count("<!--") == 0
    assert page.count("<script") == 1
    (row,) = (row for row in data_of(page)["rows"] if row["id"] == "A2A-even")
    assert row["cells"][0]["note"] == f"world size 1: {HOSTILE}"


def test_a_message_stays_text_in_markdown(loopback):
    found = worse(loopback, "A2A-even", Verdict.FAILED, HOSTILE)
    text = as_markdown([Report(**{**vars(found), "device": "a|b", "distribution": "x\n| y"})])
    (note,) = (line for line in text.splitlines() if line.startswith("- <a id="))
    assert note == (
        r'- <a id="A2A-even-1"></a>'
        r"loopback (a\|b), `A2A-even`: world size 1: \<!--\<script\> @TITLE@ \</script\> \<b\>x\</b\> a\|b "
        r"\`c\` \*d\* \_\_e\_\_ \[f\](g) 1 \& 2 \$x\$ \~\~y\~\~ \# h next \\ line float32_t"
    )
    (row,) = (line for line in text.splitlines() if line.startswith("| loopback |"))
    assert row.startswith(r"| loopback | x \| y | ")
    bars = {line.count("|") - line.count(r"\|") for line in text.splitlines() if line.startswith("| `")}
    assert bars == {3}


def run_cli(*arguments):
    with pytest.raises(SystemExit) as exited:
        main(["conformance", *arguments])
    return exited.value.code


def test_the_command_line(tmp_path, capsys):
    report = tmp_path / "r.json"
    code = run_cli("run", "--platform", "loopback", "--world-size", "1,2", "--only", "HOST", "--report", str(report))
    assert code == 0
    assert f"loopback at world size 1, 2 (3, 4 not run) on cpu, {len(HOST_IDS)} of " in capsys.readouterr().out
    assert run_cli("matrix", str(report)) == 0
    assert "| `HOST-roundtrip` | ✓ |" in capsys.readouterr().out
    assert run_cli("matrix", str(report), "--html", str(tmp_path / "m.html")) == 0
    assert (tmp_path / "m.html").read_text().startswith("<!DOCTYPE html>")
    assert run_cli("run", "--platform", "loopback", "--world-size", "one") == 2
    assert run_cli("run", "--platform", "loopbak") == 2
    assert "loopback" in capsys.readouterr().err
    assert run_cli("list") == 0
    assert f"{len(requirements())} requirements" in capsys.readouterr().out
    assert run_cli("list", "--markdown") == 0
    assert capsys.readouterr().out == listing()


@pytest.mark.parametrize(
    ("name", "message"),
    [("missing/r.json", "there is no folder"), ("", "is a directory"), ("file/r.json", "there is no folder")],
)
def test_a_report_that_cannot_be_written_is_told_before_anything_is_checked(
    tmp_path, capsys, monkeypatch, name, message
):
    (tmp_path / "file").touch()
    path = str(tmp_path / name)
    monkeypatch.setattr("hyperep.cli.conformance.check_target", lambda *a, **k: pytest.fail("something was checked"))
    assert run_cli("run", "--platform", "loopback", "--report", path) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"hyperep: error: --report {path}")
    assert message in errors
    assert errors.count("\n") == 1
    assert run_cli("matrix", str(DOCS / "reports" / "loopback.json"), "--html", path) == 2
    assert capsys.readouterr().err.startswith(f"hyperep: error: --html {path}")

    class Options:
        def getoption(self, name):
            return {"--hyperep-platform": "loopback", "--hyperep-world-size": "1", "--hyperep-report": path}.get(name)

    with pytest.raises(pytest.UsageError, match=f"--hyperep-report {path}.*{message}"):
        SuiteSession(Options())


def test_what_was_found_is_told_also_if_the_report_cannot_be_saved(tmp_path, capsys, monkeypatch):
    def save(report, path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Report, "save", save)
    arguments = ("run", "--platform", "loopback", "--world-size", "1", "--only", "HOST-roundtrip")
    assert run_cli(*arguments, "--report", str(tmp_path / "r.json")) == 2
    shown = capsys.readouterr()
    assert "asked for: passed" in shown.out
    assert "No space left on device" in shown.err


def test_a_file_that_must_not_be_changed_is_none_to_write_to(tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    path.touch()
    require_writable_file(path, "--report")
    monkeypatch.setattr(os, "access", lambda *arguments: False)  # root may write to everything
    with pytest.raises(ValueError, match=r"--report .*r.json cannot be written; name another file"):
        require_writable_file(path, "--report")
    with pytest.raises(ValueError, match=r"--report /proc/r.json: /proc cannot be written"):
        require_writable_file(Path("/proc/r.json"), "--report")


def test_the_pytest_plugin(tmp_path):
    report = tmp_path / "r.json"
    options = ["--hyperep-platform=loopback", "--hyperep-world-size=2", f"--hyperep-report={report}", "-k", "HOST"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--pyargs", "hyperep.conformance"]
    done = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert Report.load(report).conforms is None
    assert list(Report.load(report).selection) == HOST_IDS
    found = Report.load(report).results
    assert {r.id for r in found} == {id for id in requirements() if id.startswith("HOST-")}
    assert {(r.verdict, r.ranks) for r in found} == {(Verdict.PASSED, 2)}
    without = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert without.returncode != 0
    assert "--hyperep-platform=NAME" in without.stdout + without.stderr


def test_the_plugin_costs_nothing_where_it_is_not_used():
    code = (
        "import pytest, sys; before = set(sys.modules); import hyperep.conformance.pytest_plugin;"
        "print(sorted(m for m in set(sys.modules) - before if not m.startswith('hyperep')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
