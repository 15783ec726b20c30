"""RoBERTa (Liu et al. 2019, arXiv 1907.11692): BERT with other names, positions and tokens."""

from pathlib import Path

from tokenizers import AddedToken, ByteLevelBPETokenizer, Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import RobertaProcessing

from model import Bert, BertConfig

# RoBERTa's names, and ours, which are BERT's. RoBERTa's own pooler is not used.
NAMES = {
    "roberta.pooler.": "cls.unused.",
    "classifier.dense.": "bert.pooler.dense.",
    "classifier.out_proj.": "classifier.",
    "lm_head.dense.": "cls.predictions.transform.dense.",
    "lm_head.layer_norm.": "cls.predictions.transform.LayerNorm.",
    "lm_head.": "cls.predictions.",
    "roberta.": "bert.",
}


class RobertaConfig(BertConfig):
    """The same keys as BERT's."""

    @property
    def first_position(self):
        return self.pad_token_id + 1  # positions count from the padding id + 1


class Roberta(Bert):
    """The encoder with an output head, see `Bert`."""

    Config = RobertaConfig
    heads = {
        form: (name, hub_class.replace("Bert", "Roberta"))
        for form, (name, hub_class) in Bert.heads.items()
    }
    mlm_class = "RobertaForMaskedLM"
    bare_class = "RobertaModel"
    hub_prefix = "roberta"
    hub_names = NAMES

    def pool(self, hidden):
        return super().pool(self.dropout(hidden))

    def to_hub(self, state):
        """Return a state dict under RoBERTa's names. A pooler is a layer of its classifier."""
        has_pooler = any(name.startswith("bert.pooler.") for name in state)
        renamed = {}
        for name, tensor in state.items():
            for theirs, ours in NAMES.items():
                if name.startswith(ours) and (has_pooler or ours != "classifier."):
                    name = theirs + name.removeprefix(ours)
                    break
            renamed[name] = tensor
        return renamed


def build_tokenizer(path):
    """Return RoBERTa's tokenizer from vocab.json and the merges.txt beside it."""
    merges = str(Path(path).with_name("merges.txt"))
    tokenizer = ByteLevelBPETokenizer.from_file(path, merges, trim_offsets=True)
    first, last = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = RobertaProcessing(last, first, add_prefix_space=False)
    mask = AddedToken("<mask>", lstrip=True)
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", mask])
    return Tokenizer.from_str(tokenizer.to_str())


def spell_word(tokenizer, word):
    """Return a label word as it stands in a text, if the tokenizer works on bytes, as RoBERTa's.

    A space belongs to the word after it, and three words have a capital (SMP, released code).
    """
    if not isinstance(tokenizer.pre_tokenizer, ByteLevel):
        return word
    return " " + (word.capitalize() if word in ("yes", "no", "maybe") else word)
