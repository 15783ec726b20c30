"""Reports over finished runs: tables, pictures, a comparison, and the metrics at other densities.

    python -m tools.report runs/*                      one Markdown table over all runs
    python -m tools.report runs/* --pivot              a row per method, a column per density
    python -m tools.report runs/* --curve CURVE.png    metric against density, a line per method
    python -m tools.report runs/* --curve CURVE.png --against weights
                                                       metric against the number of weights kept
    python -m tools.report runs/* --first 'stsb-smp-s-*' --second 'stsb-smp-l-*'
                                                       is one method better than another?
    python -m tools.report RUN --plot RUN.png          densities and training curves, as a picture
    python -m tools.report RUN --plot RUN.png --best   the same with the densities of the best model
    python -m tools.report RUN --density 0.2 0.1 0.05  dev metrics at other densities

Runs are run folders, folders of runs, and records of tools.grid. Names of runs have * for any text.
--against weights reads config.json of the models. A record names a model by a variable of the
environment, such as $BERT.

--first and --second compare pairs of runs of one model, task, density and seed. A dense run is a
pair with the runs of every density. The metric is the first one of the task, on dev at the last
step, in percent. docs/usage.md says on what the interval rests.

`python eval.py RUN` reports the metrics, densities and sizes of one run.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so it runs from any folder

from support.terminal import Parser, UserError, program  # first: it says "loading torch"

import itertools
import json
import math
import os
from dataclasses import fields
from fnmatch import fnmatchcase
from types import SimpleNamespace

import numpy as np
import torch

from data import kind_of, load_dev
from eval import evaluate
from models.checkpoint import load_model, model_sha256, read_config
from models.runs import before_masks, load_run, read_run_config, source_of
from prune import METHODS
from support.fetch import find_model
from support.machine import DEVICES, pick_device
from support.patterns import check_density
from support.terminal import NO_SHARES, POSITIVE_SHARE, as_flag, as_shown, show, tell, warn
from tools import pictures
from tools.deploy import count_weights
from tools.record import NOT_RECORDED, read_record, read_run
from train import Settings

# ---------- a table over runs ---------------------------------------------------------------------

HEADER = """\
| task | method | density | achieved | seeds | epochs | last step | best on dev | minutes |
|---|---|---|---|---|---|---|---|---|"""

# Runs that differ only in these settings share a row.
NOT_COMPARED = {"seed", *NOT_RECORDED}


def variant(settings):
    """Return what the table adds to the name of a method.

    Runs that differ in it never share a row.
    """
    teacher = settings["teacher"]
    if teacher in (None, "none"):
        text = ""
    elif teacher == "self":
        text = " + self"
    elif teacher.startswith("self:"):
        text = " + dense, then self"
    else:
        text = " + teacher"
    if settings["regression"] == "logit":
        text += " (logit)"
    if settings["method"] == "pins" and settings.get("pins_score") == "signed":
        text += " (signed)"
    if settings.get("from_run"):
        text += " from a run"
    pattern = settings.get("pattern", "weight")
    if pattern != "weight":
        text += f" ({pattern})"
    return text


def expand(folders):
    """Return the run folders among `folders` and, where one only holds runs, those inside it.

    Each counts once, however often it is named.
    """
    runs = {}
    for folder in map(Path, folders):
        inside = []
        if not (folder / "metrics.jsonl").exists():
            inside = sorted(path.parent for path in folder.glob("*/metrics.jsonl"))
        for run in inside or [folder]:
            runs.setdefault(run.resolve(), run)
    return list(runs.values())


def finished(runs, patterns=None):
    """Return (result, settings) of each finished run; name the others on stderr.

    `runs` are folders, and records of runs. With `patterns`, such as "stsb-*", only the runs whose
    name fits one of them are returned.
    """
    found = []
    named = expand(runs)
    folders = {run.resolve() for run in named}
    for run in named:
        try:
            if run.is_file():  # a record; it may lie beside folders that are named, too
                rows = read_record(run.resolve())
                beside = [name for name in rows if run.resolve().with_name(name) in folders]
                found += [rows[name] for name in rows if name not in beside]
            else:
                found.append(read_run(run))
        except (UserError, OSError) as error:
            tell(f"left out: {error}", sys.stderr)
    if patterns:
        found = [(result, settings) for result, settings in found if fits(settings, patterns)]
    if not found:
        raise UserError("no finished run among these folders")
    return found


def fits(settings, patterns):
    """Is the name of a run, which is that of its folder, one of `patterns`?"""
    name = Path(settings.get("out") or "").name
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def compared(settings):
    """Return {name: value} of the settings by which runs are told apart.

    What a run of an older version does not say has the default.
    """
    whole = {f.name: f.default for f in fields(Settings)} | settings
    return {name: value for name, value in whole.items() if name not in NOT_COMPARED}


def grouped(found):
    """Return (text that is added to the method, results) for each row, in the table's order."""
    groups = {}
    for result, settings in found:
        values = compared(settings)
        added = variant(settings)
        values["teacher"] = added  # each seed may have a teacher of its own
        method = result["method"]
        order = (result["task"], method != "dense", method, -(result.get("density") or 0.0))
        key = (order, added, json.dumps(values, sort_keys=True))
        groups.setdefault(key, []).append(result | {"seed": settings.get("seed", 0)})
    return [(key[1], groups[key]) for key in sorted(groups)]


def cell(rows):
    """Return the mean of each metric over `rows` {metric: value}, in percent; ± is over seeds."""
    texts = []
    for name in rows[0]:
        values = [as_shown(name, row[name]) for row in rows if name in row]
        texts.append(f"{name} {mean_of(values, 3 if name in NO_SHARES else 1)}")
    return ", ".join(texts)


def table(found):
    """Print a Markdown table of runs; those that differ only in their seed make one row."""
    rows = grouped(found)
    print(HEADER)
    for added, results in rows:
        first = results[0]
        seeds = {result["seed"] for result in results}
        if len(seeds) < len(results):
            told = f"{first['task']}, {first['method']}{added}: {len(results)} runs share a row"
            warn(f"{told}, but have {len(seeds)} seeds; choose some with --only")
        if first.get("density"):
            asked = f"{first['density']:g}"
        else:
            asked = "as found" if first["method"] == "fixed" else "by lambda"
        achieved = np.mean([result["achieved_density"] for result in results])
        last_step = cell([result["metrics"] for result in results])
        best = cell([result["best"]["metrics"] for result in results])
        minutes = np.mean([result["train_seconds"] for result in results]) / 60
        print(
            f"| {first['task']} | {first['method']}{added} | {asked} | {achieved:.4f} | "
            f"{len(results)} | {first['epochs']:g} | {last_step} | {best} | {minutes:.1f} |"
        )


def pivot(found):
    """Print the first metric at the last step: a row per task and method, a column per density.

    Runs that differ in more than seed and density have rows of their own.
    """
    lines = densities_of_lines(found)
    columns = sorted({density for points in lines.values() for density in points}, reverse=True)
    print("| task | method | " + " | ".join(f"{density:g}" for density in columns) + " |")
    print("|---" * (2 + len(columns)) + "|")
    for task, label in sorted(lines, key=lambda line: (line[0], line[1] != "dense", line[1])):
        points = lines[task, label]
        cells = [mean_of(points.get(density, [])) for density in columns]
        print(f"| {task} | {label} | {' | '.join(cells)} |")


def mean_of(values, digits=1):
    """Return the mean over seeds as text, with its standard deviation; nothing of no value."""
    if not values:
        return ""
    text = f"{np.mean(values):.{digits}f}"
    return f"{text} ± {pictures.spread(values):.{digits}f}" if len(values) > 1 else text


def densities_of_lines(found, sizes=None):
    """Return {(task, label): {density: [the metric of each seed, in percent]}}.

    A label is the method with what `variant` adds. Runs of one label make one line, although a
    recipe may differ by density. Where two of them have the same density, the label has the
    settings in which they differ, too, but for the seed. Where no density was asked for, the
    achieved one stands in its place, with two digits.

    With `sizes`, {model: number of its weights}, the number of weights that are not zero stands in
    place of each density, with two digits. The label then begins with the model.
    """
    runs = {}  # {(task, label): [(settings, (density, seed), value)]}
    for result, settings in found:
        own = compared(settings) | {"density": None, "teacher": None}  # these may differ
        label = f"{result['method']}{variant(settings)}"
        density = result["density"] or float(f"{result['achieved_density']:.2g}")
        if sizes:
            model = settings["model"]
            label = f"{Path(model).name.removeprefix('$')} {label}"
            density = float(f"{result['achieved_density'] * sizes[model]:.2g}")
        value = 100 * next(iter(result["metrics"].values()))
        run = (own, (density, settings.get("seed", 0)), value)
        runs.setdefault((result["task"], label), []).append(run)
    lines = {}
    for (task, label), members in runs.items():
        differing = differing_settings(members)
        for own, point, value in members:
            flags = [f"{as_flag(name)} {short(own.get(name))}" for name in differing]
            line = lines.setdefault((task, " ".join([label, *flags])), {})
            if point in line:
                told = f"two runs of {label} on {task} have density and seed {point}"
                raise UserError(f"{told}, and equal settings; choose one with --only")
            line[point] = value
    return {name: by_density(lines[name]) for name in sorted(lines)}


def encoder_sizes(found):
    """Return {model: the number of weights in the matrices of its encoder} for finished runs.

    Raises UserError where a model is not at hand.
    """
    sizes = {}
    for model in {settings["model"] for _, settings in found}:
        path = os.path.expandvars(model)
        if "$" in path:
            advice = "let the variable name the folder of the model"
            raise UserError(f"--against weights: {model} is not set; {advice}")
        Model, config = read_config(find_model(path))
        with torch.device("meta"):  # only shapes
            sizes[model] = count_weights(Model(config, "classifier", 1))
    return sizes


def short(value):
    return f"{value:g}" if isinstance(value, float) else str(value)


def differing_settings(members):
    """Return the names of settings in which runs of the same density differ, sorted.

    `from_run` may differ between seeds, because each may begin with a run of its own.
    """
    differing = set()
    for (one, point, _), (other, other_point, _) in itertools.combinations(members, 2):
        if point[0] == other_point[0]:
            names = {name for name in one | other if one.get(name) != other.get(name)}
            differing |= names if point == other_point else names - {"from_run"}
    return sorted(differing)


def by_density(line):
    """Turn {(density, seed): value} into {density: [values]}."""
    points = {}
    for (density, _), value in sorted(line.items()):
        points.setdefault(density, []).append(value)
    return points


# ---------- is one method better than another? ----------------------------------------------------

DENSE = 1.0  # the density of a dense run

# The 97.5% quantiles of Student's t distribution, by degrees of freedom
T975 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}
T975 |= {10: 2.23, 12: 2.18, 14: 2.14, 16: 2.12, 20: 2.09, 30: 2.04, 60: 2.00}


def metrics_of(found):
    """Return {(model, task, density, seed): metric in percent}; density None: none was asked for.

    Raises UserError where two runs have the same key: which of them to take is not known.
    """
    values = {}
    names = {}
    for result, settings in found:
        model = str(settings.get("model"))
        key = (model, result["task"], result["density"], settings.get("seed", 0))
        name = settings.get("out")
        text = f"{names.get(key)} and {name} have the same model, task, density and seed"
        if key in names:
            raise UserError(f"{text}: give names that only one of them fits")
        names[key] = name
        values[key] = 100 * next(iter(result["metrics"].values()))
    return values


def pairs(first, second):
    """Return {(model, task, density): [(first, second), ...]} of two results of `metrics_of`."""
    cells = {}
    for key in sorted(first.keys() | second.keys(), key=str):
        model, task, density, seed = key
        dense = (model, task, DENSE, seed)
        one = first.get(key, first.get(dense))
        other = second.get(key, second.get(dense))
        if one is not None and other is not None:
            cells.setdefault((model, task, density), []).append((one, other))
    return cells


def interval(cells):
    """Return (mean, half the width of the 95% interval) of differences; None: one pair tells none.

    `cells` is a list of lists of differences, one list per cell.
    """
    means = [np.mean(cell) for cell in cells]
    mean = float(np.mean(means))
    freedom = sum(len(cell) - 1 for cell in cells)
    if freedom:  # the variance between the seeds of a cell, pooled over the cells
        squares = sum(np.square(cell - np.mean(cell)).sum() for cell in cells)
        variance = squares / freedom
        error = math.sqrt(sum(variance / len(cell) for cell in cells)) / len(cells)
    elif len(cells) > 1:
        freedom = len(cells) - 1
        error = np.std(means, ddof=1) / math.sqrt(len(cells))
    else:
        return mean, None
    quantile = T975[max(known for known in T975 if known <= freedom)]
    return mean, float(quantile * error)


def verdict(mean, half):
    if half is None:
        return "one pair tells nothing"
    if mean - half > 0:
        return "the first is above the second"
    if mean + half < 0:
        return "the first is below the second"
    return "cannot be told apart"


def compare(first, second, densities=None):
    """Print a row per cell, and the mean over the cells of each task and over all cells.

    `first` and `second` are from `metrics_of`. With `densities`, only their cells count.
    """
    cells = pairs(first, second)
    if densities:
        cells = {cell: values for cell, values in cells.items() if cell[2] in densities}
    if not cells:
        raise UserError("no pair: no two runs have the same model, task, density and seed")
    print("| model | task | density | pairs | first | second | difference |")
    print("|---|---|---|---|---|---|---|")
    by_task = {}
    for (model, task, density), values in sorted(cells.items(), key=from_dense_to_sparse):
        first, second = np.array(values).T  # (pairs, 2) -> 2 x (pairs,)
        model = Path(model).name
        by_task.setdefault((model, task), []).append(first - second)
        text = f"{np.mean(first - second):+.1f}"
        if len(values) > 1:
            text += f" ± {pictures.spread(first - second):.1f}"
        kept = "none asked" if density is None else f"{density:g}"
        print(
            f"| {model} | {task} | {kept} | {len(values)} | {np.mean(first):.1f} "
            f"| {np.mean(second):.1f} | {text} |"
        )
    if len(by_task) > 1:
        for (model, task), differences in by_task.items():
            print(f"\n{model}, {task}: {summary(differences)}")
    print(f"\nall: {summary(list(itertools.chain(*by_task.values())))}")


def summary(differences):
    """Return one line about differences, a list with an array for each cell."""
    mean, half = interval(differences)
    width = "" if half is None else f", 95% interval {mean - half:+.1f} to {mean + half:+.1f}"
    pairs = sum(map(len, differences))
    above = sum(np.mean(cell) > 0 for cell in differences)
    counts = f"{pairs} pairs, cells: {len(differences)}, of them above 0: {above}"
    return f"mean {mean:+.1f}{width}: {verdict(mean, half)} ({counts})"


def from_dense_to_sparse(item):
    """Sort cells by model and task, and from dense to sparse."""
    (model, task, density), _ = item
    return model, task, -(density or 1)


# ---------- other densities -----------------------------------------------------------------------


@torch.no_grad()
def sweep(run, densities, device, data_dir, base=None):
    """Print the metrics on dev at other densities. `base` is the base model, if it has moved.

    The run's scores are ranked anew, and nothing is trained.
    Raises UserError where the method keeps no largest scores, where a density would keep nothing
    of a matrix, and where the base model has changed.
    """
    model, method, task, tokenizer = with_method(run, device, base)
    settings = method.settings
    dtype = read_run_config(run)["dtype"]
    dev_sets = load_dev(task, tokenizer, settings.max_length, data_dir)
    for density in densities:
        settings.density = density
        try:
            check_density(method)
        except ValueError as error:
            raise UserError(f"--density: {error}") from None
        method.update(1)  # step 1 of 1: the density is the final one
        metrics = show(evaluate(model, dev_sets, device, dtype))
        print(f"density {density:g}, achieved {method.achieved():.4f}: {metrics}", flush=True)


def with_method(run, device, base=None):
    """Return (model, method, task, tokenizer) of a run, with the weights and scores as trained.

    What a mask drops is there, too. Raises UserError as `sweep` does.
    """
    baked, task, tokenizer, s = load_run(run)
    config = read_run_config(run)
    Method = METHODS.get(s["method"])
    if Method is None or not Method.top_k:
        advice = "those of smp, movement and magnitude can"
        raise UserError(f"--density: a {s['method']} run cannot be ranked again; {advice}")
    source = find_model(base) if base else source_of(SimpleNamespace(**s), run)
    if model_sha256(source) != config["model_sha256"]:
        raise UserError(f"--density: {s['model']} is no longer the model that {run} began with")
    kind = kind_of(task)
    head = (kind.own_head or Method.output_head, config["outputs"], config["words"])
    model = load_model(source, *head, s["seed"], form=kind.form, labels=kind.outputs)
    model.to(device)
    method = Method(model, SimpleNamespace(**s), total_steps=1)
    tensors = before_masks(baked, Path(run) / "checkpoint.safetensors", model)
    for name, parameter in model.named_parameters():
        if name in tensors:
            parameter.copy_(tensors[name])
    return model, method, task, tokenizer


# ---------- the command line ----------------------------------------------------------------------


def parse(argv):
    parser = Parser(__doc__)
    parser.prog = "python -m tools.report"
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="run folder of train.py, or record of tools.grid")
    add("--only", nargs="+", metavar="NAME", help="runs of these names, as 'stsb-*'")
    text = "evaluate at other densities; with --first: compare at these alone"
    add("--density", metavar="V", type=POSITIVE_SHARE, nargs="+", help=text)
    add("--pivot", action="store_true", help="a row per method, a column per density")
    add("--curve", metavar="FILE", help="draw the metric of the runs against density (PNG, ...)")
    text = "what --curve draws the metric against; default density"
    add("--against", choices=("density", "weights"), default="density", help=text)
    add("--first", nargs="+", metavar="NAME", help="compare the runs of these names ...")
    add("--second", nargs="+", metavar="NAME", help="... with those of these")
    add("--plot", metavar="FILE", help="draw densities and training curves (PNG, PDF, SVG)")
    add("--best", action="store_true", help="--plot: the best checkpoint on dev, not the last step")
    add("--model", help="with --density: the base model, if it has moved")
    add("--data-dir", metavar="DIR", default="data", help="folder of the data; default data")
    add("--device", default="auto", choices=DEVICES)
    args = parser.parse_args(argv)
    names = ("pivot", "curve", "first", "plot", "density")
    given = [as_flag(name) for name in names if getattr(args, name)]
    if len(given) > 1 and given != ["--first", "--density"]:
        raise UserError(f"{' and '.join(given)}: give one of them")
    if bool(args.first) != bool(args.second):
        raise UserError("--first and --second: give both")
    one_run = args.plot or (args.density and not args.first)
    if one_run and len(args.runs) > 1:
        raise UserError("--plot and --density take one run")
    if args.against != "density" and not args.curve:
        raise UserError("--against: only with --curve")
    if args.best and not args.plot:
        raise UserError("--best: only with --plot")
    if args.only and (one_run or args.first):
        raise UserError("--only: chooses among several runs")
    return args


@program
def main(argv=None):
    args = parse(argv)
    device = pick_device(args.device)
    if args.first:
        found = [metrics_of(finished(args.runs, names)) for names in (args.first, args.second)]
        compare(*found, args.density)
    elif args.density:
        sweep(args.runs[0], args.density, device, args.data_dir, args.model)
    elif args.plot:
        pictures.plot(args.runs[0], "best" if args.best else "model", Path(args.plot))
    elif args.pivot:
        pivot(finished(args.runs, args.only))
    elif args.curve:
        found = finished(args.runs, args.only)
        metrics = {result["task"]: next(iter(result["metrics"])) for result, _ in found}
        sizes = encoder_sizes(found) if args.against == "weights" else None
        lines = densities_of_lines(found, sizes)
        pictures.curve(lines, metrics, Path(args.curve), args.against)
    else:
        table(finished(args.runs, args.only))


if __name__ == "__main__":
    sys.exit(main())
