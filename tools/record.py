"""A record of runs: what tables and pictures need of many runs, in one small file.

Run folders are large, and they stay on the machine that made them. A record can be committed. It
is a JSONL file. The first line says how a grid stands, and which settings all its runs share. Each
further line is a run: its name, its other settings, and its result.
"""

import json
import os
from pathlib import Path

from tools.common import UserError, atomic_write, read_json, require

# What a table needs of the two files of a run.
RESULT = {
    "task": str,
    "method": str,
    "density": (int, float, type(None)),
    "achieved_density": float,
    "metrics": dict,
    "best": dict,
    "epochs": (int, float),
    "train_seconds": (int, float),
}
SETTINGS = {"method": str, "teacher": (str, type(None)), "regression": str}
NOT_RECORDED = ("out", "data_dir", "device", "resume", "log_every")  # they change no result


def read_run(run):
    """Return (result, settings) of a run folder; UserError where it is not finished, or damaged."""
    run = Path(run)
    path = run / "result.json"
    require(path.exists(), f"{run}: no result.json; a run that is not finished, or none")
    result = read_json(path)
    config = read_json(run / "config.json")
    settings = config.get("settings")
    require(isinstance(settings, dict), f"{run}/config.json: no settings")
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
        numbers = all(isinstance(value, (int, float)) for value in metrics.values())
        require(metrics and numbers, f"{path}: metrics are {metrics}, expected numbers")


def check_values(path, found, types):
    """Raise UserError unless `found` has each name of `types`, with a value of its type."""
    for name, kind in types.items():
        valid = name in found and isinstance(found[name], kind)
        require(valid, f"{path}: {name} is missing, or not of the kind that train.py writes")


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
            require(isinstance(common, dict), f"{where}: no common settings; not a record of runs")
            continue
        parts = [row.get("run"), row.get("settings"), row.get("result")]
        right = [type(part) for part in parts] == [str, dict, dict]
        require(right, f"{where}: expected a run, its settings and its result")
        name, own, result = parts
        settings = common | own | {"out": name}
        check(where, result, where, settings)
        runs[name] = (result, settings)
    require(lines, f"{path}: empty; not a record of runs")
    return runs


def parse(line, where):
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    require(isinstance(row, dict), f"{where}: not a JSON object")
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
    """Return the settings that matter, with $NAME in place of a path that a variable holds."""
    names = {value: f"${name}" for name, value in sorted(os.environ.items()) if "/" in value}
    kept = {key: value for key, value in settings.items() if key not in NOT_RECORDED}
    return {key: names.get(value, value) for key, value in kept.items()}


def shared(rows):
    """Return the settings that have one value in all of `rows`."""
    first = rows[0] if rows else {}
    return {key: value for key, value in first.items() if all(has(row, key, value) for row in rows)}


def has(row, key, value):
    return key in row and row[key] == value
