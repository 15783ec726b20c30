"""Is one method better than another? Differences over pairs of runs, with an interval.

    python -m tools.compare RUNS --first 'stsb-smp-s-*' --second 'stsb-smp-l-*'

RUNS are run folders, folders of runs, and records of tools.grid. --first and --second are names of
runs, with * for any text. Two runs are a pair if their model, task, density and seed are the same.
A dense run keeps everything (density 1), and is a pair with the runs of every density.

The metric is the first one of the task, on dev at the last step, in percent. A cell is a model, a
task and a density. The interval is that of the mean over the cells, at 95%. It rests on how the
differences vary between the seeds of a cell, which is taken to be the same in all cells. Where each
cell has one seed, it rests on how they vary between the cells. This makes it wide where a method
gains much in one cell and little in another, so the cells are counted, too. Runs of several tasks
have one line for each task, and one for all.
"""

import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the program at once
    print("loading torch", file=sys.stderr)  # this takes a second or two

import math
from itertools import chain
from pathlib import Path

import numpy as np

from tools.common import Parser, program, require
from tools.report import finished, spread

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
        require(key not in names, f"{text}: give names that only one of them fits")
        names[key] = name
        values[key] = 100 * next(iter(result["metrics"].values()))
    return values


def pairs(first, second):
    """Return {(model, task, density): [(first, second), ...]} of two results of `metrics_of`."""
    cells = {}
    for key in sorted(first, key=str):
        model, task, density, seed = key
        other = key if key in second else (model, task, DENSE, seed)
        if other in second:
            cells.setdefault((model, task, density), []).append((first[key], second[other]))
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


def show(cells):
    """Print a row per cell, and the mean over the cells of each task and over all cells."""
    print("| model | task | density | pairs | first | second | difference |")
    print("|---|---|---|---|---|---|---|")
    by_task = {}
    for (model, task, density), values in sorted(cells.items(), key=order):
        first, second = np.array(values).T  # (pairs, 2) -> 2 x (pairs,)
        model = Path(model).name
        by_task.setdefault((model, task), []).append(first - second)
        text = f"{np.mean(first - second):+.1f}"
        if len(values) > 1:
            text += f" ± {spread(first - second):.1f}"
        kept = "none asked" if density is None else f"{density:g}"
        print(
            f"| {model} | {task} | {kept} | {len(values)} | {np.mean(first):.1f} "
            f"| {np.mean(second):.1f} | {text} |"
        )
    if len(by_task) > 1:
        for (model, task), differences in by_task.items():
            print(f"\n{model}, {task}: {summary(differences)}")
    print(f"\nall: {summary(list(chain(*by_task.values())))}")


def summary(differences):
    """Return one line about differences, a list with an array for each cell."""
    mean, half = interval(differences)
    width = "" if half is None else f", 95% interval {mean - half:+.1f} to {mean + half:+.1f}"
    pairs = sum(map(len, differences))
    above = sum(np.mean(cell) > 0 for cell in differences)
    counts = f"{pairs} pairs, cells: {len(differences)}, of them above 0: {above}"
    return f"mean {mean:+.1f}{width}: {verdict(mean, half)} ({counts})"


def order(item):
    """Sort cells by model and task, and from dense to sparse."""
    (model, task, density), _ = item
    return model, task, -(density or 1)


@program
def main(argv=None):
    parser = Parser(__doc__)
    parser.prog = "python -m tools.compare"
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUNS", help="folders and records of runs")
    add("--first", nargs="+", metavar="NAME", required=True, help="runs of the first method")
    add("--second", nargs="+", metavar="NAME", required=True, help="runs of the second method")
    add("--density", nargs="+", type=float, metavar="V", help="only these densities")
    args = parser.parse_args(argv)
    first, second = [metrics_of(finished(args.runs, names)) for names in (args.first, args.second)]
    cells = pairs(first, second)
    if args.density:
        cells = {cell: values for cell, values in cells.items() if cell[2] in args.density}
    require(cells, "no pair: no two runs have the same model, task, density and seed")
    show(cells)


if __name__ == "__main__":
    sys.exit(main())
