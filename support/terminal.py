"""The terminal: errors of one line, flags, the progress line, signals, and what is said first.

Programs import this file before torch, because importing torch takes a second or two. When Python
runs one of our programs, this file says so at once, and lets Ctrl-C end the program.
"""

import argparse
import inspect
import os
import re
import shlex
import signal
import sys
import textwrap
from contextlib import contextmanager
from dataclasses import fields
from functools import wraps
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent


def greet():
    """Say that torch is loading, and let Ctrl-C end the program at once, if it is one of ours."""
    program = Path(getattr(sys.modules["__main__"], "__file__", None) or "").resolve()
    if program.parent in (ROOT, ROOT / "tools") and "torch" not in sys.modules:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        print("loading torch", file=sys.stderr)


greet()

# ---------- errors and lines ----------------------------------------------------------------------


class UserError(Exception):
    """A mistake of the user, described in one line."""


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
            text, status = f"error: {' '.join(str(error).splitlines())[:2000]}", 2
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


def warn(text):
    """Print a warning on stderr. Of several processes only rank 0 prints it."""
    if is_rank_0():
        tell(f"warning: {text}", sys.stderr)


def is_rank_0():
    """Is this the only process of a run, or the first of several?"""
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    return alone or os.environ.get("RANK", "0") == "0"


def quote(text):
    """Return a text from a file as messages show it: in quotes, and at most 200 characters."""
    text = str(text)
    return f'"{text}"' if len(text) <= 200 else f'"{text[:200]}..."'


NO_SHARES = ("nist", "cider")  # the metrics that are no fraction of 1


def as_shown(name, value):
    """Return the number that is shown for a metric: a fraction of 1 in percent."""
    return value if name in NO_SHARES else 100 * value


def figure(name, value):
    """Return the text that is shown for a metric."""
    return f"{as_shown(name, value):.{4 if name in NO_SHARES else 2}f}"


def show(metrics):
    """Return metrics as the terminal shows them."""
    return "  ".join(f"{name} {figure(name, value)}" for name, value in metrics.items())


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


@contextmanager
def signals_noted(alone):
    """Give a list to which SIGINT, SIGTERM and SIGHUP add their number, and do nothing else.

    With `alone`, for a single process, a second signal ends the process at once.
    """
    noted = []

    def note(number, frame):
        noted.append(number)
        if alone:
            signal.signal(number, signal.SIG_DFL)

    numbers = [signal.SIGINT, signal.SIGTERM]
    hangup = getattr(signal, "SIGHUP", None)  # Windows has none, and nohup ignores it
    if hangup and signal.getsignal(hangup) != signal.SIG_IGN:
        numbers.append(hangup)
    handlers = {number: signal.signal(number, note) for number in numbers}
    try:
        yield noted
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


# ---------- flags ---------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """A parser that raises UserError for a wrong, abbreviated or empty flag."""

    def __init__(self, description, **options):
        layout = argparse.RawDescriptionHelpFormatter
        options |= {"description": description, "formatter_class": layout}
        super().__init__(**options, allow_abbrev=False)

    def error(self, message):
        raise UserError(f"{message.removeprefix('argument ')}; see --help")

    def parse_args(self, argv=None):
        args = super().parse_args(argv)
        for name, value in vars(args).items():
            if "" in (value if isinstance(value, list) else [value]):
                raise UserError(f"{name}: the value is empty; give one, or leave it out")
        return args


def number(parse, interval):
    """Return a parser of text: `parse` makes a number, which is in an interval such as "(0, 1]".

    NaN is in none.
    """
    low, high = [float(end) for end in interval[1:-1].split(",")]

    def parse_number(text):
        value = parse(text)
        at_end = (value == low and interval[0] == "[") or (value == high and interval[-1] == "]")
        if not (low < value < high or at_end):
            raise argparse.ArgumentTypeError(f"{text}: expected a number in {interval}")
        return value

    parse_number.__name__ = interval  # --help shows it
    return parse_number


# The bound of a rate is what a float32 can hold, with room for a product of two of them. That of a
# count leaves room in an int64.
COUNT = number(int, "[1, 1e9]")
COUNT_OR_OFF = number(int, "[0, 1e9]")
RATE = number(float, "[0, 1e9]")
POSITIVE = number(float, "(0, inf)")
POSITIVE_SHARE = number(float, "(0, 1]")
BELOW_ONE = number(float, "[0, 1)")


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
        default = "" if f.default is None else f" (default: {f.default})"
        text = f"{help_of[f.name]}{default}".replace("%", "%%")
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
