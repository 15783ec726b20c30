"""Metrics, predictions and reports of finished runs.

    python eval.py RUN                                       metrics on dev, density per layer and matrix type, size
    python eval.py RUN --split test --predictions CoLA.tsv   the GLUE leaderboard's form
    python eval.py MNLI_RUN --task ax --predictions AX.tsv   the diagnostic set, through a run on MNLI
    python eval.py RUN --plot RUN.png                        densities and training curves, drawn with matplotlib
    python eval.py RUN --density 0.2 0.1 0.05                its scores at other densities, without training
    python eval.py runs/*                                    one Markdown table over all runs
"""

import contextlib
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist

from data import Parser, UserError, atomic_write, collate, get_task, load_dataset, load_tokenizer, program, token_sizes
from model import find_model, load_model, model_sha256, read_json, read_safetensors, to_score
from prune import MATRICES, METHODS

# ---------------------------------------------------------------------------------------------------------------------
# metrics, by their GLUE names


def f1(predicted, labels):
    """F1 of class 1, 0 where nothing is predicted and nothing is there."""
    hits = np.sum((predicted == 1) & (labels == 1))
    total = np.sum(predicted == 1) + np.sum(labels == 1)
    return float(2 * hits / total) if total else 0.0


def pearson(x, y):
    """Pearson correlation in float64, 0 where one side is constant."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return float(np.corrcoef(x, y)[0, 1]) if np.ptp(x) and np.ptp(y) else 0.0


def ranks(x):
    """Average ranks: equal values share the mean of their places."""
    _, place, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


METRICS = {
    "accuracy": lambda predicted, labels: float(np.mean(predicted == labels)),
    "f1": f1,
    "matthews": pearson,  # Matthews' correlation is that of two 0-1 variables
    "pearson": pearson,
    "spearman": lambda x, y: pearson(ranks(x), ranks(y)),
}


# ---------------------------------------------------------------------------------------------------------------------
# running a model over a split


def autocast(device, dtype):
    """The autocast context of a run; `dtype` is "fp32", "bf16" or "fp16"."""
    if dtype == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if dtype == "bf16" else torch.float16)


def send(tensor, device):
    """The tensor on the device. To CUDA from pinned memory: the copy waits for nothing, and as no step reads anything
    back, the next batch is made and sent while the device computes."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def inputs(batch, device):
    """The model's three inputs, (B, T) each, on the device."""
    return {name: send(batch[name], device) for name in ("input_ids", "attention_mask", "token_type_ids")}


@torch.no_grad()
def predict(model, dataset, device, dtype, max_tokens=None):
    """Logits (N, K) float32 on the CPU, in the split's order; dropout off. Batches of up to `max_tokens`, padding
    included, the same every time. Under torchrun each rank does its share."""
    # a GPU wants many (not measured), a CPU what its cache holds: 1.5 to 2.5 times as fast as with 1 << 14 (measured)
    max_tokens = max_tokens or {"cuda": 1 << 17, "cpu": 1 << 10}.get(device.type, 1 << 14)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    was_training = model.training
    model.eval()
    order = np.argsort(-dataset.lengths, kind="stable")  # longest first: little padding, and memory runs out at once
    parts = np.split(order, np.cumsum(token_sizes(dataset.lengths, max_tokens))[:-1])[rank::world]
    with autocast(device, dtype):
        logits = [model(**inputs(collate(dataset, part), device)) for part in parts]
    model.train(was_training)
    table = torch.zeros(len(dataset), model.outputs, device=device)
    for part, values in zip(parts, logits, strict=True):
        table[torch.from_numpy(part).to(device)] = values
    if world > 1:
        dist.all_reduce(table)
    return table.cpu()


def to_predictions(task, logits):
    """Classes (N,) or, of a regression task, scores (N,), as numpy."""
    return (to_score(logits, task.low, task.high) if task.regression else logits.argmax(dim=1)).numpy()


def score(task, logits, labels, suffix=""):
    """{metric: value} under GLUE's names; `suffix` marks MNLI's mismatched half."""
    predicted = to_predictions(task, logits)
    names = [name.removesuffix("_mm") for name in task.metrics if name.endswith("_mm") == bool(suffix)]
    return {name + suffix: METRICS[name](predicted, labels) for name in names}


def evaluate(model, task, dev_sets, device, dtype):
    """Metrics over `dev_sets` {suffix: dataset}; see `load_dev`."""
    metrics = {}
    for suffix, dataset in dev_sets.items():
        metrics |= score(task, predict(model, dataset, device, dtype), dataset.labels, suffix)
    return metrics


def show(metrics):
    """Metrics as the terminal shows them, in percent."""
    return "  ".join(f"{name} {100 * value:.2f}" for name, value in metrics.items())


def load_dev(task, tokenizer, max_length, data_dir):
    """{suffix: dataset}: dev, and for MNLI also its mismatched half."""
    return {
        suffix: load_dataset(task, split, tokenizer, max_length, data_dir) for split, suffix in task.eval_splits.items()
    }


def pick_device(name):
    """torch.device for "auto", "cpu", "cuda" or "mps"; UserError where it is not there."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if there[kind])
    if not there[name]:
        raise UserError(f"--device {name}: this machine, or this build of torch, has none")
    return torch.device(name)


# ---------------------------------------------------------------------------------------------------------------------
# finished runs


def load_run(run, which="model"):
    """(model, task, tokenizer, settings) of a finished run folder; `which`: "model" (last step) or "best"."""
    run = Path(run)
    config = read_json(run / "config.json")
    settings = config.get("settings")
    if not isinstance(settings, dict) or settings.get("method") not in METHODS:
        raise UserError(f"{run}/config.json: not the settings of a run of train.py")
    folder = run / which
    if not folder.is_dir():
        raise UserError(f"{run}: has no {which}/ yet; the run is not finished (continue it with --resume)")
    task = get_task(settings["task"], settings["task_file"])
    tokenizer = load_tokenizer(folder, read_json(folder / "config.json").get("vocab_size", 0))
    if (settings["task"], config["labels"]) != (task.name, list(task.labels)):
        raise UserError(
            f"{run}: trained on {settings['task']} with labels {config['labels']}; "
            f"its task file now describes {task.name} with labels {list(task.labels)}"
        )
    head = METHODS[settings["method"]].head
    model = load_model(folder, head, config["outputs"], config["words"], new_head=False)
    return model, task, tokenizer, settings


def kept_weights(model):
    """(non-zero weights, all weights) of the encoder's matrices, as saved: two arrays (L, 6)."""
    layers = model.bert.encoder["layer"]
    weights = [[layer.get_submodule(name).weight for name in MATRICES.values()] for layer in layers]
    kept = np.array([[int(weight.count_nonzero()) for weight in row] for row in weights])
    return kept, np.array([[weight.numel() for weight in row] for row in weights])


def head_densities(model):
    """The share of non-zero weights in each head, its rows of Q, K, V and its columns of O, as saved: (L, H)."""
    found, heads = [], model.config.num_attention_heads
    for layer in model.bert.encoder["layer"]:
        q, k, v, o = (layer.get_submodule(MATRICES[letter]).weight != 0 for letter in "QKVO")
        found.append(torch.stack([q, k, v, o.T]).unflatten(1, (heads, -1)).float().mean((0, 2, 3)))  # (4, H, D, C)
    return torch.stack(found).numpy()


def plot(run, which, path):
    """A picture of a run: the density of each matrix and each head, and loss, density and dev metric over the steps."""
    try:
        from matplotlib.figure import Figure  # not pyplot: no display, no state
    except ImportError:
        raise UserError("--plot draws with matplotlib, which is not installed: pip install matplotlib") from None
    model, task, _, s = load_run(run, which)
    (kept, sizes), per_head = kept_weights(model), head_densities(model)
    rows = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    figure.suptitle(f"{s['method']} on {task.name}, density {kept.sum() / sizes.sum():.4f}")
    left, middle, right = figure.subplots(1, 3, width_ratios=(3, 4, 5))
    for axes, values, names in ((left, kept / sizes, list(MATRICES)), (middle, per_head, range(per_head.shape[1]))):
        image = axes.imshow(values, vmin=0, aspect="auto")  # (L, 6 or H)
        kind = "matrix" if axes is left else "head"
        axes.set(title=f"density of each {kind}", ylabel="layer", xlabel=kind)
        axes.set_xticks(range(len(names)), names)
        figure.colorbar(image, ax=axes)
    right.set(xlabel="step", ylabel="density, dev metric", ylim=(0, 1.02))
    main, loss = task.metrics[0], right.twinx()
    loss.set_ylabel("loss")
    for axes, key, color in ((right, "density", "C0"), (loss, "loss", "C1")):
        points = [(row["step"], row[key]) for row in rows if key in row]
        axes.plot(*zip(*points, strict=True), color=color, label=key)
    points = [(row["step"], row["metrics"][main]) for row in rows if "metrics" in row]
    right.plot(*zip(*points, strict=True), "C2o-", label=main)
    figure.legend(loc="outside lower right", ncols=3)
    figure.savefig(path, dpi=150)
    print(f"{path}: {kept.sum():,} of {sizes.sum():,} weights kept")


@torch.no_grad()
def sweep(run, densities, device, data_dir):
    """Print the metrics on dev at other densities: the run's scores rank anew, and nothing is trained."""
    _, task, tokenizer, s = load_run(run)
    config, Method = read_json(Path(run) / "config.json"), METHODS[s["method"]]
    if wrong := [density for density in densities if not 0 < density <= 1]:
        raise UserError(f"--density {wrong[0]}: expected a number in (0, 1]")
    if not Method.top_k:
        raise UserError(f"--density: a {s['method']} run has nothing to rank anew; smp, movement and magnitude have")
    source = find_model(s["model"])
    if model_sha256(source) != config["model_sha256"]:
        raise UserError(f"--density: {s['model']} is no longer the model that {run} began with")
    model = load_model(source, Method.head, config["outputs"], config["words"], s["seed"]).to(device)
    method = Method(model, SimpleNamespace(**s), total_steps=1)
    tensors, _ = read_safetensors(Path(run) / "checkpoint.safetensors")  # what is masked, too, as training left it
    for name, parameter in model.named_parameters():
        if name in tensors:
            parameter.copy_(tensors[name])
    dev = load_dev(task, tokenizer, s["max_length"], data_dir)
    for density in densities:
        method.settings.density = density
        method.update(1)
        metrics = show(evaluate(model, task, dev, device, config["dtype"]))
        print(f"density {density:g}, achieved {method.achieved():.4f}: {metrics}", flush=True)


def entropy(density):
    """Bits per weight of a mask that keeps this share: no code for its places can be shorter, were they random."""
    return -sum(p * math.log2(p) for p in (density, 1 - density) if p)


def report(run, which, device, data_dir):
    """Print the metrics on dev, the density table and the sizes of one run."""
    model, task, tokenizer, s = load_run(run, which)
    dtype = read_json(Path(run) / "config.json")["dtype"]
    metrics = evaluate(model.to(device), task, load_dev(task, tokenizer, s["max_length"], data_dir), device, dtype)
    print(f"{run}: {s['method']} on {task.name}, {'last step' if which == 'model' else 'best checkpoint'}, {dtype}")
    for name, value in metrics.items():
        print(f"  {name:12} {100 * value:.2f}")
    kept, sizes = kept_weights(model)
    print("density (non-zero weights over all, as saved)")
    print("  layer " + "".join(f"{letter:>8}" for letter in [*MATRICES, "all"]))
    for name, k, n in [*zip(range(len(kept)), kept, sizes, strict=True), ("all", kept.sum(0), sizes.sum(0))]:
        print(f"  {name:>5} " + "".join(f"{x:8.4f}" for x in [*(k / n), k.sum() / n.sum()]))
    kept, total = int(kept.sum()), int(sizes.sum())
    everything = sum(p.numel() for p in model.parameters())
    bits = entropy(kept / total)
    print("size")
    print(f"  all parameters   {everything:12,}  {4 * everything / 1e6:8.2f} MB in fp32")
    print(f"  encoder matrices {total:12,}  {4 * total / 1e6:8.2f} MB in fp32, zeros stored")
    print(f"  kept of these    {kept:12,}  {2 * kept / 1e6:8.2f} MB in fp16, without their places")
    print(f"  the mask alone                 {total / 8e6:8.2f} MB as bits, {bits * total / 8e6:.2f} MB at its entropy")


def write_predictions(run, which, device, data_dir, split, path, task_name):
    """A split's predictions as the GLUE leaderboard takes them: index<TAB>prediction, in the task's own spelling."""
    model, task, tokenizer, s = load_run(run, which)
    if task_name and task_name != task.name:
        other = get_task(task_name)
        if other.labels != task.labels or task.regression:
            raise UserError(f"--task {task_name}: {run} was trained on {task.name}, whose labels differ")
        task = other
    if split not in task.files:
        raise UserError(f"--split {split}: {task.name} has {', '.join(task.files)}")
    dataset = load_dataset(task, split, tokenizer, s["max_length"], data_dir)
    dtype = read_json(Path(run) / "config.json")["dtype"]
    predicted = to_predictions(task, predict(model.to(device), dataset, device, dtype))
    if task.regression:
        cells = [f"{min(max(float(x), task.low), task.high):.3f}" for x in predicted]
    else:
        cells = [task.spelling[i] for i in predicted]
    rows = "".join(f"{i}\t{cell}\n" for i, cell in enumerate(cells))
    atomic_write(path, "index\tprediction\n" + rows)
    print(f"{path}: {len(cells):,} predictions of {task.name} {split}")


def variant(settings):
    """What a table adds to the name of a run's method; runs that differ in it never share a row."""
    teacher = settings["teacher"]
    kinds = {"none": "", None: "", "self": " + self"}
    text = kinds.get(teacher, " + dense, then self" if str(teacher).startswith("self:") else " + teacher")
    text += " (logit)" if settings["regression"] == "logit" else ""
    text += " (signed)" if settings.get("pins_score") == "signed" and settings["method"] == "pins" else ""
    return text + (f" ({settings['pattern']})" if settings.get("pattern", "weight") != "weight" else "")


def table(runs):
    """Markdown: one row per setting that differs in more than the seed; mean ± std over seeds, last step and best."""
    found, groups = [], {}
    for run in runs:
        if not (Path(run) / "result.json").exists():
            print(f"{run}: no result.json, left out", file=sys.stderr)
            continue
        found.append((read_json(Path(run) / "result.json"), read_json(Path(run) / "config.json")["settings"]))
    for result, settings in found:
        alike = [set(other) for _, other in found if other["method"] == settings["method"]]
        # all but these, and the settings that older runs of the method did not have
        compared = set.intersection(*alike) - {"seed", "out", "data_dir", "device", "resume", "log_every"}
        setting = {name: settings[name] for name in compared}
        setting["teacher"] = variant(settings)  # each seed may have a teacher of its own
        order = (result["task"], result["method"] != "dense", result["method"], -(result["density"] or 0.0))
        groups.setdefault((order, setting["teacher"], json.dumps(setting, sort_keys=True)), []).append(result)

    def cell(rows):
        texts = []
        for name in rows[0]:
            values = [100 * row[name] for row in rows]
            spread = f" ± {np.std(values, ddof=1):.1f}" if len(rows) > 1 else ""
            texts.append(f"{name} {np.mean(values):.1f}{spread}")
        return ", ".join(texts)

    print("| task | method | density | achieved | seeds | epochs | last step | best on dev | minutes |")
    print("|---|---|---|---|---|---|---|---|---|")
    for (_, extra, _), results in sorted(groups.items()):
        r = results[0]
        asked = f"{r['density']:g}" if r["density"] else "by lambda"
        achieved = np.mean([r["achieved_density"] for r in results])
        minutes = np.mean([r["train_seconds"] for r in results]) / 60
        print(
            f"| {r['task']} | {r['method']}{extra} | {asked} | {achieved:.4f} | {len(results)} | "
            f"{r['epochs']:g} | {cell([r['metrics'] for r in results])} | "
            f"{cell([r['best']['metrics'] for r in results])} | {minutes:.1f} |"
        )


@program
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder of train.py; several: a table")
    parser.add_argument("--density", metavar="V", type=float, nargs="+", help="other densities, by the run's scores")
    parser.add_argument("--plot", metavar="FILE", help="draw densities and training curves (PNG, PDF, SVG)")
    parser.add_argument("--best", action="store_true", help="the best checkpoint on dev instead of the last step")
    parser.add_argument("--predictions", metavar="FILE", help="write a split's predictions in the leaderboard's form")
    parser.add_argument("--split", default="test", help="split to predict: dev, test, dev_mm, test_mm (default: test)")
    parser.add_argument("--task", help="predict another task of the same labels: ax through a run on mnli")
    parser.add_argument("--data-dir", default="data", help="folder of the GLUE files (default: data)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    args = parser.parse_args(argv)
    which = "best" if args.best else "model"
    if len(args.runs) > 1 and (args.predictions or args.plot or args.density):
        raise UserError("--predictions, --plot and --density take one run")
    device = pick_device(args.device)
    if args.density:
        sweep(args.runs[0], args.density, device, args.data_dir)
    elif args.plot:
        plot(args.runs[0], which, Path(args.plot))
    elif args.predictions:
        write_predictions(args.runs[0], which, device, args.data_dir, args.split, Path(args.predictions), args.task)
    elif len(args.runs) > 1:
        table(args.runs)
    else:
        report(args.runs[0], which, device, args.data_dir)


if __name__ == "__main__":
    sys.exit(main())
