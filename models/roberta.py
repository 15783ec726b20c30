"""RoBERTa (Liu et al. 2019, arXiv 1907.11692): BERT with other names and positions."""

from dataclasses import dataclass

from model import Bert, BertConfig, Embeddings

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


@dataclass
class RobertaConfig(BertConfig):
    """The same keys as BERT's, with the defaults that `transformers` has for RoBERTa."""

    vocab_size: int = 50265
    pad_token_id: int = 1

    @property
    def head_act(self):
        return "gelu"

    @property
    def positions(self):
        return self.max_position_embeddings - self.pad_token_id - 1


class RobertaEmbeddings(Embeddings):
    """Positions count from the padding id + 1. Padding that a text itself holds is not counted."""

    def __init__(self, config):
        super().__init__(config)
        self.pad_token_id = config.pad_token_id

    def positions(self, input_ids):
        is_text = input_ids != self.pad_token_id  # (B, T)
        return self.position_embeddings(is_text.cumsum(1) * is_text + self.pad_token_id)


class Roberta(Bert):
    """The encoder with an output head, see `Bert`."""

    Config = RobertaConfig
    Embeddings = RobertaEmbeddings
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
