"""The CUDA path, with or without a GPU: see fake_cuda.py.

In each case `train.train` runs for two steps, with a log line after each and an evaluation at the
end. The second step must not make the host wait.
"""

import json
import os
import shlex
import shutil
import sys

import fake_cuda
import pytest
import torch

import train
from prune import CRITERIA, METHODS
from support.terminal import as_flag

# Each method, dtype, pattern, teacher and kind of task is in some case. fp16 and micro-batches are
# with methods that read gradients.
CASES = [
    "--method dense --dtype bf16 --task-file tag.json",
    "--method magnitude --dtype fp32 --grad-accum 2",
    "--method movement --dtype fp16 --pattern 2:4",
    "--method soft-movement --dtype bf16 --density 0.1",
    "--method l0 --dtype fp32 --grad-accum 2",
    "--method smp-l --dtype fp32 --pattern head --density 0.5",
    "--method smp-s --dtype fp16 --pattern unit --teacher RUN --grad-accum 2",
    "--method smp-s --dtype fp32 --teacher self --eval-every 1 --task-file tag.json",
    "--method sensitivity --dtype fp16",
    "--method platon --dtype fp32",
    "--method pins --dtype bf16 --teacher self --eval-every 1 --task-file span.json",
    "--method pins --dtype fp16 --teacher self:RUN --pins-score signed --grad-accum 2",
    "--method smp-s --dtype bf16 --teacher self --eval-every 1 --label-smoothing 0.1",  # texts
    "--method pins --dtype fp16 --grad-accum 2 --beams 2",  # texts
    "--method smp-s --dtype bf16 --frozen-dtype bf16 --beams 2",  # texts, by Llama
]

# A fault of fake_cuda.FAULTS: the flags of the run, and the file and the code of the line where the
# error is raised.
FAULTS = {
    "a count on the CPU": ("--method movement", "prune.py", "top_k_masks(values, counts)"),
    "a float() of the regulariser": ("--method smp-l", "train.py", "method.penalise(step)"),
    "an unpinned batch": ("--method dense", "classify.py", "inputs(batch, device)"),
}


def why_not():
    """Return why no test can run here, or None."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda or torch.version.hip:
        return "this build of torch has CUDA, but this machine has no GPU"
    if sys.platform != "linux" or compiler() is None:
        return "fake CUDA tensors need Linux and a C++ compiler"
    return None


def compiler():
    return shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


def begin(background, fixture):
    """Start all cases in one process; return the future of what it prints, or why there is none."""
    if why_not():
        return why_not()
    folder = fixture("tmp_path_factory").mktemp("cuda")
    code = "import fake_cuda; fake_cuda.main()"
    if not torch.cuda.is_available():
        library = fake_cuda.build_library(compiler(), folder)
        code = f"import ctypes; ctypes.CDLL({str(library)!r}); {code}"
    bases = [fixture(name) for name in ("tiny", "texts", "llama")]
    cases = cases_of(folder, *bases, fixture("kinds"))
    (folder / "cases.json").write_text(json.dumps(cases))
    paths = os.pathsep.join([str(fake_cuda.ROOT), str(fake_cuda.ROOT / "tests")])
    command = [sys.executable, "-c", code, str(folder / "cases.json")]
    return background.start(command, env={"PYTHONPATH": paths})


def cases_of(folder, tiny, texts, llama, kinds):
    """Return {case or fault: [flags, the fault or None]}."""
    teacher = folder / "teacher"
    dense = ["--method", "dense", "--max-steps", "1", "--out", str(teacher)]
    assert train.main([*tiny, *dense]) == 0
    cases = {}
    for case in CASES:
        case_here = case.replace("RUN", str(teacher))
        for kind, path in kinds.items():
            case_here = case_here.replace(f"{kind}.json", path)
        flags = shlex.split(case_here)
        base = texts if {"--beams", "--label-smoothing"} & set(flags) else tiny
        if "--frozen-dtype" in flags:
            base = llama
        cases[case] = ([*base, *two_steps(flags), *flags], None)
    for fault, (flags, _, _) in FAULTS.items():
        flags = shlex.split(flags)
        cases[fault] = ([*tiny, *two_steps(flags), *flags], fault)
    return cases


def two_steps(flags):
    """Return the flags of a run of two steps, of which the second one ranks or shares out anew.

    `flags` name the method, which refuses what it does not use.
    """
    uses = METHODS[flags[flags.index("--method") + 1]].uses
    more = ["--max-steps", "2", "--teacher", "none"]
    for name, value in (("hold", "0"), ("ramp", "0.25"), ("pins_window", "1")):
        if name in uses:
            more += [as_flag(name), value]
    return more


@pytest.fixture(scope="module")
def errors_on_cuda(begun):
    """{case or fault: its error or None}."""
    if isinstance(begun, str):
        pytest.skip(begun)
    return dict(json.loads(line) for line in begun.result().splitlines())


def test_every_method_has_a_case():
    """So has every dtype, pattern, teacher, and kind of task."""
    assert {case.split()[1] for case in CASES} == set(CRITERIA)
    words = {word for case in CASES for word in case.split()}
    assert words >= {"fp32", "bf16", "fp16", "2:4", "head", "unit", "RUN", "self", "self:RUN"}
    assert words >= {"span.json", "tag.json"}


@pytest.mark.parametrize("case", CASES)
def test_training_on_cuda(case, errors_on_cuda):
    """Nothing raises, all state is on the device, and no step makes the host wait."""
    assert errors_on_cuda[case] is None


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(fault, errors_on_cuda):
    """The error names the line."""
    _, file, code = FAULTS[fault]
    error = errors_on_cuda[fault]
    assert error is not None
    assert error.startswith(file)
    assert code in error
