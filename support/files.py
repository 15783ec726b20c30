"""Files: locked, written whole or not at all, and read with errors of one line."""

import hashlib
import json
import os
import secrets
import shutil
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from support.terminal import UserError, is_rank_0

# ---------- reading and writing -------------------------------------------------------------------


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
    """Write `data` to `path` so that it is never half-written. A stream is written directly.

    `data` is text, bytes, or parts of bytes one after another. An OSError names the path.
    """
    if isinstance(data, str):
        data = data.encode()
    parts = [data] if isinstance(data, bytes) else data
    try:
        if str(path) in ("/dev/stdout", "/dev/fd/1"):
            sys.stdout.flush()
            sys.stdout.buffer.writelines(parts)
        elif is_stream(path):
            with open(path, "ab") as file:
                file.writelines(parts)
        else:
            replace_file(Path(path).resolve(), parts)  # a link stays a link
    except OSError as error:
        error.filename = str(path)
        raise


def replace_file(path, parts):
    """Write parts of bytes to a temporary file, and rename that to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent.glob(f".{path.name}.????????.tmp"))
    temp = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # no other writer has it
    try:
        with open(temp, "wb") as file:
            lock(file)
            file.writelines(parts)
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
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error  # without the path, which stands there
        raise UserError(f"{path}: not a readable JSON object ({reason})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a readable JSON object")
    return value


def read_optional(path):
    """Return the object in a JSON file, an empty one where the file is missing."""
    return read_json(path) if path.is_file() else {}


def sha256_of(*paths):
    """Return the hex digest over the bytes of files, one after another."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: digest)  # adds the file to what it is given
    return digest.hexdigest()


def cache_home():
    """Return the folder for what cannot be written beside the data."""
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("NANOPRUNE_CACHE") or user_cache / "nanoprune")


def make_folder(path):
    """Create a folder if we may. If not, the first file that must be there is the error."""
    with suppress(OSError):
        os.makedirs(path, exist_ok=True)


def writable(folder):
    """Is `folder` there, and may we write to it?

    Root may write everywhere. A folder without any write permission is left alone all the same.
    """
    return os.access(folder, os.W_OK) and folder.stat().st_mode & 0o222 > 0


# ---------- the folder of a run that trains -------------------------------------------------------


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
        taken = lock(log) == "taken"
        deleted = os.fstat(log.fileno()).st_nlink == 0  # by the process that had locked it
        if taken or deleted:
            raise UserError(f"--out {out}: another process trains there")
        try:
            is_run = (out / "config.json").exists()
            if is_demo and is_run:
                clear_demo(out, log)
            elif not (resume and is_run):
                if os.listdir(out) != ["metrics.jsonl"] or os.path.getsize(log.name) > 0:
                    advice = "add --resume to a run, or name another"
                    raise UserError(f"--out {out}: not empty; {advice}")
            sweep(out.rglob(".*.????????.tmp"))
            yield
        finally:
            with suppress(OSError):
                if os.path.getsize(log.name) == 0:
                    os.remove(log.name)
                    out.rmdir()


def clear_demo(out, log):
    """Delete what an earlier demo wrote into `out`; its log stays, empty and locked."""
    if read_json(out / "config.json").get("command") != "python train.py":
        raise UserError(f"{out}: not made by `python train.py`; move it away, or give --out")
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
