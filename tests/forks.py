"""Processes of the program that need not import torch, which takes seconds: a server forks them.

The server is this file, run as a program. It imports torch and our modules once, and computes
nothing: the threads of torch that compute do not survive a fork. A fork has its own environment,
folder and standard output, as if a shell had started it, and Python's exit is imitated.
"""

import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parent.parent
PRELOADED = ("pytest", "train", "eval", "tools.report", "tools.grid", "tools.deploy")
PRELOADED += ("torch._dynamo",)  # every optimizer imports it, in two seconds
FAILED_FLUSH = 120  # the status of Python where its last output cannot be written

# -------------------------------------------------------------------------------------------------
# in the server


def become(argv, fds, env, cwd):
    """Turn this process, a fork, into the program `argv`, and end it.

    `argv` is a module, or "module:function" in place of its main, and the arguments.
    """
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    tqdm.set_lock(threading.RLock())  # the usual one is shared by all forks
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    for target, fd in enumerate(fds, 1):
        os.dup2(fd, target)
    sys.stdin = open(os.devnull)
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    module, _, function = argv[0].partition(":")
    sys.argv = [module, *argv[1:]]
    try:
        status = getattr(importlib.import_module(module), function or "main")(argv[1:])
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        status = FAILED_FLUSH
    os._exit(status or 0)


def watch(request, fds, status):
    """Fork a program, and write its process id and then its status into the pipe `status`."""
    pid = os.fork()
    if pid == 0:
        os.close(status)
        become(request["argv"], fds, request["env"], request["cwd"])
    for fd in fds:
        os.close(fd)
    with open(status, "w", buffering=1) as pipe:
        print(pid, file=pipe)
        _, code = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(code), file=pipe)
    os._exit(0)


def serve(connection):
    """Fork what is asked for, until nobody can ask any more."""
    for name in PRELOADED:
        importlib.import_module(name)
    while True:
        message, fds, _, _ = socket.recv_fds(connection, 1 << 20, 3)
        if not message:
            break
        if os.fork() == 0:
            connection.close()
            watch(json.loads(message), fds[:2], fds[2])
        for fd in fds:
            os.close(fd)
        reap(os.WNOHANG)
    reap(0)


def reap(options):
    """Take the statuses of children that have ended, so that their time counts as ours."""
    try:
        while os.waitpid(-1, options)[0]:
            pass
    except ChildProcessError:
        pass


# -------------------------------------------------------------------------------------------------
# in the tests


class Server:
    """Starts the server when it is needed first. Any thread may ask it."""

    def __init__(self):
        self.lock = threading.Lock()
        self.process = None
        self.forks = []

    def ask(self, message, fds):
        with self.lock:
            if self.process is None:
                self.ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                with theirs:
                    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
                    here = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
                    command = [sys.executable, __file__, str(theirs.fileno())]
                    fd = theirs.fileno()
                    self.process = subprocess.Popen(command, pass_fds=[fd], env=here)
            socket.send_fds(self.ours, [message], fds)

    def close(self):
        """End the server and the forks that are left."""
        for fork in self.forks:
            fork.kill()
        if self.process is not None:
            self.ours.close()
            self.process.wait()
            self.process = None


SERVER = Server()


class Fork:
    """What subprocess.Popen is, for a module of the program and its arguments; see `become`.

    `stdout` and `stderr` are open files, file descriptors, or None for those of the tests.
    """

    def __init__(self, argv, stdout=None, stderr=None, env=None, cwd=ROOT):
        self.returncode = None
        streams = []
        for stream, usual in ((stdout, 1), (stderr, 2)):
            streams.append(usual if stream is None else stream)
        env = dict(os.environ if env is None else env)
        request = {"argv": [str(word) for word in argv], "env": env, "cwd": str(cwd)}
        reading, writing = os.pipe()
        try:
            SERVER.ask(json.dumps(request).encode(), [*map(fileno, streams), writing])
        finally:
            os.close(writing)
        SERVER.forks.append(self)
        self.pipe = open(reading, "rb", buffering=0)
        self.pid = int(self.pipe.readline())

    def wait(self, timeout=None):
        """Return the exit status, or that of a signal as a negative number."""
        if self.returncode is None:
            if not select.select([self.pipe], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("a fork", timeout)
            self.returncode = int(self.pipe.readline())
            self.pipe.close()
        return self.returncode

    def poll(self):
        """Return the exit status, or None while the process runs."""
        try:
            return self.wait(timeout=0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def fileno(stream):
    return stream if isinstance(stream, int) else stream.fileno()


def run(argv, folder, **options):
    """Run a program to its end; return its status, and what it wrote to stdout and to stderr.

    `folder` is one for the files of its output.
    """
    return results([start(argv, folder, **options)])[0]


def start(argv, folder, **options):
    """Start a program that writes into files of a folder; see `results`."""
    with open(folder / "stdout", "w") as out, open(folder / "stderr", "w") as err:
        return Fork(argv, out, err, **options), folder


def results(started):
    """Wait for programs of `start`; return (status, stdout, stderr) of each."""
    found = []
    for fork, folder in started:
        status = fork.wait()
        found.append((status, (folder / "stdout").read_text(), (folder / "stderr").read_text()))
    return found


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
