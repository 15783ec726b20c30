"""Make all files of this folder: a task in GLUE's format, and a BERT pretrained on its language.

    python demo/make_demo.py             # takes 5 minutes on one core
    python demo/make_demo.py --check     # makes nothing, only measures the files that are there

At the end it prints the size of the folder and four figures on dev: the share of the commoner
label, the accuracy of a bag of words (with one count per word, and with one per word and
sentence), and the accuracy of the pretrained model before any training on the task.

The language, Tanu, is made up. It has two classes of nouns: sun nouns end in -a, moon nouns in -u.
It has five rules:

    dina ta kobi vilu           dina kobis vilu; ta agrees with the subject dina, a sun noun
    vilu nu kobi re dina        the same, but passive (re); nu agrees with vilu, a moon noun
    dina ta mo kobi vilu        dina does not kobi vilu
    nele dina ta kobi vilu      nele, an adverb, says when
    ... e ...                   and
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers import models as tokenizer_models

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from model import Bert, BertConfig  # noqa: E402
from models.checkpoint import load_model  # noqa: E402

SEED = 1
TRAIN, DEV = 5000, 1000
STEPS, BATCH, LR = 3000, 48, 2e-3
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
AGREEMENT = {"a": "ta", "u": "nu"}  # by the last letter of the subject
PASSIVE = "re"
NOT = "mo"
AND = "e"

# --------------------------------------------------------------------------------------------------
# the language


def coin_words(ending, count, rng):
    """`count` different words of two syllables that end in the vowel `ending`."""
    consonants = "bdgklmnrsv"
    words = []
    for first in consonants:
        for vowel in "aeiou":
            for second in consonants:
                if first != second:
                    words.append(first + vowel + second + ending)
    return rng.sample(words, count)


LEXICON = random.Random(SEED)
NOUNS = coin_words("a", 16, LEXICON) + coin_words("u", 16, LEXICON)
VERBS = coin_words("i", 16, LEXICON)
ADVERBS = coin_words("e", 6, LEXICON)
VOCABULARY = SPECIAL + [*AGREEMENT.values(), PASSIVE, NOT, AND] + ADVERBS + NOUNS + VERBS
LABELS = ["no", "yes"]
LABEL_WORDS = ADVERBS[:2]  # ordinary words of the language, as "no" and "yes" are in English


class Fact(NamedTuple):
    """What a clause says: the agent does (or does not do) the verb to the patient."""

    agent: str
    patient: str
    verb: str
    negated: bool
    when: str  # an adverb or ""
    passive: bool  # how the clause is put; the fact is the same


def any_fact(rng, passive):
    """A random fact, which is in the passive with the probability `passive`."""
    agent, patient = rng.sample(NOUNS, 2)
    when = rng.choice(ADVERBS) if rng.random() < 1 / 3 else ""
    verb = rng.choice(VERBS)
    negated = rng.random() < 0.5
    return Fact(agent, patient, verb, negated, when, rng.random() < passive)


def say(fact):
    """The clause that states one fact, in the active or the passive."""
    if fact.passive:
        subject, other = fact.patient, fact.agent
    else:
        subject, other = fact.agent, fact.patient
    words = [fact.when] if fact.when else []
    words += [subject, AGREEMENT[subject[-1]]]
    if fact.negated:
        words.append(NOT)
    words.append(fact.verb)
    if fact.passive:
        words.append(PASSIVE)
    words.append(other)
    return " ".join(words)


def two_facts(rng, passive=0.25):
    """Two facts with no noun or verb in common, and the sentence that states both."""
    while True:
        first = any_fact(rng, passive)
        second = any_fact(rng, passive)
        rng.random()  # not used, but without this draw the same seed would give other files
        nouns = {first.agent, first.patient, second.agent, second.patient}
        if len(nouns) == 4 and first.verb != second.verb:
            return first, second, f"{say(first)} {AND} {say(second)}"


def discourse(rng):
    """Two texts: the first states one or two facts, the second states one or all of them again.

    In the second text each fact is put in the active or passive anew. The model is pretrained on
    such pairs only.
    """
    if rng.random() < 0.25:
        fact = any_fact(rng, 0.25)
        facts = [fact]
        told = say(fact)
    else:
        first, second, told = two_facts(rng)
        facts = [first, second]
    count = rng.choice([1, len(facts)])
    again = []
    for fact in rng.sample(facts, count):
        again.append(say(fact._replace(passive=rng.random() < 0.25)))
    return told, f" {AND} ".join(again)


# --------------------------------------------------------------------------------------------------
# the task


def any_pair(rng):
    """A row of the task, (sentence1, sentence2, label): does the second follow from the first?

    The first sentence states two facts with no noun or verb in common. One of the two is negated,
    and one is in the passive. The second sentence is about one of these facts. Where it does not
    follow, its agent and patient are exchanged, or its negation is wrong, or one of its nouns
    belongs to the other fact. All these choices are fair and do not depend on the label, so that
    no count of words tells the label.
    """
    while True:
        first, second, told = two_facts(rng, 0.5)
        if first.negated != second.negated and first.passive != second.passive:
            break
    label = rng.randrange(2)
    claim, other = rng.sample([first, second], 2)
    if LABELS[label] == "no":
        stranger = rng.choice([other.agent, other.patient])
        role = rng.choice(["agent", "patient"])
        wrong = [
            claim._replace(agent=claim.patient, patient=claim.agent),
            claim._replace(negated=not claim.negated),
            claim._replace(**{role: stranger}),
        ]
        claim = rng.choice(wrong)
    claim = claim._replace(passive=rng.random() < 0.5)
    return told, say(claim), LABELS[label]


def write_task(rng):
    """Write train.tsv and dev.tsv, whose rows are all different, and task.json."""
    rows = [any_pair(rng) for _ in range(2 * (TRAIN + DEV))]
    rows = list(dict.fromkeys(rows))  # without repetitions
    parts = {"train.tsv": rows[:TRAIN], "dev.tsv": rows[TRAIN : TRAIN + DEV]}
    for name, part in parts.items():
        lines = ["sentence1\tsentence2\tlabel"]
        lines += ["\t".join(row) for row in part]
        (HERE / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    task = {
        "name": "demo",
        "train": "train.tsv",
        "dev": "dev.tsv",
        "columns": ["sentence1", "sentence2"],
        "label": "label",
        "labels": LABELS,
        "words": LABEL_WORDS,
        "metric": "accuracy",
    }
    (HERE / "task.json").write_text(json.dumps(task, indent=2) + "\n", encoding="utf-8")


def read_rows(name):
    """The rows (sentence1, sentence2, label) of train.tsv or dev.tsv."""
    lines = (HERE / name).read_text(encoding="utf-8").splitlines()
    return [tuple(line.split("\t")) for line in lines[1:]]


def bag_of_words(train, dev, per_sentence):
    """Dev accuracy of a logistic regression on word counts.

    The counts of the two sentences are kept apart with `per_sentence`, else they are added up.
    """
    column = {word: i for i, word in enumerate(VOCABULARY)}

    def counts(rows):
        """Counts (N, 2 * words) and labels (N,), 1.0 for yes."""
        x = []
        for sentence1, sentence2, _ in rows:
            count = [0.0] * (2 * len(column))
            for word in sentence1.split():
                count[column[word]] += 1
            second = len(column) if per_sentence else 0  # where the second sentence's counts begin
            for word in sentence2.split():
                count[second + column[word]] += 1
            x.append(count)
        y = [float(label == "yes") for _, _, label in rows]
        return torch.tensor(x), torch.tensor(y)

    x, y = counts(train)
    weight = torch.zeros(x.size(1), requires_grad=True)
    bias = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(x @ weight + bias, y)
        loss = loss + 1e-4 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    x, y = counts(dev)
    guesses = x @ weight + bias > 0
    return (guesses == y).float().mean().item()


# --------------------------------------------------------------------------------------------------
# the model


def write_tokenizer():
    """Write tokenizer.json: BERT's tokenizer, in which each word of the language is one token."""
    vocabulary = {word: i for i, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(tokenizer_models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(HERE / "tokenizer.json"))


def batch_of(pairs, tokenizer):
    """The input_ids, attention_mask and token_type_ids, each (B, T), of pairs of strings."""
    encoded = tokenizer.encode_batch(pairs)
    ids = torch.tensor([e.ids for e in encoded])
    mask = torch.tensor([e.attention_mask for e in encoded])
    types = torch.tensor([e.type_ids for e in encoded])
    return ids, mask, types


def noise(ids, types):
    """The ids (B, T) with some words masked or exchanged, and where the words were chosen (B, T).

    This is BERT's objective, changed to suit so small a model. Words are chosen in one of the two
    texts only, so that the other text tells what was there. 30% of its words are chosen. Half of
    them are masked and 30% become another word. Every second one of these other words is from the
    same example, because a task of inference asks the model to see that a word is out of place.
    """
    chosen = (torch.rand(ids.shape) < 0.3) & (ids >= len(SPECIAL))
    text = (torch.rand(len(ids), 1) < 0.75).long()  # (B, 1): 1 for the second text, 0 for the first
    chosen = chosen & (types == text)
    fate = torch.rand(ids.shape)
    anything = torch.randint(len(SPECIAL), len(VOCABULARY), ids.shape)
    nearby = ids.gather(1, torch.randint(ids.size(1), ids.shape))
    wrong = torch.where((torch.rand(ids.shape) < 0.5) & (nearby >= len(SPECIAL)), nearby, anything)
    noisy = torch.where(chosen & (fate < 0.3), wrong, ids)
    return torch.where(chosen & (fate > 0.5), SPECIAL.index("[MASK]"), noisy), chosen


def pretrain(rng):
    """Pretrain the model as a masked language model; write config.json and model.safetensors.

    No text is seen twice, because new ones are made for each step.
    """
    config = BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = Bert(config, output_head="words", pooler=False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.05)  # BERT has 0.02, for wider layers
    tokenizer = Tokenizer.from_file(str(HERE / "tokenizer.json"))
    tokenizer.enable_padding()
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    started = time.perf_counter()
    total = 0.0
    for step in range(1, STEPS + 1):
        optimizer.param_groups[0]["lr"] = LR * min(step / 200, 1 - step / STEPS)
        ids, mask, types = batch_of([discourse(rng) for _ in range(BATCH)], tokenizer)
        noisy, chosen = noise(ids, types)
        loss = F.cross_entropy(model.mlm_logits(noisy, mask, types)[chosen], ids[chosen])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += loss.item()
        if step % 250 == 0:
            seconds = time.perf_counter() - started
            print(f"step {step}/{STEPS}  loss {total / 250:.3f}  {seconds:.0f} s", flush=True)
            total = 0.0
    about = {
        "architectures": ["BertForMaskedLM"],
        "model_type": "bert",
        "hidden_act": "gelu",
        **vars(config),
    }
    (HERE / "config.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    halves = {}
    for name, tensor in model.state_dict().items():
        halves[name] = tensor.detach().half().contiguous()
    save_file(halves, HERE / "model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def zero_shot(rows):
    """Accuracy of the pretrained model with every weight kept and no training on the task.

    As in SMP, the guess is the label word that fits better at [CLS].
    """
    tokenizer = Tokenizer.from_file(str(HERE / "tokenizer.json"))
    tokenizer.enable_padding()
    words = [tokenizer.token_to_id(word) for word in LABEL_WORDS]
    model = load_model(HERE, "words", words=words).eval()
    ids, mask, types = batch_of([row[:2] for row in rows], tokenizer)
    guesses = model(ids, mask, types).argmax(1).tolist()  # (B, 2) -> (B,)
    right = [LABELS[guess] == row[2] for guess, row in zip(guesses, rows, strict=True)]
    return sum(right) / len(right)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="make nothing, only measure the files that are there"
    )
    if not parser.parse_args().check:
        torch.manual_seed(SEED)
        # One thread sums in the same order everywhere. Another CPU may still round differently.
        torch.set_num_threads(1)
        write_task(random.Random(f"task {SEED}"))
        write_tokenizer()
        pretrain(random.Random(f"text {SEED}"))
    train = read_rows("train.tsv")
    dev = read_rows("dev.tsv")
    assert not {row[:2] for row in train} & {row[:2] for row in dev}
    total = 0
    for path in sorted(HERE.iterdir()):
        if path.is_file():
            size = path.stat().st_size
            total += size
            print(f"{size:>10,}  {path.name}")
    print(f"{total:>10,}  bytes in all")
    labels = [row[2] for row in dev]
    commoner = max(labels.count(label) for label in LABELS) / len(labels)
    print(f"{100 * commoner:.1f}%  the commoner label")
    together = bag_of_words(train, dev, per_sentence=False)
    print(f"{100 * together:.1f}%  bag of words")
    apart = bag_of_words(train, dev, per_sentence=True)
    print(f"{100 * apart:.1f}%  a bag of words for each sentence")
    print(f"{100 * zero_shot(dev):.1f}%  zero-shot, the pretrained model with the label words")


if __name__ == "__main__":
    main()
