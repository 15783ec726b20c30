"""The classes of tokenizers in `transformers` 5: which one reads a folder, and what it builds.

There the class, and not tokenizer.json, decides how a text is normalised, split and framed.
"""

import json

from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import BPE, WordPiece
from tokenizers.normalizers import NFC, BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer, ByteLevel, Sequence, Split
from tokenizers.processors import RobertaProcessing, TemplateProcessing

from support.files import read_optional
from support.terminal import UserError, quote

# The special tokens by their names in tokenizer_config.json.
BERT = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}
ROBERTA = {"unk": "<unk>", "sep": "</s>", "pad": "<pad>", "cls": "<s>", "mask": "<mask>"}
GPT2 = dict.fromkeys(("unk", "bos", "eos"), "<|endoftext|>")
QWEN2 = dict.fromkeys(("unk", "eos", "pad"), "<|endoftext|>")
# What is a word for Qwen2, as its tokenizer.json says it.
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The classes of `transformers` that we know, without "Fast": the special tokens of each, and the
# model that it needs. The last ones take tokenizer.json as it is.
CLASSES = dict.fromkeys(("BertTokenizer", "DistilBertTokenizer"), (BERT, WordPiece))
CLASSES |= {"ElectraTokenizer": (BERT, WordPiece), "RobertaTokenizer": (ROBERTA, BPE)}
CLASSES |= {"GPT2Tokenizer": (GPT2, BPE), "Qwen2Tokenizer": (QWEN2, BPE)}
AS_IS = ("LlamaTokenizer", "PreTrainedTokenizer", "TokenizersBackend")
CLASSES |= dict.fromkeys(AS_IS, ({}, None))
# The class that `transformers` takes for a model, whatever class its files name.
BY_MODEL = {"qwen2": "Qwen2Tokenizer", "mistral": "TokenizersBackend"}
# What tokenizer_config.json may say otherwise than tokenizer.json, by the name in the latter. It
# counts more, as in `transformers`.
SWITCHES = {
    "lowercase": "do_lower_case",
    "strip_accents": "strip_accents",
    "handle_chinese_chars": "tokenize_chinese_chars",
    "add_prefix_space": "add_prefix_space",
}

# ---------- which class ---------------------------------------------------------------------------


def class_of(folder, config):
    """Return the class of `transformers` that a folder names, without "Fast"; None if it does not.

    Raises UserError where we do not know it.
    """
    about = read_optional(folder / "config.json")
    is_whole = (folder / "tokenizer.json").is_file()
    by_model = BY_MODEL.get(about.get("model_type"))
    if by_model and "AutoTokenizer" not in (config.get("auto_map") or {}):
        if CLASSES[by_model][1] or is_whole:
            return by_model
    for file, says in (("tokenizer_config.json", config), ("config.json", about)):
        name = says.get("tokenizer_class")
        if "AutoTokenizer" in (says.get("auto_map") or {}):
            name = "a class with code of its own"
        if name is None:
            continue
        name = str(name).removesuffix("Fast")
        if name not in CLASSES:
            expected = f"expected {', '.join(CLASSES)}"
            raise UserError(f"{folder / file}: the tokenizer is {quote(name)}; {expected}")
        if CLASSES[name][1] or is_whole:
            return name
    return None


def implied_class(path, tokenizer, framed):
    """Return the class of a tokenizer that no file names."""
    if isinstance(tokenizer.model, WordPiece):
        return "BertTokenizer"
    byte_level = isinstance(tokenizer.pre_tokenizer, ByteLevel) or path.name == "vocab.json"
    if byte_level:
        return "RobertaTokenizer" if framed else "GPT2Tokenizer"
    return "PreTrainedTokenizer"


# ---------- what it builds ------------------------------------------------------------------------


def rebuild(tokenizer, names, model, special, config, path):
    """Return a tokenizer as its class builds it around the vocabulary of another one.

    `names` and `model` are those of its class, and `special` is {name: AddedToken}. Raises
    ValueError where tokenizer.json says otherwise.
    """
    if not isinstance(tokenizer.model, model):
        found = type(tokenizer.model).__name__
        raise ValueError(f"its model is {found}, but its class needs {model.__name__}")
    texts = {name: token.content for name, token in special.items()}
    missing = set(texts.values()) - tokenizer.get_vocab().keys()
    if missing:
        raise ValueError(f"no {' '.join(sorted(missing))}")
    built = Tokenizer(tokenizer.model)
    frame = [texts[name] for name in ("cls", "sep") if name in texts]  # a decoder has none
    frame = [(text, tokenizer.token_to_id(text)) for text in frame]
    if model is WordPiece:
        first, last = frame
        built.model.unk_token = texts["unk"]
        built.normalizer = BertNormalizer(
            lowercase=config.get("do_lower_case", True),
            strip_accents=config.get("strip_accents"),  # None: if it is lower case
            handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        )
        built.pre_tokenizer = BertPreTokenizer()
        single = f"{first[0]} $A {last[0]}"
        pair = f"{single} $B:1 {last[0]}:1"
        built.post_processor = TemplateProcessing(single, pair, [first, last])
    else:
        prefix = config.get("add_prefix_space", False)
        built.pre_tokenizer = ByteLevel(add_prefix_space=prefix)
        if names is QWEN2:
            built.normalizer = NFC()
            parts = [Split(Regex(QWEN2_WORDS), "isolated"), ByteLevel(prefix, use_regex=False)]
            built.pre_tokenizer = Sequence(parts)
        built.decoder = decoders.ByteLevel()
        if names is ROBERTA:
            built.post_processor = RobertaProcessing(*frame[::-1], add_prefix_space=prefix)
    if path.name == "tokenizer.json":
        found, expected = [as_json(each) for each in (tokenizer, built)]
        if names is QWEN2:
            check_qwen2(found, expected)
        else:
            check_alike(found, expected, config)
    return built


def as_json(tokenizer):
    """Return what tokenizer.json says of a tokenizer, but for `trim_offsets`, of no effect here."""

    def without_offsets(part):
        return {key: value for key, value in part.items() if key != "trim_offsets"}

    return json.loads(tokenizer.to_str(), object_hook=without_offsets)


def check_alike(found, expected, config):
    """Raise ValueError where tokenizer.json differs from what its class builds.

    Where tokenizer_config.json says the latter, that is no contradiction.
    """
    for part in ("normalizer", "pre_tokenizer"):
        theirs, ours = found[part] or {"type": None}, expected[part] or {"type": None}
        for key in sorted({"type", *ours}):
            if theirs.get(key) == ours.get(key) or SWITCHES.get(key) in config:
                continue
            says = f"the {key} of its {part} is {theirs.get(key)}"
            advice = '"tokenizer_class": "PreTrainedTokenizerFast" takes this file as it is'
            if key in SWITCHES:
                advice = f'write "{SWITCHES[key]}"'
            where = "in tokenizer_config.json"
            raise ValueError(f"{says}, but its class has {ours.get(key)}; {advice} {where}")


def check_qwen2(found, expected):
    """Raise ValueError where tokenizer.json splits texts in another way than Qwen2's class."""
    for part in ("normalizer", "pre_tokenizer"):
        if found[part] != expected[part]:
            told = "with which transformers reads each folder whose model_type is qwen2"
            raise ValueError(f"its {part} is not that of Qwen2Tokenizer, {told}")
