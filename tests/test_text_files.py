"""Files of texts for sources: E2E, WebNLG, DART and your own; their tokens; scores of any system.

tests/test_generate.py has whole runs of the kind "generate". With real files the official counts
are tested too:

    E2E_DIR=... WEBNLG_DIR=... python -m pytest tests/test_text_files.py
"""

import csv
import gzip
import io
import json
import os
import zipfile
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
import pytest
from test_errors import refused, refused_file

import data
import eval as evaluation
from data import get_task, kind_of, load_dataset, load_dev, read_split
from kinds.bleu import bleu, tokens_of
from kinds.classify import IGNORED
from kinds.generate import encode_texts
from kinds.text import copy_of
from models.tokenizer import load_tokenizer
from support import fetch
from support.terminal import UserError

E2E = Path(os.environ.get("E2E_DIR") or "missing")
WEBNLG = Path(os.environ.get("WEBNLG_DIR") or "missing")
ROW = {"name": "t", "kind": "generate", "train": "train.csv", "dev": "dev.csv"}
ROW |= {"source": "source", "text": "text", "metric": ["bleu", "nist"]}


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    """No test reaches the network or the user's cache."""

    def refusing(source, path):
        raise AssertionError(f"{source} would be downloaded")

    monkeypatch.setattr(fetch, "download", refusing)
    monkeypatch.setenv("NANOPRUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tokenizer(texts):
    """A byte-level BPE, as GPT-2's."""
    return load_tokenizer(texts[1], 400, framed=False)


def task_of(folder, **changes):
    path = folder / "task.json"
    row = {key: value for key, value in (ROW | changes).items() if value is not None}
    path.write_text(json.dumps(row))
    return get_task(None, path)


def read(content, path="FILE.csv", split="train", **options):
    """The sources and texts in a file of a task that has no files."""
    about = {"labels": (), "columns": ("source",), "label": "text", "options": options}
    task = data.Task(name="t", folder="t", kind="generate", **about)
    content = content if isinstance(content, bytes) else content.encode()
    return read_split(task, split, path, content)


wrong = partial(refused_file, read)


def as_csv(rows, end="\n", header=("source", "text")):
    out = io.StringIO()
    csv.writer(out, lineterminator=end).writerows([header, *rows])
    return out.getvalue()


# -------------------------------------------------------------------------------------------------
# E2E


def meant(mr, name="FILE.csv"):
    """The source that a meaning representation becomes."""
    return read(as_csv([(mr, "x")]), name, mr=True)[0][0][0]


def test_meaning_representations():
    """The eight attributes get the names of the published recipes, and keep their order."""
    mr = "name[Alimentum], area[city centre], familyFriendly[no]"
    assert meant(mr) == "name : Alimentum | area : city centre | family friendly : no"
    mr = "near[a], eatType[b], food[c], priceRange[d], customer rating[e], area[f], name[g]"
    expected = "near : a | Type : b | food : c | price : d | customer rating : e | area : f | name"
    assert meant(f"{mr}, familyFriendly[yes]") == f"{expected} : g | family friendly : yes"


@pytest.mark.parametrize(
    "mr, source",
    [
        ("near[Café Adriatic], priceRange[£20-25]", "near : Café Adriatic | price : £20-25"),
        ("name[a, b[c, d], food[e,f]", "name : a, b[c, d | food : e,f"),
        ("name[], food[ ]", "name :  | food : "),
        ("  name [ a ],food[b] ", "name : a | food : b"),
        ("name[a], name[b], other one[c]", "name : a | name : b | other one : c"),
    ],
)
def test_values(mr, source):
    """Commas, signs and letters of any kind stay; a value may be empty; spaces around one go."""
    assert meant(mr) == source


NO_MR = ("", "name", "name[a", "name a]", "[a]", "name[a],", ", name[a]", "name[a] food[b]")


@pytest.mark.parametrize("mr", [*NO_MR, "name[a]] food[b]"])
def test_no_meaning_representation(mr):
    """The file and the line are named, of a table and of your own text alike."""
    rows = as_csv([("name[x\ny]", "x"), (mr, "x")], "\r\n")
    message = f'FILE.csv:4: "{mr}" is not in the form name[value], name[value]'
    wrong(rows, message, mr=True)
    kind = kind_of(get_task("e2e"))
    with pytest.raises(UserError, match="FILE.csv:4: "):
        kind.read_input("FILE.csv", rows.replace("source", "mr").encode())
    with pytest.raises(UserError, match="standard input:2: "):
        kind.read_input("standard input", f"name[a]\n{mr}\n".encode(), ("mr",))


def test_long_meaning_representations():
    """A mistake after many attributes is found at once, and quoted in part."""
    many = ", ".join(f"a{i}[b]" for i in range(999))
    assert meant(many).count(" | ") == 998
    wrong(as_csv([(f"{many}, c", "x")]), "FILE.csv:2: ", "...", mr=True)


@pytest.mark.real
@pytest.mark.parametrize(
    "split, name, sources, count",
    [("train", "trainset", 4_862, 42_061), ("dev", "devset", 547, 4_672)],
)
def test_the_files_of_e2e(split, name, sources, count):
    """The official counts, and no attribute but the eight."""
    if not (E2E / f"{name}.csv").is_file():
        pytest.skip("needs E2E_DIR")
    task = get_task("e2e")
    path = fetch.locate(task, split, E2E)
    assert path == E2E / f"{name}.csv"
    texts, gold = read_split(task, split, path, path.read_bytes())
    assert sum(map(len, gold)) == count
    found = {text[0] for text in texts} if split == "train" else set(texts)
    assert len(found) == sources
    names = {slot.split(" : ")[0] for source in found for slot in source.split(" | ")}
    assert names == {
        *("name", "Type", "food", "price", "customer rating", "area", "family friendly", "near")
    }
    assert all(text for texts in gold for text in texts)
    if split == "dev":
        first = "name : Alimentum | area : city centre | family friendly : no"
        assert first in texts and len(gold[texts.index(first)]) > 1


# -------------------------------------------------------------------------------------------------
# WebNLG


def entry(*triples, good=(), other=(), category="Food"):
    rows = "".join(f"<mtriple>{escape(triple)}</mtriple>" for triple in triples)
    texts = "".join(f'<lex comment="good" lid="Id1">{escape(text)}</lex>' for text in good)
    texts += "".join(f'<lex comment="toFix">{escape(text)}</lex>' for text in other)
    original = "<originaltripleset><otriple>not | this | one</otriple></originaltripleset>"
    triples = f"<modifiedtripleset>{rows}</modifiedtripleset>"
    return f'<entry category="{category}" eid="Id1">{original}{triples}\n{texts}</entry>\n'


def webnlg(*entries):
    text = "\n".join(entries)
    head = '<?xml version="1.0" encoding="utf-8"?>'
    return f"{head}\n<benchmark><entries>{text}</entries></benchmark>\n"


def test_triples():
    """Subjects, properties and objects stay as they are; only texts marked good count."""
    rows = ('A_b | is a | "c, d"@en', "A_b | x&y<z | é_(1977)")
    first = entry(*rows, good=(" A. ", "B & é."), other="C")
    file = webnlg(first, entry("A | p | b", good=["D."]))
    source = 'A_b : is a : "c, d"@en | A_b : x&y<z : é_(1977)'
    pairs = [(source, "A."), (source, "B & é."), ("A : p : b", "D.")]
    for path in ("FILE.xml", "FILE.xml.gz"):
        content = gzip.compress(file.encode()) if path.endswith("gz") else file
        assert read(content, path) == (pairs, [["A."], ["B & é."], ["D."]])
        assert read(content, path, "dev") == ([source, "A : p : b"], [["A.", "B & é."], ["D."]])


def test_texts_of_later_releases():
    """They stand in an element of their own, beside others."""
    file = webnlg(entry("A | p | b", good="x"))
    for space in ("", "\n  "):
        inner = f"{space}<sortedtripleset/>{space}<text> Hi. </text>"
        assert read(file.replace(">x<", f">{inner}<"), "F.xml")[0] == [("A : p : b", "Hi.")]


def test_entries_without_a_good_text():
    """They are left out of every split alike, so that predictions and scores have equal rows."""
    file = webnlg(entry("a | b | c", other="x"), entry("d | e | f", good="yz", other="x"))
    assert read(file, "F.xml")[1] == [["y"], ["z"]]
    for split in ("dev", "test"):
        assert read(file, "F.xml", split)[0] == ["d : e : f"]
    wrong(webnlg(entry("a | b | c", other="x")), "FILE.xml: no row of data", path="FILE.xml")


def test_entries_without_texts():
    """A test split and your own sources need none. An entry of several texts is one row."""
    entries = entry("a | b | c"), entry("d | e | f", good="xy"), entry("a | b | c")
    file = webnlg(*entries).encode()
    assert read(file, "F.xml", "test")[0] == ["a : b : c", "d : e : f"]
    assert read(file, "F.xml", "dev")[0] == ["d : e : f"]
    kind = kind_of(get_task("webnlg"))
    rows = ["a : b : c", "d : e : f", "a : b : c"]
    assert kind.read_input("F.xml", file) == rows
    assert kind.read_input("F.xml.gz", gzip.compress(file)) == rows


@pytest.mark.parametrize(
    "file, message",
    [
        ("", "FILE.xml: no element found"),
        ("source,text\na,b\n", "FILE.xml: syntax error: line 1, column 0; expected the XML of the"),
        (webnlg(entry("a | b | c"))[:-20], "expected the XML of the WebNLG challenge of 2017"),
        ("<benchmark/>", "FILE.xml: no row of data"),
        (webnlg(entry()), "FILE.xml: entry number 1 has no triples; leave it out"),
        ("<b><entry/></b>", "FILE.xml: entry number 1 has no triples; leave it out"),
        (webnlg(entry("a | b | c"), entry("a | b")), 'entry number 2: "["a ", " b"]" is no triple'),
        (webnlg(entry("a | b | c | d")), "is no triple; expected a subject, a property and an ob"),
        (webnlg(entry("a | b | c", "")), 'FILE.xml: entry number 1: "[""]" is no triple'),
        (b"<b>\n\xff</b>", "FILE.xml:2: byte 0xff is not UTF-8"),
        (webnlg(entry("a | b | c", good=" ")), "FILE.xml: entry number 1 has a good text that is"),
    ],
)
def test_mistakes_in_webnlg(file, message):
    wrong(file, message, path="FILE.xml")


SEEN = entry("j | k | l", good="x", category="City")
UNSEEN = entry("m | n | o", good="x", category="Artist")
RIGHT = {
    "train/1triples/1triple_Food.xml": webnlg(entry("a | b | c", good="x")),
    "train/2triples/2triples_City.xml": webnlg(entry("d | é | f", good="x", category="City")),
    "dev/1triples/1triple_Food.xml": webnlg(entry("g | h | i", good="x")),
    "test/testdata_no_lex.xml": webnlg(entry("no | lex | m")),
    "test/testdata_with_lex.xml": webnlg(SEEN, UNSEEN),
    "test/testdata_unseen_with_lex.xml": webnlg(UNSEEN),
    "readme.txt": "text",
}
SOURCES = {"train": ["a : b : c", "d : é : f"], "dev": ["g : h : i"], "test": ["j : k : l"]}
SOURCES |= {"test_seen": ["j : k : l"], "test_unseen": ["m : n : o"]}
SOURCES["test"] += SOURCES["test_unseen"]


def archive(folder, files, name="webnlg2017.zip"):
    path = folder / "webnlg" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as zipped:
        for member, text in files.items():
            zipped.writestr(member, text)
    return path


def built(folder, splits=SOURCES):
    """The sources of each split of WebNLG in a folder of data."""
    task = replace(get_task("webnlg"), rows={})
    found = {}
    for split in splits:
        path = fetch.locate(task, split, folder)
        assert path == folder / "webnlg" / f"{split}.xml"
        found[split] = read_split(task, split, path, path.read_bytes(), role="dev")[0]
    return found


def below(folder, files=RIGHT):
    return {f"{folder}/{name}": text for name, text in files.items()}


OTHER = {name: webnlg(entry("other | release | x", good="x")) for name in RIGHT}


@pytest.mark.parametrize(
    "files",
    [
        RIGHT,
        below("webnlg_challenge_2017"),
        below("webnlg/x"),
        below("x/release_v3.0/en", OTHER) | below("x/webnlg_challenge_2017") | below("x/a", OTHER),
        RIGHT | {"__MACOSX/train/1triples/._1triple_Food.xml": "\0\5\26\7"},
    ],
    ids=["bare", "challenge", "folders", "official", "finder"],
)
def test_webnlg_is_built(files, tmp_path):
    """From the folders of the challenge, alone or among other releases; tests by category."""
    archive(tmp_path, files)
    assert built(tmp_path) == SOURCES


def test_webnlg_is_built_once(tmp_path):
    """A file that is there stays as it is, and the built files alone are enough."""
    folder = tmp_path / "webnlg"
    folder.mkdir()
    mine = webnlg(entry("mine | is | here", good="x"))
    (folder / "dev.xml").write_text(mine)
    zipped = archive(tmp_path, RIGHT)
    expected = SOURCES | {"dev": ["mine : is : here"]}
    assert built(tmp_path) == expected
    assert (folder / "dev.xml").read_text() == mine
    zipped.unlink()
    assert built(tmp_path) == expected


def test_webnlg_beside_the_data(tmp_path):
    """The zip is found in DATA_DIR and in DATA_DIR/webnlg; a folder without it asks for a file."""
    archive(tmp_path, RIGHT, "webnlg-dataset.zip").rename(tmp_path / "webnlg-dataset.zip")
    assert built(tmp_path) == SOURCES
    (tmp_path / "empty").mkdir()
    with pytest.raises(AssertionError, match="gitlab.com/shimorina/.* would be downloaded"):
        built(tmp_path / "empty")


def test_webnlg_in_a_folder_that_is_not_ours(tmp_path):
    """What is made from a read-only folder goes to the cache."""
    archive(tmp_path / "data", RIGHT)
    (tmp_path / "data").chmod(0o555)
    path = fetch.locate(get_task("webnlg"), "dev", tmp_path / "data")
    (tmp_path / "data").chmod(0o755)
    assert path.is_relative_to(tmp_path / "cache") and path.is_file()
    assert [file.name for file in (tmp_path / "data/webnlg").iterdir()] == ["webnlg2017.zip"]


def test_a_zip_without_a_split(tmp_path, monkeypatch):
    """The zip and the split are named, also where the zip was downloaded; others are built."""
    parts = {name: text for name, text in RIGHT.items() if not name.startswith("test")}
    zipped = archive(tmp_path / "a", parts)
    assert built(tmp_path / "a", ["train", "dev"]) == {s: SOURCES[s] for s in ("train", "dev")}
    for split in ("test", "test_seen", "test_unseen"):
        with pytest.raises(UserError, match=f"{zipped}: has no XML files of the {split} split$"):
            built(tmp_path / "a", [split])
    (tmp_path / "b").mkdir()
    monkeypatch.setattr(fetch, "download", lambda source, path: path.write_bytes(whole))
    whole = zipped.read_bytes()
    with pytest.raises(UserError, match="webnlg-dataset-.*zip: has no XML files of the test split"):
        built(tmp_path / "b", ["test"])


def test_unseen_is_known_with_a_training_set_alone(tmp_path):
    """Without one no category is known, and nothing is said to be unseen."""
    archive(tmp_path, {name: text for name, text in RIGHT.items() if name.startswith("test")})
    assert built(tmp_path, ["test"])["test"] == SOURCES["test"]
    with pytest.raises(UserError, match="no XML files of the test_unseen split"):
        built(tmp_path, ["test_unseen"])


@pytest.mark.parametrize("damage", ["text", "cut", "bytes", "xml"])
def test_a_damaged_zip(damage, tmp_path):
    """One line names it, and its file that is damaged; nothing is written."""
    member = "train/1triples/1triple_Food.xml"
    path = archive(tmp_path, RIGHT | ({member: "<a>"} if damage == "xml" else {}))
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[:-100]
    if damage == "text":
        content = b"text"
    if damage == "bytes":
        begin = content.index(member.encode()) + len(member)
        content[begin : begin + 20] = b"\xff" * 20
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        built(tmp_path)
    message = str(caught.value)
    place = f"{path}: {member}: " if damage in ("bytes", "xml") else f"{path}: "
    assert message.startswith(f"{place}not a usable zip: ") and "\n" not in message
    assert message.endswith("; remove it to download it")
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.real
def test_the_files_of_webnlg(tmp_path):
    """The official counts of entries, of their texts, and of those that are marked good."""
    found = sorted(WEBNLG.glob("webnlg*.zip"))
    if not found:
        pytest.skip("needs WEBNLG_DIR")
    (tmp_path / "webnlg").mkdir()
    (tmp_path / "webnlg" / found[0].name).symlink_to(found[0].resolve())
    task = get_task("webnlg")
    counts = {"train": (6_940, 18_102, 18_025, 6_888), "dev": (872, 2_268, 2_258, 870)}
    for split, (entries, lexes, good, sources) in counts.items():
        path = fetch.locate(task, split, tmp_path)
        text = path.read_text()
        assert (text.count("<entry "), text.count("<lex ")) == (entries, lexes)
        texts, gold = read_split(task, split, path, path.read_bytes())
        assert sum(map(len, gold)) == good
        assert len({source for source, _ in texts} if split == "train" else texts) == sources
        named = [pair[0] for pair in texts] if split == "train" else texts
        triples = [triple.split(" : ") for source in named for triple in source.split(" | ")]
        assert all(len(parts) >= 3 and all(parts) for parts in triples)
    assert texts[0] == "Aarhus : leaderName : Jacob_Bundsgaard"
    assert gold[0] == ["The leader of Aarhus is Jacob Bundsgaard."]


# -------------------------------------------------------------------------------------------------
# DART


def dart(*triples, texts=("x",)):
    annotations = [{"source": "WikiTableQuestions_mturk", "text": text} for text in texts]
    return {"subtree_was_extended": False, "tripleset": list(triples), "annotations": annotations}


def test_dart():
    """Relations are in lower case, and nothing else; each annotation is a text."""
    title = ["[TABLECONTEXT]", "[TITLE]", "Mars Hill, É"]
    rows = [dart(["Mars Hill", "JOINED_In", "1973 "], title, texts=[" A.", "B."]), dart(title)]
    source = "Mars Hill : joined_in : 1973 | [TABLECONTEXT] : [title] : Mars Hill, É"
    other = "[TABLECONTEXT] : [title] : Mars Hill, É"
    file = json.dumps(rows)
    pairs = [(source, "A."), (source, "B."), (other, "x")]
    assert read(file, "F.json") == (pairs, [["A."], ["B."], ["x"]])
    assert read(file, "F.json", "dev") == ([source, other], [["A.", "B."], ["x"]])
    packed = gzip.compress(file.encode())
    assert read(packed, "F.json.gz", "test")[0] == [source, other]
    assert kind_of(get_task("dart")).read_input("F.json.gz", packed) == [source, other]
    del rows[0]["annotations"]
    assert read(json.dumps(rows), "F.json", "test")[0] == [source, other]


@pytest.mark.parametrize(
    "file, message",
    [
        ("", "FILE.json: not in DART's form (JSONDecodeError"),
        ("{}\n{}\n", "FILE.json: not in DART's form (JSONDecodeError: Extra data"),
        ("3", "FILE.json: not in DART's form (TypeError"),
        ("[" * 99_999, "FILE.json: not in DART's form (RecursionError"),
        ("[]", "FILE.json: no row of data"),
        ('{"data": []}', "FILE.json: entry number 1: not in DART's form (TypeError"),
        ([dart("abc")], 'FILE.json: entry number 1: ""abc"" is no triple'),
        ([dart(["a", "b", "c"]), dart(["a", "b"])], 'entry number 2: "["a", "b"]" is no triple'),
        ([dart(["a", "b", "c", "d" * 999])], "..."),
        ([dart()], "FILE.json: entry number 1 has no triples"),
        ([{"annotations": []}], "(KeyError: 'tripleset'); expected [{"),
        ([{"tripleset": [["a", "b", "c"]]}], "entry number 1: not in DART's form (KeyError: 'anno"),
        ([dart(["a", 3, "c"])], "entry number 1: not in DART's form (AttributeError"),
        ([dart(["a", "b", 3])], "entry number 1: not in DART's form (AttributeError"),
        ([dart(["a", "b", "c"], texts=[None])], "entry number 1: not in DART's form (Attribute"),
        ([dart(["a", "b", "c"], texts=["\ud800"])], "surrogates"),
        ([dart(["a", "b", "\ud800"])], "surrogates"),
    ],
)
def test_mistakes_in_dart(file, message):
    wrong(file if isinstance(file, str) else json.dumps(file), message, path="FILE.json")


# -------------------------------------------------------------------------------------------------
# tables of your own

PAIRS = [("a, b", 'He said "x".'), ("é", "two\nlines"), ("", "no source"), ("no text", "")]
PAIRS += [("a, b", "again"), ("é", "two\nlines")]


def test_forms_of_tables(tmp_path):
    """CSV, JSON lines, a quoted TSV, packed or not: equal pairs."""
    lines = "".join(json.dumps({"n": 1, "text": t, "source": s}) + "\n" for s, t in PAIRS)
    table = as_csv([(s, t, "z") for s, t in PAIRS], "\r\n", ("source", "text", "more"))
    tsv = io.StringIO()
    csv.writer(tsv, delimiter="\t", lineterminator="\n").writerows([("source", "text"), *PAIRS])
    forms = {
        "F.csv": (table, {}),
        "F.csv.gz": (table, {}),
        "F.jsonl": (lines, {}),
        "F.ndjson": (lines.replace("\n", "\r\n"), {}),
        "F.tsv": (tsv.getvalue(), {"quoted": True}),
    }
    for name, (text, more) in forms.items():
        task = task_of(tmp_path, **more)
        content = gzip.compress(text.encode()) if name.endswith("gz") else text.encode()
        texts, gold = read_split(task, "train", name, content)
        assert texts == PAIRS, name
        assert gold == [[text] for _, text in PAIRS]


def test_equal_sources():
    """They are one row of dev, wherever they stand, and single rows of a training set."""
    texts, gold = read(as_csv(PAIRS), split="dev")
    assert texts == ["a, b", "é", "", "no text"]
    assert gold == [['He said "x".', "again"], ["two\nlines"] * 2, ["no source"], [""]]
    assert read(as_csv(PAIRS), split="test")[0] == texts
    assert len(read(as_csv(PAIRS))[0]) == len(PAIRS)


def test_a_test_file_without_texts(tmp_path):
    """It needs no column of texts, unless it is to be scored; --input needs none either."""
    file = "more,source\n1,b\n2,a\n3,b\n"
    assert read(file, split="test")[0] == ["b", "a"]
    assert kind_of(task_of(tmp_path)).read_input("F.csv", file.encode()) == ["b", "a", "b"]
    wrong(file, 'FILE.csv:1: no column "text"', split="dev")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"text": "source"}, '"text": expected another column than that of the sources'),
        ({"columns": ["source"]}, 'unknown key "columns"; the keys are name, train, dev, metric'),
        ({"labels": ["a", "b"]}, 'unknown key "labels"'),
        ({"words": ["a", "b"]}, 'unknown key "words"'),
        ({"source": None}, '"source": expected this key, but it is missing'),
        ({"text": None}, '"text": expected this key, but it is missing'),
        ({"metric": "accuracy"}, '"metric": expected some of bleu, nist'),
        ({"metric": ["bleu", "bleu"]}, '"metric": expected 1 to 4 different strings'),
        ({"source": ["a", "b"]}, '"source": expected a string, not empty'),
        ({"source": ""}, '"source": expected a string, not empty'),
        ({"quoted": "yes"}, '"quoted": expected true or false'),
        ({"mr": 1}, '"mr": expected true or false'),
        ({"kind": "write"}, '"kind": expected one of classify, score, span, tag, generate'),
    ],
)
def test_mistakes_in_a_task_file(changes, message, tmp_path, capsys):
    """One line names the file, the key, and what is expected."""
    with pytest.raises(UserError) as caught:
        task_of(tmp_path, **changes)
    assert str(caught.value).startswith(f"{tmp_path / 'task.json'}: {message}"), caught.value
    argv = ["--task-file", tmp_path / "task.json", "--score", "p.txt"]
    refused(capsys, argv, message, main=evaluation.main)


@pytest.mark.parametrize(
    "path, file, message",
    [
        ("FILE.csv", "a,text\nx,y\n", 'FILE.csv:1: no column "source"; the header line has "a, te'),
        ("FILE.csv", "source,text,text\nx,y,z\n", 'FILE.csv:1: two columns "text"'),
        ("FILE.csv", 'source,text\n"x\ny",z\nx,"y\n', "FILE.csv:4: quotes do not fit"),
        ("FILE.csv", "source,text\nx\n", 'FILE.csv:2: 1 columns, expected 2: "text" is missing'),
        ("FILE.csv", "source,text\nx,y,z\n", "FILE.csv:2: 3 columns, expected 2: a comma inside"),
        ("FILE.tsv", 'source\ttext\n"x\ty\n', None),
        ("FILE.jsonl", '{"source": "x"}\n', 'FILE.jsonl:1: no text and no number under the key "'),
        ("FILE.jsonl", '{"source": "x", "text": ["y"]}\n', "FILE.jsonl:1: no text and no number"),
        ("FILE.csv.gz", "source,text\n", "FILE.csv.gz: not a whole gzip file"),
        ("FILE.csv", "source,text\n", "FILE.csv: no row of data"),
        ("FILE.csv", "", 'FILE.csv:1: no column "source"'),
        ("FILE.csv", b"source,text\nx,\xff\n", "FILE.csv:2: byte 0xff is not UTF-8"),
    ],
)
def test_mistakes_in_tables(path, file, message):
    if message:
        wrong(file, message, path=path)
    else:
        assert read(file, path)[0] == [('"x', "y")]  # a plain TSV has no quotes


def test_your_own_meaning_representations(tmp_path):
    """The key "mr" reads the form of E2E in any table."""
    task = task_of(tmp_path, mr=True)
    rows = b"text\tsource\nx\teatType[pub]\n"
    assert read_split(task, "dev", "F.tsv", rows) == (["Type : pub"], [["x"]])
    assert read_split(task, "test", "F.tsv", rows) == (["Type : pub"], [[""]])


# -------------------------------------------------------------------------------------------------
# tokens


def rows_of(arrays):
    """[(ids, labels, second)] of the rows."""
    ends = np.cumsum(arrays["lengths"])[:-1]
    parts = np.split(arrays["ids"], ends), np.split(arrays["labels"], ends), arrays["second"]
    return [(ids.tolist(), labels.tolist(), int(second)) for ids, labels, second in zip(*parts)]


def spelled(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False)


def check_decisions(row, end):
    """A label is the next token from the last one of the prompt on; `second` follows that one."""
    ids, labels, second = row
    assert ids[second - 1] == end
    assert labels == [IGNORED] * (second - 1) + ids[second:] + [IGNORED]


TRICKY = ["Bibi has fish.", "", " ", " two  spaces ", "a\nb\tc", "é £ \U0001f600", "<|endoftext|>"]
TRICKY += ["a<|endoftext|>b <|endoftext|>", "<|endoftext"]


def test_rows_of_a_training_set(tokenizer):
    """Source, end, the text with a space before it, end. Each token of the text is decided."""
    end = tokenizer.token_to_id("<|endoftext|>")
    sources = ["name : Bibi", ""]
    pairs = [(source, text) for source in sources for text in TRICKY]
    arrays = encode_texts(pairs, tokenizer, 512)
    assert not arrays["cut"].any()
    for (source, text), row in zip(pairs, rows_of(arrays)):
        ids, _, second = row
        check_decisions(row, end)
        assert spelled(tokenizer, ids[:second]) == f"{source}<|endoftext|>"
        assert spelled(tokenizer, ids[second:]) == f" {text}<|endoftext|>"
        # the one end of a text is its last token, whatever the text spells
        assert ids[second:].count(end) == 1 and ids[-1] == end


def test_special_tokens(tokenizer):
    """A source may hold those of the tokenizer. A text never holds one: it could not be written."""
    tokenizer = copy_of(tokenizer)
    tokenizer.add_special_tokens(["<sep>"])
    before = tokenizer.to_str()
    end, sep = map(tokenizer.token_to_id, ("<|endoftext|>", "<sep>"))
    pair = ("a<sep>b<|endoftext|>c", "a<sep>b")
    (ids, labels, second), *_ = rows_of(encode_texts([pair], tokenizer, 64))
    check_decisions((ids, labels, second), end)
    assert ids[:second].count(sep) == 1 and ids[:second].count(end) == 2
    assert sep not in ids[second:]
    assert tokenizer.decode(ids[second:]) == " a<sep>b"
    ((sources, *_),) = rows_of(encode_texts([pair[0]], tokenizer, 64))
    assert sources == ids[:second]
    assert tokenizer.to_str() == before and not tokenizer.encode_special_tokens


def test_rows_of_sources(tokenizer):
    """A source and the end; nothing is decided; they leave a quarter for new tokens."""
    end = tokenizer.token_to_id("<|endoftext|>")
    source = "name : Bibi | food : fish and soup"
    whole = tokenizer.encode(source, add_special_tokens=False).ids
    count = len(whole)
    assert count > 8
    for max_length in (8, 12, count, count + 9, 64):
        kept = min(count, max_length - 1 - max_length // 4)
        arrays = encode_texts([source, "", source], tokenizer, max_length)
        for row, expected in zip(rows_of(arrays), (whole[:kept], [], whole[:kept])):
            assert row == ([*expected, end], [IGNORED] * (len(expected) + 1), len(expected) + 1)
        assert arrays["cut"].tolist() == [kept < count, False, kept < count]


def test_max_length_cuts_the_source(tokenizer):
    """From its end on, as far as the text needs it, and the text where it alone is too long."""
    end = tokenizer.token_to_id("<|endoftext|>")
    source = "name : Bibi | food : fish"
    text = "Bibi has fish."
    first = tokenizer.encode(source, add_special_tokens=False).ids
    then = [*tokenizer.encode(f" {text}", add_special_tokens=False).ids, end]
    whole = [*first, end, *then]
    for max_length in range(2, len(whole) + 3):
        arrays = encode_texts([(source, text)], tokenizer, max_length)
        ((ids, labels, second),) = rows_of(arrays)
        room = max(0, min(len(first), max_length - 1 - len(then)))
        expected = [*first[:room], end, *then]
        assert ids == expected[:max_length]
        assert second == room + 1
        assert labels == ([IGNORED] * room + then + [IGNORED])[:max_length]
        assert arrays["cut"].tolist() == [room < len(first)]


def test_many_rows(tokenizer):
    """Rows are tokenised in chunks, of a training set and of another split."""
    pairs = [(f"name {i}", f"text {i}") for i in range(4_100)]
    rows = rows_of(encode_texts(pairs, tokenizer, 64))
    assert len(rows) == 4_100
    for i in (0, 4_095, 4_096, 4_099):
        check_decisions(rows[i], rows[i][0][-1])
        assert spelled(tokenizer, rows[i][0]) == f"name {i}<|endoftext|> text {i}<|endoftext|>"
    (ids, *_) = rows_of(encode_texts([pair[0] for pair in pairs], tokenizer, 64))[4_099]
    assert spelled(tokenizer, ids) == "name 4099<|endoftext|>"


def test_what_is_cut_is_told(tokenizer, tmp_path, capsys):
    """Sources and texts are counted, also from the cache; a text that just fits is not cut."""
    long = "Bibi has fish and more fish and more"
    fits = len(tokenizer.encode(f" {long}", add_special_tokens=False).ids) + 1  # with its end
    rows = [("name : Bibi | food : fish", long), ("", "x"), ("", long)]
    for split in ("train", "dev"):
        (tmp_path / f"{split}.csv").write_text(as_csv(rows))
    task = replace(task_of(tmp_path), settings={"max_new_tokens": 4})

    def said(split, max_length):
        capsys.readouterr()
        dataset = load_dataset(task, split, tokenizer, max_length, tmp_path)
        return dataset, capsys.readouterr().err

    for _ in range(2):
        for max_length in (fits + 1, fits):  # the end itself need not be read
            dataset, told = said("train", max_length)
            where = f"of t train at --max-length {max_length} are cut"
            assert told == f"warning: 1 of 3 sources {where}\n"
        assert dataset.decision_counts.tolist() == [fits, *dataset.decision_counts[1:2], fits]
        dataset, told = said("train", fits - 1)
        where = f"of t train at --max-length {fits - 1} are cut"
        sources, texts = told.splitlines()
        assert sources == f"warning: 1 of 3 sources {where}"
        assert texts == f"warning: 2 of 3 texts {where}, and have no end"
    assert said("train", 64)[1] == ""
    assert said("dev", 64)[1] == ""
    assert said("dev", 8)[1] == "warning: 1 of 2 sources of t dev at --max-length 8 are cut\n"


def test_a_split_as_arrays(tokenizer, tmp_path):
    """A row of dev leaves room for new tokens, and its references are kept as text."""
    for split in ("train", "dev"):
        (tmp_path / f"{split}.csv").write_text(as_csv(PAIRS))
    task = task_of(tmp_path)
    train = load_dataset(task, "train", tokenizer, 64, tmp_path)
    assert len(train) == len(PAIRS)
    assert train.decision_counts.tolist() == (train.lengths - train.second).tolist()
    assert train.decision_counts.min() == 2  # of an empty text: the space before it, and the end
    dev = load_dev(task, tokenizer, 64, tmp_path)["dev"]
    assert len(dev) == 4 and dev.decision_counts.tolist() == [0] * 4
    assert dev.examples[0] == ("a, b", ['He said "x".', "again"])
    assert dev.gold == read(as_csv(PAIRS), split="dev")[1]
    cached = set((tmp_path / "cache").iterdir())
    other = replace(task, settings={"beams": 7})  # changes no token
    assert len(load_dev(other, tokenizer, 64, tmp_path)["dev"]) == 4
    assert set((tmp_path / "cache").iterdir()) == cached


# -------------------------------------------------------------------------------------------------
# scores


def scored(folder, outputs, rows, capsys, name="test.csv"):
    """What eval.py prints of a file of outputs for the test split `rows`."""
    task_of(folder, test=name)
    (folder / name).write_text(as_csv(rows), encoding="utf-8", newline="")
    (folder / "out.txt").write_bytes(outputs)
    capsys.readouterr()
    argv = ["--task-file", folder / "task.json", "--split", "test", "--score", folder / "out.txt"]
    status = evaluation.main([str(value) for value in argv])
    captured = capsys.readouterr()
    assert (status, captured.err == "") in ((0, True), (2, False))
    return (captured.out or captured.err).replace(str(folder / "out.txt"), "FILE")


REFERENCES = [("s", "a b c d e"), ("t", "f g h i j"), ("s", "b c d e f"), ("u", "k l m n o")]
OTHERS = ["f g h i j", "k l m n o"]
WHOLE = "FILE: bleu 100.00  nist "


@pytest.mark.parametrize(
    "outputs",
    [
        b"a b c d e\nf g h i j\nk l m n o\n",
        b"b c d e f\r\nf g h i j\r\nk l m n o\r\n",
        b"\xef\xbb\xbfA b c d e\n  f g h i j \nk l m n o",
    ],
    ids=["plain", "crlf", "bom"],
)
def test_outputs_are_lines(outputs, tmp_path, capsys):
    """One for each source, in the order of their first appearance; case is no matter."""
    assert scored(tmp_path, outputs, REFERENCES, capsys).startswith(WHOLE)
    lines = kind_of(task_of(tmp_path)).read_predictions(tmp_path / "out.txt", "stu", None)
    assert [line.lower() for line in lines] in (["a b c d e", *OTHERS], ["b c d e f", *OTHERS])


def test_the_number_of_outputs(tmp_path, capsys):
    """It must be that of the sources, neither more nor less."""
    expected = "expected 3, one for each source in the order of the file"
    for count, outputs in ((1, b""), (2, b"x\ny\n"), (4, b"x\n\ny\nz\n"), (4, b"x\ny\nz\n\n")):
        said = scored(tmp_path, outputs, REFERENCES, capsys)
        assert said == f"error: FILE: {count} lines, {expected}\n"
    said = scored(tmp_path, b"x\ny\xff\nz\n", REFERENCES, capsys)
    assert said == "error: FILE:2: byte 0xff is not UTF-8; convert the file\n"


def test_an_empty_output(tmp_path, capsys):
    """It counts as an empty output, at any place and with any line end."""
    texts = [" ".join(f"w{i}" for i in range(start, start + 9)) for start in (0, 10, 20)]
    rows = [(f"source {i}", text) for i, text in enumerate(texts)]
    for lost in range(3):
        lines = [text if i != lost else "" for i, text in enumerate(texts)]
        share = bleu(list(map(tokens_of, lines)), [[tokens_of(text)] for text in texts])
        assert 0.3 < share < 0.9
        for end in ("\n", "\r\n"):
            said = scored(tmp_path, "".join(line + end for line in lines).encode(), rows, capsys)
            assert said.startswith(f"FILE: bleu {100 * share:.2f}  nist ")


def test_a_split_without_references_has_no_score(tmp_path, capsys):
    said = scored(tmp_path, b"x\n", [], capsys)
    assert said.endswith("test.csv: no row of data\n")
    (tmp_path / "test.csv").write_text("source\na\n")
    argv = ["--task-file", tmp_path / "task.json", "--split", "test"]
    argv += ["--score", tmp_path / "out.txt"]
    refused(capsys, argv, 'test.csv:1: no column "text"', main=evaluation.main)
    (tmp_path / "test.csv").write_text("source,text\na,\n")
    assert evaluation.main([str(value) for value in argv]) == 0
    assert "bleu counts as 0: every reference is empty" in capsys.readouterr().err


@pytest.mark.real
def test_the_example_of_the_e2e_metric(tmp_path, capsys):
    """Its outputs and references, as a file and as a task, have the official figures."""
    folder = E2E / "metric-example"
    if not folder.is_dir():
        pytest.skip("needs E2E_DIR")
    blocks = (folder / "references.txt").read_text(encoding="utf-8").strip("\n").split("\n\n")
    rows = [(f"source {i}", text) for i, block in enumerate(blocks) for text in block.split("\n")]
    outputs = (folder / "outputs.txt").read_bytes()
    expected = "FILE: bleu 72.03  nist 7.7889\n"
    assert scored(tmp_path, outputs, rows, capsys) == expected
    assert scored(tmp_path, outputs.replace(b"\n", b"\r\n"), rows, capsys) == expected
    seen = Counter()
    mixed = []  # first a reference of each source, then another of each
    for source, text in rows:
        seen[source] += 1
        mixed.append((seen[source], source, text))
    mixed.sort(key=lambda row: row[0])
    assert mixed[0][1] != mixed[1][1]
    assert scored(tmp_path, outputs, [row[1:] for row in mixed], capsys) == expected
