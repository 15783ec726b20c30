"""What every program needs besides its subject: errors of one line, a live line, safe files."""

import argparse
import hashlib
import inspect
import json
import os
import platform
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, fields
from datetime import timedelta
from functools import wraps
from pathlib import Path

import numpy as np
import safetensors
import tokenizers
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from tqdm import tqdm

# -------------------------------------------------------------------------------------------------
# errors, flags and the terminal


class UserError(Exception):
    """A mistake of the user, described in one line."""


def require(condition, message):
    """Raise UserError unless the condition holds."""
    if not condition:
        raise UserError(message)


def program(main):
    """Let `main(argv)` end in one line on stderr, whatever stops it, and return the exit status.

    2: a UserError, or a file that cannot be read or written. 128 + n: signal n, or a closed pipe.
    """

    @wraps(main)
    def reporting(argv=None):
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which raises KeyboardInterrupt
        try:
            status = main(argv) or 0
            sys.stdout.flush()
            return status
        except KeyboardInterrupt as error:
            text, status = error.args or ("interrupted", 128 + signal.SIGINT)
        except BrokenPipeError:
            silence(sys.stdout)
            text, status = "stopped: nothing reads the output any more", 141
        except (UserError, OSError) as error:
            text, status = f"error: {' '.join(str(error).splitlines())}", 2
        tell(text, sys.stderr)
        return status

    return reporting


def silence(stream):
    """Let a stream lead nowhere. Python would fail once more when it closes the stream at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def tell(text, stream=None):
    """Print a line, on a terminal above the live line. It is no error if nothing reads it.

    Without a `stream` it goes to stdout, and of several processes only rank 0 prints it.
    """
    if stream is None and not is_rank_0():
        return
    stream = stream or sys.stdout
    try:
        tqdm.write(text, stream)
        stream.flush()
    except OSError:
        silence(stream)


def is_rank_0():
    """Is this the only process of a run, or the first of several?"""
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    return alone or os.environ.get("RANK", "0") == "0"


class Lines:
    """Takes what a live line shows where stderr is no terminal, and prints it as lines."""

    def write(self, text):
        if text.strip():
            tell(text.strip(), sys.stderr)


def live(what, total, **options):
    """Return a tqdm: one line on stderr, at most 80 columns wide, that says how far the work is.

    A terminal renews it twice a second. Elsewhere, as in a log file, a line is added every 30
    seconds. Of several processes only rank 0 shows it.
    """
    terminal = sys.stderr.isatty()
    seconds = 0.5 if terminal else 30
    return tqdm(
        desc=what,
        total=total,
        file=sys.stderr if terminal else Lines(),
        ncols=79,
        nrows=24,  # where a terminal does not report its height, tqdm would show nothing
        bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
        position=0,
        leave=False,
        mininterval=seconds,
        delay=seconds,
        miniters=1,
        smoothing=0,  # what remains follows from the mean speed
        disable=not is_rank_0(),
        **options,
    )


class Parser(argparse.ArgumentParser):
    """A parser that raises UserError for a wrong, abbreviated or empty flag."""

    def __init__(self, description):
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=layout, allow_abbrev=False)

    def error(self, message):
        raise UserError(f"{message.removeprefix('argument ')}; see --help")

    def parse_args(self, argv=None):
        args = super().parse_args(argv)
        for name, value in vars(args).items():
            values = value if isinstance(value, list) else [value]
            require("" not in values, f"{name}: the value is empty; give one, or leave it out")
        return args


def number(kind, interval):
    """Return a parser of text: an int or float in an interval such as "(0, 1]". NaN is in none."""
    low, high = [float(end) for end in interval[1:-1].split(",")]

    def parse_number(text):
        value = kind(text)
        at_end = (value == low and interval[0] == "[") or (value == high and interval[-1] == "]")
        if not (low < value < high or at_end):
            raise argparse.ArgumentTypeError(f"{text}: expected a number in {interval}")
        return value

    parse_number.__name__ = interval  # --help shows it
    return parse_number


def as_flag(name):
    """Return the flag of a setting; "from" is a word of Python, so its setting is from_run."""
    return "--" + name.removesuffix("_run").replace("_", "-")


def parse_settings(Settings, description, argv):
    """Return {setting: value} of the flags given; UserError for an unknown one.

    `Settings` is a dataclass. Each field is a flag. Its annotation is a parser of the text or the
    choices, and its comment is the help.
    """
    parser = Parser(description)
    help_of = dict(re.findall(r"(\w+): .+  # (.+)", inspect.getsource(Settings)))
    for f in fields(Settings):
        options = {"type": f.type, "metavar": getattr(f.type, "__name__", None)}
        if f.type is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif isinstance(f.type, tuple):
            options = {"choices": f.type}
        text = f"{help_of[f.name]} (default: {f.default})".replace("%", "%%")
        options |= {"dest": f.name, "default": argparse.SUPPRESS, "help": text}
        parser.add_argument(as_flag(f.name), **options)
    text = "print the settings and stop"
    parser.add_argument("--dry-run", action="store_true", default=argparse.SUPPRESS, help=text)
    return vars(parser.parse_args(argv))


def show_settings(s, given, source):
    """Print the settings that differ from the defaults, as flags; `source` is that of the others.

    What the source switches off (0, none) is left out.
    """
    flags = []
    for f in fields(s):
        value = getattr(s, f.name)
        if value == f.default or (f.name not in given and value in (0, "none")):
            continue
        flag = as_flag(f.name)
        if f.type is bool:
            flags.append(flag if value else "--no-" + f.name)
        else:
            flags.append(f"{flag} {shlex.quote(str(value))}")
    text = f"settings: {' '.join(flags)} (what was not given is from {source})"
    tell(textwrap.fill(text, 79, break_on_hyphens=False, break_long_words=False))


# -------------------------------------------------------------------------------------------------
# files


def lock(file):
    """Lock an open file until it is closed.

    Return "ours", "taken" if another process has locked it, or "unknown" on Windows and where the
    file system has no locks.
    """
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return "taken"
    except (ImportError, OSError):
        return "unknown"
    return "ours"


def sweep(temporary):
    """Remove the temporary files of killed processes. A living process has locked its own."""
    for path in temporary:
        with suppress(OSError), open(path, "rb+") as file:  # this mode creates no file
            old = time.time() - path.stat().st_mtime > 1  # a new one may not be locked yet
            if old and lock(file) == "ours":
                path.unlink()


def is_stream(path):
    """Is `path` a device, a pipe, or a name of an output that is already open?"""
    if str(path).startswith(("/dev/std", "/dev/fd/", "/proc/self/fd/")):
        return True
    return os.path.exists(path) and not os.path.isfile(path)


def atomic_write(path, data):
    """Write bytes or text to `path` so that it is never half-written. A stream is written directly.

    An OSError names the path.
    """
    if isinstance(data, str):
        data = data.encode()
    try:
        if str(path) in ("/dev/stdout", "/dev/fd/1"):
            sys.stdout.flush()
            sys.stdout.buffer.write(data)
        elif is_stream(path):
            with open(path, "ab") as file:
                file.write(data)
        else:
            replace_file(Path(path).resolve(), data)  # a link stays a link
    except OSError as error:
        error.filename = str(path)
        raise


def replace_file(path, data):
    """Write bytes to a temporary file, and rename that to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent.glob(f".{path.name}.????????.tmp"))
    temp = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # no other writer has it
    try:
        with open(temp, "wb") as file:
            lock(file)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.utime(temp)  # so that no other writer takes it for an old one
        os.replace(temp, path)
    finally:
        temp.unlink(missing_ok=True)


def write_json(path, value):
    atomic_write(path, json.dumps(value, indent=2) + "\n")


def read_json(path):
    """Return the object in a JSON file. Raises UserError if it is missing or not an object."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable JSON object ({error})") from None
    require(isinstance(value, dict), f"{path}: not a readable JSON object")
    return value


def sha256_of(*paths):
    """Return the hex digest over the bytes of files, one after another."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: digest)  # adds the file to what it is given
    return digest.hexdigest()


def read_safetensors(path):
    """Return ({name: tensor}, metadata) of a safetensors file; UserError if missing or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}); copy it again") from None


def parse_safetensors(data, path):
    """Return ({name: tensor}, metadata) of `data`, the bytes of a checkpoint at `path`."""
    try:
        tensors = from_safetensors(data)
    except SafetensorError as error:
        lost = "the run cannot be resumed; its best model so far, if any, is in best/"
        raise UserError(f"{path}: damaged ({error}); {lost}") from None
    size = int.from_bytes(data[:8], "little")  # of the header
    return tensors, json.loads(data[8 : 8 + size]).get("__metadata__", {})


def save_tensors(path, tensors, **header):
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    atomic_write(path, to_safetensors(tensors, header))


def cache_home():
    """Return the folder for what cannot be written beside the data."""
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("NANOPRUNE_CACHE") or user_cache / "nanoprune")


def writable(folder):
    """Is `folder` there, and may we write to it?

    Root may write everywhere. A folder without any write permission is left alone all the same.
    """
    return os.access(folder, os.W_OK) and folder.stat().st_mode & 0o222 > 0


@contextmanager
def claimed(out, resume, is_demo):
    """Let no other process train in the run folder `out`; remove what a killed one left there.

    What is locked is metrics.jsonl. The demo deletes the files of an earlier demo. Raises UserError
    where something else is in the folder, unless that is a run to resume. A folder in which nothing
    was written is removed at the end.
    """
    if not is_rank_0():
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "metrics.jsonl", "ab") as log:
        free = lock(log) != "taken" and os.fstat(log.fileno()).st_nlink  # 0: deleted meanwhile
        require(free, f"--out {out}: another process trains there")
        try:
            is_run = (out / "config.json").exists()
            if is_demo and is_run:
                clear_demo(out, log)
            elif not (resume and is_run):
                empty = os.listdir(out) == ["metrics.jsonl"] and os.path.getsize(log.name) == 0
                require(empty, f"--out {out}: not empty; add --resume to a run, or name another")
            sweep(out.rglob(".*.????????.tmp"))
            yield
        finally:
            with suppress(OSError):
                if os.path.getsize(log.name) == 0:
                    os.remove(log.name)
                    out.rmdir()


def clear_demo(out, log):
    """Delete what an earlier demo wrote into `out`; its log stays, empty and locked."""
    same = read_json(out / "config.json").get("command") == "python train.py"
    require(same, f"{out}: not made by `python train.py`; move it away, or give --out")
    for name in ("model", "best"):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in ("config.json", "result.json"):
        (out / name).unlink(missing_ok=True)
    for path in out.glob("*.safetensors"):
        path.unlink()
    log.truncate(0)


@dataclass
class Log:
    """metrics.jsonl. Only rank 0 writes it."""

    path: Path
    rank: int

    def row(self, **values):
        if self.rank == 0:
            with open(self.path, "a") as file:
                file.write(json.dumps(values) + "\n")

    def cut(self, step):
        """Drop the rows after `step` and a torn last one, which a resumed run writes again."""
        if self.rank > 0:
            return
        size = 0
        with open(self.path, "rb+") as file:
            with suppress(ValueError, KeyError, TypeError):  # at a torn line
                for line in file.readlines():
                    if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                        break
                    size += len(line)
            file.truncate(size)  # in place, because the file is locked


# -------------------------------------------------------------------------------------------------
# processes and the machine


DEVICES = ("auto", "cpu", "cuda", "mps")


def pick_device(name):
    """Return the torch.device for "auto", "cpu", "cuda" or "mps".

    Raises UserError where this machine does not have it.
    """
    found = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = [kind for kind in found if found[kind]][0]
    require(found[name], f"--device {name}: this machine, or this build of torch, has none")
    return torch.device(name)


def join_processes(device_name):
    """Return (rank, world size, device) of this process, after it has joined the others.

    Tensors on a CPU travel by gloo, and those on GPUs by nccl. The processes wait for each other
    for three hours, because the first one on a machine may have to download and tokenise.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    launched = world == 1 or {"RANK", "MASTER_ADDR"} <= os.environ.keys()
    require(launched, "WORLD_SIZE is set, but not by torchrun: use torchrun, or unset it")
    rank = int(os.environ["RANK"]) if world > 1 else 0
    device = pick_device(device_name)
    if world > 1 and device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=3))
    return rank, world, device


def pick_dtype(device):
    """Return "bf16" where the device multiplies in it, else "fp16" on GPUs and "fp32" elsewhere.

    GPUs tell it themselves. Those that only emulate bf16 are slow in it. A CPU multiplies in bf16
    if it has AVX512-BF16 or AMX.
    """
    if device.type == "cuda":
        real = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if real else "fp16"
    can = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11 does not tell: {}
    able = can.get("avx512_bf16") or can.get("amx_bf16")
    return "bf16" if device.type == "cpu" and able else "fp32"


def autocast(device, dtype):
    """Return the autocast context for `dtype`, which is "fp32", "bf16" or "fp16"."""
    if dtype == "fp32":
        return nullcontext()
    half = torch.bfloat16 if dtype == "bf16" else torch.float16
    return torch.autocast(device.type, half)


def from_rank_0(data, rank, world):
    """Return the bytes `data` of rank 0 on every rank, so that machines need no shared disk."""
    if world == 1:
        return data
    size = torch.tensor(len(data))
    dist.broadcast(size, 0)
    received = torch.zeros(int(size), dtype=torch.uint8)
    if rank == 0:
        received = torch.from_numpy(np.frombuffer(data, np.uint8).copy())
    for part in received.split(1 << 28):
        dist.broadcast(part, 0)
    return received.numpy().tobytes()


def peak_memory(device):
    """Return the bytes that tensors took at most on CUDA, and the process elsewhere; 0: unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def surroundings():
    """Return what config.json of a run folder says of the program and the machine."""
    versions = {m.__name__: m.__version__ for m in (torch, np, tokenizers, safetensors)}
    return {
        "git_commit": git_commit(),
        "threads": torch.get_num_threads(),
        "versions": versions | {"python": platform.python_version()},
        "platform": platform.platform(),
    }


def git_commit():
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    with suppress(OSError, subprocess.TimeoutExpired):  # there is no git, or it hangs
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)
        return done.stdout.strip() or None
