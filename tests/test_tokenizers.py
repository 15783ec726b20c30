"""Tokens of other people's folders are those of transformers, before training and from the run."""

import json
import os
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, word_tokenizer
from safetensors.torch import load_file, save_file
from test_data import VOCAB, tokenizer_json

import train
from data import read_split
from kinds.tag import encode_words
from model import BertConfig
from models.checkpoint import load_model, read_config
from models.runs import load_run
from models.tokenizer import load_tokenizer, save_tokenizer
from support.terminal import UserError
from tools import deploy

BERT_DIR = Path(os.environ.get("BERT_DIR") or "missing")
ROBERTA = Path(os.environ.get("ROBERTA_TOKENIZER") or "missing")
GLUE_DIR = Path(os.environ.get("GLUE_DIR") or "missing")


def folder_of(path, vocabulary=VOCAB, **files):
    """A folder with vocab.txt, and JSON files by their names without the ending."""
    path.mkdir(exist_ok=True)
    if vocabulary:
        (path / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    for name, value in files.items():
        text = value if isinstance(value, str) else json.dumps(value)
        (path / f"{name}.json").write_text(text)
    return path


def tokens(path, text, rows=200):
    return load_tokenizer(path, rows).encode(text).tokens


def test_added_tokens(tmp_path):
    """Tokens of added_tokens.json are one token, and they are in the folder that is written."""
    added = {"[E1]": len(VOCAB), "[/E1]": len(VOCAB) + 1}
    special = {"extra_special_tokens": ["[E1]", "[/E1]"]}
    path = folder_of(tmp_path / "a", added_tokens=added, special_tokens_map=special)
    expected = ["[CLS]", "[E1]", "cat", "[/E1]", "[SEP]"]
    assert tokens(path, "[E1]cat[/E1]") == expected
    tokenizer = load_tokenizer(path, 200)
    save_tokenizer(tmp_path, tokenizer, BertConfig())
    assert tokens(tmp_path, "[E1]cat[/E1]") == expected
    assert load_tokenizer(tmp_path, 200).to_str() == tokenizer.to_str()
    with pytest.raises(UserError, match=f"ids up to {len(VOCAB) + 1}, but the embedding has"):
        load_tokenizer(path, len(VOCAB))
    objects = {"additional_special_tokens": [{"content": "[E1]", "lstrip": True}, "[/E1]"]}
    old = folder_of(tmp_path / "c", added_tokens=added, tokenizer_config=objects)
    assert load_tokenizer(old, 200).token_to_id("[E1]") == len(VOCAB)
    without = folder_of(tmp_path / "d", VOCAB[1:], added_tokens={VOCAB[0]: len(VOCAB) - 1})
    assert tokens(without, "cat") == tokens(path, "cat")  # one of the class's own tokens is added
    moved = folder_of(tmp_path / "b", added_tokens={"[E1]": len(VOCAB) + 5})
    with pytest.raises(UserError, match=r'added token "\[E1\]" is \d+, not'):
        load_tokenizer(moved, 200)


@pytest.mark.parametrize("lower", [True, False])
def test_tokenizer_config_decides(lower, tmp_path):
    """What tokenizer_config.json says counts more than tokenizer.json, as in transformers."""
    json_file = tokenizer_json(VOCAB, lowercase=not lower)
    config = {"do_lower_case": lower}
    path = folder_of(tmp_path, None, tokenizer=json_file, tokenizer_config=config)
    assert tokens(path, "CAT")[1] == ("cat" if lower else "[UNK]")


@pytest.mark.parametrize(
    "switch, name",
    [
        ({"lowercase": False}, "do_lower_case"),
        ({"strip_accents": False}, "strip_accents"),
        ({"handle_chinese_chars": False}, "tokenize_chinese_chars"),
        ({"clean_text": False}, "PreTrainedTokenizerFast"),
    ],
)
def test_contradictions_are_refused(switch, name, tmp_path):
    """What tokenizer.json alone says, and transformers would not do, is refused by its file."""
    path = folder_of(tmp_path, None, tokenizer=tokenizer_json(VOCAB, **switch))
    with pytest.raises(UserError) as caught:
        load_tokenizer(path, 200)
    for word in ("tokenizer.json", name, "tokenizer_config.json"):
        assert word in str(caught.value)
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    load_tokenizer(path, 200)  # takes tokenizer.json as it is


@pytest.mark.parametrize("file", ["tokenizer_config", "config"])
@pytest.mark.parametrize("name", ["BertJapaneseTokenizer", "XLMRobertaTokenizerFast"])
def test_other_classes_are_refused(file, name, tmp_path):
    path = folder_of(tmp_path, **{file: {"tokenizer_class": name}})
    with pytest.raises(UserError, match=f"/{file}.json: the tokenizer is"):
        load_tokenizer(path, 200)


def test_code_of_a_folder_is_refused(tmp_path):
    auto = {"auto_map": {"AutoTokenizer": ["x.Tokenizer", None]}}
    with pytest.raises(UserError, match="a class with code of its own"):
        load_tokenizer(folder_of(tmp_path, tokenizer_config=auto), 200)


def test_special_tokens_are_framed(tmp_path):
    """A tokenizer.json without a post-processor gets that of its class; else it is refused."""
    says = json.loads(tokenizer_json(VOCAB)) | {"post_processor": None}
    path = folder_of(tmp_path, None, tokenizer=says)
    assert tokens(path, "cat") == ["[CLS]", "cat", "[SEP]"]
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(UserError, match="adds no special tokens"):
        load_tokenizer(path, 200)


def test_vocabularies(tmp_path):
    """Empty last lines and CR LF of vocab.txt are no tokens; special tokens may be others."""
    text = "\r\n".join(VOCAB) + "\r\n\r\n\n"
    path = folder_of(tmp_path / "a", None)
    (path / "vocab.txt").write_bytes(text.encode())
    assert tokens(path, "cat", len(VOCAB)) == ["[CLS]", "cat", "[SEP]"]
    renamed = [{"[CLS]": "<s>", "[SEP]": "</s>"}.get(token, token) for token in VOCAB]
    config = {"cls_token": {"content": "<s>", "__type": "AddedToken"}, "sep_token": "</s>"}
    path = folder_of(tmp_path / "b", renamed, tokenizer_config=config)
    assert tokens(path, "cat") == ["<s>", "cat", "</s>"]
    with pytest.raises(UserError, match=r"no \[CLS\] \[SEP\]"):
        load_tokenizer(folder_of(tmp_path / "c", renamed), 200)
    with pytest.raises(UserError, match="its model is WordLevel"):
        word = word_tokenizer().to_str()
        named = {"tokenizer_class": "BertTokenizer"}
        load_tokenizer(folder_of(tmp_path / "d", None, tokenizer=word, tokenizer_config=named), 200)


def test_one_token_type(tmp_path):
    """A folder for a model with one token type does not ask transformers for a second one."""
    tokenizer = load_tokenizer(folder_of(tmp_path), 200)
    for count in (1, 2):
        save_tokenizer(tmp_path, tokenizer, BertConfig(type_vocab_size=count))
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        assert ("token_type_ids" in config["model_input_names"]) == (count == 2)
        assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert (config["cls_token"], config["unk_token"]) == ("[CLS]", "[UNK]")


@pytest.mark.parametrize(
    "says", [{"tokenizer_class": "DistilBertTokenizer"}, {"model_input_names": ["input_ids"]}]
)
def test_a_folder_without_token_types(says, tmp_path):
    """Its pairs have type 0 alone, as for a model that gets no types; so has what we write."""
    usual = load_tokenizer(folder_of(tmp_path / "a"), 200)
    assert usual.encode("cat", "dog").type_ids == [0, 0, 0, 1, 1]
    tokenizer = load_tokenizer(folder_of(tmp_path / "b", tokenizer_config=says), 200)
    save_tokenizer(tmp_path, tokenizer, BertConfig())
    for each in (tokenizer, load_tokenizer(tmp_path, 200)):
        assert each.encode("cat", "dog").ids == usual.encode("cat", "dog").ids
        assert each.encode("cat", "dog").type_ids == [0] * 5


def test_the_side_of_truncation(tmp_path, capsys):
    """A folder that cuts at the left is told that texts are cut at the right."""
    for side, lines in (("right", 0), ("left", 1)):
        load_tokenizer(folder_of(tmp_path, tokenizer_config={"truncation_side": side}), 200)
        assert capsys.readouterr().err.count("its truncation_side is ignored") == lines


def test_a_decoder_joins_the_pieces_of_words(tmp_path):
    """What a decoder with BERT's tokenizer writes has words, and no pieces with ##."""
    folder = folder_of(tmp_path, tokenizer_config={"eos_token": "[SEP]"})
    tokenizer = load_tokenizer(folder, 200, framed=False)
    encoding = tokenizer.encode("the cat cab")
    assert encoding.tokens == ["the", "cat", "c", "##a", "##b", "[SEP]"]
    assert tokenizer.decode(encoding.ids) == "the cat cab"


# --------------------------------------------------------------------------------------------------
# real tokenizers, and transformers

E1 = {"content": "[E1]", "lstrip": False, "rstrip": False, "normalized": False}
E1 |= {"single_word": False, "special": True}
MASK = {"__type": "AddedToken", "content": "<mask>", "lstrip": True, "normalized": False}
MASK |= {"rstrip": False, "single_word": False}
BERT_CASES = {
    "vocab": ["vocab.txt"],
    "json": ["tokenizer.json"],
    "all": ["vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"],
    "added": ["vocab.txt", ("added_tokens", {"[E1]": 30522, "[/E1]": 30523})],
    "special": [
        "vocab.txt",
        ("added_tokens", {"[E1]": 30522}),
        ("special_tokens_map", {"additional_special_tokens": ["[E1]", "[E2]"]}),
    ],
    "objects": [
        "vocab.txt",
        ("added_tokens", {"[E1]": 30522}),
        ("tokenizer_config", {"additional_special_tokens": [{**E1, "__type": "AddedToken"}]}),
    ],
    "decoder": ["vocab.txt", ("tokenizer_config", {"added_tokens_decoder": {"30522": E1}})],
    "cased vocab": ["vocab.txt", ("tokenizer_config", {"do_lower_case": False})],
    "cased config": ["tokenizer.json", ("tokenizer_config", {"do_lower_case": False})],
    "accents": ["tokenizer.json", ("tokenizer_config", {"strip_accents": False})],
    "chinese": ["tokenizer.json", ("tokenizer_config", {"tokenize_chinese_chars": False})],
    "as it is": ["tokenizer.json", ("tokenizer_config", {"tokenizer_class": "TokenizersBackend"})],
    "no types": ["vocab.txt", ("tokenizer_config", {"model_input_names": ["input_ids"]})],
    "distilbert": ["vocab.txt", ("tokenizer_config", {"tokenizer_class": "DistilBertTokenizer"})],
    "one type": [
        "vocab.txt",
        ("tokenizer_config", {"tokenizer_class": "BertTokenizer"}),
        ("config", {"model_type": "roberta", "type_vocab_size": 1, "pad_token_id": 0}),
    ],
}
BARE = {"post_processor": None}
BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
ROBERTA_CASES = {
    "json": ["tokenizer.json"],
    "vocab": ["vocab.json", "merges.txt"],
    "no post-processor": [("tokenizer", BARE)],
    "another post-processor": [("tokenizer", {"post_processor": BYTES})],
    "prefix": ["tokenizer.json", ("tokenizer_config", {"add_prefix_space": True})],
    "mask": ["vocab.json", "merges.txt", ("special_tokens_map", {"mask_token": MASK})],
    "added": ["vocab.json", "merges.txt", ("added_tokens", {"[E1]": 50265})],
}
# fmt: off
ODD = [
    "Éléphant à vélo", "naïve café", "日本語のテスト", "漢字kanji混ぜ",
    "emoji 😀👩\u200d👩\u200d👧 ok", "[SEP] in text", "a [MASK] b", "<pad> x </s> y <mask> z",
    "  spaces   here ", "Tab\there", "ÀÉÎ ß ﬁ", "[E1] Tom [/E1] sees [e1]", "it's don't",
    "\u200bzero width", "nul\x00ctrl\x07", "ñandú Ñ", "ΑΒΓ αβγ", "Привет МИР", "العربية",
    "हिन्दी", "한국어 텍스트", "ｆｕｌｌｗｉｄｔｈ", "a", "[CLS]", "[UNK] x", "<unk> <s>",
    "İstanbul", "ﷺ", "é combining", "–—“”", "C++ #hash @user", "http://a.b/c?d=e", "1,000.50",
    "\u2028line", "THE End", "<mask>x", "x<mask>", "New [E2] tok", "foo[E1]bar", "Éé [SEP]x",
    "x x x", "ǅ ǆ", "𝒳 math", "½ ⅓", "¿Qué?", "ﬀ ﬂ", "[PAD] y", "[pad] [Cls]", "</s></s>",
    "\ufeffbom", "soft\xadhyphen", "nb\xa0sp",
]
# fmt: on


def texts():
    """150 real sentences, and 50 odd ones."""
    if not (GLUE_DIR / "STS-B.zip").is_file():
        pytest.skip("needs GLUE_DIR")
    with zipfile.ZipFile(GLUE_DIR / "STS-B.zip") as zipped:
        lines = zipped.read("STS-B/dev.tsv").decode().split("\n")[1:151]
    assert len(ODD) >= 50
    return [line.split("\t")[7] for line in lines] + ODD


def made(path, source, files, config):
    """A folder with files of `source`, and others that are given or, for tokenizer.json, merged."""
    if not source.is_dir():
        pytest.skip("needs BERT_DIR and ROBERTA_TOKENIZER")
    (path / "config.json").write_text(json.dumps(config))
    for file in files:
        if isinstance(file, str):
            shutil.copy(source / file, path / file)
            continue
        name, value = file
        if name == "tokenizer":
            value = json.loads((source / "tokenizer.json").read_text()) | value
        if name == "config":
            value = config | value
        (path / f"{name}.json").write_text(json.dumps(value))
    return path


CASES = [("bert", name) for name in BERT_CASES] + [("roberta", name) for name in ROBERTA_CASES]


@pytest.mark.real
@pytest.mark.parametrize("family, name", CASES)
def test_tokens_are_those_of_transformers(family, name, tmp_path):
    """200 texts, alone and in pairs, have the ids that AutoTokenizer gives for the same folder.

    The folder that is written has them too, here and there.
    """
    transformers = pytest.importorskip("transformers")
    config = json.loads((GOLDEN / "tiny-bert" / "config.json").read_text())
    config |= {"model_type": family, "vocab_size": 50_300}
    if family == "roberta":
        config |= {"type_vocab_size": 1, "pad_token_id": 1}
    files = BERT_CASES[name] if family == "bert" else ROBERTA_CASES[name]
    source = BERT_DIR if family == "bert" else ROBERTA
    folder = tmp_path / "theirs"
    folder.mkdir()
    made(folder, source, files, config)
    _, config = read_config(folder)
    ours = load_tokenizer(folder, config.vocab_size)
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(folder / "config.json", run)
    save_tokenizer(run, ours, config)
    again = load_tokenizer(run, config.vocab_size)
    theirs = [transformers.AutoTokenizer.from_pretrained(str(path)) for path in (folder, run)]
    all_texts = texts()
    for text, other in zip(all_texts, all_texts[1:] + all_texts[:1]):
        for pair in ((text,), (text, other)):
            for encoding, tokenizer in zip([ours.encode(*pair), again.encode(*pair)], theirs):
                said = tokenizer(*pair)
                assert said["input_ids"] == encoding.ids, (text, tokenizer)
                first = [0] * len(encoding)  # what a model takes that is given no types
                if name == "as it is":  # transformers 4 gives types there, and 5 does not
                    first = encoding.type_ids
                assert said.get("token_type_ids", first) == encoding.type_ids


def conll_part():
    """The first sentences of CoNLL-2003's dev split, as a file in that form."""
    path = Path(os.environ.get("CONLL_DIR") or "missing") / "eng.testa"
    if not path.is_file():
        pytest.skip("needs CONLL_DIR")
    return "\n\n".join(path.read_text(encoding="utf-8").split("\n\n")[:110]) + "\n"


@pytest.mark.real
def test_words_of_a_tag_run_are_those_of_transformers(tmp_path):
    """model/ and an export of a RoBERTa run on tags: AutoTokenizer gives each word its space."""
    transformers = pytest.importorskip("transformers")
    text = conll_part()
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    small |= {"intermediate_size": 16, "max_position_embeddings": 258, "type_vocab_size": 1}
    config = transformers.RobertaConfig(vocab_size=50_265, **small)
    transformers.RobertaForMaskedLM(config).save_pretrained(tmp_path / "base")
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(ROBERTA / name, tmp_path / "base" / name)
    for split in ("train", "dev"):
        (tmp_path / f"{split}.txt").write_text(text, encoding="utf-8")
    row = {"name": "t", "kind": "tag", "train": "train.txt", "dev": "dev.txt"}
    (tmp_path / "task.json").write_text(json.dumps(row | {"metric": "entity_f1"}))
    out = tmp_path / "run"
    argv = ["--model", tmp_path / "base", "--task-file", tmp_path / "task.json", "--out", out]
    argv += ["--method", "dense", "--max-steps", "1", "--data-dir", tmp_path, "--device", "cpu"]
    assert train.main([str(flag) for flag in argv]) == 0
    assert deploy.main(["export", str(out), str(tmp_path / "export")]) == 0
    _, task, tokenizer, _ = load_run(out)
    texts, tags = read_split(task, "dev", "FILE", text.encode())
    arrays = encode_words(texts, tags, task.labels, tokenizer, 256)
    ends = arrays["lengths"].cumsum()
    assert len(texts) >= 94
    for folder in (out / "model", tmp_path / "export"):
        theirs = transformers.AutoTokenizer.from_pretrained(str(folder))
        for words, length, end in zip(texts, arrays["lengths"], ends):
            said = theirs(words, is_split_into_words=True)["input_ids"]
            assert said == arrays["ids"][end - length : end].tolist()


@pytest.mark.real
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_special_tokens_in_a_text(family, tmp_path):
    """Logits of texts that hold special tokens are those of transformers."""
    transformers = pytest.importorskip("transformers")
    source, files = (BERT_DIR, ["vocab.txt"]) if family == "bert" else (ROBERTA, ["tokenizer.json"])
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    small |= {"intermediate_size": 16, "max_position_embeddings": 66, "initializer_range": 0.5}
    name = {"bert": "Bert", "roberta": "Roberta"}[family]
    more = {"vocab_size": 50_265, "type_vocab_size": 1} if family == "roberta" else {}
    config = getattr(transformers, f"{name}Config")(**small, **more)
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{name}ForSequenceClassification")(config).eval()
    theirs.save_pretrained(tmp_path)
    made(tmp_path, source, files, json.loads((tmp_path / "config.json").read_text()))
    net = load_model(tmp_path, "classifier", 2, new_head=False).eval()
    ours = load_tokenizer(tmp_path, net.config.vocab_size)
    for text in ("a <pad> b", "[SEP] a [PAD] b", "<pad><pad> x", "</s> a <mask>"):
        encoding = ours.encode(text, "b <pad> c")
        ids = torch.tensor([encoding.ids])
        types = torch.tensor([encoding.type_ids])
        mask = torch.ones_like(ids)
        with torch.no_grad():
            said = theirs(ids, attention_mask=mask, token_type_ids=types).logits
            assert (net(ids, mask, types) - said).abs().max() < 1e-5, text


@pytest.mark.real
@pytest.mark.parametrize("method", ["smp-s", "dense"])
@pytest.mark.parametrize("mlm", [True, False])
def test_the_readme_of_an_export_reads_it(method, mlm, tiny, tmp_path, monkeypatch, capsys):
    """The lines in README.md of an export compute the logits of the run, with transformers."""
    pytest.importorskip("transformers")
    base = tmp_path / "base"
    shutil.copytree(tiny[1], base)
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    if not mlm:
        state = load_file(base / "model.safetensors")
        state = {name: t for name, t in state.items() if not name.startswith("cls.")}
        save_file(state, base / "model.safetensors")
    out = tmp_path / "run"
    argv = [*tiny, "--model", str(base), "--method", method, "--max-steps", "2"]
    assert train.main([*argv, "--out", str(out)]) == 0
    capsys.readouterr()
    assert deploy.main(["export", str(out), str(tmp_path / "export")]) == 0
    readme = (tmp_path / "export" / "README.md").read_text()
    _, code, _ = readme.split("```")
    assert code.removeprefix("python\n").strip() in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(code.removeprefix("python\n").replace("a text", "w1 w2"), found)
    model, _, tokenizer, _ = load_run(out)
    encoding = tokenizer.encode("w1 w2", "the second text")
    batch = [torch.tensor([row]) for row in (encoding.ids, encoding.attention_mask)]
    expected = model.eval()(*batch, torch.tensor([encoding.type_ids]))[0]
    assert (found["logits"] - expected).abs().max() < 1e-5
    assert list(found["model"].config.id2label.values()) == ["no", "yes"]
