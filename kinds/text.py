"""Files of text: their lines, and their tokens as flat arrays."""

import csv
import gzip
import io
import json
import re
import sys
import zlib
from itertools import zip_longest
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from support.terminal import UserError, live, quote, tell


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


def read_rows(
    path, data, columns, label="", header=(), official=False, drop_broken=False, quoted=False
):
    """Return [(text, label, place in the file)] of the rows of a file.

    Its ending says its form: .csv (RFC 4180), .jsonl (an object on each line), else TSV. A `quoted`
    TSV has quotes and line breaks as in a .csv. A text is a string, or of two `columns` a pair of
    strings. The label is "" where no column of labels is named. `header` are the columns of a file
    without a header line. `drop_broken`: rows with missing fields are dropped, and not refused. A
    row of too many fields passes in `official` files, as it does in the official scripts. Raises
    UserError that names a row or column.
    """
    names = [*columns, label] if label else list(columns)
    header, rows = split_rows(path, decode(path, data), names, list(header), quoted)
    for name in names:
        if header.count(name) != 1:
            wrong = "two columns" if name in header else "no column"
            found = f"the header line has {quote(', '.join(header))}"
            raise UserError(f'{path}:1: {wrong} "{name}"; {found}')
    places = [header.index(name) for name in names]
    while len(header) > 1 and rows and rows[-1][1] == [""]:
        rows.pop()  # empty lines at the end
    found = []
    for number, fields in rows:
        missing = header[len(fields) :]
        if missing and (drop_broken or (official and fields == [""])):
            continue
        if missing or (len(fields) > len(header) and not official):
            hint = f'"{missing[0]}" is missing' if missing else "a tab inside a text?"
            if any(field.startswith('"') for field in fields):
                hint += '; if the file has quotes as pandas writes them, give "quoted": true'
            counts = f"{len(fields)} columns, expected {len(header)}"
            raise UserError(f"{path}:{number}: {counts}: {hint}")
        *texts, last = [fields[place] for place in places]
        if not label:
            texts.append(last)
        text = texts[0] if len(texts) == 1 else tuple(texts)
        found.append((text, last if label else "", f"{path}:{number}"))
    return found


def split_rows(path, text, names, header, quoted):
    """Return (header, [(number of the line, fields)]) of a file; see `read_rows`."""
    form = Path(str(path).removesuffix(".gz")).suffix
    if "\n" not in text:
        text = text.replace("\r", "\n")  # as the oldest Macs wrote it
    if form == ".csv" or (quoted and not header):
        rows = quoted_rows(path, text, "," if form == ".csv" else "\t")
    else:
        # not splitlines(), because U+2028 and its like are text
        lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
        if form == ".jsonl":
            rows = enumerate(lines, 1)
            return names, [(i, json_fields(line, names, f"{path}:{i}")) for i, line in rows]
        rows = [(i, line.split("\t")) for i, line in enumerate(lines, 1)]
        if not header:
            warn_of_quotes(path, rows)
    if not header:
        (_, header), *rows = rows
    return header, rows


def quoted_rows(path, text, delimiter):
    """Return [(number of the line, fields)] of a file with quotes."""
    csv.field_size_limit(2**31 - 1)  # a text may be long
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows = []
    number = 1
    try:
        for fields in reader:
            rows.append((number, fields or [""]))
            number = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}:{number}: quotes do not fit ({error})") from None
    return rows or [(1, [""])]


def json_fields(line, names, place):
    """Return the values of an object of JSON as text."""
    try:
        row = json.loads(line)
        fields = [row[name] for name in names]
        if any(type(value) not in (str, int, float, bool) for value in fields):
            raise TypeError("a value is neither a text nor a number")
        fields = [value if type(value) is str else json.dumps(value) for value in fields]
        "".join(fields).encode()  # a ValueError for half a character
    except KeyError as error:
        raise UserError(f"{place}: no key {error}") from None
    except (TypeError, ValueError, RecursionError) as error:
        expected = f"expected a JSON object with {', '.join(names)}"
        raise UserError(f"{place}: {error}; {expected}") from None
    return fields


def warn_of_quotes(path, rows):
    """Say where a field of a TSV is quoted as pandas does it. The quotes are read as text."""
    for number, fields in rows:
        if any(re.fullmatch('"(?:[^"]|"")*"', field) for field in fields):
            cure = '"quoted": true in the task file removes the quotes'
            tell(f"warning: {path}:{number}: a field is in quotes; {cure}", sys.stderr)
            return


def check_lines(path, expected, found):
    """Raise UserError with the first line of a file that is not the expected one."""
    together = zip_longest(expected, found, fillvalue="no line")
    for number, (ours, theirs) in enumerate(together, 1):
        if ours != theirs:
            counts = f"found {quote(theirs)}, expected {quote(ours)}"
            raise UserError(f"{path}: near line {number}: {counts}")


def copy_of(tokenizer):
    """Return a copy, whose settings may be changed."""
    return Tokenizer.from_str(tokenizer.to_str())


def encode(texts, tokenizer, max_length):
    """Return the arrays of texts or pairs of texts. Of a pair the longer text is cut first.

    Besides `flat`: "cut" (n,), of which rows something is cut.
    """
    tokenizer = copy_of(tokenizer)
    tokenizer.enable_truncation(max_length, strategy="longest_first")
    ids = []
    second = []
    cut = []
    with live("tokenise", len(texts)) as bar:
        for start in range(0, len(texts), 4096):  # in chunks: an Encoding takes much memory
            chunk = tokenizer.encode_batch_fast(texts[start : start + 4096])
            for encoding in chunk:
                ids.append(np.array(encoding.ids, np.int32))
                second.append(len(ids[-1]) - sum(encoding.type_ids))
                cut.append(bool(encoding.overflowing))
            bar.update(len(chunk))
    return flat(ids, second) | {"cut": np.array(cut)}


def flat(ids, second):
    """Return ids, lengths and second (see Dataset) of the rows `ids`, by name."""
    lengths = np.array([len(row) for row in ids])
    ids = np.concatenate(ids, dtype=np.int32)
    return {"ids": ids, "lengths": lengths, "second": np.array(second, np.int32)}
