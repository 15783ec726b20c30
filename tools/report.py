"""Reports over finished runs: a table, a picture, and the metrics at other densities.

    python -m tools.report runs/*                      one Markdown table over all runs
    python -m tools.report runs/* --pivot              a row per method, a column per density
    python -m tools.report runs/* --curve CURVE.png    metric against density, a line per method
    python -m tools.report RUN --plot RUN.png          densities and training curves, as a picture
    python -m tools.report RUN --plot RUN.png --best   the same with the densities of the best model
    python -m tools.report RUN --density 0.2 0.1 0.05  dev metrics at other densities

`python eval.py RUN` reports the metrics, densities and sizes of one run.
"""

import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the program at once
    print("loading torch", file=sys.stderr)  # this takes a second or two

import io
import itertools
import json
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from eval import evaluate, load_dev, load_run, show
from model import load_model, model_sha256
from prune import METHODS, encoder_matrices
from tools.common import Parser, UserError, as_flag, atomic_write, pick_device, program
from tools.common import read_json, read_safetensors, require, tell
from tools.fetch import find_model
from tools.record import NOT_RECORDED, read_record, read_run
from tools.sizes import kept_weights

# -------------------------------------------------------------------------------------------------
# a table over runs

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
    for run in expand(runs):
        try:
            found += read_record(run).values() if run.is_file() else [read_run(run)]
        except (UserError, OSError) as error:
            tell(f"left out: {error}", sys.stderr)
    if patterns:
        found = [(result, settings) for result, settings in found if fits(settings, patterns)]
    require(found, "no finished run among these folders")
    return found


def fits(settings, patterns):
    """Is the name of a run, which is that of its folder, one of `patterns`?"""
    name = Path(settings.get("out") or "").name
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def common_names(found):
    """Return {method: the names of the settings that all its runs have}.

    Runs of an older version have fewer settings.
    """
    names = {}
    for _, settings in found:
        method = settings["method"]
        names[method] = names.get(method, settings.keys()) & settings.keys()
    return names


def grouped(found):
    """Return (text that is added to the method, results) for each row, in the table's order."""
    names = common_names(found)
    groups = {}
    for result, settings in found:
        compared = names[settings["method"]] - NOT_COMPARED
        values = {name: settings[name] for name in compared}
        added = variant(settings)
        values["teacher"] = added  # each seed may have a teacher of its own
        method = result["method"]
        order = (result["task"], method != "dense", method, -(result.get("density") or 0.0))
        key = (order, added, json.dumps(values, sort_keys=True))
        groups.setdefault(key, []).append(result)
    return [(key[1], groups[key]) for key in sorted(groups)]


def cell(rows):
    """Return the mean of each metric over `rows` {metric: value}, in percent; ± is over seeds."""
    texts = []
    for name in rows[0]:
        values = [100 * row[name] for row in rows if name in row]
        texts.append(f"{name} {mean_of(values)}")
    return ", ".join(texts)


def table(found):
    """Print a Markdown table of runs; those that differ only in their seed make one row."""
    rows = grouped(found)
    print(HEADER)
    for added, results in rows:
        first = results[0]
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


def mean_of(values):
    """Return the mean over seeds as text, with its standard deviation; nothing of no value."""
    if not values:
        return ""
    text = f"{np.mean(values):.1f}"
    return f"{text} ± {spread(values):.1f}" if len(values) > 1 else text


# -------------------------------------------------------------------------------------------------
# pictures


def new_figure(path, flag, size):
    """Return (an empty figure, the path); a path without an ending gets .png.

    Raises UserError where matplotlib is not installed, or cannot write such a file.
    """
    try:
        from matplotlib.figure import Figure  # pyplot would want a display, and keeps a state
    except ImportError:
        advice = "which is not installed: pip install matplotlib"
        raise UserError(f"{flag} draws with matplotlib, {advice}") from None
    require(path.name, f"{flag} {path}: expected the name of a file")
    if not path.suffix:
        path = path.with_name(f"{path.name}.png")
    figure = Figure(figsize=size, layout="constrained")
    kinds = figure.canvas.get_supported_filetypes()
    known = path.suffix[1:].lower() in kinds
    require(known, f"{flag} {path}: the ending is none of {', '.join(sorted(kinds))}")
    return figure, path


def save_figure(figure, path):
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix[1:].lower(), dpi=150)
    atomic_write(path, picture.getvalue())


def curve(found, path):
    """Draw the first metric at the last step against density: a panel a task, a line a method.

    A line is the mean over seeds, and its band one standard deviation each way. Dense runs are a
    dashed line. Runs that differ in more than seed and density have lines of their own.
    """
    lines = densities_of_lines(found)
    metrics = {result["task"]: next(iter(result["metrics"])) for result, _ in found}
    figure, path = new_figure(path, "--curve", size=(6.5 * len(metrics), 4.2))
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    labels = sorted({label for _, label in lines})
    for panel, task in zip(panels, sorted(metrics)):
        here = {label: points for (t, label), points in lines.items() if t == task}
        draw_panel(panel, here, labels)
        panel.set(title=task, xlabel="density", ylabel=f"{metrics[task]} on dev, percent")
    save_figure(figure, path)
    print(f"{path}: {len(lines)} lines, {len(metrics)} tasks")


def densities_of_lines(found):
    """Return {(task, label): {density: [the metric of each seed, in percent]}}.

    A label is the method with what `variant` adds. Runs of one label make one line, although a
    recipe may differ by density. Where two of them have the same density and seed, the label has
    the settings in which they differ, too. Where no density was asked for, the achieved one stands
    in its place, with two digits.
    """
    names = common_names(found)
    runs = {}  # {(task, label): [(settings, (density, seed), value)]}
    for result, settings in found:
        compared = names[settings["method"]] - NOT_COMPARED - {"density", "teacher"}
        own = {name: settings[name] for name in sorted(compared)}
        label = f"{result['method']}{variant(settings)}"
        density = result["density"] or float(f"{result['achieved_density']:.2g}")
        value = 100 * next(iter(result["metrics"].values()))
        run = (own, (density, settings.get("seed", 0)), value)
        runs.setdefault((result["task"], label), []).append(run)
    lines = {}
    for (task, label), members in runs.items():
        differing = differing_settings(members)
        for own, point, value in members:
            flags = [f"{as_flag(name)} {short(own[name])}" for name in differing]
            line = lines.setdefault((task, " ".join([label, *flags])), {})
            line[point] = value
    return {name: by_density(lines[name]) for name in sorted(lines)}


def short(value):
    return f"{value:g}" if isinstance(value, float) else str(value)


def differing_settings(members):
    """Return the names of settings in which runs of the same density and seed differ, sorted."""
    differing = set()
    for (one, point, _), (other, other_point, _) in itertools.combinations(members, 2):
        if point == other_point:
            differing |= {name for name in one if one[name] != other[name]}
    return sorted(differing)


def by_density(line):
    """Turn {(density, seed): value} into {density: [values]}."""
    points = {}
    for (density, _), value in sorted(line.items()):
        points.setdefault(density, []).append(value)
    return points


def spread(values):
    """Return the standard deviation over seeds; 0 of a single one."""
    return np.std(values, ddof=1) if len(values) > 1 else 0.0


def draw_panel(axes, lines, labels):
    """Draw the lines {label: {density: values}} of a task. `labels` are those of all tasks.

    A label has the same colour in each panel.
    """
    for label, points in lines.items():
        i = labels.index(label)
        color = f"C{i % 10}"
        style = ("o-", "s--", "^:")[i // 10 % 3]  # there are ten colours
        densities = sorted(points)
        means = np.array([np.mean(points[density]) for density in densities])
        spreads = np.array([spread(points[density]) for density in densities])
        if label.startswith("dense"):
            axes.axhline(means[-1], color="black", linestyle="--", label=label)
            axes.axhspan(*(means[-1] + spreads[-1] * np.array([-1, 1])), color="black", alpha=0.1)
            continue
        axes.plot(densities, means, style, color=color, label=label)
        axes.fill_between(densities, means - spreads, means + spreads, color=color, alpha=0.2)
    shown = sorted({density for points in lines.values() for density in points if density < 1})
    axes.set_xscale("log")
    axes.set_xticks(shown, [f"{density:g}" for density in shown])
    axes.minorticks_off()
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))


# -------------------------------------------------------------------------------------------------
# a picture of a run


def head_densities(model):
    """Return the fraction of non-zero weights in each attention head, as saved: (L, H).

    A head is its rows of Q, K and V and its columns of O.
    """
    matrices = encoder_matrices(model)
    densities = []
    for i in range(len(model.layers)):
        q, k, v, o = [matrices[letter][i].weight != 0 for letter in "QKVO"]
        kept = torch.stack([q, k, v, o.T])  # (4, C, C)
        kept = kept.unflatten(1, (model.num_heads, -1))  # (4, C, C) -> (4, H, D, C)
        densities.append(kept.float().mean((0, 2, 3)))  # (H,)
    return torch.stack(densities).numpy()


def plot(run, which, path):
    """Draw a run: the density of each matrix and each attention head, and its training curves.

    The curves are the loss, the density and the first metric on dev. Raises UserError as
    `new_figure` does.
    """
    figure, path = new_figure(path, "--plot", size=(12, 3.6))
    model, task, _, settings = load_run(run, which)
    kept, sizes = kept_weights(model)
    per_head = head_densities(model)
    density = kept.sum() / sizes.sum()
    figure.suptitle(f"{settings['method']} on {task.name}, density {density:.4f}")
    left, middle, right = figure.subplots(1, 3, width_ratios=(3, 4, 5))
    draw_densities(figure, left, kept / sizes, kind="matrix", names=list(model.matrices))
    draw_densities(figure, middle, per_head, kind="head", names=range(model.num_heads))
    draw_curves(right, read_log(run), metric=task.metrics[0])
    save_figure(figure, path)
    print(f"{path}: {kept.sum():,} of {sizes.sum():,} weights kept")


def read_log(run):
    """Return the rows of a run's metrics.jsonl. A line that is no row is left out, and named."""
    path = Path(run) / "metrics.jsonl"
    require(path.is_file(), f"{path}: no such file")
    rows = []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line else {}
        except ValueError:
            row = None
        if is_row(row):
            rows.append(row)
        elif line:
            tell(f"{path}:{number}: left out, not a row of a log", sys.stderr)
    return rows


def is_row(row):
    """Is this a row of a log, with numbers where numbers belong?"""
    if not isinstance(row, dict) or not isinstance(row.get("metrics", {}), dict):
        return False
    values = [row.get("step"), row.get("loss", 0), row.get("density", 0)]
    values += row.get("metrics", {}).values()
    return all(isinstance(value, (int, float)) for value in values)


def draw_densities(figure, axes, densities, kind, names):
    """Draw `densities` (L, len(names)) as a map of layers and of `names`.

    The colours mean the same in every picture: from 0 to 1, and finer for small densities, because
    they follow the square root.
    """
    from matplotlib.colors import PowerNorm

    image = axes.imshow(densities, norm=PowerNorm(0.5, vmin=0, vmax=1), aspect="auto")
    axes.set(title=f"density of each {kind}", ylabel="layer", xlabel=kind)
    axes.set_xticks(range(len(names)), names)
    axes.yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=axes, ticks=(0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1))


def draw_curves(axes, rows, metric):
    """Draw density and metric over the steps, and on an axis of its own the loss."""
    measured = [row for row in rows if metric in row.get("metrics", {})]
    steps = [row["step"] for row in measured]
    values = [row["metrics"][metric] for row in measured]
    lowest = min([0.02, *values]) - 0.02  # a correlation may be negative
    last = max([1, *[row["step"] for row in rows]])
    axes.set(xlabel="step", xlim=(0, last), ylim=(lowest, 1.2))  # above 1 the legend has room
    axes.set_ylabel("density", color="C0")
    loss_axes = axes.twinx()
    loss_axes.set_ylabel("loss", color="C1")
    axes.tick_params(axis="y", colors="C0")
    loss_axes.tick_params(axis="y", colors="C1")
    lines = draw_curve(axes, rows, "density", color="C0")
    lines += draw_curve(loss_axes, rows, "loss", color="C1")
    lines += axes.plot(steps, values, "C2o-", label=f"{metric} on dev (left)", clip_on=False)
    highest = max([0.1, *[row["loss"] for row in rows if "loss" in row]])
    loss_axes.set_ylim(0, 1.2 * highest)
    loss_axes.legend(handles=lines, loc="upper center", ncols=3, fontsize="small")


def draw_curve(axes, rows, key, color):
    """Draw `key` over the steps, from those rows that have it; return the line in a list."""
    logged = [row for row in rows if key in row]
    steps = [row["step"] for row in logged]
    values = [row[key] for row in logged]
    return axes.plot(steps, values, color=color, label=key)


# -------------------------------------------------------------------------------------------------
# other densities


@torch.no_grad()
def sweep(run, densities, device, data_dir):
    """Print the metrics on dev at other densities.

    The run's scores are ranked anew, and nothing is trained.
    Raises UserError where a density is not in (0, 1], where the method keeps no largest scores,
    and where the base model has changed.
    """
    for density in densities:
        if not 0 < density <= 1:
            raise UserError(f"--density {density}: expected a number in (0, 1]")
    model, method, task, tokenizer = with_method(run, device)
    settings = method.settings
    dtype = read_json(Path(run) / "config.json")["dtype"]
    dev_sets = load_dev(task, tokenizer, settings.max_length, data_dir)
    for density in densities:
        settings.density = density
        check_density(method)
        method.update(1)  # step 1 of 1: the density is the final one
        metrics = show(evaluate(model, task, dev_sets, device, dtype))
        print(f"density {density:g}, achieved {method.achieved():.4f}: {metrics}", flush=True)


def check_density(method):
    """Raise UserError where the density of the method keeps nothing."""
    try:
        method.check_density()
    except ValueError as error:
        raise UserError(f"--density: {error}") from None


def with_method(run, device):
    """Return (model, method, task, tokenizer) of a run, with the weights and scores as trained.

    What a mask drops is there, too. Raises UserError as `sweep` does.
    """
    _, task, tokenizer, s = load_run(run)
    config = read_json(Path(run) / "config.json")
    Method = METHODS[s["method"]]
    if not Method.top_k:
        advice = "those of smp, movement and magnitude can"
        raise UserError(f"--density: a {s['method']} run cannot be ranked again; {advice}")
    source = find_model(s["model"])
    if model_sha256(source) != config["model_sha256"]:
        raise UserError(f"--density: {s['model']} is no longer the model that {run} began with")
    head = (Method.output_head, config["outputs"], config["words"])
    model = load_model(source, *head, s["seed"], kind=task.kind)
    model.to(device)
    method = Method(model, SimpleNamespace(**s), total_steps=1)
    tensors, _ = read_safetensors(Path(run) / "checkpoint.safetensors")
    for name, parameter in model.named_parameters():
        if name in tensors:
            parameter.copy_(tensors[name])
    return model, method, task, tokenizer


# -------------------------------------------------------------------------------------------------
# the command line


@program
def main(argv=None):
    parser = Parser(__doc__)
    parser.prog = "python -m tools.report"
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="run folder of train.py, or record of tools.grid")
    add("--only", nargs="+", metavar="NAME", help="runs of these names, as 'stsb-*'")
    add("--density", metavar="V", type=float, nargs="+", help="evaluate at other densities")
    add("--pivot", action="store_true", help="a row per method, a column per density")
    add("--curve", metavar="FILE", help="draw the metric of the runs against density (PNG, ...)")
    add("--plot", metavar="FILE", help="draw densities and training curves (PNG, PDF, SVG)")
    add("--best", action="store_true", help="--plot: the best checkpoint on dev, not the last step")
    add("--data-dir", metavar="DIR", default="data", help="folder of the data; default data")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    args = parser.parse_args(argv)
    if len(args.runs) > 1 and (args.plot or args.density):
        raise UserError("--plot and --density take one run")
    given = [f"--{name}" for name in ("pivot", "curve", "plot", "density") if getattr(args, name)]
    require(len(given) < 2, f"{' and '.join(given)}: give one of them")
    require(args.plot or not args.best, "--best: only with --plot")
    require(not (args.only and (args.plot or args.density)), "--only: chooses among several runs")
    device = pick_device(args.device)
    run = args.runs[0]
    if args.density:
        sweep(run, args.density, device, args.data_dir)
    elif args.plot:
        plot(run, "best" if args.best else "model", Path(args.plot))
    elif args.pivot:
        pivot(finished(args.runs, args.only))
    elif args.curve:
        curve(finished(args.runs, args.only), Path(args.curve))
    else:
        table(finished(args.runs, args.only))


if __name__ == "__main__":
    sys.exit(main())
