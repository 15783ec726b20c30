"""What is shipped computes what was trained, and a damaged or foreign file is refused."""

import copy
import json
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from data import kind_of, load_dev
from model import Bert, BertConfig
from models import sparse as sparse_execution
from models.checkpoint import load_model
from models.compaction import compact
from models.runs import load_run
from models.sparse import sparse
from support.machine import inputs
from support.matrices import encoder_linears
from support.terminal import UserError
from tools import deploy
from tools import masks as mask_files

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """The folder of a finished SMP-S run."""
    out = tmp_path_factory.mktemp("deploy") / "run"
    assert train.main([*tiny, "--method", "smp-s", "--out", str(out)]) == 0
    return out


def evaluating(tiny, mask):
    """Flags that evaluate a mask file over the tiny base model."""
    return ["masks", tiny[1], str(mask), "--task-file", tiny[3], "--data-dir", tiny[5]]


def entropy(mask):
    """The entropy bound, in bytes, on the size of a mask of independent bits of this density."""
    p = mask.mean()
    if p in (0, 1):
        return 0.0
    bits = -(p * np.log2(p) + (1 - p) * np.log2(1 - p))
    return float(bits) * mask.size / 8


def test_masks_round_trip_near_their_entropy():
    """Packed masks are read back bit for bit, and a random one is at most a few percent too large.

    A mask with empty rows is smaller than the bound, which knows its density only.
    """
    rng = np.random.default_rng(0)
    for density, most in ((0.5, 1.01), (0.1, 1.03), (0.03, 1.03), (0.9, 1.03), (0.001, 1.2)):
        mask = rng.random(1_000_000) < density
        data = mask_files.pack(mask)
        assert np.array_equal(mask_files.unpack(data, mask.size, int(mask.sum())), mask)
        assert len(data) <= most * entropy(mask), density
    mask = (rng.random((1000, 1000)) < 0.2) & (rng.random((1000, 1)) < 0.5)
    assert len(mask_files.pack(mask.reshape(-1))) < 0.85 * entropy(mask)
    for n in (1, 2, 255, 256, 257, 70_000):
        place = np.arange(n)
        for mask in (place < 0, place >= 0, place == n - 1, place == 0, place % 256 == 255):
            packed = mask_files.pack(mask)
            assert np.array_equal(mask_files.unpack(packed, n, int(mask.sum())), mask)


def test_mask_file_is_the_run(tiny, finished, tmp_path, capsys):
    """A mask file holds the run's masks bit for bit, and over the base it has the run's metrics.

    One base in memory serves several mask files in turn.
    """
    path = str(tmp_path / "a.mask")
    assert deploy.main(["save-mask", str(finished), path]) == 0
    about, payload = mask_files.read_mask(path)
    shapes = {name: (rows, columns) for name, rows, columns, _, _ in about["matrices"]}
    masks = mask_files.unpack_all(path, about["matrices"], payload, shapes)
    scores = load_file(finished / "scores.safetensors")
    saved = {name for name in scores if name.endswith(".mask")}
    assert {f"{name}.mask" for name in masks} == saved
    for name, mask in masks.items():
        assert np.array_equal(mask, scores[f"{name}.mask"].numpy())
    metrics = json.loads((finished / "result.json").read_text())["metrics"]
    found = mask_files.evaluate_masks(tiny[1], [path, path], CPU, tiny[5], task_file=tiny[3])
    assert found == [metrics, metrics]
    capsys.readouterr()
    assert deploy.main(evaluating(tiny, path)) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert "density 0.09" in line
    assert f"accuracy {100 * metrics['accuracy']:.2f}" in line


def test_released_masks(tmp_path):
    """A mask file of the SMP release is read matrix by matrix, in the order of their names as text.

    A file that does not fit the model is refused.
    """
    name = "bert.encoder.layer.{}.output.dense"
    shapes = {name.format(i): (3, 5) for i in range(12)}
    rng = np.random.default_rng(0)
    masks = {key: rng.random(shape) < 0.3 for key, shape in shapes.items()}
    order = [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]  # as text, 10 comes before 2
    bits = np.concatenate([masks[name.format(i)].ravel() for i in order])
    path = tmp_path / "m.npy"
    np.save(path, np.packbits(bits))
    read = mask_files.read_released(path, shapes)
    for key in shapes:
        assert np.array_equal(read[key], masks[key])
    with pytest.raises(UserError, match="encoder matrices have"):
        mask_files.read_released(path, shapes | {name.format(0): (3, 8)})


def refused(capsys, argv, *words):
    """Assert that deploy.py ends with status 2 and one error line that holds all `words`."""
    assert deploy.main([str(flag) for flag in argv]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: "), line
    assert line.count("\n") == 1, line
    for word in words:
        assert str(word) in line, (word, line)


def test_damaged_and_foreign_files_are_refused(tiny, finished, tmp_path, capsys):
    """A mask file is refused when one of its bits is flipped or its end is missing.

    It is also refused over another base model. Of a run that trained weights no mask is saved.
    """
    path = tmp_path / "a.mask"
    mask_files.save_mask(finished, path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for place in [*rng.integers(8, len(whole), size=30), len(whole) - 1, whole.index(b"density")]:
        flipped = bytearray(whole)
        flipped[place] ^= 4
        path.write_bytes(flipped)
        refused(capsys, evaluating(tiny, path), path)
    path.write_bytes(whole[:-1])
    refused(capsys, evaluating(tiny, path), path, "whole")
    path.write_bytes(whole)

    other = tmp_path / "other"
    shutil.copytree(tiny[1], other)
    tensors = load_file(other / "model.safetensors")
    tensors["bert.embeddings.word_embeddings.weight"][0, 0] += 1
    save_file(tensors, other / "model.safetensors")
    argv = ["masks", other, *evaluating(tiny, path)[2:]]
    refused(capsys, argv, path, "another model", other)

    dense = tmp_path / "dense"
    argv = [*tiny, "--method", "dense", "--max-steps", "1", "--out", str(dense)]
    assert train.main(argv) == 0
    argv = ["save-mask", dense, tmp_path / "b.mask"]
    refused(capsys, argv, "a dense run trains weights")
    assert not (tmp_path / "b.mask").exists()


def two_rows():
    """Inputs of two texts of ten tokens, of which the very last is padding."""
    ids = torch.arange(20).view(2, 10)
    return {
        "input_ids": ids,
        "attention_mask": ids != 19,
        "token_type_ids": torch.zeros_like(ids),
    }


def test_export_is_the_run(tiny, finished, tmp_path):
    """The exported folder computes what the run computes.

    A model with an MLM head becomes a BertForMaskedLM. A model without one becomes a
    BertForTokenClassification, whose classifier has the label words' embeddings as its rows.
    """
    assert deploy.main(["export", str(finished), str(tmp_path / "mlm")]) == 0
    config = json.loads((tmp_path / "mlm" / "config.json").read_text())
    assert config["architectures"] == ["BertForMaskedLM"]
    assert config["label_words"] == ["no", "yes"]

    bare = tmp_path / "bare"
    shutil.copytree(tiny[1], bare)
    tensors = load_file(bare / "model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if name.startswith("bert.")}
    save_file(tensors, bare / "model.safetensors")
    flags = ["--model", str(bare), *tiny[2:], "--method", "smp-s", "--max-steps", "3"]
    assert train.main([*flags, "--out", str(tmp_path / "run")]) == 0
    exported = tmp_path / "words"
    assert deploy.main(["export", str(tmp_path / "run"), str(exported)]) == 0
    config = json.loads((exported / "config.json").read_text())
    assert config["architectures"] == ["BertForTokenClassification"]
    assert config["id2label"] == {"0": "no", "1": "yes"}

    run = load_run(tmp_path / "run")[0].eval()
    tensors = load_file(exported / "model.safetensors")
    assert not [name for name in tensors if "pooler" in name]
    batch = two_rows()
    first = run.bert(**batch)[:, 0]  # (B, C)
    logits = first @ tensors["classifier.weight"].T + tensors["classifier.bias"]  # (B, K)
    assert torch.allclose(logits, run(**batch), atol=1e-6)
    again = load_model(exported, "words", words=[5, 6], new_head=False)
    assert again(**batch).shape == (2, 2)


def test_compact_folder_is_the_run(tiny, finished, tmp_path, capsys):
    """A compact folder, written and read again, computes what the run computes, and is smaller.

    --drop-rows makes it smaller still. A folder whose parts do not fit together is refused.
    """
    run = load_run(finished)[0].eval()
    batch = two_rows()
    bytes_of = {}
    for rows in ("0", "3"):
        folder = tmp_path / rows
        flags = ["--drop-rows", rows, "--data-dir", tiny[5], "--device", "cpu"]
        assert deploy.main(["compact", str(finished), str(folder), *flags]) == 0
        model, about = deploy.load_compact(folder)
        bytes_of[rows] = (folder / "compact.safetensors").stat().st_size
        stored = load_file(folder / "compact.safetensors")
        # The file holds no padding. The heads are padded to one size only in memory.
        for i, (inner, outer, units) in enumerate(about["sizes"]):
            layer = f"bert.encoder.layer.{i}"
            assert len(stored[f"{layer}.attention.self.query.weight"]) == sum(inner)
            assert len(stored[f"{layer}.attention.self.key.weight"]) == sum(inner)
            assert len(stored[f"{layer}.attention.self.value.weight"]) == sum(outer)
            assert len(stored[f"{layer}.intermediate.dense.weight"]) == units
        if rows == "0":
            assert (model(**batch) - run(**batch)).abs().max() < 1e-5
            assert "differ by" in capsys.readouterr().out
    whole = 4 * sum(p.numel() for p in run.parameters())  # bytes in float32
    assert whole > bytes_of["0"] > bytes_of["3"]
    argv = ["onnx", tmp_path / "0", tmp_path / "x.onnx", "--best"]
    refused(capsys, argv, "--best", "has one model; compact the run with --best")
    about["sizes"][0][2] += 1
    (tmp_path / "0" / "compact.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="not a whole compact model"):
        deploy.load_compact(tmp_path / "0")


@pytest.mark.real
@pytest.mark.skipif(not os.environ.get("BERT_DIR"), reason="needs GLUE_DIR and BERT_DIR")
@pytest.mark.parametrize("method", ["dense", "smp-s", "pins", "smp-l by unit"])
def test_real_export_predicts_the_same(method, tmp_path):
    """`transformers` loads the export and makes the same prediction for all of RTE's dev set.

    The logits agree to 1e-5. A run pruned by unit is exported with only the units that it kept.
    """
    hf = pytest.importorskip("transformers")
    run = tmp_path / "run"
    folder = tmp_path / "hf"
    pattern = "unit" if "unit" in method else "weight"
    data = ["--data-dir", os.environ["GLUE_DIR"]]
    flags = ["--model", os.environ["BERT_DIR"], *data, "--device", "cpu", "--dtype", "fp32"]
    steps = "12" if method == "pins" else "4"  # pins ranks first after 10 steps
    flags += ["--task", "rte", "--max-length", "64", "--max-steps", steps, "--batch-size", "16"]
    flags += ["--lr", "1e-4", "--method", method.split()[0], "--pattern", pattern]
    assert train.main([*flags, "--out", str(run)]) == 0
    density = json.loads((run / "result.json").read_text())["density"]
    recommended = {"dense": 1, "pins": 0.2}.get(method, 0.1)
    assert density == pytest.approx(recommended, abs=0.01)
    if pattern == "unit":
        flags = ["--uniform", "--no-check", *data]
        assert deploy.main(["compact", str(run), str(folder), *flags]) == 0
        units = load_run(run)[0].config.intermediate_size
        config = json.loads((folder / "config.json").read_text())
        assert config["intermediate_size"] == int(0.1 * units)
    else:
        assert deploy.main(["export", str(run), str(folder)]) == 0
    kind = json.loads((folder / "config.json").read_text())["architectures"][0]
    theirs, info = getattr(hf, kind).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info

    model, task, tokenizer, s = load_run(run)
    (dev,) = load_dev(task, tokenizer, s["max_length"], s["data_dir"]).values()
    ours = kind_of(task).logits(model, dev, CPU, "fp32")
    theirs.eval()
    parts = []
    with torch.no_grad():
        for i in range(0, len(dev), 64):
            batch = dev.collate(np.arange(i, min(i + 64, len(dev))))
            logits = theirs(**inputs(batch, CPU)).logits
            if logits.dim() == 3:  # (B, T, K): a token classifier, of which the first token counts
                logits = logits[:, 0]
            parts.append(logits)
    logits = torch.cat(parts)
    assert torch.equal(ours.argmax(1), logits.argmax(1))
    assert (ours - logits).abs().max() < 1e-5


def planted(config, cases):
    """A random BERT in which rows (axis 0) or columns (axis 1) of some matrices are zero.

    Each case is (layer, letter of the matrix, axis, which of them).
    """
    torch.manual_seed(0)
    model = Bert(config, "classifier", 3, mlm=False).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5 if parameter.dim() == 2 else 0.3)
        for i, letter, axis, places in cases:
            weight = model.layers[i].get_submodule(model.matrices[letter]).weight
            if axis == 0:
                weight[places] = 0.0
            else:
                weight[:, places] = 0.0
    return model


def random_batch(lengths):
    """Inputs of random texts of these lengths, padded to 9 tokens."""
    ids = torch.randint(50, (len(lengths), 9))
    return {
        "input_ids": ids,
        "attention_mask": torch.arange(9) < torch.tensor(lengths)[:, None],  # (B, T)
        "token_type_ids": ids % 2,
    }


ROWS = [1, 2, 5, 9]
HEAD = list(range(8, 16))  # the second head; a head has 8 rows
EVERYTHING = [(i, letter, 0, ROWS) for i in (0, 1) for letter in "QKVU"]
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
    "everything, the last layer too": [*EVERYTHING, (1, "K", 0, HEAD)],
}


@pytest.mark.parametrize("case", CASES)
def test_compaction_is_exact(case):
    """A compacted model gives the outputs of the whole one, to 1e-5 in fp32 and with padding.

    It is smaller where rows or columns are empty, except for one empty query row, and not else.
    """
    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
    )
    model = planted(config, CASES[case])
    batch = random_batch([9, 4, 1, 7])
    before = model(**batch).detach()
    uniform = copy.deepcopy(model)
    sizes = compact(model)
    assert (model(**batch) - before).abs().max() < 1e-5
    left = sum(sum(inner) + sum(outer) + units for inner, outer, units in sizes)
    smaller = left < 2 * (32 + 32 + 48)
    assert smaller == (case not in ("nothing", "one query"))
    if case == "queries":  # the three empty rows of head 0 become one; head 1 has only one
        assert sizes[0][0] == [6, 8, 8, 8]
    if case == "a head of constant queries":
        assert sizes[0][0] == [8, 1, 8, 8]
    sparse(model)
    assert (model(**batch) - before).abs().max() < 1e-5

    compact(uniform, uniform=True)
    assert (uniform(**batch) - before).abs().max() < 1e-5
    units = {layer.intermediate["dense"].out_features for layer in uniform.layers}
    assert units == {max(units for _, _, units in sizes)}
    assert units == {uniform.config.intermediate_size}


def test_pattern_head_compacts_to_whole_heads(tiny, tmp_path):
    """A run pruned by head compacts to a smaller dense model with whole heads only.

    It has as many heads and units as the density says, in every layer.
    """
    flags = [*tiny, "--method", "smp-l", "--pattern", "head", "--density", "0.5"]
    assert train.main([*flags, "--max-steps", "4", "--out", str(tmp_path / "run")]) == 0
    model, _, _, _ = load_run(tmp_path / "run")
    heads = model.config.num_attention_heads
    units = model.config.intermediate_size
    size = model.config.hidden_size // heads
    whole = [size] * (heads // 2)
    layer = [whole, whole, units // 2]
    assert compact(model) == [layer] * model.config.num_hidden_layers


@pytest.mark.parametrize("density", [0.02, 0.1, 0.6])
@pytest.mark.parametrize("side", [1, 8])
def test_sparse_execution_is_exact(density, side, monkeypatch):
    """Sparse execution gives the dense logits to 1e-5, with padding, however the texts are split.

    A matrix is stored as CSR up to a density of `DENSEST`, and denser ones stay as they are. Blocks
    of 8 x 8 are stored as BSR, up to another density.
    """
    config = BertConfig(
        vocab_size=50,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=96,
    )
    model = planted(config, [])
    with torch.no_grad():
        for linear in encoder_linears(model)[:-1]:  # the last one stays dense
            squares = sparse_execution.squares(linear.weight, side)
            squares.mul_(torch.rand_like(squares[:, :1, :, :1]) < density)
    batch = random_batch([9, 4, 1, 7, 2, 2, 9])
    before = model(**batch)
    found = sparse(model)
    layouts = {linear.weight.layout for linear in encoder_linears(model)}
    assert (torch.sparse_bsr in layouts) == (side == 8 and density < 0.6)
    if side == 1:
        assert found == (17 if density < sparse_execution.DENSEST else 0)
    for tokens in (256, 20, 1):  # computed at a time
        monkeypatch.setattr(sparse_execution, "TOKENS", tokens)
        assert (model(**batch) - before).abs().max() < 1e-5
