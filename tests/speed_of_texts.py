"""How fast texts are generated and learned: ours over transformers', measured in one run.

    python tests/speed_of_texts.py generate    tokens per second, against transformers
    python tests/speed_of_texts.py step        a step of smp-s and pins over a dense one
    python tests/speed_of_texts.py teacher     a step with a teacher beside the student
    python tests/speed_of_texts.py memory      peak memory of a step of GPT-2's size
    python tests/speed_of_texts.py bytes       memory for each weight in a step of SmolLM2's size

The weights are random. A ratio is the median over rounds in which both are called in turn. It is no
test, because no test asserts a time. Nothing else should run beside it.
"""

import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from data import get_task, kind_of, with_settings
from models.checkpoint import save_model
from models.gpt2 import GPT2, GPT2Config
from models.llama import Llama
from models.llama_config import LlamaConfig
from models.teacher import Teacher, frozen_copy
from prune import METHODS
from support.machine import peak_memory, store_frozen
from tools.deploy import alternate, count_weights
from train import settings_from

CPU = torch.device("cpu")
SMALL = {"vocab_size": 4000, "n_positions": 256, "n_embd": 256, "n_layer": 4, "n_head": 4}
SMOLLM2 = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536}
SMOLLM2 |= {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
SMOLLM2 |= {"rope_theta": 100000.0, "tie_word_embeddings": True}
SHAPES = {
    "4 x 256": (GPT2, GPT2Config(**SMALL)),
    "GPT-2": (GPT2, GPT2Config()),
    "SmolLM2": (Llama, LlamaConfig(**SMOLLM2)),
}
KIND = kind_of(get_task("e2e"))
PROMPT, NEW = 40, 16  # tokens
REPEAT = 3


def model_of(shape):
    Model, config = SHAPES[shape]
    with torch.device("meta"):
        model = Model(config, "vocabulary")
    shapes = {name: p.shape for name, p in model.named_parameters()}
    model.load_state_dict(Model.draw(shapes, 0), assign=True)
    return model.requires_grad_(True)


def batch_of(model, size=16, source=40, text=28):
    """Random rows of a source and a text, as in E2E."""
    length = source + text
    ids = torch.randint(1, model.config.vocab_size, (size, length))
    labels = torch.full((size, length), -100)
    labels[:, source - 1 : -1] = ids[:, source:]
    reads = (labels.flatten() >= 0).nonzero()[:, 0]
    batch = {"input_ids": ids, "labels": labels, "rows": torch.arange(size), "reads": reads}
    batch["attention_mask"] = torch.ones_like(ids)
    return batch | {"token_type_ids": torch.zeros_like(ids)}


def ratio(what, functions):
    """Print the median of the ratios of the first function's time to the second's."""
    seconds = alternate(functions, CPU, REPEAT, warm=1)
    ratios = seconds[:, 0] / seconds[:, 1]
    first, second = np.median(seconds, axis=0)
    spread = f"{ratios.min():.2f} to {ratios.max():.2f}"
    times = f"{first:.3f} s, {second:.3f} s"
    print(f"{what:46} {np.median(ratios):6.2f}  ({spread}; {times})", flush=True)
    return first, second


# ---------- generation ----------------------------------------------------------------------------


def generate():
    """Print transformers' time over ours: above 1 ours is faster.

    With the larger shapes a batch of 32 is decoded greedily and with the cache alone: the rest
    takes hours on a core.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    for shape in SHAPES:
        model = model_of(shape).eval()
        with tempfile.TemporaryDirectory() as folder:
            save_model(Path(folder), model, model.state_dict(), ())
            theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        for size in (1, 32):
            for beams in (1, 5):
                for cached in (True, False):
                    slow = shape != "4 x 256" and size == 32 and (beams == 5 or not cached)
                    if not slow:
                        compare(shape, model, theirs, size, beams, cached)


def compare(shape, model, theirs, size, beams, cached):
    prompts = torch.randint(1, model.config.vocab_size, (size, PROMPT))
    options = {"max_new_tokens": NEW, "num_beams": beams, "use_cache": cached, "do_sample": False}
    options |= {"pad_token_id": 0, "eos_token_id": model.config.vocab_size - 1}
    ends = [model.config.vocab_size - 1]
    mask = torch.ones_like(prompts)

    def by_them():
        with torch.no_grad():
            theirs.generate(prompts, attention_mask=mask, **options)

    def by_us():
        model.generate(prompts.tolist(), ends, beams, most_new=NEW, cached=cached)

    cache = "cache" if cached else "no cache"
    what = f"{shape}, batch {size}, {beams} beams, {cache}"
    first, second = ratio(what, [by_them, by_us])
    speeds = f"theirs {size * NEW / first:.0f}, ours {size * NEW / second:.0f}"
    print(f"{'':10}tokens per second: {speeds}")


# ---------- training ------------------------------------------------------------------------------


def step_of(name, model, teacher=None, dtype="fp32", frozen_dtype="fp32", rows=16):
    """Return a function that does a step of a method, in the middle of its ramp."""
    given = {"model": "demo", "task": "demo", "method": name}
    if name != "dense":
        given["density"] = 0.2
    s = settings_from(given)
    s.hold, s.ramp = 0.1, 0.6
    method = METHODS[name](model.train(), s, 1000)
    store_frozen(model, frozen_dtype, dtype)
    optimizer = torch.optim.AdamW(method.groups(), fused=True)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    task = with_settings(get_task("e2e"), dict.fromkeys(KIND.uses, 0), "here")
    kind = kind_of(task)
    batch = batch_of(model, rows)
    method.update(400)

    def step():
        decided = kind.decide(model, batch, CPU, dtype)
        losses = teacher.losses(kind, decided) if teacher else decided.losses
        losses.mean().backward()
        step.resident = resident()
        method.penalise(400)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        method.observe(400, 1e-4)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        method.update(401)

    return step


def steps():
    """Print the time of a step of smp-s and of pins over that of a dense one."""
    for shape in ("4 x 256", "GPT-2"):
        for name in ("smp-s", "pins"):
            functions = [step_of(name, model_of(shape)), step_of("dense", model_of(shape))]
            ratio(f"{shape}, a step of {name} over dense", functions)


def teachers():
    """Print the time of a step of pins with a teacher over one without."""
    for shape in ("4 x 256", "GPT-2"):
        model = model_of(shape)
        teacher = Teacher("self")
        teacher.table = frozen_copy(model, model.state_dict())
        functions = [step_of("pins", model, teacher), step_of("pins", model_of(shape))]
        ratio(f"{shape}, a step of pins with a teacher over none", functions)
        extra = sum(p.numel() for p in model.parameters()) * 4 / 2**20
        print(f"{'':10}the teacher takes {extra:.0f} MiB")


# ---------- memory --------------------------------------------------------------------------------


def memory():
    """Print the peak memory of a process that does one step, in each of two ways."""
    for way in ("decisions", "all"):
        subprocess.run([sys.executable, __file__, "one", way])


def one(way):
    """Do a step of GPT-2's size; the LM head is computed at the decisions, or everywhere."""
    model = model_of("GPT-2").train()
    batch = batch_of(model, size=16, source=100, text=12)  # decisions are a tenth of the places
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    labels = batch["labels"].flatten()
    reads = (labels >= 0).nonzero()[:, 0]
    logits = model(batch["input_ids"], reads=reads if way == "decisions" else None)
    if way == "all":
        logits = logits.flatten(0, 1)[reads]
    torch.nn.functional.cross_entropy(logits, labels[reads]).backward()
    peak = peak_memory(CPU) / 2**20
    told = f"{peak:.0f} MiB, {before / 2**10:.0f} before the step"
    print(f"GPT-2, 16 x 112, LM head at {way}: {told}")


def resident():
    """Return the bytes of memory that this process has (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def bytes_per_weight():
    """Print what a step of one row in bf16 needs for each weight, by process after process.

    The allocator gives back at once what is freed, so that the figures are what is in use.
    """
    ways = [("smp-l", "fp32"), ("smp-l", "bf16"), ("smp-s", "fp32"), ("smp-s", "bf16")]
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "100000"}
    for way in [*ways, ("dense", "fp32"), ("pins", "fp32")]:
        subprocess.run([sys.executable, __file__, "weights", *way], env=env)


def weights(name, frozen_dtype):
    """Do two steps of SmolLM2's size; print the memory less that of the libraries."""
    before = resident()
    model = model_of("SmolLM2")
    masked = count_weights(model)
    step = step_of(name, model, None, "bf16", frozen_dtype, rows=1)
    step()
    step()
    after, most = step.resident - before, peak_memory(CPU) - before
    told = f"{after / 1e6:.0f} MB after backward, {most / 1e6:.0f} MB at most"
    each = f"{after / masked:.1f} and {most / masked:.1f} for each of {masked:,} weights"
    print(f"{name}, frozen matrices in {frozen_dtype}: {told}: {each}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    commands = {"generate": generate, "step": steps, "teacher": teachers, "memory": memory}
    commands["bytes"] = bytes_per_weight
    if sys.argv[1] == "one":
        one(sys.argv[2])
    elif sys.argv[1] == "weights":
        weights(*sys.argv[2:])
    else:
        for name in sys.argv[1:]:
            commands[name]()
