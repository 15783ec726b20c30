"""The official files of tasks, and checkpoints: found, or downloaded and checked."""

import hashlib
import http.client
import os
import sys
import urllib.parse
import urllib.request
import xml.etree.ElementTree as ElementTree
import zipfile
import zlib
from functools import cache
from pathlib import Path

from support.files import atomic_write, cache_home, read_json, writable
from support.terminal import ROOT, UserError, live, tell, warn

DEMO = ROOT / "demo"

# ---------- tasks ---------------------------------------------------------------------------------


def locate(task, split, data_dir):
    """Return the path of the file of a split.

    The file is taken from `data_dir` if it is there. If not, it is made from the official sources,
    and sources that are not there are downloaded. What we make goes to `data_dir`. If we may not
    write there, it goes to a folder of its own in `cache_home()`.
    """
    if split not in task.files:
        raise UserError(f'{task.name} has no "{split}" split but {", ".join(task.files)}')
    name = task.files[split]
    data_dir = Path(data_dir)
    spare = cache_home() / task.sources[0][1][:16] if task.sources else data_dir
    folders = (data_dir, data_dir / task.folder, spare)
    names = [name, *dict(task.other_names).get(split, ())]
    bare = Path(name).name
    alike = [other for other in task.files.values() if Path(other).name == bare]
    if not task.sources and len(set(alike)) == 1:
        names.append(bare)  # where your own file has moved
    for file in names:
        for folder in folders:
            path = folder / file
            if path.is_file():
                if file == bare != name and not task.sources:
                    warn_of_another(name, path)
                return path
    if not task.sources:
        advice = "if it has moved, give --data-dir FOLDER"
        raise UserError(f"{name}: no such file (the {split} split of task {task.name}); {advice}")
    if not data_dir.is_dir():
        raise UserError(f"--data-dir {data_dir}: no such folder")
    home = data_dir if writable(data_dir) else spare
    for source in task.sources:
        if Path(source[0]).name == name:  # the source is the file itself
            return fetch(source, folders, home)
    if task.name == "webnlg":
        archives = [path for folder in folders for path in sorted(folder.glob("webnlg*.zip"))]
        archive = archives[0] if archives else fetch(task.sources[0], folders, home)
        build_webnlg(archive, home)
        if not (home / name).is_file():
            raise UserError(f"{archive}: has no XML files of the {split} split")
        return home / name
    sources = [fetch(source, folders, home) for source in task.sources]
    if task.name == "mrpc":
        build_mrpc(*sources, home)
    else:
        unpack(sources[0], home, task.files.values())
    return home / name


@cache
def warn_of_another(name, path):
    """Say once that a file has been found in another place."""
    warn(f"{name}: no such file; {path} is taken in its place")


def fetch(source, folders, home):
    """Return the path of a checked source, found in one of `folders` or downloaded to `home`."""
    address, sha256 = source
    name = Path(address).name
    for folder in folders:
        path = folder / name
        if path.is_file():
            check_sha256(path.read_bytes(), sha256, path, "remove it, and it is downloaded")
            return path
    download(source, home / name)
    return home / name


def check_sha256(data, sha256, origin, advice):
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        wrong = f"{len(data)} bytes, sha256 {found}, expected {sha256}"
        raise UserError(f"{origin}: not the official file: {wrong}; {advice}")


def download(source, path):
    """Download a source, check it, and write it to `path`."""
    address, sha256 = source
    mirror = os.environ.get("GLUE_URL", "https://dl.fbaipublicfiles.com/")
    url = urllib.parse.urljoin(f"{mirror.rstrip('/')}/", address)  # some addresses are whole
    advice = f"run again, or put {path.name} into {path.parent}"
    if url != address:
        advice += ", or set GLUE_URL to a mirror"
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            size = int(response.headers.get("Content-Length", 0))
            tell(f"downloading {url}, {size:,} bytes", sys.stderr)
            blocks = []
            with live("download", size or None, unit_scale=True) as bar:
                for block in iter(lambda: response.read1(1 << 18), b""):  # what has arrived
                    blocks.append(block)
                    bar.update(len(block))
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise UserError(f"{url}: {str(error) or type(error).__name__}; {advice}") from None
    data = b"".join(blocks)
    check_sha256(data, sha256, url, advice)
    atomic_write(path, data)


def unpack(archive, home, names):
    """Write the members `names` of a zip below `home`, and nothing else.

    A file that is already there stays as it is. The zip may hold them without their folder.
    """
    try:
        with zipfile.ZipFile(archive) as zipped:
            for name in names:
                bare = Path(name).name
                member = bare if bare in zipped.namelist() else name
                write_new(home / name, zipped.read(member))
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"{archive}: not a usable zip: {error}; remove it to download it") from None


def build_mrpc(train, test, dev_ids, home):
    """Write MRPC's TSVs. The training rows whose pair of ids `dev_ids` lists become dev."""
    dev_pairs = set(dev_ids.read_text().split("\n"))
    header, *lines = train.read_bytes().decode("utf-8-sig").rstrip("\n").split("\n")
    texts = {"train": [header], "dev": [header]}
    for line in lines:
        pair = "\t".join(line.split("\t")[1:3])  # the ids of its two sentences
        texts["dev" if pair in dev_pairs else "train"].append(line)
    for split, lines in texts.items():
        write_new(home / f"MRPC/{split}.tsv", "\n".join(lines) + "\n")
    write_new(home / "MRPC/test.tsv", test.read_bytes())


def build_webnlg(archive, home):
    """Write a file of each split of the WebNLG challenge of 2017, from its many in a zip.

    The test set is written as a whole and in two parts: its entries of the training set's
    categories are `test_seen`, the others `test_unseen`.
    """
    entries = {name: [] for name in ("train", "dev", "test", "test_seen", "test_unseen")}
    place = archive
    try:
        with zipfile.ZipFile(archive) as zipped:
            names = sorted(name for name in zipped.namelist() if name.endswith(".xml"))
            names = [name for name in names if not name.startswith("__MACOSX/")]
            challenge = [name for name in names if "webnlg_challenge_2017/" in name]
            for name in challenge or names:  # the official zip has other releases, too
                place = f"{archive}: {name}"
                split = {"train", "dev", "test"}.intersection(name.split("/"))
                if not split or ("test" in split and not name.endswith("/testdata_with_lex.xml")):
                    continue
                root = ElementTree.fromstring(zipped.read(name))
                entries[split.pop()] += root.iter("entry")
    except (zipfile.BadZipFile, zlib.error, ElementTree.ParseError) as error:
        raise UserError(f"{place}: not a usable zip: {error}; remove it to download it") from None
    known = {entry.get("category") for entry in entries["train"]}
    for entry in entries["test"] if known else ():
        part = "test_seen" if entry.get("category") in known else "test_unseen"
        entries[part].append(entry)
    for split, found in entries.items():
        if found:
            root = ElementTree.Element("entries")
            root.extend(found)
            write_new(home / f"webnlg/{split}.xml", ElementTree.tostring(root))


def write_new(path, content):
    if not path.exists():
        atomic_write(path, content)


# ---------- checkpoints ---------------------------------------------------------------------------


CONVERT = (
    "pickled .bin checkpoints are refused, because unpickling runs code; convert once, where "
    "transformers is installed: python -c \"import transformers as t; m = '{name}'; "
    "Model = getattr(t, t.AutoConfig.from_pretrained(m).architectures[0]); "
    "[T.from_pretrained(m).save_pretrained('converted') for T in (Model, t.AutoTokenizer)]\""
)


def find_model(name):
    """Return the folder of "demo", of a folder, or of a Hugging Face id, which is downloaded.

    Raises UserError where there is no such model, or no safetensors file in it.
    """
    if name == "demo":
        return DEMO
    if Path(name).is_dir():
        return Path(name)
    folder = from_hub(name)
    if not list(folder.glob("*.safetensors")):
        advice = CONVERT.format(name=name)
        raise UserError(f"--model {name}: the hub has no model.safetensors; {advice}")
    return folder


def find_config(name):
    """Return what config.json of a model says; of a Hugging Face id only this file is needed."""
    folder = DEMO if name == "demo" else Path(name)
    if not folder.is_dir():
        folder = from_hub(name, ["config.json"])
    return read_json(folder / "config.json")


FILES = ["config.json", "*.safetensors", "*.index.json", "tokenizer*.json", "added_tokens.json"]
FILES += ["special_tokens_map.json", "vocab.txt", "vocab.json", "merges.txt"]


def from_hub(name, wanted=FILES):
    """Return the folder of a Hugging Face id in the hub's cache; download what is not there."""
    import huggingface_hub as hub  # it is slow to import, and only needed here

    options = {"allow_patterns": wanted, "ignore_patterns": ["*/*", "consolidated*"]}
    try:
        # without this question, snapshot_download would wait without end for a dead server
        hub.model_info(name, timeout=hub.constants.HF_HUB_ETAG_TIMEOUT)
        return Path(hub.snapshot_download(name, **options))
    except Exception as error:  # the hub has many: no such id, no network, gated, full disk
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    try:
        return Path(hub.snapshot_download(name, **options, local_files_only=True))
    except Exception:
        raise UserError(
            f"--model {name}: no such folder, and the Hugging Face hub did not give it ({reason}); "
            "give a folder with config.json, model.safetensors and tokenizer.json, or `demo`"
        ) from None


def model_files(folder):
    """Return the safetensors files of a checkpoint, sharded or not; UserError if there are none."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    if not index.exists():
        advice = (
            CONVERT.format(name=folder) if list(folder.glob("*.bin")) else "it is no checkpoint"
        )
        raise UserError(f"{folder}: no model.safetensors and no {index.name}; {advice}")
    shards = read_json(index).get("weight_map")
    shards = list(shards.values()) if isinstance(shards, dict) else []
    plain = [isinstance(shard, str) and Path(shard).name == shard for shard in shards]
    if not shards or not all(plain):
        raise UserError(f"{index}: weight_map must name files of this folder")
    return [folder / shard for shard in sorted(set(shards))]
