"""What is shipped is what was trained: mask files bit for bit, and refused when damaged or of another base."""

import copy
import json
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import deploy
import eval as evaluation
import train
from data import collate
from model import Bert, BertConfig, load_model
from prune import MATRICES


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("deploy") / "run"
    assert train.main([*tiny, "--method", "smp-s", "--out", str(out)]) == 0
    return out


def evaluating(tiny, *masks):
    """Flags that evaluate mask files over the tiny base."""
    flags = ["--model", tiny[1], "--task-file", tiny[3], "--data-dir", tiny[5]]
    return flags + [str(flag) for mask in masks for flag in ("--mask", mask)]


def entropy(mask):
    p = mask.mean()
    return 0.0 if p in (0, 1) else float(-(p * np.log2(p) + (1 - p) * np.log2(1 - p))) * mask.size / 8


def test_masks_round_trip_near_their_entropy():
    """Bit for bit, random masks and corners; 1.03 times the bound at 0.1 and 0.03, 1.01 at 0.5; empty rows, below."""
    rng = np.random.default_rng(0)
    for density, most in ((0.5, 1.01), (0.1, 1.03), (0.03, 1.03), (0.9, 1.03), (0.001, 1.2)):
        mask = rng.random(1_000_000) < density
        data = deploy.pack(mask)
        assert np.array_equal(deploy.unpack(data, mask.size, int(mask.sum())), mask)
        assert len(data) <= most * entropy(mask), density
    mask = (rng.random((1000, 1000)) < 0.2) & (rng.random((1000, 1)) < 0.5)
    assert len(deploy.pack(mask.reshape(-1))) < 0.85 * entropy(mask)
    for n in (1, 2, 255, 256, 257, 70_000):
        place = np.arange(n)
        for mask in (place < 0, place >= 0, place == n - 1, place == 0, place % 256 == 255):
            assert np.array_equal(deploy.unpack(deploy.pack(mask), n, int(mask.sum())), mask)


def test_mask_file_is_the_run(tiny, finished, tmp_path, capsys):
    """The file's masks are the run's, bit for bit, and score what the run scored, twice over one base in memory."""
    path = str(tmp_path / "a.mask")
    assert deploy.main([str(finished), "--save-mask", path]) == 0
    _, masks = deploy.read_mask(path)
    scores = load_file(finished / "scores.safetensors")
    assert {f"{name}.mask" for name in masks} == {name for name in scores if name.endswith(".mask")}
    assert all(np.array_equal(mask, scores[f"{name}.mask"].numpy()) for name, mask in masks.items())
    metrics = json.loads((finished / "result.json").read_text())["metrics"]
    found = deploy.evaluate_masks(tiny[1], [path, path], torch.device("cpu"), tiny[5], task_file=tiny[3])
    assert found == [metrics, metrics]
    capsys.readouterr()
    assert deploy.main(evaluating(tiny, path)) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert "density 0.09" in line and f"accuracy {100 * metrics['accuracy']:.2f}" in line


def test_released_masks(tiny, finished, tmp_path):
    """Packed bits in lexicographic key order (layer 10 before layer 2) give back each matrix."""
    shapes = {f"bert.encoder.layer.{i}.output.dense": (3, 5) for i in range(12)}
    rng = np.random.default_rng(0)
    masks = {name: rng.random(shape) < 0.3 for name, shape in shapes.items()}
    order = sorted(shapes, key=lambda name: int(name.split(".")[3]))  # 0, 1, 2, ... and by their text 0, 1, 10, 11, 2
    order = [order[i] for i in (0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9)]
    np.save(tmp_path / "m.npy", np.packbits(np.concatenate([masks[name].ravel() for name in order])))
    read = deploy.read_released(tmp_path / "m.npy", shapes)
    assert all(np.array_equal(read[name], masks[name]) for name in shapes)
    with pytest.raises(deploy.UserError, match="encoder matrices have"):
        deploy.read_released(tmp_path / "m.npy", shapes | {"bert.encoder.layer.0.output.dense": (3, 8)})


def refused(capsys, argv, *words):
    assert deploy.main([str(flag) for flag in argv]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1 and all(str(word) in line for word in words), line


def test_damaged_and_foreign_files_are_refused(tiny, finished, tmp_path, capsys):
    """A flipped byte anywhere, a truncated file, another base, a run that trained weights."""
    path = tmp_path / "a.mask"
    deploy.save_mask(finished, path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for place in [*rng.integers(8, len(whole), size=30), len(whole) - 1, whole.index(b"density")]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        refused(capsys, evaluating(tiny, path), path)
    path.write_bytes(whole[:-1])
    refused(capsys, evaluating(tiny, path), path, "whole")
    path.write_bytes(whole)
    shutil.copytree(tiny[1], tmp_path / "other")
    tensors = load_file(tmp_path / "other" / "model.safetensors")
    tensors["bert.embeddings.word_embeddings.weight"][0, 0] += 1
    save_file(tensors, tmp_path / "other" / "model.safetensors")
    other = ["--model", tmp_path / "other", *evaluating(tiny, path)[2:]]
    refused(capsys, other, path, "another model", tmp_path / "other")
    assert train.main([*tiny, "--method", "dense", "--max-steps", "1", "--out", str(tmp_path / "dense")]) == 0
    refused(capsys, [tmp_path / "dense", "--save-mask", tmp_path / "b.mask"], "a dense run trains weights")
    assert not (tmp_path / "b.mask").exists()


def test_export_is_the_run(tiny, finished, tmp_path):
    """The exported folder holds the run's function; label words without MLM head become a classifier's rows."""
    deploy.export(finished, tmp_path / "mlm", "model")
    config = json.loads((tmp_path / "mlm" / "config.json").read_text())
    assert config["architectures"] == ["BertForMaskedLM"] and config["label_words"] == ["no", "yes"]
    shutil.copytree(tiny[1], tmp_path / "bare")
    tensors = {n: t for n, t in load_file(tmp_path / "bare" / "model.safetensors").items() if n.startswith("bert.")}
    save_file(tensors, tmp_path / "bare" / "model.safetensors")
    flags = ["--model", str(tmp_path / "bare"), *tiny[2:], "--method", "smp-s", "--max-steps", "3"]
    assert train.main([*flags, "--out", str(tmp_path / "run")]) == 0
    deploy.export(tmp_path / "run", tmp_path / "words", "model")
    config = json.loads((tmp_path / "words" / "config.json").read_text())
    assert config["architectures"] == ["BertForTokenClassification"] and config["id2label"] == {"0": "no", "1": "yes"}
    run = evaluation.load_run(tmp_path / "run")[0].eval()
    tensors = load_file(tmp_path / "words" / "model.safetensors")
    assert not [name for name in tensors if "pooler" in name]
    batch = {"input_ids": torch.arange(20).view(2, 10), "token_type_ids": torch.zeros(2, 10, dtype=torch.long)}
    batch["attention_mask"] = torch.arange(20).view(2, 10) != 19
    first = run.bert(**batch)[:, 0]
    assert torch.allclose(first @ tensors["classifier.weight"].T + tensors["classifier.bias"], run(**batch), atol=1e-6)
    assert load_model(tmp_path / "words", "words", words=[5, 6], new_head=False)(**batch).shape == (2, 2)


def test_compact_folder_is_the_run(tiny, finished, tmp_path, capsys):
    """Written, read again, the same function; emptying rows first is lossy and smaller; damage is refused."""
    run = evaluation.load_run(finished)[0].eval()
    batch = {"input_ids": torch.arange(20).view(2, 10), "token_type_ids": torch.zeros(2, 10, dtype=torch.long)}
    batch["attention_mask"] = torch.arange(20).view(2, 10) != 19
    sizes = []
    for rows in ("0", "3"):
        flags = ["--compact", str(tmp_path / rows), "--drop-rows", rows, "--data-dir", tiny[5], "--device", "cpu"]
        assert deploy.main([str(finished), *flags]) == 0
        model, about = deploy.load_compact(tmp_path / rows)
        sizes.append((tmp_path / rows / "compact.safetensors").stat().st_size)
        stored = load_file(tmp_path / rows / "compact.safetensors")
        for i, (inner, outer, units) in enumerate(about["sizes"]):  # heads are padded in memory, not in the file
            lengths = sum(inner), sum(inner), sum(outer), units
            names = ("attention.self.query", "attention.self.key", "attention.self.value", "intermediate.dense")
            assert tuple(len(stored[f"bert.encoder.layer.{i}.{name}.weight"]) for name in names) == lengths
        if rows == "0":
            assert (model(**batch) - run(**batch)).abs().max() < 1e-5
            assert "differ by" in capsys.readouterr().out
    assert 4 * sum(p.numel() for p in run.parameters()) > sizes[0] > sizes[1]
    about["sizes"][0][2] += 1
    (tmp_path / "0" / "compact.json").write_text(json.dumps(about))
    with pytest.raises(deploy.UserError, match="not a whole compact model"):
        deploy.load_compact(tmp_path / "0")


@pytest.mark.real
@pytest.mark.skipif(not os.environ.get("BERT_DIR"), reason="needs GLUE_DIR and BERT_DIR")
@pytest.mark.parametrize("method", ["dense", "smp-s", "pins", "smp-l by unit"])
def test_real_export_predicts_the_same(method, tmp_path):
    """In transformers, over the whole dev set of RTE: every prediction the same, logits to 1e-5; by unit: with as many
    units as were kept."""
    hf = pytest.importorskip("transformers")
    flags = ["--model", os.environ["BERT_DIR"], "--data-dir", os.environ["GLUE_DIR"], "--task", "rte"]
    flags += ["--max-length", "64", "--device", "cpu", "--dtype", "fp32", "--max-steps", "4", "--batch-size", "16"]
    flags += ["--lr", "1e-4", "--method", method.split()[0], "--pattern", "unit" if "unit" in method else "weight"]
    assert train.main([*flags, "--out", str(tmp_path / "run")]) == 0
    if "unit" in method:
        flags = ["--compact", str(tmp_path / "hf"), "--uniform", "--data-dir", os.environ["GLUE_DIR"]]
        assert deploy.main([str(tmp_path / "run"), *flags]) == 0
        width = evaluation.load_run(tmp_path / "run")[0].config.intermediate_size
        assert json.loads((tmp_path / "hf" / "config.json").read_text())["intermediate_size"] == int(0.1 * width)
    else:
        deploy.export(tmp_path / "run", tmp_path / "hf", "model")
    kind = json.loads((tmp_path / "hf" / "config.json").read_text())["architectures"][0]
    theirs, info = getattr(hf, kind).from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values()), info
    model, task, tokenizer, s = evaluation.load_run(tmp_path / "run")
    (dev,) = evaluation.load_dev(task, tokenizer, s["max_length"], s["data_dir"]).values()
    ours, logits = evaluation.predict(model, dev, torch.device("cpu"), "fp32"), []
    with torch.no_grad():
        for i in range(0, len(dev), 64):
            batch = collate(dev, np.arange(i, min(i + 64, len(dev))))
            batch.pop("labels")
            output = theirs.eval()(**batch).logits
            logits.append(output if output.dim() == 2 else output[:, 0])
    logits = torch.cat(logits)
    assert torch.equal(ours.argmax(1), logits.argmax(1)) and (ours - logits).abs().max() < 1e-5


def planted(config, cases):
    """A random BERT with every case of compaction in its first layers: (layer, matrix, rows or columns) zeroed."""
    torch.manual_seed(0)
    model = Bert(config, "classifier", 3, mlm=False).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5 if parameter.dim() == 2 else 0.3)
        for i, matrix, axis, places in cases:
            weight = model.bert.encoder["layer"][i].get_submodule(MATRICES[matrix]).weight
            weight[places] = 0.0 if axis == 0 else weight[places]
            if axis == 1:
                weight[:, places] = 0.0
    return model


ROWS, HEAD = [1, 2, 5, 9], list(range(8, 16))  # heads of 8
CASES = {
    "nothing": [],
    "constant units": [(0, "U", 0, ROWS)],
    "unread units": [(0, "D", 1, ROWS)],
    "constant and unread units": [(0, "U", 0, ROWS), (0, "D", 1, [2, 3])],
    "constant values": [(0, "V", 0, ROWS)],
    "unread values": [(0, "O", 1, ROWS)],
    "keys": [(0, "K", 0, ROWS)],
    "queries": [(0, "Q", 0, ROWS)],
    "one query": [(0, "Q", 0, [3])],
    "queries and keys": [(0, "Q", 0, ROWS), (0, "K", 0, [2, 3, 4])],
    "a head without values": [(0, "V", 0, HEAD)],
    "a head that nothing reads": [(0, "O", 1, HEAD)],
    "a head of constant queries": [(0, "Q", 0, HEAD)],
    "a head without keys": [(0, "K", 0, HEAD)],
    "no head": [(0, "V", 0, list(range(32)))],
    "no unit": [(0, "U", 0, list(range(48)))],
    "everything, the last layer too": [(i, m, 0, ROWS) for i in (0, 1) for m in "QKVU"] + [(1, "K", 0, HEAD)],
}


@pytest.mark.parametrize("case", CASES)
def test_compaction_is_exact(case):
    """Outputs to 1e-5 in fp32, with padding; every planted case makes the model smaller, and nothing else does."""
    config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    model = planted(config, CASES[case])
    ids = torch.randint(50, (4, 9))
    lengths = torch.tensor([9, 4, 1, 7])
    batch = {"input_ids": ids, "attention_mask": torch.arange(9) < lengths[:, None], "token_type_ids": ids % 2}
    before, uniform = model(**batch).detach(), copy.deepcopy(model)
    sizes = deploy.compact(model)
    assert (model(**batch) - before).abs().max() < 1e-5
    smaller = sum(sum(inner) + sum(outer) + units for inner, outer, units in sizes) < 2 * (32 + 32 + 48)
    assert smaller == (case not in ("nothing", "one query"))
    if case == "queries":  # three empty rows of head 0 become one; that of head 1 is one
        assert sizes[0][0] == [6, 8, 8, 8]
    if case == "a head of constant queries":
        assert sizes[0][0] == [8, 1, 8, 8]
    deploy.sparse(model)
    assert (model(**batch) - before).abs().max() < 1e-5
    deploy.compact(uniform, uniform=True)
    assert (uniform(**batch) - before).abs().max() < 1e-5
    units = {layer.intermediate["dense"].out_features for layer in uniform.bert.encoder["layer"]}
    assert units == {uniform.config.intermediate_size} == {max(layer[2] for layer in sizes)}


def test_pattern_head_compacts_to_whole_heads(tiny, tmp_path):
    """What was trained by head and unit is a smaller dense model: as many of each as the density says, none ragged."""
    flags = [*tiny, "--method", "smp-l", "--pattern", "head", "--density", "0.5", "--max-steps", "4"]
    assert train.main([*flags, "--out", str(tmp_path / "run")]) == 0
    model, _, _, _ = evaluation.load_run(tmp_path / "run")
    heads, units = model.config.num_attention_heads, model.config.intermediate_size
    size = model.config.hidden_size // heads
    whole = [size] * (heads // 2)
    assert deploy.compact(model) == [[whole, whole, units // 2]] * model.config.num_hidden_layers


@pytest.mark.parametrize("density", [0.02, 0.1, 0.6])
def test_sparse_execution_is_exact(density, monkeypatch):
    """CSR and dense matrices side by side, in one part and in several, with padding: the dense logits to 1e-5."""
    config = BertConfig(vocab_size=50, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96)
    model = planted(config, [])
    with torch.no_grad():
        for linear in deploy.encoder_linears(model)[:-1]:  # one stays dense
            linear.weight.mul_(torch.rand_like(linear.weight) < density)
    ids, lengths = torch.randint(50, (7, 9)), torch.tensor([9, 4, 1, 7, 2, 2, 9])
    batch = {"input_ids": ids, "attention_mask": torch.arange(9) < lengths[:, None], "token_type_ids": ids % 2}
    before = model(**batch)
    assert deploy.sparse(model) == (17 if density < deploy.DENSEST else 0)
    for tokens in (256, 20, 1):
        monkeypatch.setattr(deploy, "TOKENS", tokens)
        assert (model(**batch) - before).abs().max() < 1e-5
