# SPDX-License-Identifier: Apache-2.0
"""``hyperep platforms``, ``hyperep doctor``, and how the command line reports errors."""

import json
import os
import subprocess
import sys

import pytest

from hyperep.cli import application
from hyperep.cli.commands import COMMANDS, Command
from hyperep.platform.errors import PlatformNotFound
from hyperep.platform.reference import resolve


@pytest.fixture
def hyperep(site):
    """Run the command line in a process of its own that also sees the fake distributions."""

    def run(*arguments, **environment):
        path = os.pathsep.join(filter(None, [str(site.folder), os.environ.get("PYTHONPATH")]))
        return subprocess.run(
            [sys.executable, "-m", "hyperep", *arguments],
            env={**os.environ, "PYTHONPATH": path, "COLUMNS": "200", **environment},
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


def test_json_holds_every_platform_with_every_key(site, hyperep):
    site.install("alpha", version="1.2.3")
    site.install("beta", probe='return Viability.no("no NPU is visible")')
    site.install("gamma", before="print('noise'); import no_such_framework")
    site.install("delta", distribution="first-dist", version="1.0")
    site.install("delta", distribution="second-dist", version="2.0")
    site.install("epsilon")
    result = hyperep("platforms", "--json", HYPEREP_BLOCK="epsilon")
    assert result.returncode == 0, result.stderr
    records = {record["name"]: record for record in json.loads(result.stdout)}
    keys = {"name", "state", "reason", "distribution", "version", "api", "capabilities"}
    assert all(set(record) == keys for record in records.values())
    assert {name: records[name]["state"] for name in ("alpha", "beta", "gamma", "delta", "epsilon")} == {
        "alpha": "viable",
        "beta": "not viable",
        "gamma": "broken",
        "delta": "broken",
        "epsilon": "blocked",
    }
    alpha = records["alpha"]
    assert (alpha["distribution"], alpha["version"], alpha["api"]) == ("hyperep-alpha", "1.2.3", [2, 2])
    assert alpha["capabilities"]["all_to_all"] == "full"
    assert alpha["capabilities"]["float64"] == "emulated"
    assert alpha["capabilities"]["modules"] == "unsupported"
    assert records["beta"]["reason"] == "no NPU is visible"
    assert "Traceback" in records["gamma"]["reason"]
    assert set(records["delta"]["distribution"].split(", ")) == {"first-dist", "second-dist"}


def test_table_shows_states_reasons_and_owners(site, hyperep):
    site.install("alpha", version="1.2.3")
    site.install("beta", probe='return Viability.no("no [npu] is visible")')
    result = hyperep("platforms")
    assert result.returncode == 0, result.stderr
    for text in ("alpha", "viable", "hyperep-alpha 1.2.3", "not viable", "no [npu] is visible", "emulated: float64"):
        assert text in result.stdout


def test_table_reads_well_on_a_narrow_screen(site, hyperep):
    site.install("alpha", version="1.2.3", api=(1, 2))
    site.install("a_longer_platform", probe='return Viability.no("no NPU is visible: " + "why, " * 30)')
    lines = hyperep("platforms", COLUMNS="80").stdout.splitlines()
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    for whole in ("a_longer_platform", "not viable", "hyperep-alpha 1.2.3", "protocol versions 1 to"):
        assert whole in text, "on one line"
    assert len(lines) < 40
    assert "None" not in text


def test_doctor_finds_no_problem_where_a_platform_would_be_chosen(site, hyperep):
    site.install("alpha", priority=1000)
    result = hyperep("doctor", HYPEREP_BLOCK="torch,torch_npu,mindspore")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "chooses alpha" in result.stdout
    assert "No problem found" in result.stdout


def test_doctor_gives_the_line_that_installs_what_is_missing(site, hyperep):
    site.install("alpha", probe='return Viability.no("no NPU is visible")')
    result = hyperep("doctor", HYPEREP_PLATFORM="alpha")
    assert result.returncode == 1
    assert "problem: platform 'alpha' (HYPEREP_PLATFORM=alpha)" in result.stdout
    assert "to install what is missing: pip install hyperep-alpha" in result.stdout


def test_doctor_fails_for_a_broken_plugin_and_shows_its_traceback(site, hyperep):
    site.install("alpha", probe="raise OSError('driver crashed')")
    site.install("beta", priority=1000)
    result = hyperep("doctor", HYPEREP_BLOCK="torch,torch_npu,mindspore")
    assert result.returncode == 1
    assert "Traceback" in result.stdout
    assert "problem: alpha: broken, OSError: driver crashed; repair or uninstall hyperep-alpha" in result.stdout
    assert "chooses beta" in result.stdout


PANIC = "raise type('PanicException', (BaseException,), {})('in Rust')"


@pytest.mark.parametrize("command", ["platforms", "doctor"])
def test_a_plugin_that_panics_at_import_is_listed_like_any_other_that_is_broken(site, hyperep, command):
    site.install("alpha", before=PANIC)
    result = hyperep(command)
    assert result.returncode == (1 if command == "doctor" else 0)
    assert "PanicException: in Rust" in result.stdout
    assert "loopback" in result.stdout
    assert not result.stderr


def test_a_command_that_asks_for_a_plugin_that_panics_says_so(site, hyperep):
    site.install("alpha", before=PANIC)
    result = hyperep("train", "--platform", "alpha")
    assert result.returncode == 2
    assert result.stderr.startswith("hyperep: error: platform 'alpha' is broken: PanicException: in Rust")


def test_doctor_remarks_on_a_blocked_name_that_nobody_registers(site, hyperep):
    result = hyperep("doctor", HYPEREP_BLOCK="tusch")
    assert "HYPEREP_BLOCK rules out 'tusch', which is not installed" in result.stdout


def test_doctor_fails_for_an_unknown_platform_in_the_environment(site, hyperep):
    site.install("alpha")
    result = hyperep("doctor", HYPEREP_PLATFORM="alpa")
    assert result.returncode == 1
    assert "unknown platform 'alpa' (HYPEREP_PLATFORM=alpa)" in result.stdout


def test_unknown_command(hyperep):
    result = hyperep("trian")
    assert result.returncode == 2
    assert "No such command 'trian'" in result.stderr


def fail_with_value():
    """A command."""
    error = ValueError("num_experts=10 is not divisible by 4; choose 8 or 12")
    error.add_note("on rank 3")
    raise error


def fail_with_platform():
    """A command."""
    raise PlatformNotFound("unknown platform 'x'; installed: loopback")


def fail_with_bug():
    """A command."""
    raise KeyError("a bug of ours")


@pytest.fixture
def commands(monkeypatch):
    names = ("fail_with_value", "fail_with_platform", "fail_with_bug")
    mine = tuple(Command(name, f"{__name__}:{name}", "fail") for name in names)
    monkeypatch.setattr(application, "COMMANDS", mine)
    monkeypatch.delenv(application.TRACEBACK_VARIABLE, raising=False)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fail_with_value", "hyperep: error: num_experts=10 is not divisible by 4; choose 8 or 12\non rank 3\n"),
        ("fail_with_platform", "hyperep: error: unknown platform 'x'; installed: loopback\n"),
    ],
)
def test_error_of_the_user_is_one_message_and_status_2(commands, capsys, name, message):
    with pytest.raises(SystemExit) as caught:
        application.main([name])
    assert caught.value.code == 2
    assert capsys.readouterr().err == message


@pytest.mark.parametrize("arguments", [["--traceback", "fail_with_value"], ["fail_with_value", "--traceback"]])
def test_option_shows_the_whole_traceback(commands, arguments):
    with pytest.raises(ValueError, match="num_experts"):
        application.main(arguments)


def test_variable_shows_the_whole_traceback(commands, monkeypatch):
    monkeypatch.setenv("HYPEREP_TRACEBACK", "1")
    with pytest.raises(ValueError, match="num_experts"):
        application.main(["fail_with_value"])


def test_bug_is_not_hidden(commands):
    with pytest.raises(KeyError, match="a bug of ours"):
        application.main(["fail_with_bug"])


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_command_of_the_table_exists_and_is_documented(command):
    assert resolve(command.function).__doc__
    assert command.help.endswith(".")


def test_only_the_chosen_command_is_imported():
    code = (
        "import sys; from hyperep.cli import main\n"
        "try: main(['platforms', '--help'])\n"
        "except SystemExit: pass\n"
        "print([name for name in sys.modules if name.startswith('hyperep.cli.')], file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0
    assert "hyperep.cli.platforms" in result.stderr
    assert "hyperep.cli.doctor" not in result.stderr
