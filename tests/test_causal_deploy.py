"""What is shipped of a decoder writes the texts that the run writes."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import eval as eval_module
import train
from models.compaction import compact
from models.gpt2 import GPT2, GPT2Config
from models.runs import load_run
from models.sparse import sparse
from support.terminal import UserError
from tools import deploy

# ---------- compaction ----------------------------------------------------------------------------


def planted(cases):
    """A random GPT-2 in which rows (axis 0) or columns (axis 1) of some matrices are zero.

    Each case is (layer, letter of the matrix, axis, which of them).
    """
    config = GPT2Config(vocab_size=60, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    model = GPT2(config, "vocabulary").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ln_" not in name:
                spread = 0.5 if parameter.dim() == 2 else 0.3
                parameter.normal_(0.0, spread, generator=generator)
        for i, letter, axis, places in cases:
            weight = model.layers[i].get_submodule(model.matrices[letter]).weight
            weight.index_fill_(axis, torch.tensor(places), 0.0)
    return model


ROWS = [1, 2, 5, 9]  # of both heads
HEAD = list(range(8, 16))  # the second head
CASES = {
    "units": [(0, "U", 0, ROWS), (0, "D", 1, [2, 3])],
    "no unit": [(0, "U", 0, list(range(64)))],
    "no unit in any layer": [(i, "U", 0, list(range(64))) for i in (0, 1)],
    "values": [(0, "V", 0, ROWS), (1, "O", 1, [3])],
    "keys": [(0, "K", 0, ROWS)],
    "queries": [(0, "Q", 0, ROWS), (0, "K", 0, [2, 3, 4])],
    "an empty head": [(1, letter, 0, HEAD) for letter in "QKV"],
    "no head": [(0, "V", 0, list(range(16)))],
    "no head in any layer": [(i, "O", 1, list(range(16))) for i in (0, 1)],
    "everything": [(i, letter, 0, ROWS) for i in (0, 1) for letter in "QKVU"],
}
PROMPTS = [[7, 8, 9, 10, 11], [3], [20, 21, 22]]


def generated(model):
    """The new tokens of three prompts, greedily and by beams, with the cache and without."""
    ends = [0, 20, 40]
    for beams in (1, 3):
        for cached in (True, False):
            options = {"beams": beams, "no_repeat": 1, "most_new": 12, "cached": cached}
            yield model.generate(PROMPTS, ends, **options)


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_compaction_is_exact(case, uniform):
    """A compacted decoder gives the logits of the whole one, and the same tokens.

    The logits are compared in float64, to 1e-6. In float32 large key biases move them by 1e-5.
    """
    whole = planted(CASES[case])
    model = copy.deepcopy(whole)
    sizes = compact(model, uniform)
    ids = torch.randint(60, (3, 11), generator=torch.Generator().manual_seed(1))
    logits, expected = [copy.deepcopy(each).double()(ids) for each in (model, whole)]
    assert (logits - expected).abs().max() < 1e-6
    greedy, without_cache, *_ = expected = list(generated(whole))
    assert greedy == without_cache and len(set(map(tuple, greedy))) > 1
    assert list(generated(model)) == expected

    units = [size for _, _, size in sizes]
    if uniform:
        assert {layer.mlp["c_fc"].out_features for layer in model.layers} == {max(*units, 1)}
        assert model.config.n_inner == max(*units, 1)
        assert all(layer.attn.query.out_features == 16 for layer in model.layers)
        return
    assert model.config == whole.config
    if case == "units":
        assert units == [59, 64]
    if case == "values":
        assert [layer[1] for layer in sizes] == [[5, 7], [7, 8]]
        assert model.layers[0].attn.value.out_features == 14  # two heads of 7, one is padded
    if case == "keys":
        assert [layer[0] for layer in sizes] == [[5, 7], [8, 8]]
    if case == "an empty head":
        assert [layer.attn.num_heads for layer in model.layers] == [2, 1]
    if case == "no head":
        assert sizes[0][:2] == [[1], [1]]


def test_sparse_execution_is_refused():
    """CSR is for encoders. A decoder is refused as a whole, before anything is compacted."""
    model = planted(CASES["everything"])
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match="sparse: .* not for GPT2"):
        sparse(model)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


# ---------- the commands --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(texts, tmp_path_factory):
    """The folder of a finished run that is pruned by unit and decodes with three beams.

    In its first layer some of the 32 queries, keys and values are emptied, too.
    """
    out = tmp_path_factory.mktemp("causal") / "run"
    flags = ["--method", "movement", "--pattern", "unit", "--density", "0.4", "--lr", "0.01"]
    flags += ["--no-repeat-ngram", "3", "--max-steps", "120"]
    assert train.main([*texts, *flags, "--out", str(out)]) == 0
    path = out / "model" / "model.safetensors"
    tensors = load_file(path)
    joined = tensors["transformer.h.0.attn.c_attn.weight"]  # (32, 96)
    joined[:, [9, 10]] = 0.0  # of Q, in head 1
    joined[:, [32 + 10, 32 + 16]] = 0.0  # of K, in heads 1 and 2
    joined[:, [64 + 24, *range(64, 64 + 8)]] = 0.0  # of V, in head 3, and all of head 0
    save_file(tensors, path, metadata={"format": "pt"})
    return out


def lines_of(path):
    return path.read_text().splitlines()


@pytest.fixture(scope="module")
def written(texts, finished):
    """The texts that the run writes for the dev set."""
    path = finished.parent / "run.txt"
    flags = ["--predictions", str(path), "--split", "dev", "--data-dir", texts[5]]
    assert eval_module.main([str(finished), *flags, "--device", "cpu"]) == 0
    assert len(set(lines_of(path))) > 1
    return lines_of(path)


def compared(capsys, count):
    """What compact prints: how far logits are apart, how many texts, the metrics of both models."""
    out = capsys.readouterr().out
    form = rf"logits on {count} dev examples differ by (\S+) at most; (\d+) of their texts differ"
    apart, texts_apart = re.search(form, out).groups()
    assert out.count("times as fast") == 3
    return float(apart), int(texts_apart), *re.findall(r"(?:before|after): (.*)", out)


def test_what_is_lost_is_printed(texts, finished, written, tmp_path, capsys):
    """Where --drop-rows empties every matrix, the comparison says how much that changes."""
    flags = ["--drop-rows", "200", "--data-dir", texts[5], "--device", "cpu"]
    assert deploy.main(["compact", str(finished), str(tmp_path / "compact"), *flags]) == 0
    apart, texts_apart, before, after = compared(capsys, len(written))
    assert apart > 0.1 and texts_apart > 0 and before != after


def test_compact_folder_is_the_run(texts, finished, written, tmp_path, capsys):
    """A compact folder, read again, has the metrics of the run and writes its texts.

    It decodes with the settings of the run. Without them it is refused.
    """
    folder = tmp_path / "compact"
    data = ["--data-dir", texts[5], "--device", "cpu"]
    assert deploy.main(["compact", str(finished), str(folder), *data]) == 0
    apart, texts_apart, before, after = compared(capsys, len(written))
    assert apart < 1e-5 and texts_apart == 0 and before == after
    stored = load_file(folder / "compact.safetensors")
    about = json.loads((folder / "compact.json").read_text())
    for i, (_, _, units) in enumerate(about["sizes"]):
        assert units < 128
        assert len(stored[f"transformer.h.{i}.mlp.c_fc.weight"]) == units
    assert about["sizes"][0][:2] == [[7, 7, 8], [8, 8, 7]]  # see `finished`
    assert len(stored["transformer.h.0.attn.query.weight"]) == 7 + 7 + 8  # without padding
    assert about["sizes"][1][:2] == [[8] * 4, [8] * 4]

    model, task, _, _ = deploy.load_for_use(folder)
    run, theirs, _, _ = load_run(finished)
    assert task.settings == theirs.settings and task.settings["beams"] == 3
    ids = torch.arange(20).view(2, 10)
    assert (model(ids) - run.eval()(ids)).abs().max() < 1e-5

    assert deploy.main(["evaluate", str(folder), *data]) == 0
    line = capsys.readouterr().out
    assert before in line and "3 beams" in line
    path = tmp_path / "compact.txt"
    assert deploy.main(["predict", str(folder), str(path), "--split", "dev", *data]) == 0
    assert lines_of(path) == written

    del about["settings"]["beams"]
    (folder / "compact.json").write_text(json.dumps(about))
    capsys.readouterr()
    assert deploy.main(["evaluate", str(folder), *data]) == 2
    assert "expected the settings beams, length_penalty" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["export", "compact"])
def test_transformers_writes_the_same(command, texts, finished, written, tmp_path, monkeypatch):
    """The lines of README.md write, with `transformers`, what the run writes for a source."""
    pytest.importorskip("transformers")
    folder = tmp_path / "hub"
    flags = ["--uniform", "--data-dir", texts[5], "--device", "cpu"] if command == "compact" else []
    assert deploy.main([command, str(finished), str(folder), *flags]) == 0
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["GPT2LMHeadModel"]
    assert (config["n_inner"] < 128) == (command == "compact")
    assert json.loads((folder / "generation_config.json").read_text())["num_beams"] == 3
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer["model_input_names"] == ["input_ids", "attention_mask"]

    code = re.search("```python\n(.*)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    rows = lines_of(Path(texts[3]).with_name("dev.csv"))[1:]
    sources = list(dict.fromkeys(row.split(",")[0] for row in rows))  # each once, as in the run
    assert len(sources) == len(written) and "a source" in code
    monkeypatch.chdir(tmp_path)
    for source, text in list(zip(sources, written))[:6]:
        names = {}
        exec(code.replace("a source", source), names)
        assert names["text"] == text
