"""The tokenizer of a checkpoint, and the ids of label words.

A folder gives the tokens that `transformers` 5 gives for it, see models/tokenizer_classes.py. A run
folder gets one tokenizer.json that says all, and a class that takes it as it is.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE, WordPiece
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing

from models.tokenizer_classes import BERT, CLASSES, GPT2, ROBERTA, class_of, implied_class, rebuild
from support.files import atomic_write, read_optional, write_json
from support.terminal import UserError, quote, warn

# ---------- reading -------------------------------------------------------------------------------


def load_tokenizer(folder, vocab_size, framed=True):
    """Return the tokenizer of a checkpoint folder, which neither pads nor truncates.

    It sets special tokens around a text if it shall be `framed`; else the end token after it.
    It is read from tokenizer.json or, without this file, from BERT's vocab.txt, or from RoBERTa's
    vocab.json and merges.txt; and from tokenizer_config.json, special_tokens_map.json and
    added_tokens.json. Raises UserError if nothing is there, if two files contradict each other, if
    the tokenizer is of another class, or if an id is not below `vocab_size`, the rows of the
    embedding.
    """
    folder = Path(folder)
    path, tokenizer = read_tokenizer(folder)
    config = read_optional(folder / "tokenizer_config.json")
    if config.get("additional_special_tokens"):  # the older name
        config.setdefault("extra_special_tokens", config.pop("additional_special_tokens"))
    if "added_tokens_decoder" not in config:
        config |= read_optional(folder / "special_tokens_map.json")
    name = class_of(folder, config) or implied_class(path, tokenizer, framed)
    names, model = CLASSES[name]
    try:
        if name == "LlamaTokenizer" and '"ByteLevel"' not in tokenizer.to_str():
            advice = '"tokenizer_class": "PreTrainedTokenizerFast" takes this file as it is'
            raise ValueError(f"not byte-level, so that LlamaTokenizer is built anew; {advice}")
        special = special_tokens(config, names)
        added = added_tokens(folder, config, tokenizer)
        if model:
            add_tokens(tokenizer, added, [])  # special tokens may be among them
            tokenizer = rebuild(tokenizer, names, model, special, config, path)
        add_tokens(tokenizer, added, [*special.values(), *extra_tokens(config)])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if config.get("truncation_side", "right") != "right":
        warn(f"{folder}: its truncation_side is ignored; what is too long is cut at the right")
    if name == "DistilBertTokenizer":
        config.setdefault("model_input_names", ["input_ids", "attention_mask"])
    if "token_type_ids" not in config.get("model_input_names", ["token_type_ids"]):
        tokenizer = of_one_type(tokenizer)
    if not framed:
        if model is WordPiece:
            tokenizer.decoder = decoders.WordPiece()
        set_end(tokenizer, end_token(folder, config, tokenizer), path)
    if not tokenizer.num_special_tokens_to_add(is_pair=False):
        raise UserError(f"{path}: adds no special tokens; a model reads the first of them")
    add_tokens(tokenizer, {}, [as_special(text) for text in special_of(tokenizer).values()])
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= vocab_size:
        raise UserError(f"{path}: ids up to {largest}, but the embedding has {vocab_size} rows")
    return tokenizer


def of_one_type(tokenizer):
    """Return a tokenizer whose tokens have type 0, as if a model were not given their types."""
    says = json.loads(tokenizer.to_str())
    frame = json.dumps(says["post_processor"]).replace('"type_id": 1', '"type_id": 0')
    says["post_processor"] = json.loads(frame)
    return Tokenizer.from_str(json.dumps(says))


def read_tokenizer(folder):
    """Return (path, tokenizer) of the first file of a tokenizer that is in `folder`."""
    readers = {
        "tokenizer.json": lambda path: Tokenizer.from_file(str(path)),
        "vocab.txt": read_vocab_txt,
        "vocab.json": read_vocab_json,
    }
    paths = [folder / name for name in readers if (folder / name).is_file()]
    if not paths and (folder / "tokenizer.model").is_file():
        advice = "take a copy of the model that has one"
        path = folder / "tokenizer.model"
        raise UserError(f"{path}: SentencePiece is not read; expected tokenizer.json; {advice}")
    if not paths:
        raise UserError(f"{folder}: none of {', '.join(readers)}; copy one there")
    path = paths[0]
    try:
        return path, readers[path.name](path)
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(f"{path}: not a tokenizer of BERT's kind ({error})") from None


def read_vocab_txt(path):
    """Return a tokenizer from BERT's vocab.txt, which has one token per line."""
    lines = path.read_text(encoding="utf-8").rstrip().split("\n")
    return Tokenizer(WordPiece({line.rstrip(): number for number, line in enumerate(lines)}))


def read_vocab_json(path):
    """Return a tokenizer from RoBERTa's vocab.json and the merges.txt beside it."""
    return Tokenizer(BPE.from_file(str(path), str(path.with_name("merges.txt"))))


# ---------- special and added tokens --------------------------------------------------------------


def as_special(given):
    """Return the special token that a file describes, as a string or as an object."""
    given = {"content": given} if isinstance(given, str) else given
    options = {key: value for key, value in given.items() if key != "__type"}
    return AddedToken(**options | {"special": True})


def special_tokens(config, names):
    """Return {name: AddedToken} of the special tokens, by default those in `names`."""
    texts = {name: config.get(f"{name}_token") or names.get(name) for name in BERT | names}
    return {name: as_special(text) for name, text in texts.items() if text}


def extra_tokens(config):
    """Return the further special tokens that a folder names, as AddedTokens."""
    found = config.get("extra_special_tokens") or []
    found = [*(found.values() if isinstance(found, dict) else found)]
    found += config.get("additional_special_tokens") or []  # of special_tokens_map.json
    return [as_special(token) for token in found]


def added_tokens(folder, config, tokenizer):
    """Return {id: AddedToken}, in the order of the ids, of the tokens that a folder adds."""
    if "added_tokens_decoder" in config:
        found = config["added_tokens_decoder"].items()
        return {int(i): AddedToken(**token) for i, token in sorted(found, key=lambda x: int(x[0]))}
    names = {token.content for token in special_tokens(config, {}).values()}
    extra = config.get("extra_special_tokens", [])
    names |= {token for token in extra if isinstance(token, str)}  # as `transformers`
    found = {}
    for text, number in read_optional(folder / "added_tokens.json").items():
        found[number] = AddedToken(text, special=text in names, normalized=text not in names)
    return dict(sorted((found | tokenizer.get_added_tokens_decoder()).items()))


def add_tokens(tokenizer, added, special):
    """Add tokens {id: AddedToken}, and special ones that are not among them.

    Raises ValueError where one would get another id.
    """
    for number, token in added.items():
        tokenizer.add_tokens([token])
        ours = tokenizer.token_to_id(token.content)
        if ours != number:
            raise ValueError(f"the added token {quote(token.content)} is {ours}, not {number}")
    there = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    tokenizer.add_tokens([token for token in special if token.content not in there])


def end_token(folder, config, tokenizer):
    """Return the text of the end token, which a folder names, or of which it gives the id."""
    if config.get("eos_token"):
        return as_special(config["eos_token"]).content
    numbers = read_optional(folder / "config.json").get("eos_token_id")
    first = numbers[0] if isinstance(numbers, list) and numbers else numbers  # there may be several
    text = tokenizer.id_to_token(first) if type(first) is int and first >= 0 else None
    return text or GPT2["eos"]


def set_end(tokenizer, text, path):
    """Let a tokenizer set the end token `text` after each text, for a decoder."""
    number = tokenizer.token_to_id(text)
    if number is None:
        expected = 'name the end token as "eos_token" in tokenizer_config.json'
        raise UserError(f"{path}: has no token {quote(text)}; {expected}")
    ends = [(text, number)]
    tokenizer.post_processor = TemplateProcessing(f"$A {text}", f"$A {text} $B:1 {text}:1", ends)


# ---------- writing -------------------------------------------------------------------------------


def save_tokenizer(folder, tokenizer, config):
    """Write tokenizer.json, and a tokenizer_config.json by which `transformers` takes it as it is.

    `config` is that of the model.
    """
    says = json.loads(tokenizer.to_str())
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.positions,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
    }
    if config.type_vocab_size < 2:
        about["model_input_names"].remove("token_type_ids")
    if says["pre_tokenizer"] and "add_prefix_space" in says["pre_tokenizer"]:
        about["add_prefix_space"] = says["pre_tokenizer"]["add_prefix_space"]
    about |= {f"{name}_token": text for name, text in special_of(tokenizer).items()}
    atomic_write(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    write_json(folder / "tokenizer_config.json", about)


def special_of(tokenizer):
    """Return {name: text} of the special tokens that a tokenizer has."""
    vocabulary = tokenizer.get_vocab()
    found = {}
    for names in (ROBERTA, BERT):
        found |= {name: text for name, text in names.items() if text in vocabulary}
    frame = tokenizer.encode("").tokens
    if len(frame) == 1:  # the end token of a decoder
        return dict.fromkeys(("unk", "bos", "eos", "pad"), frame[0])
    return found | ({"cls": frame[0], "sep": frame[-1]} if frame else {})


# ---------- label words, and unknown tokens -------------------------------------------------------


def word_ids(tokenizer, words):
    """Return the ids of label words. Raises UserError unless each is one token of its own."""
    unknown = unknown_id(tokenizer)
    ids = []
    for word in words:
        text = spell_word(tokenizer, word)
        encoding = tokenizer.encode(text, add_special_tokens=False)
        new = [i for i in encoding.ids if i not in (unknown, *ids)]
        if len(encoding.ids) != 1 or len(new) != 1:
            expected = f"expected one token, which no other word has; it is {encoding.tokens}"
            raise UserError(f'label word "{text}": {expected}')
        ids += new
    return ids


def unknown_id(tokenizer):
    """Return the id of the token of what a tokenizer does not know; None if there is none."""
    return tokenizer.token_to_id(getattr(tokenizer.model, "unk_token", None) or "")


def spell_word(tokenizer, word):
    """Return a label word as it stands in a text, if the tokenizer works on bytes, as RoBERTa's.

    A space belongs to the word after it, and three words have a capital (SMP, released code).
    """
    if not isinstance(tokenizer.pre_tokenizer, ByteLevel):
        return word
    return " " + (word.capitalize() if word in ("yes", "no", "maybe") else word)


def label_word_ids(tokenizer, task, s, head):
    """Return the ids of a task's label words, which the output head "words" needs; else [].

    With --regression logit a number is the logit of the word for the high end (SMP, released code),
    and not interpolated between two. Raises UserError where the task has no label words, and where
    this setting would change nothing.
    """
    by_logit = s.regression == "logit"
    if by_logit and (head != "words" or task.kind != "score"):
        raise UserError(f"--regression logit: no label word gives a number of {task.name} here")
    if head != "words":
        return []
    words = task.words[1:] if by_logit else task.words
    if not words:
        given = f'give "words" in the task file; {s.method} needs one for each label'
        raise UserError(f"task {task.name} has no label words: {given}")
    return word_ids(tokenizer, words)
