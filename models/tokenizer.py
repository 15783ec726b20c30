"""The tokenizer of a checkpoint, and the ids of label words.

A folder gives the tokens that `transformers` 5 gives for it. There the class of the tokenizer, and
not tokenizer.json, decides how a text is normalised, split and framed by special tokens. A run
folder gets one tokenizer.json that says all, and a class that takes it as it is.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE, WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer, ByteLevel
from tokenizers.processors import RobertaProcessing, TemplateProcessing

from support.files import atomic_write, read_json, write_json
from support.terminal import UserError, quote

# The special tokens by their names in tokenizer_config.json.
BERT = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}
ROBERTA = {"unk": "<unk>", "sep": "</s>", "pad": "<pad>", "cls": "<s>", "mask": "<mask>"}
# The classes of `transformers`, without "Fast", that we know. The last ones take tokenizer.json as
# it is.
WORD_PIECE = ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer")
BYTE_LEVEL = ("RobertaTokenizer",)
AS_IT_IS = ("PreTrainedTokenizer", "TokenizersBackend")
DEFAULTS = dict.fromkeys(WORD_PIECE, BERT) | dict.fromkeys(BYTE_LEVEL, ROBERTA)

# ---------- reading -------------------------------------------------------------------------------


def load_tokenizer(folder, vocab_size):
    """Return the tokenizer of a checkpoint folder, which neither pads nor truncates.

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
    name = class_of(folder, config)
    if name is None or (name in AS_IT_IS and path.name != "tokenizer.json"):
        name = implied_class(path, tokenizer)
    try:
        added = added_tokens(folder, config, tokenizer)
        special = special_tokens(config, DEFAULTS.get(name, {}))
        if name in WORD_PIECE:
            tokenizer = build_word_piece(tokenizer, special, config, path)
        elif name in BYTE_LEVEL:
            tokenizer = build_byte_level(tokenizer, special, config, path)
        add_tokens(tokenizer, added, [*special.values(), *extra_tokens(config)])
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    add_tokens(tokenizer, {}, [as_special(text) for text in special_of(tokenizer).values()])
    if not tokenizer.num_special_tokens_to_add(is_pair=False):
        raise UserError(f"{path}: adds no special tokens; a model reads the first of them")
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= vocab_size:
        raise UserError(f"{path}: ids up to {largest}, but the embedding has {vocab_size} rows")
    return tokenizer


def read_tokenizer(folder):
    """Return (path, tokenizer) of the first file of a tokenizer that is in `folder`."""
    readers = {
        "tokenizer.json": lambda path: Tokenizer.from_file(str(path)),
        "vocab.txt": read_vocab_txt,
        "vocab.json": read_vocab_json,
    }
    paths = [folder / name for name in readers if (folder / name).is_file()]
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
    vocabulary = {line.rstrip(): number for number, line in enumerate(lines)}
    return Tokenizer(WordPiece(vocabulary, unk_token=BERT["unk"]))


def read_vocab_json(path):
    """Return a tokenizer from RoBERTa's vocab.json and the merges.txt beside it."""
    return Tokenizer(BPE.from_file(str(path), str(path.with_name("merges.txt"))))


def read_optional(path):
    return read_json(path) if path.is_file() else {}


def class_of(folder, config):
    """Return the class of `transformers` that a folder names, without "Fast"; None if it does not.

    Raises UserError where we do not know it.
    """
    known = (*WORD_PIECE, *BYTE_LEVEL, *AS_IT_IS)
    about = read_optional(folder / "config.json")
    for file, says in (("tokenizer_config.json", config), ("config.json", about)):
        name = says.get("tokenizer_class")
        if "AutoTokenizer" in (says.get("auto_map") or {}):
            name = "a class with code of its own"
        if name is None:
            continue
        name = str(name).removesuffix("Fast")
        if name not in known:
            expected = f"expected {', '.join(known)}"
            raise UserError(f"{folder / file}: the tokenizer is {quote(name)}; {expected}")
        return name
    return None


def implied_class(path, tokenizer):
    """Return the class of a tokenizer that no file names."""
    if isinstance(tokenizer.model, WordPiece):
        return WORD_PIECE[0]
    byte_level = isinstance(tokenizer.pre_tokenizer, ByteLevel) or path.name == "vocab.json"
    return BYTE_LEVEL[0] if byte_level else AS_IT_IS[0]


# ---------- as transformers builds it -------------------------------------------------------------


def special_tokens(config, names):
    """Return {name: AddedToken} of the special tokens, by default those in `names`."""
    tokens = {}
    for name in BERT:
        given = config.get(f"{name}_token") or names.get(name)
        if given:
            tokens[name] = as_special(given)
    return tokens


def extra_tokens(config):
    """Return the further special tokens that a folder names, as AddedTokens."""
    found = config.get("extra_special_tokens") or []
    found = [*(found.values() if isinstance(found, dict) else found)]
    found += config.get("additional_special_tokens") or []  # of special_tokens_map.json
    return [as_special(token) for token in found]


def as_special(given):
    """Return the special token that a file describes, as a string or as an object."""
    if isinstance(given, str):
        return AddedToken(given, special=True)
    given = {key: value for key, value in given.items() if key != "__type"}
    return AddedToken(**given | {"special": True})


def added_tokens(folder, config, tokenizer):
    """Return {id: AddedToken}, in the order of the ids, of the tokens that a folder adds."""
    if "added_tokens_decoder" in config:
        found = config["added_tokens_decoder"].items()
        found = {int(number): AddedToken(**token) for number, token in found}
    else:
        special = special_tokens(config, {}).values()
        names = {token.content for token in special} | set(config.get("extra_special_tokens", []))
        found = {}
        for text, number in read_optional(folder / "added_tokens.json").items():
            found[number] = AddedToken(text, special=text in names, normalized=text not in names)
        found |= tokenizer.get_added_tokens_decoder()
    return dict(sorted(found.items()))


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


def build_word_piece(tokenizer, special, config, path):
    """Return a tokenizer as BertTokenizer builds it around the vocabulary of another one.

    `special` is {name: AddedToken}.
    """
    says = json.loads(tokenizer.to_str())
    rest = {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    check_part(says, "model", {"type": "WordPiece"} | rest)
    check_there(tokenizer, special)
    lower = config.get("do_lower_case", True)
    strip = config.get("strip_accents")  # None: as `lower`
    chinese = config.get("tokenize_chinese_chars", True)
    expected = {
        "lowercase": ("do_lower_case", lower),
        "strip_accents": ("strip_accents", lower if strip is None else strip),
        "handle_chinese_chars": ("tokenize_chinese_chars", chinese),
    }
    if path.name == "tokenizer.json":
        check_part(says, "normalizer", {"type": "BertNormalizer", "clean_text": True})
        check_part(says, "pre_tokenizer", {"type": "BertPreTokenizer"})
        found = says["normalizer"]
        if found["strip_accents"] is None:
            found["strip_accents"] = lower
        check_switches(found, expected, config)
    built = Tokenizer(tokenizer.model)
    built.model.unk_token = special["unk"].content
    built.normalizer = BertNormalizer(True, chinese, strip, lower)
    built.pre_tokenizer = BertPreTokenizer()
    first, last = special["cls"].content, special["sep"].content
    built.post_processor = TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {last} $B:1 {last}:1",
        special_tokens=[(text, tokenizer.token_to_id(text)) for text in (first, last)],
    )
    return built


def build_byte_level(tokenizer, special, config, path):
    """Return a tokenizer as RobertaTokenizer builds it around the vocabulary of another one.

    `special` is {name: AddedToken}.
    """
    says = json.loads(tokenizer.to_str())
    check_part(says, "model", {"type": "BPE"})
    check_there(tokenizer, special)
    prefix = config.get("add_prefix_space", False)
    if path.name == "tokenizer.json":
        check_part(says, "normalizer", {})
        check_part(says, "pre_tokenizer", {"type": "ByteLevel"})
        expected = {"add_prefix_space": ("add_prefix_space", prefix)}
        check_switches(says["pre_tokenizer"], expected, config)
    built = Tokenizer(tokenizer.model)
    built.pre_tokenizer = ByteLevel(add_prefix_space=prefix)
    ends = [special[name].content for name in ("sep", "cls")]
    ends = [(text, tokenizer.token_to_id(text)) for text in ends]
    built.post_processor = RobertaProcessing(*ends, add_prefix_space=prefix)
    return built


def check_there(tokenizer, special):
    """Raise ValueError unless the vocabulary has the special tokens {name: AddedToken}."""
    texts = {token.content for token in special.values()}
    missing = texts - tokenizer.get_vocab().keys()
    if missing:
        raise ValueError(f"no {' '.join(sorted(missing))}")


def check_part(says, name, expected):
    """Raise ValueError unless a part of tokenizer.json has the values that its class has."""
    found = {key: (says[name] or {}).get(key) for key in (expected or says[name] or {})}
    if found != expected:
        told = f"its {name} has {found}, but the class of the tokenizer has {expected}"
        advice = 'to take this file as it is, write "tokenizer_class": "PreTrainedTokenizerFast"'
        raise ValueError(f"{told}; {advice} into tokenizer_config.json")


def check_switches(found, expected, config):
    """Raise ValueError where tokenizer.json differs from the default that its class has.

    `expected` is {name in tokenizer.json: (name in tokenizer_config.json, value)}. What
    tokenizer_config.json itself says counts more, as in `transformers`.
    """
    for name, (key, value) in expected.items():
        if key not in config and found[name] != value:
            told = f"{name} is {found[name]}, but {value} without {key} in tokenizer_config.json"
            raise ValueError(f"{told}; write it there")


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
    return found | ({"cls": frame[0], "sep": frame[-1]} if frame else {})


# ---------- label words, and unknown tokens -------------------------------------------------------


def word_ids(tokenizer, words):
    """Return the ids of label words. Raises UserError unless each is one token of its own."""
    unknown = tokenizer.token_to_id(tokenizer.model.unk_token or "")
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


def spell_word(tokenizer, word):
    """Return a label word as it stands in a text, if the tokenizer works on bytes, as RoBERTa's.

    A space belongs to the word after it, and three words have a capital (SMP, released code).
    """
    if not isinstance(tokenizer.pre_tokenizer, ByteLevel):
        return word
    return " " + (word.capitalize() if word in ("yes", "no", "maybe") else word)


def label_word_ids(tokenizer, task, method, by_logit=False):
    """Return the ids of a task's label words, which the method needs.

    `by_logit`: a number is the logit of the word for the high end (SMP, released code), and not
    interpolated between two words. Raises UserError where the task has no label words.
    """
    words = task.words
    if by_logit and not task.labels:
        words = words[1:]
    if not words:
        given = f'give "words" in the task file; {method} needs one for each label'
        raise UserError(f"task {task.name} has no label words: {given}")
    return word_ids(tokenizer, words)
