"""The official tasks outside GLUE: {name: fields of a Task}, see data.py."""

SQUAD = "https://rajpurkar.github.io/SQuAD-explorer/dataset/"
E2E = "https://raw.githubusercontent.com/tuetschek/e2e-dataset/master/"
DART = "https://raw.githubusercontent.com/Yale-LILY/dart/master/data/v1.1.1/dart-v1.1.1-full-"
WEBNLG = "587fa698bec705efbefe72a235a6019c2b9b8b6c"  # the version of its repository
# What a task of texts for sources has no use for, and its metrics.
TEXTS = {"kind": "generate", "labels": (), "spelling": (), "words": (), "metrics": ("bleu", "nist")}
OTHER_SCORER = {"published": "GenerationEval"}  # whose figures the papers have

# fmt: off
OFFICIAL = {
    "squad": dict(
        folder="SQuAD", kind="span",
        labels=("start", "end"), words=("yes", "no"),
        metrics=("f1", "em"), columns=("question", "context"),
        files={"train": "train-v1.1.json", "dev": "dev-v1.1.json"},
        rows=(87_599, 10_570),
        sources=(
            (f"{SQUAD}train-v1.1.json",
             "3527663986b8295af4f7fcdff1ba1ff3f72d07d61a20f487cb238a6ef92fd955"),
            (f"{SQUAD}dev-v1.1.json",
             "95aa6a52d5d6a735563366753ca50492a658031da74f301ac5238b03966972c9"))),
    "conll2003": dict(
        folder="CoNLL-2003", kind="tag",
        labels=("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC", "B-MISC", "I-MISC"),
        words=("the", "John", "Smith", "company", "Inc", "London", "England", "German", "Cup"),
        metrics=("entity_f1", "entity_precision", "entity_recall"),
        files={"train": "CoNLL-2003/train.txt", "dev": "CoNLL-2003/valid.txt",
               "test": "CoNLL-2003/test.txt"},
        other_names={"train": ("train.txt", "eng.train"), "dev": ("valid.txt", "eng.testa"),
                     "test": ("test.txt", "eng.testb")},
        columns=("sentence",),
        rows=(14_041, 3_250, 3_453),
        sources=(("https://data.deepai.org/conll2003.zip",
                  "96a104d174ddae7558bab603f19382c5fe02ff1da5c077a7f3ce2ced1578a2c3"),)),
    # Of a training set the rows are texts, of the other splits sources.
    "e2e": TEXTS | dict(
        folder="e2e", columns=("mr",), label="ref", options={"mr": True},
        files={"train": "trainset.csv", "dev": "devset.csv", "test": "testset_w_refs.csv"},
        rows=(42_061, 547, 630),
        sources=(
            (f"{E2E}trainset.csv",
             "f27d48df45815288ab15619d47a79028c300fbb7f42e373668aba0b98c1d57c6"),
            (f"{E2E}devset.csv",
             "fc26b78cdb849c80545f513b223d1e051138b43882eeb79e3eb153e689c864f9"),
            (f"{E2E}testset_w_refs.csv",
             "edc8db685e39bb9824d5bd70c18b1c9b0412d14b527aa960e2d1c8251ee15ccd"))),
    # The challenge of 2017. support/fetch.py makes a file of each split. Its tests differ in
    # whether the categories of their entries are in the training set.
    "webnlg": TEXTS | dict(
        folder="webnlg", columns=("source",), label="text", options=OTHER_SCORER,
        files={split: f"webnlg/{split}.xml"
               for split in ("train", "dev", "test", "test_seen", "test_unseen")},
        rows={"train": 18_025, "dev": 870},
        sources=((f"https://gitlab.com/shimorina/webnlg-dataset/-/archive/{WEBNLG}/"
                  f"webnlg-dataset-{WEBNLG}.zip",
                  "d6837063d6ef2a2e05418c1511f989c85fd9fffd21f5bd04bc5b34886f24c94e"),)),
    "dart": TEXTS | dict(
        folder="dart", columns=("source",), label="text", options=OTHER_SCORER,
        files={split: f"dart-v1.1.1-full-{split}.json" for split in ("train", "dev", "test")},
        sources=(
            (f"{DART}train.json",
             "0671b56f4b090ccf1c0187364d45c6f1214421d6f1081a21800596860f314e70"),
            (f"{DART}dev.json",
             "5038f3543b6d59b94ac4e3f69d15a0b01d8578913f862142e7c560200dd6e434"),
            (f"{DART}test.json",
             "c772553b482dd5fc7b8ad90d68889062a2603e28d4449ee1f162006819e0565e"))),
}
# fmt: on
