"""Make many runs of train.py, several side by side, from a small file.

    python -m tools.grid GRID --out DIR              make what is not yet made
    python -m tools.grid GRID --out DIR --dry-run    print the runs and the planned hours

Each line of GRID is a name, the minutes that a run takes on one core, and flags of train.py:

    # STS-B, 2 x 2 x 3 runs
    stsb  3  --model $MODEL --task stsb --method {smp-s,pins} --density {0.3,0.1} --seed {0,1,2}

{a,b} stands for a, then for b; $NAME is a variable of the environment; the rest of a line after #
is a comment. The folder of a run is DIR/stsb-smp-s-0.3-0, and its output is in the .log beside it.
A second start skips what is finished and resumes what is not. A run that fails is named, and the
others go on. DIR/grid.jsonl is the record: what was planned, done and failed, the core-hours of it,
and the result of each run. A run that stands in the record is finished, also where its folder is
gone. tools.report reads a record like run folders.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so it runs from any folder

from support.terminal import COUNT, ROOT, Parser, UserError, live, parse_settings, program, tell

import importlib
import itertools
import os
import re
import shlex
import signal
import subprocess
import time
from dataclasses import dataclass

from models.runs import read_run_config
from support.files import lock
from tools.record import NOT_RECORDED, read_record, read_run, without_paths, write_record


@dataclass
class Planned:
    """A run of the grid."""

    name: str
    minutes: float  # on one core, as the file says
    flags: list  # of train.py, without --out
    out: Path
    known: tuple = None  # (result, settings) from the record of an earlier start

    @property
    def log(self):
        return self.out.with_name(f"{self.name}.log")


# ---------- the file ------------------------------------------------------------------------------


def read_grid(path, folder, known, Settings):
    """Return the runs of a file in its order. Raises UserError with the line that is wrong.

    `known` is {name: (result, settings)} of a record, and `Settings` is the class of the flags.
    """
    runs = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        line = line.split("#")[0].strip()
        if not line:
            continue
        where = f"{path}:{number}"
        name, minutes, flags = split_line(line, where)
        for chosen, text in choices(flags):
            run_name = "-".join([name, *chosen])
            if not re.fullmatch(r"[\w.+-]+", run_name):
                raise UserError(f"{where}: {run_name!r} is no name of a folder")
            if run_name in runs:
                raise UserError(f"{where}: a second run {run_name}; give the line another name")
            out = folder / run_name
            run = Planned(run_name, minutes, shlex.split(text), out, known.get(run_name))
            check(run, where, Settings)
            runs[run_name] = run
    if not runs:
        raise UserError(f"{path}: no run; expected lines of a name, minutes and flags of train.py")
    return list(runs.values())


def split_line(line, where):
    """Return (name, minutes, flags) of a line, with its variables in place."""
    unknown = [name for name in re.findall(r"\$\{?(\w+)", line) if name not in os.environ]
    if unknown:
        raise UserError(f"{where}: no variable {' '.join(unknown)} in the environment; set it")
    parts = os.path.expandvars(line).split(maxsplit=2)
    form = f"{where}: expected NAME MINUTES FLAGS"
    if len(parts) != 3:
        raise UserError(form)
    try:
        minutes = float(parts[1])
    except ValueError:
        raise UserError(f"{form}; {parts[1]!r} is no number of minutes") from None
    if not (0 < minutes < 1e6):
        raise UserError(f"{form}; minutes are above 0")
    return parts[0], minutes, parts[2]


def choices(flags):
    """Yield (what was chosen, the flags) for each way to choose one of every {a,b}."""
    pieces = re.split(r"\{([^{}]*)\}", flags)  # text, choices, text, choices, ..., text
    options = [piece.split(",") for piece in pieces[1::2]]
    for chosen in itertools.product(*options):
        texts = list(pieces)
        texts[1::2] = chosen
        yield chosen, "".join(texts)


def check(run, where, Settings):
    """Raise UserError where the flags are wrong, or a finished run was made with others."""
    try:
        given = parse_settings(Settings, "", run.flags)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    ours = given.keys() & {"out", "resume", "dry_run"}
    if ours:
        raise UserError(f"{where}: --{' --'.join(ours)}: the grid gives it")
    path = run.out / "config.json"
    if path.exists():
        saved = read_run_config(run.out)["settings"]
    elif run.known:
        path = f"the record of {run.name}"
        saved = run.known[1]
    else:
        return
    for name, value in given.items():
        found = saved.get(name)
        same = found in (value, without_paths(value))
        if isinstance(found, str):
            same = same or os.path.expandvars(found) == value  # a record has names of variables
        if not same and name not in NOT_RECORDED:
            raise UserError(f"{where}: {path} has {name} {found}, the line {value}; move it")


def finished(run):
    return run.known is not None or (run.out / "result.json").exists()


# ---------- the runs ------------------------------------------------------------------------------


def make(runs, program_name, jobs, path, known):
    """Make those of `runs` that are not finished, some at a time; return the names of failed ones.

    The record is written after each of them, see `record`. SIGTERM and SIGHUP act as Ctrl-C here:
    they stop the runs after their step, with a checkpoint.
    """
    waiting = [run for run in runs if not finished(run)]
    working = {}  # {process: run}
    failed = []
    numbers = {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}
    before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    try:
        with live("grid", len(waiting)) as bar:
            while waiting or working:
                while waiting and len(working) < jobs:
                    run = waiting.pop(0)
                    working[start(run, program_name)] = run
                time.sleep(0.2)
                for process in [p for p in working if p.poll() is not None]:
                    run = working.pop(process)
                    bar.update()
                    if process.returncode == 0 and finished(run):
                        tell(f"done: {last_line(run)}")
                    else:
                        failed.append(run.name)
                        tell(f"failed: {run.name}: {last_line(run)}")
                    record(runs, failed, path, known)
    finally:
        for process in working:
            process.send_signal(signal.SIGTERM)
        for process in working:
            process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
    return failed


def start(run, program_name):
    """Start a run, or resume it, on one core, in a process of its own, which no Ctrl-C reaches."""
    command = [sys.executable, "-m", program_name, "--out", str(run.out)]
    command += ["--resume"] if (run.out / "config.json").exists() else run.flags
    places = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    here = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, places))}
    with open(run.log, "a", encoding="utf-8") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | here,
            start_new_session=True,
        )


def last_line(run):
    text = run.log.read_text(encoding="utf-8", errors="replace").strip()
    return text.splitlines()[-1] if text else "no output"


def record(runs, failed, path, known):
    """Write what was planned, done and failed, and the results; return the core-hours.

    `known` is what the record held before. All of it stays, whatever lines the grid now has.
    """
    found = known | {run.name: read_run(run.out) for run in runs if finished(run) and not run.known}
    seconds = sum(result["train_seconds"] for result, _ in found.values())
    hours = round(seconds / 3600, 3)
    planned = len(found.keys() | {run.name for run in runs})
    state = {"planned": planned, "done": len(found), "failed": failed, "core_hours": hours}
    write_record(path, state, found)
    return hours


# ---------- the command line ----------------------------------------------------------------------


def parse(argv):
    parser = Parser(__doc__)
    parser.prog = "python -m tools.grid"
    add = parser.add_argument
    add("grid", metavar="GRID", help="the file")
    add("--out", metavar="DIR", required=True, help="folder of the runs")
    add("--record", metavar="FILE", help="the record; default DIR/grid.jsonl")
    cores = os.cpu_count() or 1
    add("--jobs", type=COUNT, default=cores, help=f"runs side by side; default {cores}, the cores")
    add("--hours", type=float, default=24.0, help="core-hours allowed; default 24")
    add("--program", default="train", help="module with flags as train has; default train")
    add("--dry-run", action="store_true", help="print the runs and stop")
    return parser.parse_args(argv)


def settings_of(name):
    """Return the class of the settings of a module such as train; UserError where it has none."""
    try:
        return importlib.import_module(name).Settings
    except (ImportError, AttributeError) as error:
        raise UserError(f"--program {name}: no module with Settings ({error})") from None


@program
def main(argv=None):
    args = parse(argv)
    folder = Path(args.out)
    path = Path(args.record or folder / "grid.jsonl")
    known = read_record(path) if path.exists() else {}
    runs = read_grid(args.grid, folder, known, settings_of(args.program))
    left = [run for run in runs if not finished(run)]
    hours = sum(run.minutes for run in left) / 60
    tell(
        f"{len(runs)} runs, {len(runs) - len(left)} of them finished; planned for the others: "
        f"{hours:.2f} core-hours, {hours / args.jobs:.2f} hours with {args.jobs} at a time"
    )
    if args.dry_run:
        for run in runs:
            state = "finished" if finished(run) else f"{run.minutes:g} min"
            tell(f"{run.name}  {state}  {shlex.join(run.flags)}")
        return
    if not (hours <= args.hours):
        raise UserError(f"--hours {args.hours:g}: the plan has more; nothing was started")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "grid.lock", "ab") as file:
        if lock(file) == "taken":
            raise UserError(f"--out {folder}: another grid works there")
        failed = []
        try:
            failed = make(runs, args.program, args.jobs, path, known)
        finally:
            hours = record(runs, failed, path, known)
            done = sum(finished(run) for run in runs)
            tell(f"{done} of {len(runs)} runs are done, in {hours:.2f} core-hours")
    if failed:
        raise UserError(f"{len(failed)} runs failed: {' '.join(failed)}; their .log says why")


if __name__ == "__main__":
    sys.exit(main())
