"""Files of text: their lines, and their tokens as flat arrays."""

import csv
import gzip
import io
import json
import re
import zlib
from itertools import zip_longest
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from support.terminal import UserError, live, quote, warn


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
        read = error.object  # without a byte order mark
        end = b"\n" if b"\n" in read else b"\r"
        number = read.count(end, 0, error.start) + 1
        byte = f"byte 0x{read[error.start]:02x}"
        raise UserError(f"{path}:{number}: {byte} is not UTF-8; convert the file") from None


FORMS = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl"}
DELIMITERS = {"csv": ",", "quoted": "\t"}  # of the forms that have quotes
CURE = 'if the file has quotes as pandas writes them, give "quoted": true in the task file'


def read_rows(
    path, data, columns, label="", header=(), official=False, drop_broken=False, quoted=False
):
    """Return [(text, label, place in the file)] of the rows of a file.

    Its ending says its form: .csv (RFC 4180), .jsonl or .ndjson (an object on each line), else TSV.
    A `quoted` TSV has quotes and line breaks as in a .csv. A text is a string, or of two `columns`
    a pair of strings. The label is "" where no column of labels is named. `header` are the columns
    of a file without a header line, which is never quoted. `drop_broken`: rows with missing fields
    are dropped, and not refused. A row of too many fields passes in `official` files, as it does in
    the official scripts. An empty line is a row if there is one column. At the end of several
    columns it is none. Raises UserError that names a row or column.
    """
    names = [*columns, label] if label else list(columns)
    ending = Path(str(path).removesuffix(".gz")).suffix.lower()
    form = FORMS.get(ending, "quoted" if quoted and not header else "tsv")
    may_be_quoted = form == "tsv" and not official and not header
    header, rows = split_rows(path, decode(path, data), names, list(header), form)
    for name in names:
        if header.count(name) != 1:
            wrong = "two columns" if name in header else "no column"
            found = f"the header line has {quote(', '.join(header))}"
            near = wrong == "no column" and name in [column.strip(' "') for column in header]
            hint = f"; remove the spaces around it, or {CURE}" if near else ""
            raise UserError(f"{path}:1: {wrong} {quote(name)}; {found}{hint}")
    places = [header.index(name) for name in columns]
    last = header.index(label) if label else None
    while len(header) > 1 and rows and rows[-1][1] == [""]:
        rows.pop()  # empty lines at the end
    found = []
    for number, fields in rows:
        if len(fields) != len(header):
            missing = header[len(fields) :]
            if missing and (drop_broken or (official and fields == [""])):
                continue
            if missing or not official:
                hint = hint_of(fields, missing, form, may_be_quoted)
                counts = f"{len(fields)} columns, expected {len(header)}"
                raise UserError(f"{path}:{number}: {counts}: {hint}")
        texts = [fields[place] for place in places]
        text = texts[0] if len(texts) == 1 else tuple(texts)
        found.append((text, fields[last] if label else "", f"{path}:{number}"))
    if may_be_quoted:
        warn_of_quotes(found)
    return found


def hint_of(fields, missing, form, may_be_quoted):
    """Return what may be wrong with a row that has too few or too many fields."""
    if fields == [""]:
        return "an empty line; remove it"
    delimiter = "comma" if form == "csv" else "tab"
    hint = f"{quote(missing[0])} is missing" if missing else f"a {delimiter} inside a text?"
    if may_be_quoted and any(field.startswith('"') for field in fields):
        hint += f"; {CURE}"
    return hint


def split_rows(path, text, names, header, form):
    """Return (header, [(number of the line, fields)]) of a file; see `read_rows`."""
    if "\n" not in text:
        text = text.replace("\r", "\n")  # as the oldest Macs wrote it
    if form in DELIMITERS:
        rows = quoted_rows(path, text, DELIMITERS[form])
    else:
        # not splitlines(), because U+2028 and its like are text
        lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
        rows = list(enumerate(lines if text else [], 1))
        if form == "jsonl":
            while rows and not rows[-1][1].strip():
                rows.pop()  # empty lines at the end
            return names, [(i, json_fields(line, names, f"{path}:{i}")) for i, line in rows]
        rows = [(i, line.split("\t")) for i, line in rows]
    if not header:
        (_, header), *rows = rows or [(1, [""])]
    return header, rows


def quoted_rows(path, text, delimiter):
    """Return [(number of the line, fields)] of a file with quotes."""
    csv.field_size_limit(2**31 - 1)  # a text may be long
    # only "\n" ends a line, so the csv module refuses a "\r" that stands alone outside of quotes
    lines = io.StringIO(text, newline="\n")
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    rows = []
    number = 1
    try:
        for fields in reader:
            rows.append((number, fields or [""]))
            number = reader.line_num + 1
    except csv.Error as error:
        cure = 'expected " around a text with tabs, commas or line ends, and "" for each " inside'
        raise UserError(f"{path}:{number}: quotes do not fit ({error}); {cure}") from None
    return rows


def json_fields(line, names, place):
    """Return the values of an object of JSON as text. Numbers are as they stand in the file."""
    try:
        row = json.loads(line, object_pairs_hook=keys_once, parse_int=str, parse_float=str)
        if type(row) is not dict:
            raise ValueError("not an object")
        for name in names:
            if type(row.get(name)) not in (str, bool):
                raise ValueError(f"no text and no number under the key {quote(name)}")
        fields = [row[name] if type(row[name]) is str else json.dumps(row[name]) for name in names]
        "".join(fields).encode()  # a ValueError for half a character
    except (ValueError, RecursionError) as error:
        broken = isinstance(error, json.JSONDecodeError)
        reason = f"{error.msg} at character {error.pos + 1}" if broken else error
        expected = f"expected a JSON object with {quote(', '.join(names))}"
        raise UserError(f"{place}: {reason}; {expected}") from None
    return fields


def keys_once(pairs):
    """Return the dict of an object of JSON; ValueError for a key that is there twice."""
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("a key is there twice")
    return row


def warn_of_quotes(rows):
    """Say where a text of a TSV is quoted as pandas does it. The quotes are read as text."""
    for text, _, place in rows:
        fields = [text] if isinstance(text, str) else text
        if any(re.fullmatch('"(?:[^"]|"")*"', field) for field in fields):
            warn(f"{place}: a text is in quotes; {CURE}")
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
