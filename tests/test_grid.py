"""tools/grid.py makes the runs of a small file, once each, and never counts one that failed."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from unittest.mock import patch

import forks
import pytest
import torch

from support.machine import pick_dtype
from support.terminal import parse_settings
from tools import grid, report
from tools.record import read_record, write_record
from train import Settings


def test_a_line_is_many_runs(tmp_path, monkeypatch):
    """Every {a,b} is chosen in turn, variables are put in, and comments are left out."""
    monkeypatch.setenv("MODEL_HERE", "demo/model")
    file = tmp_path / "grid"
    line = "a  2.5  --model $MODEL_HERE --method {smp-s,pins} --density 0.3 --seed {0,1}  # four"
    file.write_text(f"# nothing\n\n{line}\nb 1 --method dense\n")
    runs = grid.read_grid(file, tmp_path / "out", known={}, Settings=Settings)
    assert [run.name for run in runs] == ["a-smp-s-0", "a-smp-s-1", "a-pins-0", "a-pins-1", "b"]
    assert runs[2].flags == "--model demo/model --method pins --density 0.3 --seed 0".split()
    assert [run.minutes for run in runs] == [2.5] * 4 + [1.0]


WRONG = {
    "a 1": "grid:1: expected NAME MINUTES FLAGS",
    "a long --method dense": "'long' is no number of minutes",
    "a 1 --method {dense,best}": "grid:1: --method: invalid choice: 'best'",
    "a 1 --seed {1,2} --model $NOT_SET_ANYWHERE": "no variable NOT_SET_ANYWHERE",
    "a 1 --seed {1,1}": "a second run a-1",
    "a/b 1 --seed 1": "is no name of a folder",
    "a 1 --out x": "the grid gives it",
    "# nothing": "no run",
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_lines(line, tmp_path, capsys):
    (tmp_path / "grid").write_text(line + "\n")
    status = grid.main([str(tmp_path / "grid"), "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert status == 2
    assert error.count("\n") == 1 and WRONG[line] in error
    assert not (tmp_path / "out").exists()


def begin(background, fixture):
    """Start two grids: (their folder, the future of what `make_grids` returns)."""
    folder = fixture("tmp_path_factory").mktemp("grids")
    flags = " ".join(fixture("tiny")).replace("--dtype fp32", "--dtype auto")
    broken = flags.replace(fixture("tiny")[1], str(folder / "no-model"))
    lines = [f"good 1 {flags} --method {{dense,smp-s}}", f"bad 1 {broken} --method dense"]
    (folder / "three").write_text("\n".join(lines) + "\n")
    flags = flags.replace("--max-steps 26", "--max-steps 120 --eval-every 120")
    (folder / "one").write_text(f"a 1 {flags} --method dense\n")
    return folder, background.call(make_grids, folder)


def make_grids(folder):
    """Make a grid of three runs, of which one fails. Stop another grid, and start it again.

    Return the statuses of these three commands, and the files of the run that was stopped.
    """
    three = start([folder / "three", "--out", folder / "out", "--jobs", "2"], folder).wait()
    stopped = folder / "stopped"
    log = stopped / "a" / "metrics.jsonl"
    one_grid = [folder / "one", "--out", stopped]
    process = start(one_grid, folder)
    while not (log.exists() and '"step": 9' in log.read_text()):
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    one = process.wait()
    files = {path.name for path in (stopped / "a").iterdir()}
    assert read_record(stopped / "grid.jsonl") == {}
    again = start(one_grid, folder).wait()
    return (three, one, again), files


def start(argv, folder):
    """Start a grid in a process of its own, which forks its runs; its output goes to the folder."""
    return forks.start(["test_grid:main_with_forks", *argv], folder)[0]


def main_with_forks(argv):
    """Do what tools.grid does, in a process that has computed nothing, with forks as its runs."""
    names = {name: getattr(subprocess, name) for name in ("DEVNULL", "STDOUT")}
    with patch.object(grid, "subprocess", SimpleNamespace(Popen=ForkOfGrid, **names)):
        return grid.main(argv)


class ForkOfGrid:
    """What subprocess.Popen is for tools.grid."""

    def __init__(self, command, stdin, stdout, stderr, env, start_new_session):
        python, dash_m, *argv = command
        assert [python, dash_m] == [sys.executable, "-m"]
        self.returncode = None
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            forks.become(argv, [stdout.fileno(), stdout.fileno()], env, os.getcwd())

    def wait(self, options=0):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def poll(self):
        return self.wait(os.WNOHANG)

    def send_signal(self, number):
        os.kill(self.pid, number)


@pytest.fixture(scope="module")
def grids(begun):
    """The folder of two grids, the statuses of three commands, and files; see `make_grids`."""
    folder, made = begun
    return folder, *made.result()


PROBE = """
import json, os, sys
about = [sys.argv[1:], os.getsid(0) == os.getpid(), os.environ["OMP_NUM_THREADS"]]
print(json.dumps(about), "torch" in sys.modules, flush=True)
print("stderr", file=sys.stderr)
"""


def test_a_run_is_a_process_of_its_own(tmp_path, monkeypatch):
    """A run is `python -m PROGRAM`, in a session of its own and on one core.

    Its output and its errors are added to its log. Where it has begun, it gets --resume alone.
    """
    (tmp_path / "probe.py").write_text(PROBE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    run = grid.Planned("a", 1.0, ["--seed", "3"], tmp_path / "a")
    assert grid.start(run, "probe").wait() == 0
    run.out.mkdir()
    (run.out / "config.json").write_text("{}")
    assert grid.start(run, "probe").wait() == 0
    expected = []
    for flags in (["--seed", "3"], ["--resume"]):
        about = [["--out", str(run.out), *flags], True, "1"]
        expected += [f"{json.dumps(about)} False", "stderr"]
    assert run.log.read_text().splitlines() == expected


@pytest.fixture(scope="module")
def made(grids):
    """A grid of three runs, of which one fails, that was started once: (file, folder, status)."""
    folder, statuses, _ = grids
    return folder / "three", folder / "out", statuses[0]


def main(file, out):
    return grid.main([str(file), "--out", str(out), "--jobs", "2"])


def test_done_and_failed(made):
    """The failed run is named and not counted; the core-hours are those of the finished ones."""
    _, out, status = made
    assert status == 2
    state = json.loads((out / "grid.jsonl").read_text().splitlines()[0])
    assert (state["planned"], state["done"], state["failed"]) == (3, 2, ["bad"])
    runs = read_record(out / "grid.jsonl")
    assert list(runs) == ["good-dense", "good-smp-s"]
    results = [json.loads((out / name / "result.json").read_text()) for name in runs]
    seconds = sum(result["train_seconds"] for result in results)
    assert state["core_hours"] == pytest.approx(seconds / 3600, abs=1e-3)
    for (recorded, settings), result in zip(runs.values(), results):
        assert recorded["metrics"] == result["metrics"]
        assert settings["dtype"] == pick_dtype(torch.device("cpu"))  # "auto" would say nothing
        assert settings["method"] == result["method"]


def test_what_is_finished_is_skipped(made, capsys):
    """A second start plans the failed run alone."""
    file, out, _ = made
    assert grid.main([str(file), "--out", str(out), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "3 runs, 2 of them finished; planned for the others: 0.02 core-hours" in shown
    assert shown.count("  finished  ") == 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid, "start", lambda run, name: pytest.fail(run.name))
        file = file.with_name("good")
        file.write_text(made[0].read_text().splitlines()[0] + "\n")
        before = signal.getsignal(signal.SIGTERM)
        assert main(file, out) == 0
        assert signal.getsignal(signal.SIGTERM) == before


def test_a_record_beside_its_runs(made, capsys):
    """A run that is named as a folder and in a record is one run."""
    _, out, _ = made
    found = []
    for named in ([out / "grid.jsonl"], sorted(out.iterdir())):
        assert report.main([str(path) for path in named]) == 0
        found.append(capsys.readouterr().out)
    assert found[0] == found[1]


def test_a_recorded_run_is_finished_where_its_folder_is_gone(tmp_path, monkeypatch, capsys):
    """A record holds no absolute path, but the line of the grid may: it stands for the same run.

    The paths are a folder below that of a variable, one that no variable holds, and a teacher.
    """
    monkeypatch.setenv("TINY", "/home/me/tiny")
    flags = "--task cola --method smp-s --model {model} --teacher {teacher}"
    cases = [
        ("$TINY/model", "none", "$TINY/model", "none"),
        ("/home/me/tiny/model", "none", "$TINY/model", "none"),
        ("/elsewhere/model", "/elsewhere/run", "model", "run"),
        ("$TINY", "self:/abs/run", "$TINY", "self:run"),
    ]
    lines = []
    runs = {}
    for i, (model, teacher, _, _) in enumerate(cases):
        lines.append(f"r{i} 1 {flags.format(model=model, teacher=teacher)}\n")
        line = os.path.expandvars(lines[-1].split(maxsplit=2)[2])
        settings = parse_settings(Settings, "", line.split()) | {"regression": "interpolate"}
        assert os.path.isabs(settings["model"])
        metrics = {"metrics": {"matthews": 0.5}}
        result = {"task": "cola", "method": "smp-s", "density": 0.1, "achieved_density": 0.1}
        result |= metrics | {"best": metrics, "epochs": 1, "train_seconds": 1.0}
        runs[f"r{i}"] = (result, settings)
    out = tmp_path / "out"
    write_record(out / "grid.jsonl", {}, runs)
    known = read_record(out / "grid.jsonl")
    for (_, settings), (_, _, *recorded) in zip(known.values(), cases):
        assert [settings["model"], settings["teacher"]] == recorded
    (tmp_path / "grid").write_text("".join(lines))
    assert grid.main([str(tmp_path / "grid"), "--out", str(out), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "4 runs, 4 of them finished; planned for the others: 0.00 core-hours" in shown
    (tmp_path / "grid").write_text(lines[1])
    assert grid.main([str(tmp_path / "grid"), "--out", str(out)]) == 0
    assert read_record(out / "grid.jsonl") == known  # with fewer lines nothing is lost
    other = lines[2].replace("/elsewhere/run", "/elsewhere/another")
    (tmp_path / "grid").write_text(other)
    assert grid.main([str(tmp_path / "grid"), "--out", str(out), "--dry-run"]) == 2
    assert "the record of r2 has teacher run" in capsys.readouterr().err


def test_other_flags_are_refused(made, tmp_path, capsys):
    """A finished run stands for no other one."""
    file, out, _ = made
    other = tmp_path / "grid"
    other.write_text(file.read_text().replace("--method {", "--lr 1e-2 --method {"))
    assert main(other, out) == 2
    assert "has lr" in capsys.readouterr().err
    assert grid.main([str(file), "--out", str(out), "--jobs", "0"]) == 2
    assert "--jobs: 0: expected a number in [1, 1e9]" in capsys.readouterr().err


def test_a_signal_stops_and_a_second_start_resumes(grids):
    """SIGTERM lets a run write its checkpoint; the next start goes on from there."""
    folder, (_, stopped, again), files = grids
    assert stopped == 130
    assert "checkpoint.safetensors" in files
    assert "result.json" not in files
    assert again == 0
    assert "resumed" in (folder / "stopped" / "a.log").read_text()
    assert list(read_record(folder / "stopped" / "grid.jsonl")) == ["a"]
