"""A record of runs: what tables and pictures need of many runs, in one small file.

Run folders are large, and they stay on the machine that made them. A record can be committed. It
is a JSONL file. The first line says how a grid stands, and which settings all its runs share. Each
further line is a run: its name, its other settings, and its result.
"""

import json
import os
from pathlib import Path

from models.runs import read_run_config
from support.files import atomic_write, read_json
from support.terminal import UserError

# What a table needs of the two files of a run.
RESULT = dict.fromkeys(("task", "method"), str) | {"density": (int, float, type(None))}
RESULT |= {"achieved_density": float, "metrics": dict, "best": dict}
RESULT |= dict.fromkeys(("epochs", "train_seconds"), (int, float))
SETTINGS = {"model": str, "method": str, "teacher": (str, type(None)), "regression": str}
NOT_RECORDED = ("out", "data_dir", "device", "resume", "log_every")  # they change no result


def read_run(run):
    """Return (result, settings) of a run folder; UserError where it is not finished, or damaged."""
    run = Path(run)
    path = run / "result.json"
    if not path.exists():
        raise UserError(f"{run}: no result.json; a run that is not finished, or none")
    result = read_json(path)
    config = read_run_config(run)
    settings = config["settings"] | {"out": str(run.resolve())}  # also where it has moved
    if "dtype" in config:
        settings["dtype"] = config["dtype"]  # what "auto" was on that machine
    check(path, result, run / "config.json", settings)
    return result, settings


def check(path, result, place, settings):
    """Raise UserError unless a result and the settings, of two files, have what tables need."""
    check_values(path, result, RESULT)
    check_values(path, result["best"], {"metrics": dict})
    check_values(place, settings, SETTINGS)
    for metrics in (result["metrics"], result["best"]["metrics"]):
        numbers = [isinstance(value, (int, float)) for value in metrics.values()]
        if not metrics or not all(numbers):
            raise UserError(f"{path}: metrics are {metrics}, expected numbers")


def check_values(path, found, types):
    """Raise UserError unless `found` has each name of `types`, with a value of its type."""
    for name, expected in types.items():
        if name not in found or not isinstance(found[name], expected):
            raise UserError(f"{path}: {name} is missing, or not of the type that it should have")


def read_record(path):
    """Return {name: (result, settings)} of a record; UserError names the line that is wrong."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable record ({error})") from None
    common = {}
    runs = {}
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        row = parse(line, where)
        if number == 1:
            common = row.get("common")
            if not isinstance(common, dict):
                raise UserError(f"{where}: no common settings; not a record of runs")
            continue
        parts = [row.get("run"), row.get("settings"), row.get("result")]
        if [type(part) for part in parts] != [str, dict, dict]:
            raise UserError(f"{where}: expected a run, its settings and its result")
        name, own, result = parts
        settings = common | own | {"out": name}
        check(where, result, where, settings)
        runs[name] = (result, settings)
    if not lines:
        raise UserError(f"{path}: empty; not a record of runs")
    return runs


def parse(line, where):
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a JSON object")
    return row


def write_record(path, state, runs):
    """Write {name: (result, settings)}, and the dict `state` of the grid, as a record."""
    kept = {name: portable(settings) for name, (_, settings) in runs.items()}
    common = shared(list(kept.values()))
    lines = [state | {"common": common}]
    for name, (result, _) in runs.items():
        own = {key: value for key, value in kept[name].items() if key not in common}
        result = {key: result[key] for key in RESULT}
        lines.append({"run": name, "settings": own, "result": result})
    atomic_write(path, "".join(json.dumps(line) + "\n" for line in lines))


def portable(settings):
    """Return the settings that matter, without a path of this machine."""
    kept = {key: value for key, value in settings.items() if key not in NOT_RECORDED}
    return {key: without_paths(value) for key, value in kept.items()}


def without_paths(value):
    """Return a setting with $NAME in place of a folder that an environment variable holds.

    Of another absolute path only the last name stays. A value may have "self:" before its path.
    """
    if not isinstance(value, str) or "/" not in value:
        return value
    before, colon, path = value.rpartition(":")
    if not os.path.isabs(path):
        return value  # an id of the hub, or a folder below the working directory
    variables = {name: folder for name, folder in os.environ.items() if not name.endswith("PWD")}
    for name, folder in sorted(variables.items(), key=lambda item: -len(item[1])):  # longest first
        below = f"{path}/".startswith(folder.rstrip("/") + "/")
        if below and folder.count("/") > 1:  # not the root, and not /tmp
            return f"{before}{colon}${name}{path.removeprefix(folder.rstrip('/'))}"
    return f"{before}{colon}{os.path.basename(path)}"


def shared(rows):
    """Return the settings that have one value in all of `rows`."""
    common = dict(rows[0]) if rows else {}
    for row in rows:
        common = {key: value for key, value in common.items() if key in row and row[key] == value}
    return common
