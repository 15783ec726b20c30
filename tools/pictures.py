"""Pictures with matplotlib, for tools.report: metric against density, and a run."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import torch

from eval import kept_weights
from models.runs import load_run
from support.files import atomic_write
from support.matrices import encoder_matrices
from support.patterns import block_values
from support.terminal import UserError, tell


def new_figure(path, flag, size):
    """Return (an empty figure, the path); a path without an ending gets .png.

    Raises UserError where matplotlib is not installed, or cannot write such a file.
    """
    try:
        from matplotlib.figure import Figure  # pyplot would want a display, and keeps a state
    except ImportError:
        advice = "which is not installed: pip install matplotlib"
        raise UserError(f"{flag} draws with matplotlib, {advice}") from None
    if not path.name:
        raise UserError(f"{flag} {path}: expected the name of a file")
    if not path.suffix:
        path = path.with_name(f"{path.name}.png")
    figure = Figure(figsize=size, layout="constrained")
    endings = figure.canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in endings:
        raise UserError(f"{flag} {path}: the ending is none of {', '.join(sorted(endings))}")
    return figure, path


def save_figure(figure, path):
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix[1:].lower(), dpi=150)
    atomic_write(path, picture.getvalue())


def curve(lines, metrics, path, against):
    """Draw the first metric at the last step: a panel a task, a line a method.

    `lines` are {(task, label): {density: values of the seeds}}, `metrics` {task: name}. A line is
    the mean over seeds, and its band one standard deviation each way. Dense runs are a dashed line.
    `against`: "density", or "weights", whose number then stands in place of the density.
    """
    figure, path = new_figure(path, "--curve", size=(6.5 * len(metrics), 4.2))
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    looks = looks_of(sorted({label for _, label in lines}), by_model=against == "weights")
    for panel, task in zip(panels, sorted(metrics)):
        here = {label: points for (t, label), points in lines.items() if t == task}
        draw_panel(panel, here, looks, ticks=against == "density")
        xlabel = "density" if against == "density" else "weights of the encoder that are not zero"
        panel.set(title=task, xlabel=xlabel, ylabel=f"{metrics[task]} on dev, percent")
    save_figure(figure, path)
    print(f"{path}: {len(lines)} lines, {len(metrics)} tasks")


STYLES = ("o-", "s--", "^:", "D-.", "v-", "X--")


def looks_of(labels, by_model):
    """Return {label: (colour, style)}. A method has the same look in each panel.

    `by_model`: a label begins with its model. A method keeps its colour, and a model its style.
    """
    parts = [label.split(" ", 1) if by_model else ("", label) for label in labels]
    models, methods = [sorted(set(names)) for names in zip(*parts)]
    looks = {}
    for label, (model, method) in zip(labels, parts):
        again, color = divmod(methods.index(method), 10)  # there are ten colours
        style = STYLES[(again * len(models) + models.index(model)) % len(STYLES)]
        looks[label] = (f"C{color}", style)
    return looks


def spread(values):
    """Return the standard deviation over seeds; 0 of a single one."""
    return np.std(values, ddof=1) if len(values) > 1 else 0.0


def draw_panel(axes, lines, looks, ticks):
    """Draw the lines {label: {density: values}} of a task. `looks`: see `looks_of`.

    `ticks`: mark the densities that were drawn.
    """
    for label, points in lines.items():
        color, style = looks[label]
        densities = sorted(points)
        means = np.array([np.mean(points[density]) for density in densities])
        spreads = np.array([spread(points[density]) for density in densities])
        if label.startswith("dense"):
            axes.axhline(means[-1], color="black", linestyle="--", label=label)
            axes.axhspan(*(means[-1] + spreads[-1] * np.array([-1, 1])), color="black", alpha=0.1)
            continue
        axes.plot(densities, means, style, color=color, label=label)
        axes.fill_between(densities, means - spreads, means + spreads, color=color, alpha=0.2)
    axes.set_xscale("log")
    if ticks:
        shown = sorted({density for points in lines.values() for density in points if density < 1})
        axes.set_xticks(shown, [f"{density:g}" for density in shown])
    else:
        from matplotlib.ticker import EngFormatter, LogLocator

        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 300k
    axes.minorticks_off()
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))


def head_densities(model):
    """Return the fraction of non-zero weights in each attention head, as saved: (L, H).

    A head is its rows of Q, K and V and its columns of O.
    """
    matrices = encoder_matrices(model)
    densities = []
    for i in range(len(model.layers)):
        kept = [matrices[letter][i].weight != 0 for letter in model.attention_letters]
        densities.append(block_values(kept, model.num_heads))  # (H,)
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
    draw_densities(figure, left, kept / sizes, what="matrix", names=list(model.matrices))
    draw_densities(figure, middle, per_head, what="head", names=range(model.num_heads))
    draw_curves(right, read_log(run), metric=task.metrics[0])
    save_figure(figure, path)
    print(f"{path}: {kept.sum():,} of {sizes.sum():,} weights kept")


def read_log(run):
    """Return the rows of a run's metrics.jsonl. A line that is no row is left out, and named."""
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: no such file")
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


def draw_densities(figure, axes, densities, what, names):
    """Draw `densities` (L, len(names)) as a map of layers and of `names`.

    The colours mean the same in every picture: from 0 to 1, and finer for small densities, because
    they follow the square root.
    """
    from matplotlib.colors import PowerNorm

    image = axes.imshow(densities, norm=PowerNorm(0.5, vmin=0, vmax=1), aspect="auto")
    axes.set(title=f"density of each {what}", ylabel="layer", xlabel=what)
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
