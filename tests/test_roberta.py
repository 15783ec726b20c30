"""RoBERTa: its names, positions, heads and tokens, against transformers and published ids."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from data import TASKS, Dataset, Task, kind_of
from kinds.span import encode_windows
from kinds.tag import encode_words
from models.checkpoint import load_model, read_checkpoint, read_config, save_model
from models.roberta import Roberta
from models.tokenizer import load_tokenizer, word_ids

BERT_DIR = os.environ.get("BERT_DIR", "")
TOKENIZER = os.environ.get("ROBERTA_TOKENIZER", "")
pytestmark = pytest.mark.real
# the class of transformers, and the arguments of load_model
CLASSES = {
    "RobertaForMaskedLM": ("words", 0, "pooled"),
    "RobertaForSequenceClassification": ("classifier", 3, "pooled"),
    "RobertaForQuestionAnswering": ("classifier", 2, "start and end"),
    "RobertaForTokenClassification": ("classifier", 5, "per token"),
}


@pytest.fixture(scope="module")
def files():
    """The folder of RoBERTa's real tokenizer."""
    if not Path(TOKENIZER or "missing").is_dir():
        pytest.skip("needs ROBERTA_TOKENIZER")
    return Path(TOKENIZER)


def small(hf, labels):
    return hf.RobertaConfig(
        vocab_size=99,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        max_position_embeddings=34,
        type_vocab_size=1,
        num_labels=labels,
    )


def batch():
    ids = torch.randint(3, 99, (4, 20), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(20) < torch.tensor([[20], [7], [12], [3]])
    return torch.where(mask, ids, 1), mask


@pytest.mark.parametrize("name", CLASSES)
def test_logits_are_those_of_transformers(name, hf, tmp_path):
    """Logits of a random small model are those of transformers, to 1e-5.

    The folders of either side load on the other without a missing or an unexpected key.
    """
    head, outputs, form = CLASSES[name]
    words = [5, 9] if head == "words" else []
    torch.manual_seed(0)
    theirs = getattr(hf, name)(small(hf, outputs or 2))
    theirs.save_pretrained(tmp_path / "theirs")
    net = load_model(tmp_path / "theirs", head, outputs, words, form=form, new_head=False).eval()
    assert net.config.positions == 32
    labels = [f"L{i}" for i in range(outputs)]
    save_model(tmp_path / "ours", net, net.state_dict(), labels)
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["architectures"] == [name]
    ids, mask = batch()
    zeros = torch.zeros_like(ids)
    for folder in ("theirs", "ours"):
        kind_of_model = getattr(hf, name)
        loaded, info = kind_of_model.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(info.values()), info
        with torch.no_grad():
            said = loaded.eval()(ids, attention_mask=mask)
            ours = net.mlm_logits(ids, mask, zeros) if words else net(ids, mask, zeros)
        if form == "start and end":
            logits = torch.stack([said.start_logits, said.end_logits], dim=-1)
        else:
            logits = said.logits
        gap = (ours - logits).abs()
        assert (gap if form == "pooled" and not words else gap[mask]).max() < 1e-5
        again = load_model(tmp_path / folder, head, outputs, words, form=form, new_head=False)
        for key, tensor in net.state_dict().items():
            assert torch.equal(tensor, again.state_dict()[key]), key


def test_hidden_states(hf, tmp_path):
    """A bare RobertaModel loads, without its pooler, and has the same hidden states."""
    torch.manual_seed(0)
    theirs = hf.RobertaModel(small(hf, 2))
    theirs.save_pretrained(tmp_path)
    assert any("pooler" in name for name, _ in theirs.named_parameters())
    Model, _ = read_config(tmp_path)
    assert Model is Roberta
    net = load_model(tmp_path, "words", words=[5]).eval()
    ids, mask = batch()
    with torch.no_grad():
        ours = net.bert(ids, mask, torch.zeros_like(ids))
        said = theirs.eval()(ids, attention_mask=mask).last_hidden_state
    assert (ours - said)[mask].abs().max() < 1e-5
    assert "bert.pooler.dense.weight" not in read_checkpoint(tmp_path)


@pytest.mark.parametrize("source", ["tokenizer.json", "vocab.json"])
def test_ids(source, files, tmp_path):
    """The published ids; a pair has four special tokens; words of a sentence have their space."""
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        if source != "vocab.json" or name != "tokenizer.json":
            shutil.copy(files / name, tmp_path / name)
    tokenizer = load_tokenizer(tmp_path, 50_265)
    assert tokenizer.encode("Hello world").ids == [0, 31414, 232, 2]
    assert tokenizer.encode(" Hello world").ids == [0, 20920, 232, 2]
    if source == "tokenizer.json":  # which says that a mask takes the space before it
        paris = [0, 32826, 16, 5, 50264, 9, 1470, 2]
        assert tokenizer.encode("Paris is the <mask> of France").ids == paris
    assert tokenizer.encode("a b", "c d").ids == [0, 102, 741, 2, 2, 438, 385, 2]
    words = ("yes", "no", "maybe", "terrible", "great", "correct", "incorrect")
    assert word_ids(tokenizer, words) == [3216, 440, 5359, 6587, 372, 4577, 17401]
    assert len(word_ids(tokenizer, TASKS["conll2003"].words)) == 9
    arrays = encode_words([["EU", "rejects"]], [["O", "O"]], ["O"], tokenizer, 16)
    rejects = tokenizer.encode(" rejects", add_special_tokens=False).ids
    assert len(rejects) == 1
    assert arrays["ids"].tolist()[-2:] == [*rejects, 2]
    assert arrays["places"].tolist() == [-1, 0, 1, -1]
    question = [("Who?", "The cat  sat.")]
    arrays = encode_windows(question, [("q", [("cat", 4)])], tokenizer, 16)
    task = Task(name="s", folder="s", kind="span", labels=("start", "end"))
    dataset = Dataset(kind_of(task), **arrays)
    first, last = dataset.labels[0]
    begin, end = dataset.places[first, 0], dataset.places[last, 1]
    assert "The cat  sat."[begin:end] == "cat"
    assert not dataset.collate(np.array([0]))["token_type_ids"].any()
