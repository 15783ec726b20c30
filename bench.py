"""How fast, as ratios measured in one run.

    python bench.py                                   every part, on the GPU if there is one
    python bench.py step select                       some of them
    python bench.py throughput --data-dir GLUE        on a task's real lengths, against the published way

Each ratio is the median over alternating runs (one of ours, one of theirs, and again), so that a noisy machine is noisy
for both. Weights are random in the shape of a real model: MiniLM-L6-H384 on a CPU, BERT-base on a GPU.
"""

import copy
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data import Parser, UserError, batches, collate, encode, get_task, load_dataset, load_tokenizer, program
from eval import autocast, inputs, pick_device, predict, send
from model import DEMO, Bert, BertConfig, read_json, task_loss
from prune import METHODS, encoder_matrices, kth_largest, kth_largest_on_device
from train import settings_from

SHAPES = {
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536},
    "base": {},  # BertConfig's own
}

# ---------------------------------------------------------------------------------------------------------------------
# the published way, in its plainest form: a full sort of every matrix in every forward, every sentence padded to 128,
# fp32, the regulariser through autograd, every position of the last layer, the loss read every step


class SortMask(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, density):
        mask = torch.zeros_like(scores)
        order = scores.flatten().sort(descending=True).indices
        mask.view(-1)[order[: int(density * scores.numel())]] = 1
        return mask

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class PublishedLinear(nn.Linear):
    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.scores = nn.Parameter(torch.zeros_like(linear.weight))

    def forward(self, x):
        return F.linear(x, self.weight * SortMask.apply(self.scores, 0.1), self.bias)


def published_step(shape, device):
    """A function (batch of tensors) -> None that trains SMP-L as the released code does."""
    model = Bert(BertConfig(**SHAPES[shape]), "words", words=[5, 6], pooler=False).to(device).requires_grad_(False)
    scores = []
    for places in encoder_matrices(model.bert.encoder["layer"]).values():
        for parent, child in places:
            parent.add_module(child, PublishedLinear(parent.get_submodule(child)))
            scores.append(parent.get_submodule(child).scores)
    optimizer = torch.optim.AdamW(scores, lr=2e-2, weight_decay=0.0)
    model.train()

    def step(batch):
        first = model.bert(**inputs(batch, device))[:, 0]  # (B, C)
        logits = model.cls["predictions"](first, model.bert.embeddings.word_embeddings.weight, model.words)
        loss = F.cross_entropy(logits, batch["labels"].to(device))
        loss = loss + 200.0 * sum(torch.sigmoid(s).mean() for s in scores) / len(scores)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(scores, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return step


# ---------------------------------------------------------------------------------------------------------------------
# our way: the pieces of train.py's loop


def our_step(method, shape, device, dtype):
    """A function (batch of tensors) -> None that trains `method` as train.py does, from the middle of its ramp on."""
    Method = METHODS[method]
    words = [5, 6] if Method.head == "words" else []
    model = Bert(BertConfig(**SHAPES[shape]), Method.head, 2, words, pooler=not words, mlm=bool(words)).to(device)
    given = {"density": 0.1} if method != "dense" else {}
    m = Method(model, settings_from({"task": "cola", "method": method, **given}), 1000)
    optimizer = torch.optim.AdamW(m.groups(), fused=device.type in ("cpu", "cuda"))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    model.train()
    number = 500
    m.update(number)

    def step(batch):
        nonlocal number
        with autocast(device, dtype):
            logits = model(**inputs(batch, device))
        task_loss(logits, send(batch["labels"], device), 0, 1).mean().backward()
        m.penalise(number)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        m.observe(number, 3e-5)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        number += 1
        m.update(number)

    return step


def synthetic(length, size=32):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (size, length), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    return batch | {"labels": torch.arange(size) % 2}


# ---------------------------------------------------------------------------------------------------------------------
# measuring


def clock(function, device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def alternate(functions, device, repeat, warm=2):
    """Seconds (repeat, len(functions)), the functions in turn, after `warm` rounds that do not count."""
    rounds = [[clock(f, device) for f in functions] for _ in range(warm + repeat)]
    return np.array(rounds[warm:])


def show(what, seconds, names):
    """One line: the median of the ratios of the first to the last, their range, and both times."""
    ratio = seconds[:, 0] / seconds[:, -1]
    times = ", ".join(f"{n} {1e3 * t:.4g} ms" for n, t in zip(names, np.median(seconds, axis=0), strict=True))
    print(f"{what:44} {np.median(ratio):7.3f}  ({ratio.min():.3f} to {ratio.max():.3f}; {times})", flush=True)
    return float(np.median(ratio))


# ---------------------------------------------------------------------------------------------------------------------
# the parts


def part_step(a, device):
    """A step of each method over dense fine-tuning, everything trained, fused AdamW; batch 32."""
    for dtype in a.dtypes:
        for length in (128, 40):
            batch, dense = synthetic(length), our_step("dense", a.shape, device, dtype)
            for method in a.methods:
                ours = our_step(method, a.shape, device, dtype)
                seconds = alternate([lambda: ours(batch), lambda: dense(batch)], device, a.repeat)  # noqa: B023
                show(f"step, {method} / dense, length {length}, {dtype}", seconds, (method, "dense"))


def part_floors(a, device):
    """A dense step over what its matrix products and its optimizer's bytes would take at the measured rates."""
    config = BertConfig(**SHAPES[a.shape])
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    for dtype in a.dtypes:
        kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
        for length in (128, 40):
            tokens = 32 * length
            x, w = torch.randn(tokens, width, device=device).to(kind), torch.randn(inner, width, device=device).to(kind)
            source = torch.randn(1 << 26, device=device)
            target = torch.empty_like(source)
            product = np.median(alternate([lambda: x @ w.T], device, a.repeat))  # noqa: B023
            copy = np.median(alternate([lambda: target.copy_(source)], device, a.repeat))  # noqa: B023
            rate, bandwidth = 2 * tokens * width * inner / product, 8 * source.numel() / copy
            matrices = (4 * width * width + 2 * width * inner) * layers
            last = (2 * width * width + 2 * width * inner) * (1 - 1 / length)  # of it only position 0 is computed
            flops = 6 * (matrices - last) * tokens
            parameters = matrices + config.vocab_size * width
            floor = flops / rate + 28 * parameters / bandwidth  # AdamW reads w, g, m, v and writes w, m, v
            dense, batch = our_step("dense", a.shape, device, dtype), synthetic(length)
            seconds = np.median(alternate([lambda: dense(batch)], device, a.repeat))  # noqa: B023
            print(
                f"floor, dense, length {length}, {dtype}: {1e3 * seconds:.4g} ms a step; products {flops / 1e9:.0f} "
                f"GFLOP at {rate / 1e9:.0f}/s, AdamW {28 * parameters / 1e6:.0f} MB at {bandwidth / 1e9:.0f} GB/s: "
                f"{1e3 * floor:.4g} ms, ratio {seconds / floor:.2f}",
                flush=True,
            )


def part_throughput(a, device):
    """SMP-S on a task's own lengths, in the fastest dtype, against the published way; and that against a dense step."""
    tokenizer = load_tokenizer(DEMO if a.tokenizer is None else a.tokenizer, 30522)
    published, ours = published_step(a.shape, device), our_step("smp-s", a.shape, device, a.dtypes[-1])
    dense, batch = our_step("dense", a.shape, device, "fp32"), synthetic(128)
    seconds = alternate([lambda: published(batch), lambda: dense(batch)], device, a.repeat)
    show("the published way / dense, length 128, fp32", seconds, ("published", "dense"))
    for name in ("rte", "cola"):
        data = load_dataset(get_task(name), "train", tokenizer, 128, a.data_dir)
        order = batches(data.lengths, 32, 0, 0)
        few = [order[i] for i in np.linspace(0, len(order) - 1, a.repeat + 2).astype(int)]
        whole = [batch for batch in few if len(batch) == 32] or few
        padded = [pad(collate(data, batch), 128) for batch in whole]
        trimmed = [collate(data, batch) for batch in whole]
        seconds = np.array([[clock(lambda: published(p), device), clock(lambda: ours(t), device)]  # noqa: B023
                            for p, t in zip(padded, trimmed, strict=True)])[2:]  # fmt: skip
        show(f"throughput, {name}, ours / published", seconds, ("published", f"smp-s {a.dtypes[-1]}"))


def pad(batch, length):
    """The batch with every row padded to `length`, as the published code has it."""
    return {name: F.pad(t, (0, length - t.size(1))) if t.dim() == 2 else t for name, t in batch.items()}


def part_select(a, device):
    """The k-th largest of 3072 x 768, k 10%, exactly."""
    scores = torch.randn(3072 * 768, device=device) * 0.1
    k = scores.numel() // 10
    ways = {"sort": lambda: scores.sort(descending=True), "topk": lambda: scores.topk(k, sorted=False)}
    ways["kthvalue"] = lambda: scores.kthvalue(scores.numel() - k + 1)
    if device.type == "cpu":
        flat = scores.numpy()
        ways["np.partition"] = lambda: np.partition(flat, flat.size - k)
        ways["ours"] = lambda: kth_largest(flat, k)
    else:
        number = torch.full((1, 1), k, device=device)
        ways["ours"] = lambda: kth_largest_on_device(scores[None], number)
    seconds = alternate(list(ways.values()), device, a.repeat)
    for i, name in enumerate(ways):
        if name != "ours":
            show(f"select, {name} / ours", seconds[:, [i, -1]], (name, "ours"))


@torch.no_grad()
def part_sparse(a, device):
    """CSR execution against dense, in fp32 and bf16, on the CPU: random masks, batches of 1, 8, 32, lengths 32, 128."""
    import deploy  # which imports this file

    cpu = torch.device("cpu")
    for density in (0.1, 0.03):
        dense = Bert(BertConfig(**SHAPES[a.shape]), "classifier", 2, mlm=False).eval().requires_grad_(False)
        for linear in deploy.encoder_linears(dense):
            linear.weight *= torch.rand_like(linear.weight) < density
        thin = copy.deepcopy(dense)
        print(f"sparse, {a.shape}, density {density}: {deploy.sparse(thin)} matrices as CSR")
        for size in (1, 8, 32):
            for length in (32, 128):
                deploy.speed(dense, thin, inputs(synthetic(length, size), cpu), cpu, a.repeat)


def part_evaluate(a, device):
    """Evaluation on RTE's dev: longest first and trimmed, against batches of 32 padded to 128 in file order, fp32."""
    tokenizer = load_tokenizer(DEMO if a.tokenizer is None else a.tokenizer, 30522)
    model = Bert(BertConfig(**SHAPES[a.shape]), "classifier", 2, mlm=False).to(device).eval()
    data = load_dataset(get_task("rte"), "dev", tokenizer, 128, a.data_dir)

    @torch.no_grad()
    def published():
        for i in range(0, len(data), 32):
            batch = pad(collate(data, np.arange(i, min(i + 32, len(data)))), 128)
            model(**inputs(batch, device)).argmax(1).tolist()

    seconds = alternate([published, lambda: predict(model, data, device, a.dtypes[-1])], device, a.repeat)
    show(f"evaluation, rte dev, published / ours {a.dtypes[-1]}", seconds, ("published", "ours"))


def part_startup(a, device):
    """Seconds from the command to the first step, cache warm; and to tokenise 67,000 sentences."""
    for again in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            flags = ["--max-steps", "1", "--log-every", "1", "--out", folder + "/run", "--device", device.type]
            if a.model:
                flags += ["--model", a.model, "--task", "cola", "--data-dir", a.data_dir]
            command = [sys.executable, "train.py", *flags]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=HERE)
            first = next((time.perf_counter() for line in process.stdout if "step 1/" in line), None)
            process.communicate()
        if again and first:
            print(f"start-up, first step of {'cola' if a.model else 'the demo'} on a warm cache: {first - began:.2f} s")
    tokenizer = load_tokenizer(DEMO if a.tokenizer is None else a.tokenizer, 30522)
    words = list(tokenizer.get_vocab())[1000:]
    rng = np.random.default_rng(0)
    texts = [" ".join(words[i] for i in rng.integers(len(words), size=10)) for _ in range(67_000)]
    seconds = clock(lambda: encode(texts, tokenizer, 128), device)
    print(f"start-up, 67,000 sentences of 10 words tokenised: {seconds:.2f} s")


def part_memory(a, device):
    """Peak memory of a run of SMP-S over one of dense fine-tuning, five steps each."""
    peaks = []
    for method in ("smp-s", "dense"):
        with tempfile.TemporaryDirectory() as folder:
            flags = ["--method", method, "--max-steps", "5", "--out", folder + "/run", "--device", device.type]
            flags += ["--dtype", a.dtypes[-1]]
            if a.model:
                flags += ["--model", a.model, "--task", "cola", "--data-dir", a.data_dir, "--batch-size", "32"]
            subprocess.run([sys.executable, "train.py", *flags], stdout=subprocess.DEVNULL, cwd=HERE, check=True)
            peaks.append(read_json(Path(folder) / "run" / "result.json")["peak_memory_bytes"])
    print(f"memory, smp-s / dense: {peaks[0] / peaks[1]:.3f}  ({peaks[0] / 1e6:.0f} MB, {peaks[1] / 1e6:.0f} MB)")


HERE = Path(__file__).parent
PARTS = {name.removeprefix("part_"): part for name, part in list(globals().items()) if name.startswith("part_")}
NEEDS_DATA = ("throughput", "evaluate")


@program
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {' '.join(PARTS)}; default all")
    parser.add_argument("--shape", choices=tuple(SHAPES), help="default minilm on a CPU, base on a GPU")
    parser.add_argument("--model", help="a model's folder, for start-up and memory; default the demo")
    parser.add_argument("--tokenizer", help="a folder with tokenizer.json, for real lengths; default that of --model")
    parser.add_argument("--data-dir", help="folder of GLUE files, for throughput and evaluate; default: left out")
    parser.add_argument("--methods", nargs="+", default=["smp-l", "smp-s", "movement", "pins"], choices=tuple(METHODS))
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--repeat", type=int, default=7, help="alternating runs per ratio")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    a = parser.parse_args(argv)
    if unknown := [part for part in a.parts if part not in PARTS]:
        raise UserError(f"{' '.join(unknown)}: no such part; there are {' '.join(PARTS)}")
    device = pick_device(a.device)
    a.shape = a.shape or ("base" if device.type == "cuda" else "minilm")
    a.tokenizer, a.data_dir = a.tokenizer or a.model, a.data_dir and os.path.abspath(a.data_dir)
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, shape {a.shape}")
    for name in a.parts or PARTS:
        if name in NEEDS_DATA and not a.data_dir:
            print(f"{name}: left out, needs --data-dir")
        else:
            PARTS[name](a, device)


if __name__ == "__main__":
    sys.exit(main())
