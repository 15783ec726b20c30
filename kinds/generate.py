"""The kind "generate": a text is written for a source, as in E2E, WebNLG and DART.

A row of a training set is a source, the separator, its text, and the end. The separator is the end
token, as in the published recipes of GPT-2. Each token of the text and the end is a decision among
the whole vocabulary. In the other splits a row is a source and the separator, and equal sources are
one row with all their texts as references.
"""

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from kinds.bleu import bleu, by_java, check_java, nist, tokens_of
from kinds.classify import IGNORED, Classify, Decided
from kinds.text import copy_of, decode, flat, read_rows
from support.machine import autocast, inputs, rank_and_world, send
from support.terminal import UserError, live, quote, warn

# Tokens of a batch in `predict`, with those to come. On a CPU 1 << 11 take 1.5 times as long.
MAX_TOKENS = {"cpu": 1 << 13, "mps": 1 << 14, "cuda": 1 << 15}


@dataclass
class DecidedTexts(Decided):
    """The decisions of a batch of texts: n tokens, each among V."""

    ask: partial  # ask(model): the logits (n, V) of another model for the same decisions


class Generate(Classify):
    """A decision for each token of a text, and one for its end."""

    name = "generate"
    form = "vocabulary"
    own_head = "vocabulary"
    label_per_token = True
    keeps_text = True
    picks_label = False
    teaches_beside = True  # a table of decisions x V would not fit
    metrics = {"bleu": bleu, "nist": nist}
    more_metrics = staticmethod(by_java)
    check_more = staticmethod(check_java)
    keys = {"source": (1, 1), "text": (1, 1)}
    needed = {"source", "text"}
    options = {"quoted": bool, "mr": bool}
    uses = ("beams", "length_penalty", "no_repeat_ngram", "max_new_tokens")
    uses += ("label_smoothing", "eval_sources")

    @classmethod
    def describe(cls, values, expect):
        (source,), (text,) = values["source"], values["text"]
        expect(source != text, "text", "another column than that of the sources")
        return {"labels": (), "spelling": (), "columns": (source,), "label": text}

    @property
    def outputs(self):
        return ()  # the head is the model's own

    # files

    def read(self, role, path, data):
        pairs = self.read_pairs(path, data, role != "test")
        if role == "train":
            return pairs, [[text] for _, text in pairs]
        references = {}
        for source, text in pairs:
            references.setdefault(source, []).append(text)
        return list(references), list(references.values())

    def read_pairs(self, path, data, labelled, header=()):
        """Return [(source, text)] of a file, whose ending says its form."""
        name = str(path).removesuffix(".gz")
        if name.endswith(".xml"):
            return read_webnlg(path, decode(path, data), labelled)
        if name.endswith(".json"):
            return read_dart(path, decode(path, data), labelled)
        options = self.task.options
        label = self.task.label if labelled else ""
        quoted = options.get("quoted", False)
        rows = read_rows(path, data, self.task.columns, label, header, quoted=quoted)
        if options.get("mr"):
            rows = [(slots(source, place), text, place) for source, text, place in rows]
        return [(source, text) for source, text, _ in rows]

    def read_input(self, path, data, header=()):
        return [source for source, _ in self.read_pairs(path, data, False, header)]

    def from_rows(self, rows, path):
        return rows, rows, [[] for _ in rows]

    # tokens

    def encode(self, texts, gold, tokenizer, max_length):
        return encode_texts(texts, tokenizer, max_length)

    def check(self, dataset, name):
        where = f"of {name} at --max-length {dataset.max_length}"
        if dataset.cut is not None and dataset.cut.any():
            warn(f"{dataset.cut.sum():,} of {len(dataset):,} sources {where} are cut")
        after = dataset.labels[dataset.starts + dataset.lengths - 1]  # what follows the last token
        lost = (after != IGNORED) & (after != self.end)
        if lost.any():
            warn(f"{lost.sum():,} of {len(dataset):,} texts {where} are cut, and have no end")

    def learn_from(self, dataset):
        """There are no classes to weigh."""

    # decisions and their losses

    def decide(self, net, batch, device, dtype):
        reads = batch["reads"]  # (n,), where decisions are made
        labels = send(batch["labels"].flatten()[reads], device)  # (n,)
        on_device = inputs(batch, device) | {"reads": send(reads, device)}
        ask = partial(self.ask, inputs=on_device, device=device, dtype=dtype)
        logits = ask(net)  # (n, V)
        most_entropy = math.log(logits.size(-1))
        losses = self.losses(logits, labels)
        mask = on_device["attention_mask"]
        return DecidedTexts(logits, most_entropy, losses, labels, batch["rows"], mask, ask)

    def ask(self, model, inputs, device, dtype):
        with autocast(device, dtype):
            return model(**inputs)

    def losses(self, logits, labels):
        smoothing = self.task.settings["label_smoothing"]
        return F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)

    def losses_taught(self, decided, teacher, weigh):
        with torch.no_grad():
            taught = decided.ask(teacher)
        return weigh(decided.losses, decided.logits, taught, decided.most_entropy)

    # predictions

    def predict(self, model, dataset, device, dtype):
        """Return a text for each source. Under torchrun each rank writes its share of them."""
        s = self.task.settings
        rank, world = rank_and_world()
        sizes = dataset.second  # of the prompts; a row of a training set goes on
        most_new = min(s["max_new_tokens"], model.config.positions + 1 - int(sizes.max()))
        if most_new < s["max_new_tokens"]:  # in every batch
            warn(f"at most {most_new} new tokens: the longest source leaves no more positions")
        tokens_at_once = MAX_TOKENS[device.type] // s["beams"]
        parts = replace(dataset, lengths=sizes + most_new).by_tokens(tokens_at_once)[rank::world]
        decoding = (s["beams"], s["length_penalty"], s["no_repeat_ngram"], most_new)
        table = torch.zeros(len(dataset), most_new, dtype=torch.long)
        with model.plain(), autocast(device, dtype), live("generate", len(parts)) as bar:
            for part in parts:
                whole = [dataset.ids[dataset.tokens(row)] for row in part]
                prompts = [ids[:size].tolist() for ids, size in zip(whole, sizes[part])]
                for row, tokens in zip(part, model.generate(prompts, [self.end], *decoding)):
                    table[row, : len(tokens)] = torch.tensor(tokens) + 1  # 0: there is no token
                bar.update()
        if world > 1:
            dist.all_reduce(table)
        return [self.write(row[row > 0] - 1) for row in table]

    @property
    def end(self):
        """Return the id of the end token, which the tokenizer sets after a text."""
        return self.tokenizer_used.encode("").ids[-1]

    def write(self, tokens):
        """Return tokens as a text of one line, without the end, whether it is special or not."""
        tokens = tokens[tokens != self.end].tolist()
        return " ".join(self.tokenizer_used.decode(tokens).split())

    def quick(self, dataset):
        settings = self.task.settings | {"beams": 1}
        count = min(len(dataset), settings["eval_sources"])
        part = dataset.take(np.arange(count) * len(dataset) // count)  # from all parts of the file
        part.kind = type(self)(replace(self.task, settings=settings), self.tokenizer_used)
        return part

    @property
    def how(self):
        s = self.task.settings
        how = "greedy"
        if s["beams"] > 1:
            how = f"{s['beams']} beams, length penalty {s['length_penalty']:g}"
        how += f", at most {s['max_new_tokens']} new tokens"
        if s["no_repeat_ngram"]:
            how += f", no {s['no_repeat_ngram']}-gram twice"
        return how + self.note

    @property
    def note(self):
        scorer = self.task.options.get("published")
        return f"; published figures are {scorer}'s, which differ" if scorer else ""

    def metric(self, name, predicted, gold):
        outputs = [tokens_of(text) for text in predicted]
        references = [[tokens_of(text) for text in texts] for texts in gold]
        try:
            if not any(text.strip() for texts in gold for text in texts):
                raise ValueError("every reference is empty")
            value = self.metrics[name](outputs, references)
            if name == "bleu" and value > 1:
                raise ValueError("most outputs are empty, for which it is not defined")
            return value
        except ValueError as error:
            warn(f"{name} counts as 0: {error}")
            return 0.0

    # files of predictions, and the user's own texts

    def as_file(self, predicted, dataset, exact=False):
        return "".join(f"{text}\n" for text in predicted)

    def label(self, model, dataset, device, dtype):
        predicted = self.predict(model, dataset, device, dtype)
        return predicted, np.zeros((len(predicted), 0))

    def read_predictions(self, path, texts, gold):
        with open(path, "rb") as file:
            lines = decode(path, file.read()).removesuffix("\n").split("\n")
        if len(lines) != len(texts):
            counts = f"{len(lines):,} lines, expected {len(texts):,}"
            raise UserError(f"{path}: {counts}, one for each source in the order of the file")
        return [line.strip() for line in lines]

    def further_files(self, tokenizer):
        s = self.task.settings
        end = tokenizer.encode("").ids[-1]
        decoding = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end)
        decoding |= {
            "num_beams": s["beams"],
            "length_penalty": s["length_penalty"],
            "no_repeat_ngram_size": s["no_repeat_ngram"],
            "max_new_tokens": s["max_new_tokens"],
        }
        return {"generation_config.json": decoding}


# ---------- files ---------------------------------------------------------------------------------

# The attributes of E2E as the published recipes of GPT-2 name them.
SLOTS = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}
SLOT = r"\s*([^\[\],\s][^\[\],]*)\[([^\]]*)\]\s*"


def slots(text, place):
    """Return E2E's name[The Vaults], eatType[pub] as "name : The Vaults | Type : pub"."""
    if not re.fullmatch(f"{SLOT}(?:,{SLOT})*", text):
        raise UserError(f"{place}: {quote(text)} is not in the form name[value], name[value]")
    pairs = [(name.strip(), value.strip()) for name, value in re.findall(SLOT, text)]
    return " | ".join(f"{SLOTS.get(name, name)} : {value}" for name, value in pairs)


def triples(rows, place, spell=str):
    """Return triples as "subject : property : object | ..."; `spell` is called of a property."""
    if not rows:
        raise UserError(f"{place} has no triples; leave it out")
    for row in rows:
        if not isinstance(row, list) or len(row) != 3:
            expected = "expected a subject, a property and an object"
            raise UserError(f"{place}: {quote(json.dumps(row))} is no triple; {expected}")
    parts = [(one.strip(), spell(name.strip()), other.strip()) for one, name, other in rows]
    return " | ".join(map(" : ".join, parts))


def read_webnlg(path, text, labelled):
    """Return [(source, text)] of an XML file of the WebNLG challenge of 2017.

    Only texts that are marked good count, as in the published recipes. A few entries have none. If
    not `labelled`, an entry is there once, and needs no text. Later releases have a text in <text>.
    """
    try:
        entries = list(ElementTree.fromstring(text).iter("entry"))
    except ElementTree.ParseError as error:
        expected = "expected the XML of the WebNLG challenge of 2017"
        raise UserError(f"{path}: {error}; {expected}") from None
    pairs = []
    for number, entry in enumerate(entries, 1):
        rows = [(row.text or "").split("|") for row in entry.iterfind("modifiedtripleset/mtriple")]
        source = triples(rows, f"{path}: entry number {number}")
        good = [lex for lex in entry.iter("lex") if lex.get("comment") == "good"]
        found = [(lex.findtext("text") or lex.text or "").strip() for lex in good]
        if labelled and "" in found:
            raise UserError(f"{path}: entry number {number} has a good text that is empty")
        if not labelled:
            found = [""] if found or entry.find("lex") is None else []
        pairs += [(source, text) for text in found]
    return pairs


def read_dart(path, text, labelled):
    """Return [(source, text)] of a JSON file of DART. Relations are in lower case (LoRA)."""
    pairs = []
    place = path
    try:
        for number, entry in enumerate(json.loads(text), 1):
            place = f"{path}: entry number {number}"
            source = triples(entry["tripleset"], place, str.lower)
            found = [row["text"].strip() for row in entry["annotations"]] if labelled else [""]
            "".join([source, *found]).encode()  # a ValueError for half a character
            pairs += [(source, text) for text in found]
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        reason = f"not in DART's form ({type(error).__name__}: {error})"
        expected = '[{"tripleset": [[...]], "annotations": [{"text": ...}]}]'
        raise UserError(f"{place}: {reason}; expected {expected}") from None
    return pairs


# ---------- tokens --------------------------------------------------------------------------------


def encode_texts(texts, tokenizer, max_length):
    """Return the arrays of pairs (source, text), or of sources alone.

    Besides `flat`: "labels" (tokens,), the next token where it belongs to a text or is its end,
    else IGNORED; "cut" (n,), of which rows the source is cut. A source leaves room for its text
    or, without one, a quarter of `max_length`. A text has no special tokens: where it spells one,
    it is read as plain text, or it would end there.
    """
    end = tokenizer.encode("").ids[-1]
    plain = copy_of(tokenizer)
    plain.encode_special_tokens = True  # as text
    ids, labels, second, cut = [], [], [], []
    with live("tokenise", len(texts)) as bar:
        for start in range(0, len(texts), 4096):  # in chunks: an Encoding takes much memory
            chunk = texts[start : start + 4096]
            paired = not isinstance(chunk[0], str)
            sources = [pair[0] for pair in chunk] if paired else chunk
            sources = tokenizer.encode_batch_fast(sources, add_special_tokens=False)
            targets = [" " + pair[1] if paired else "" for pair in chunk]
            targets = plain.encode_batch_fast(targets, add_special_tokens=False)
            for source, target in zip(sources, targets):
                text = [*target.ids, end] if paired else []
                most = max_length - 1 - (len(text) if paired else max_length // 4)
                row = [*source.ids[: max(0, most)], end]
                second.append(len(row))
                whole = np.array(row + text, np.int32)
                right = np.append(whole[1:], IGNORED)
                right[: len(row) - 1] = IGNORED
                ids.append(whole[:max_length])
                labels.append(right[:max_length])
                cut.append(len(source.ids) > len(row) - 1)
            bar.update(len(chunk))
    return flat(ids, second) | {"labels": np.concatenate(labels), "cut": np.array(cut)}
