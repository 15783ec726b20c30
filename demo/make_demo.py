"""Make everything in this folder: a language, a small BERT pretrained on text in it, and a task in GLUE's format.

    python demo/make_demo.py             # 5 minutes on one core
    python demo/make_demo.py --check     # only measure what is there

It ends by printing the size of the folder, the share of the commoner label in dev, the accuracy of a bag of words (one
count per word; one per word and sentence), and that of the pretrained model before any training on the task.

Tanu, the language, has two classes of nouns, sun (ending in -a) and moon (-u), and five rules:

    dina ta kobi vilu           dina kobis vilu; ta agrees with the subject, dina, a sun noun
    vilu nu kobi re dina        the same: re makes the verb passive, nu agrees with vilu, a moon noun
    dina ta mo kobi vilu        dina does not kobi vilu
    nele dina ta kobi vilu      it happens nele: an adverb of time
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
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from model import Bert, BertConfig, load_model  # noqa: E402

SEED = 1
TRAIN, DEV = 5000, 1000
STEPS, BATCH, LR = 3000, 48, 2e-3
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
AGREEMENT, PASSIVE, NOT, AND = {"a": "ta", "u": "nu"}, "re", "mo", "e"

# ---------------------------------------------------------------------------------------------------------------------
# the language


def coin_words(ending, count, rng):
    """`count` different words of two syllables with this last vowel."""
    words = [c + v + d + ending for c in "bdgklmnrsv" for v in "aeiou" for d in "bdgklmnrsv" if c != d]
    return rng.sample(words, count)


LEXICON = random.Random(SEED)
NOUNS = coin_words("a", 16, LEXICON) + coin_words("u", 16, LEXICON)
VERBS = coin_words("i", 16, LEXICON)
ADVERBS = coin_words("e", 6, LEXICON)
VOCABULARY = SPECIAL + [*AGREEMENT.values(), PASSIVE, NOT, AND] + ADVERBS + NOUNS + VERBS
LABELS, LABEL_WORDS = ["no", "yes"], ADVERBS[:2]  # two ordinary words, as "no" and "yes" are to a BERT


class Fact(NamedTuple):
    agent: str
    patient: str
    verb: str
    negated: bool
    when: str  # an adverb or ""
    passive: bool  # only a manner of speaking


def any_fact(rng, passive):
    agent, patient = rng.sample(NOUNS, 2)
    when = rng.choice(ADVERBS) if rng.random() < 1 / 3 else ""
    return Fact(agent, patient, rng.choice(VERBS), rng.random() < 0.5, when, rng.random() < passive)


def say(fact):
    """One clause, in the active or the passive."""
    subject, other = (fact.patient, fact.agent) if fact.passive else (fact.agent, fact.patient)
    words = [fact.when, subject, AGREEMENT[subject[-1]], NOT * fact.negated, fact.verb, PASSIVE * fact.passive, other]
    return " ".join(word for word in words if word)


def two_facts(rng, passive=0.25):
    """Two facts with no word in common, and how they are told."""
    while True:
        first, second = any_fact(rng, passive), any_fact(rng, passive)
        rng.random()  # of a rule that was given up; without this draw the seed would give other files
        if len({*first[:2], *second[:2]}) == 4 and first.verb != second.verb:
            return first, second, f"{say(first)} {AND} {say(second)}"


def discourse(rng):
    """Two texts: one or two facts, and all or one of them said again, freely. This is all that pretraining sees."""
    if rng.random() < 0.25:
        facts = [any_fact(rng, 0.25)]
        told = say(*facts)
    else:
        *facts, told = two_facts(rng)
    again = [fact._replace(passive=rng.random() < 0.25) for fact in rng.sample(facts, rng.choice([1, len(facts)]))]
    return told, f" {AND} ".join(map(say, again))


# ---------------------------------------------------------------------------------------------------------------------
# the task


def any_pair(rng):
    """(sentence1, sentence2, label): does the second follow from the first?

    The first states two facts with no word in common, one of them negated, one in the passive; the second one is about
    either of them. If it does not follow, the roles are exchanged, the negation is wrong, or one participant belongs
    to the other fact. Every choice is fair and made apart from the label, so that no count of words betrays it.
    """
    while True:
        first, second, told = two_facts(rng, 0.5)
        if first.negated != second.negated and first.passive != second.passive:
            break
    label, (claim, other) = rng.randrange(2), rng.sample([first, second], 2)
    if not label:
        stranger = rng.choice([noun for noun in other[:2] if noun not in claim[:2]])
        claim = rng.choice(
            [
                claim._replace(agent=claim.patient, patient=claim.agent),
                claim._replace(negated=not claim.negated),
                claim._replace(**{rng.choice(["agent", "patient"]): stranger}),
            ]
        )
    return told, say(claim._replace(passive=rng.random() < 0.5)), LABELS[label]


def write_task(rng):
    rows = list(dict.fromkeys(any_pair(rng) for _ in range(2 * (TRAIN + DEV))))  # all different
    for name, part in {"train.tsv": rows[:TRAIN], "dev.tsv": rows[TRAIN : TRAIN + DEV]}.items():
        lines = ["\t".join(row) for row in [("sentence1", "sentence2", "label"), *part]]
        (HERE / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    task = {"name": "demo", "train": "train.tsv", "dev": "dev.tsv", "columns": ["sentence1", "sentence2"]}
    task |= {"label": "label", "labels": LABELS, "words": LABEL_WORDS, "metric": "accuracy"}
    (HERE / "task.json").write_text(json.dumps(task, indent=2) + "\n", encoding="utf-8")


def read_rows(name):
    lines = (HERE / name).read_text(encoding="utf-8").splitlines()
    return [tuple(line.split("\t")) for line in lines[1:]]


def bag_of_words(train, dev, per_sentence):
    """Dev accuracy of a logistic regression on word counts, those of the two sentences added up or kept apart."""
    column = {word: i for i, word in enumerate(VOCABULARY)}

    def counts(rows):
        x = [[0.0] * (2 * len(column)) for _ in rows]
        for row, count in zip(rows, x, strict=True):
            for sentence in range(2):
                for word in row[sentence].split():
                    count[sentence * per_sentence * len(column) + column[word]] += 1
        return torch.tensor(x), torch.tensor([float(row[2] == LABELS[1]) for row in rows])

    x, y = counts(train)
    weight, bias = (torch.zeros(size, requires_grad=True) for size in (x.size(1), 1))
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(x @ weight + bias, y) + 1e-4 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    x, y = counts(dev)
    return ((x @ weight + bias > 0) == y).float().mean().item()


# ---------------------------------------------------------------------------------------------------------------------
# the model


def write_tokenizer():
    vocabulary = {word: i for i, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
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
    """input_ids, attention_mask, token_type_ids (B, T) of pairs of strings."""
    encoded = tokenizer.encode_batch(pairs)
    return [torch.tensor([getattr(e, key) for e in encoded]) for key in ("ids", "attention_mask", "type_ids")]


def noise(ids, types):
    """ids with words masked or exchanged, and where (B, T): BERT's objective, sharpened for so small a model.

    Only one of the two texts is disturbed, so that the other tells what was there. Of the 30% chosen half are masked
    and 30% become another word, every other time one of the same example: to see that a word is out of place is what
    a task of inference asks for.
    """
    chosen = (torch.rand(ids.shape) < 0.3) & (ids >= len(SPECIAL)) & (types == (torch.rand(len(ids), 1) < 0.75).long())
    fate = torch.rand(ids.shape)
    anything = torch.randint(len(SPECIAL), len(VOCABULARY), ids.shape)
    nearby = ids.gather(1, torch.randint(ids.size(1), ids.shape))
    wrong = torch.where((torch.rand(ids.shape) < 0.5) & (nearby >= len(SPECIAL)), nearby, anything)
    noisy = torch.where(chosen & (fate < 0.3), wrong, ids)
    return torch.where(chosen & (fate > 0.5), SPECIAL.index("[MASK]"), noisy), chosen


def pretrain(rng):
    """Masked language modelling on an endless text; writes config.json and model.safetensors."""
    config = BertConfig(len(VOCABULARY), 128, 3, 4, 256, 128, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = Bert(config, head="words", pooler=False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.05)  # BERT's 0.02 is for wider layers
    tokenizer = Tokenizer.from_file(str(HERE / "tokenizer.json"))
    tokenizer.enable_padding()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    started, total = time.perf_counter(), 0.0
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
            print(f"step {step}/{STEPS}  loss {total / 250:.3f}  {time.perf_counter() - started:.0f} s", flush=True)
            total = 0.0
    about = {"architectures": ["BertForMaskedLM"], "model_type": "bert", "hidden_act": "gelu", **vars(config)}
    (HERE / "config.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    halves = {name: tensor.detach().half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(halves, HERE / "model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def zero_shot(rows):
    """Accuracy of the pretrained model as SMP reads it, every weight kept: the label word that fits better at [CLS]."""
    tokenizer = Tokenizer.from_file(str(HERE / "tokenizer.json"))
    tokenizer.enable_padding()
    model = load_model(HERE, "words", words=[tokenizer.token_to_id(word) for word in LABEL_WORDS]).eval()
    guesses = model(*batch_of([row[:2] for row in rows], tokenizer)).argmax(1).tolist()
    return sum(LABELS[guess] == row[2] for guess, row in zip(guesses, rows, strict=True)) / len(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="make nothing, measure what is there")
    if not parser.parse_args().check:
        torch.manual_seed(SEED)
        torch.set_num_threads(1)  # sums in the same order everywhere; another CPU may still round otherwise
        write_task(random.Random(f"task {SEED}"))
        write_tokenizer()
        pretrain(random.Random(f"text {SEED}"))
    train, dev = read_rows("train.tsv"), read_rows("dev.tsv")
    assert not {row[:2] for row in train} & {row[:2] for row in dev}
    share = sum(row[2] == LABELS[1] for row in dev) / len(dev)
    files = [path for path in sorted(HERE.iterdir()) if path.is_file()]
    print(*(f"{path.stat().st_size:>10,}  {path.name}" for path in files), sep="\n")
    print(f"{sum(path.stat().st_size for path in files):>10,}  bytes in all")
    print(f"{100 * max(share, 1 - share):.1f}%  the commoner label")
    print(f"{100 * bag_of_words(train, dev, per_sentence=False):.1f}%  bag of words")
    print(f"{100 * bag_of_words(train, dev, per_sentence=True):.1f}%  a bag of words for each sentence")
    print(f"{100 * zero_shot(dev):.1f}%  zero-shot, the pretrained model with the label words")


if __name__ == "__main__":
    main()
