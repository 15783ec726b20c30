"""Reports over finished runs: a table, a picture, and the metrics at other densities.

    python -m tools.report runs/*                      one Markdown table over all runs
    python -m tools.report RUN --plot RUN.png          densities and training curves, as a picture
    python -m tools.report RUN --plot RUN.png --best   the same with the densities of the best model
    python -m tools.report RUN --density 0.2 0.1 0.05  dev metrics at other densities

`python eval.py RUN` reports the metrics, densities and sizes of one run.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from data import Parser, UserError, program, read_json
from eval import evaluate, kept_weights, load_dev, load_run, show
from model import find_model, load_model, model_sha256, pick_device, read_safetensors
from prune import METHODS, encoder_matrices

# -------------------------------------------------------------------------------------------------
# a table over runs

HEADER = """\
| task | method | density | achieved | seeds | epochs | last step | best on dev | minutes |
|---|---|---|---|---|---|---|---|---|"""

# Runs that differ only in these settings share a row.
NOT_COMPARED = {"seed", "out", "data_dir", "device", "resume", "log_every"}


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
    pattern = settings.get("pattern", "weight")
    if pattern != "weight":
        text += f" ({pattern})"
    return text


def finished(runs):
    """Return (result, settings) of each finished run; name the others on stderr."""
    found = []
    for run in runs:
        path = Path(run) / "result.json"
        if not path.exists():
            print(f"{run}: no result.json, left out", file=sys.stderr)
            continue
        settings = read_json(Path(run) / "config.json")["settings"]
        found.append((read_json(path), settings))
    return found


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
        order = (result["task"], method != "dense", method, -(result["density"] or 0.0))
        key = (order, added, json.dumps(values, sort_keys=True))
        groups.setdefault(key, []).append(result)
    return [(key[1], groups[key]) for key in sorted(groups)]


def cell(rows):
    """Return the mean of each metric over `rows` {metric: value}, in percent; ± is over seeds."""
    texts = []
    for name in rows[0]:
        values = [100 * row[name] for row in rows]
        text = f"{name} {np.mean(values):.1f}"
        if len(rows) > 1:
            text += f" ± {np.std(values, ddof=1):.1f}"
        texts.append(text)
    return ", ".join(texts)


def table(runs):
    """Print a Markdown table of `runs`; runs that differ only in their seed make one row."""
    rows = grouped(finished(runs))
    print(HEADER)
    for added, results in rows:
        first = results[0]
        asked = f"{first['density']:g}" if first["density"] else "by lambda"
        achieved = np.mean([result["achieved_density"] for result in results])
        last_step = cell([result["metrics"] for result in results])
        best = cell([result["best"]["metrics"] for result in results])
        minutes = np.mean([result["train_seconds"] for result in results]) / 60
        print(
            f"| {first['task']} | {first['method']}{added} | {asked} | {achieved:.4f} | "
            f"{len(results)} | {first['epochs']:g} | {last_step} | {best} | {minutes:.1f} |"
        )


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

    The curves are the loss, the density and the first metric on dev.
    Raises UserError where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # pyplot would want a display, and keeps a state
    except ImportError:
        advice = "which is not installed: pip install matplotlib"
        raise UserError(f"--plot draws with matplotlib, {advice}") from None
    model, task, _, settings = load_run(run, which)
    kept, sizes = kept_weights(model)
    per_head = head_densities(model)
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    density = kept.sum() / sizes.sum()
    figure.suptitle(f"{settings['method']} on {task.name}, density {density:.4f}")
    left, middle, right = figure.subplots(1, 3, width_ratios=(3, 4, 5))
    draw_densities(figure, left, kept / sizes, kind="matrix", names=list(model.matrices))
    draw_densities(figure, middle, per_head, kind="head", names=range(model.num_heads))
    draw_curves(right, read_log(run), metric=task.metrics[0])
    figure.legend(loc="outside lower right", ncols=3)
    figure.savefig(path, dpi=150)
    print(f"{path}: {kept.sum():,} of {sizes.sum():,} weights kept")


def read_log(run):
    """Return the rows of a run's metrics.jsonl."""
    text = (Path(run) / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def draw_densities(figure, axes, densities, kind, names):
    """Draw `densities` (L, len(names)) as a map of layers and of `names`."""
    image = axes.imshow(densities, vmin=0, aspect="auto")
    axes.set(title=f"density of each {kind}", ylabel="layer", xlabel=kind)
    axes.set_xticks(range(len(names)), names)
    figure.colorbar(image, ax=axes)


def draw_curves(axes, rows, metric):
    """Draw density and metric over the steps, and on an axis of its own the loss."""
    axes.set(xlabel="step", ylabel="density, dev metric", ylim=(0, 1.02))
    loss_axes = axes.twinx()
    loss_axes.set_ylabel("loss")
    draw_curve(axes, rows, "density", color="C0")
    draw_curve(loss_axes, rows, "loss", color="C1")
    measured = [row for row in rows if "metrics" in row]
    steps = [row["step"] for row in measured]
    values = [row["metrics"][metric] for row in measured]
    axes.plot(steps, values, "C2o-", label=metric)


def draw_curve(axes, rows, key, color):
    """Draw `key` over the steps, from those rows that have it."""
    logged = [row for row in rows if key in row]
    steps = [row["step"] for row in logged]
    values = [row[key] for row in logged]
    axes.plot(steps, values, color=color, label=key)


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
        advice = "smp, movement and magnitude have"
        raise UserError(f"--density: a {s['method']} run has nothing to rank anew; {advice}")
    source = find_model(s["model"])
    if model_sha256(source) != config["model_sha256"]:
        raise UserError(f"--density: {s['model']} is no longer the model that {run} began with")
    model = load_model(source, Method.output_head, config["outputs"], config["words"], s["seed"])
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
    add("runs", nargs="+", metavar="RUN", help="run folder of train.py")
    add("--density", metavar="V", type=float, nargs="+", help="evaluate at other densities")
    add("--plot", metavar="FILE", help="draw densities and training curves (PNG, PDF, SVG)")
    add("--best", action="store_true", help="--plot: the best checkpoint on dev, not the last step")
    add("--data-dir", metavar="DIR", default="data", help="folder of the GLUE files; default data")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    args = parser.parse_args(argv)
    if len(args.runs) > 1 and (args.plot or args.density):
        raise UserError("--plot and --density take one run")
    device = pick_device(args.device)
    run = args.runs[0]
    if args.density:
        sweep(run, args.density, device, args.data_dir)
    elif args.plot:
        plot(run, "best" if args.best else "model", Path(args.plot))
    else:
        table(args.runs)


if __name__ == "__main__":
    sys.exit(main())
