"""The tokenizer of a checkpoint, and the ids of label words."""

from pathlib import Path

from tokenizers import BertWordPieceTokenizer, Tokenizer

from models import roberta
from support.files import read_json
from support.terminal import UserError


def load_tokenizer(model_dir, vocab_size):
    """Return the tokenizer of a checkpoint folder, which neither pads nor truncates.

    It is read from tokenizer.json or, without this file, built from BERT's vocab.txt, or from
    RoBERTa's vocab.json and merges.txt. Raises UserError if none is there, or if an id is not below
    `vocab_size`, the rows of the embedding.
    """
    builders = {
        "tokenizer.json": Tokenizer.from_file,
        "vocab.txt": build_tokenizer,
        "vocab.json": roberta.build_tokenizer,
    }
    paths = [Path(model_dir, name) for name in builders]
    there = [path for path in paths if path.is_file()]
    if not there:
        raise UserError(f"{model_dir}: none of {', '.join(builders)}; copy one there")
    path = there[0]
    try:
        tokenizer = builders[path.name](str(path))
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(f"{path}: not a tokenizer of BERT's kind ({error})") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= vocab_size:
        raise UserError(f"{path}: ids up to {largest}, but the embedding has {vocab_size} rows")
    return tokenizer


def build_tokenizer(path):
    """Return BERT's tokenizer from vocab.txt, which has one token per line.

    Switches such as "do_lower_case" come from the tokenizer_config.json beside it, if there is one.
    """
    config = Path(path).with_name("tokenizer_config.json")
    config = read_json(config) if config.is_file() else {}
    tokenizer = BertWordPieceTokenizer.from_file(
        path,
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"),  # None: strip them if we lowercase
        lowercase=config.get("do_lower_case", True),
    )
    missing = {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"} - tokenizer.get_vocab().keys()
    if missing:
        raise UserError(f"no {' '.join(sorted(missing))}")
    return Tokenizer.from_str(tokenizer.to_str())


def word_ids(tokenizer, words):
    """Return the ids of label words. Raises UserError unless each is one token of its own."""
    unknown = tokenizer.token_to_id("[UNK]")
    ids = []
    for word in words:
        text = roberta.spell_word(tokenizer, word)
        encoding = tokenizer.encode(text, add_special_tokens=False)
        new = [i for i in encoding.ids if i not in (unknown, *ids)]
        if len(encoding.ids) != 1 or len(new) != 1:
            expected = f"expected one token, which no other word has; it is {encoding.tokens}"
            raise UserError(f'label word "{text}": {expected}')
        ids += new
    return ids


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
