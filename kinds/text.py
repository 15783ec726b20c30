"""Files of text: their lines, and their tokens as flat arrays."""

import gzip
import zlib
from itertools import zip_longest
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from support.terminal import UserError, live


def decode(path, data):
    """Return the bytes `data` of a file as text; UserError with the line that is not UTF-8.

    A file whose name ends in .gz is unpacked first.
    """
    if Path(path).suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path}: not a whole gzip file ({error}); copy it again") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        byte = f"byte 0x{data[error.start]:02x}"
        raise UserError(f"{path}:{number}: {byte} is not UTF-8; convert the file") from None


def read_tsv(path, data, columns, label="", header=(), official=False, drop_broken=False):
    """Return [(text, label, place in the file)] of the rows of a TSV.

    A text is a string, or of two `columns` a pair of strings. The label is "" where no column of
    labels is named. `header` are the columns of a file without a header line. `drop_broken`: rows
    with missing fields are dropped, and not refused. A row of too many fields passes in `official`
    files, as it does in the official scripts. Raises UserError that names a row or column.
    """
    # not splitlines(), because U+2028 and its like are text
    lines = [line.removesuffix("\r") for line in decode(path, data).split("\n")]
    first = 0 if header else 1
    header = header or lines[0].split("\t")
    for name in (*columns, label):
        if name and name not in header:
            found = ", ".join(header)
            raise UserError(f'{path}:1: no column "{name}"; the header line has {found}')
    places = [header.index(name) for name in columns]
    rows = []
    for number, line in enumerate(lines[first:], first + 1):
        fields = line.split("\t")
        missing = header[len(fields) :]
        if line == "" or (missing and drop_broken):
            continue
        if missing or (len(fields) > len(header) and not official):
            hint = f'"{missing[0]}" is missing' if missing else "a tab inside a text?"
            counts = f"{len(fields)} columns, expected {len(header)}"
            raise UserError(f"{path}:{number}: {counts}: {hint}")
        texts = [fields[place] for place in places]
        text = texts[0] if len(texts) == 1 else tuple(texts)
        rows.append((text, fields[header.index(label)] if label else "", f"{path}:{number}"))
    return rows


def check_lines(path, expected, found):
    """Raise UserError with the first line of a file that is not the expected one."""
    together = zip_longest(expected, found, fillvalue="no line")
    for number, (ours, theirs) in enumerate(together, 1):
        if ours != theirs:
            raise UserError(f"{path}: near line {number}: found {theirs!r}, expected {ours!r}")


def copy_of(tokenizer):
    """Return a copy, whose settings may be changed."""
    return Tokenizer.from_str(tokenizer.to_str())


def encode(texts, tokenizer, max_length):
    """Return the arrays of texts or pairs of texts. Of a pair the longer text is cut first."""
    tokenizer = copy_of(tokenizer)
    tokenizer.enable_truncation(max_length, strategy="longest_first")
    ids = []
    second = []
    with live("tokenise", len(texts)) as bar:
        for start in range(0, len(texts), 4096):  # in chunks: an Encoding takes much memory
            chunk = tokenizer.encode_batch_fast(texts[start : start + 4096])
            for encoding in chunk:
                ids.append(np.array(encoding.ids, np.int32))
                second.append(len(ids[-1]) - sum(encoding.type_ids))
            bar.update(len(chunk))
    return flat(ids, second)


def flat(ids, second):
    """Return ids, lengths and second (see Dataset) of the rows `ids`, by name."""
    lengths = np.array([len(row) for row in ids])
    ids = np.concatenate(ids, dtype=np.int32)
    return {"ids": ids, "lengths": lengths, "second": np.array(second, np.int32)}
