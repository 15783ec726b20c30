"""tools/from_gguf.py: made-up GGUF files, and SmolLM2 as it comes in a wheel."""

import csv
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from test_errors import refused
from test_llama import load, random_ids, random_model
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from models.tokenizer import load_tokenizer
from tools import from_gguf

gguf = pytest.importorskip("gguf", reason="needs the package gguf")
SMOLLM2 = os.environ.get("SMOLLM2_GGUF", "")
E2E = Path(os.environ.get("E2E_DIR") or "missing")

TOKENS = ["<unk>", "<end>", "<mark>", *sorted(ByteLevel.alphabet()), "aa", "aab"]
TYPES = [3, 3, 4] + [1] * (len(TOKENS) - 3)
KEYS = {
    "block_count": 3,
    "context_length": 64,
    "embedding_length": 32,
    "feed_forward_length": 64,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 50000.0,
    "rope.dimension_count": 8,
    "vocab_size": len(TOKENS),
}


def pairs_together(weight, heads):
    """The rows of Q or K as llama.cpp orders them: those that turn together stand together."""
    out = np.empty_like(weight)
    size = len(weight) // heads
    for head in range(heads):
        for i in range(size // 2):
            for half in range(2):
                out[head * size + 2 * i + half] = weight[head * size + half * size // 2 + i]
    return out


def theirs(model):
    """{name: array} of a model, under the names and in the order of GGUF."""
    names = {ours: name for name, ours in (from_gguf.MODULES | from_gguf.IN_LAYER).items()}
    found = {}
    for name, tensor in model.state_dict().items():
        array = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:
            array = pairs_together(array, 4 if "q_proj" in name else 2)
        module, part = name.rsplit(".", 1)
        if module.startswith("model.layers."):
            number, module = module.removeprefix("model.layers.").split(".", 1)
            found[f"blk.{number}.{names[module]}.{part}"] = array
        else:
            found[f"{names[module]}.{part}"] = array
    return found


def write(path, arrays, kind="F32", keys=KEYS, architecture="llama", **tokenizer):
    """Write a GGUF file of these arrays; matrices are of this kind."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in keys.items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{architecture}.{key}", value)
    merges = tokenizer.pop("merges", ["a a", "aa b"])
    about = {"model": "gpt2", "pre": "smollm"} | tokenizer
    for key, value in about.items():
        add = writer.add_string if isinstance(value, str) else writer.add_bool
        add(f"tokenizer.ggml.{key}", value)
    writer.add_token_list(TOKENS)
    writer.add_token_types(TYPES)
    writer.add_token_merges(merges)
    writer.add_uint32("tokenizer.ggml.eos_token_id", 1)
    writer.add_uint32("tokenizer.ggml.bos_token_id", 0)
    kind = getattr(gguf.GGMLQuantizationType, kind)
    for name, array in arrays.items():
        array = array.astype(np.float32)
        if array.ndim == 1:
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def small(name="llama", **changes):
    options = {"vocab_size": len(TOKENS), "intermediate_size": 64, "rope_theta": 50000.0}
    return random_model(name, rms_norm_eps=1e-5, **options | changes)


def convert(source, folder):
    assert from_gguf.main([str(source), str(folder)]) == 0
    return load(folder).eval()


# ---------- the model -----------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "attention_bias": True}])
def test_a_file_and_its_folder_compute_the_same(changes, tmp_path):
    """A model, written with the rows of Q and K as GGUF has them, comes back as it was."""
    model = small(**changes)
    write(tmp_path / "m.gguf", theirs(model))
    found = convert(tmp_path / "m.gguf", tmp_path / "folder")
    assert vars(found.config) == vars(model.config) | {"bos_token_id": 0, "eos_token_id": 1}
    state = model.state_dict()
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    ids = random_ids(2, 9)
    with torch.no_grad():
        assert torch.equal(found(ids), model(ids))


def numbers_of(kind, data, columns):
    """The values of a quantised matrix, block by block, as its format defines them."""
    blocks = data.reshape(-1, {"Q8_0": 34, "Q4_1": 20}[kind])
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    if kind == "Q8_0":
        return (scale * blocks[:, 2:].view(np.int8)).reshape(-1, columns)
    least = blocks[:, 2:4].copy().view(np.float16).astype(np.float32)
    steps = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    return (scale * steps + least).reshape(-1, columns)


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_1"])
def test_quantised_values(kind, tmp_path):
    """Each becomes the number that its format defines."""
    arrays = theirs(small())
    write(tmp_path / "m.gguf", arrays, kind)
    found = convert(tmp_path / "m.gguf", tmp_path / "folder").state_dict()
    for name in ("mlp.down_proj", "self_attn.v_proj"):
        inner = {ours: name for name, ours in from_gguf.IN_LAYER.items()}[name]
        array = arrays[f"blk.1.{inner}.weight"]
        if kind == "F16":
            expected = array.astype(np.float16).astype(np.float32)
        else:
            data = gguf.quants.quantize(array, getattr(gguf.GGMLQuantizationType, kind))
            expected = numbers_of(kind, data, array.shape[1])
        assert np.array_equal(found[f"model.layers.1.{name}.weight"].numpy(), expected)
        assert np.abs(expected - array).max() < 0.2


# ---------- the tokenizer -------------------------------------------------------------------------


def test_tokens(tmp_path):
    """Digits stand alone, bytes are merged, and tokens that are no text are never split."""
    write(tmp_path / "m.gguf", theirs(small()))
    convert(tmp_path / "m.gguf", tmp_path / "folder")
    tokenizer = Tokenizer.from_file(str(tmp_path / "folder" / "tokenizer.json"))
    assert tokenizer.encode("aab12<mark>aa<end>").tokens == [
        "aab",
        "1",
        "2",
        "<mark>",
        "aa",
        "<end>",
    ]
    assert tokenizer.decode(tokenizer.encode("aab 12<mark><end>").ids) == "aab 12<mark>"
    ours = load_tokenizer(tmp_path / "folder", len(TOKENS), framed=False)
    assert ours.encode("aab").tokens == ["aab", "<end>"]


def test_a_first_token(tmp_path):
    write(tmp_path / "m.gguf", theirs(small()), add_bos_token=True, pre="gpt-2")
    convert(tmp_path / "m.gguf", tmp_path / "folder")
    tokenizer = Tokenizer.from_file(str(tmp_path / "folder" / "tokenizer.json"))
    assert tokenizer.encode("aa").tokens == ["<unk>", "aa"]


# ---------- mistakes ------------------------------------------------------------------------------


def refuse(capsys, tmp_path, *words, **changes):
    """Assert that a file with these changes is refused, and that nothing is written."""
    arrays = changes.pop("arrays", None) or theirs(small())
    (tmp_path / "m.gguf").unlink(missing_ok=True)
    write(tmp_path / "m.gguf", arrays, **changes)
    argv = [tmp_path / "m.gguf", tmp_path / "folder"]
    refused(capsys, argv, "m.gguf", *words, main=from_gguf.main)
    assert not (tmp_path / "folder").exists()


def test_what_we_do_not_have_is_refused(capsys, tmp_path):
    arrays = theirs(small())
    more = arrays | {"rope_freqs.weight": np.ones(4)}
    refuse(capsys, tmp_path, "rope_freqs.weight", arrays=more)
    refuse(
        capsys,
        tmp_path,
        "blk.0.ffn_gate_inp",
        arrays=arrays | {"blk.0.ffn_gate_inp.w": more["output_norm.weight"]},
    )
    less = {name: array for name, array in arrays.items() if name != "blk.2.ffn_up.weight"}
    refuse(capsys, tmp_path, "missing model.layers.2.mlp.up_proj.weight", arrays=less)
    refuse(capsys, tmp_path, "token_embd", arrays={"output_norm.weight": np.ones(32)})
    refuse(capsys, tmp_path, "architecture", "qwen2", architecture="qwen2")
    refuse(capsys, tmp_path, "llama.expert_count", keys=KEYS | {"expert_count": 8})
    refuse(capsys, tmp_path, "rope.dimension_count", keys=KEYS | {"rope.dimension_count": 4})
    less = {key: value for key, value in KEYS.items() if key != "context_length"}
    refuse(capsys, tmp_path, "context_length", keys=less)
    refuse(capsys, tmp_path, "llama-bpe", "smollm", pre="llama-bpe")
    refuse(capsys, tmp_path, "add_space_prefix", add_space_prefix=True)


def test_a_wrong_tensor_or_merge_is_refused(capsys, tmp_path):
    rows = {**theirs(small()), "blk.0.attn_q.weight": np.ones((30, 32))}
    refuse(capsys, tmp_path, "m.gguf: a key or a tensor is missing or wrong", arrays=rows)
    refuse(capsys, tmp_path, "Token `zz` out of vocabulary", merges=["z z"])


def test_a_damaged_file_is_refused(capsys, tmp_path):
    """Wherever a file ends too early, one line says so."""
    write(tmp_path / "m.gguf", theirs(small()))
    whole = (tmp_path / "m.gguf").read_bytes()
    for size in (0, 3, 20, 100, 1000, 3000, len(whole) // 2, len(whole) - 200):
        (tmp_path / "m.gguf").write_bytes(whole[:size])
        argv = [tmp_path / "m.gguf", tmp_path / "folder"]
        refused(capsys, argv, "m.gguf", main=from_gguf.main)
    refused(capsys, [tmp_path / "none", tmp_path / "folder"], "none", main=from_gguf.main)


def test_nothing_is_overwritten(capsys, tmp_path):
    write(tmp_path / "m.gguf", theirs(small()))
    (tmp_path / "folder").mkdir()
    convert(tmp_path / "m.gguf", tmp_path / "folder")
    argv = [tmp_path / "m.gguf", tmp_path / "folder"]
    refused(capsys, argv, "folder", "exists already", main=from_gguf.main)


# ---------- SmolLM2 -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2") / "folder"
    return convert(SMOLLM2, folder), folder


@pytest.mark.real
@pytest.mark.skipif(not SMOLLM2, reason="needs SMOLLM2_GGUF, the file of SmolLM2-135M-Instruct")
@torch.no_grad()
def test_smollm2(smollm2):
    """Its perplexity on 50 references of E2E is 55.7 (with Q and K as in the file 231.5).

    Its logits and tokens are those of `transformers`.
    """
    if not E2E.is_dir():
        pytest.skip("needs E2E_DIR")
    from transformers import AutoTokenizer, LlamaForCausalLM

    model, folder = smollm2
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ours = load_tokenizer(folder, 49152, framed=False)
    with open(E2E / "devset.csv", encoding="utf-8-sig", newline="") as file:
        texts = [row["ref"] for row in csv.DictReader(file)]
    for text in texts[:500]:
        assert ours.encode(text).ids == [*tokenizer(text)["input_ids"], 2]

    reference = LlamaForCausalLM.from_pretrained(folder).eval()
    loss = count = 0
    for i, text in enumerate(texts[:50]):
        ids = torch.tensor([0, *tokenizer(text)["input_ids"]])
        logits = model(ids[None])[0]
        if i < 3:
            assert (logits - reference(ids[None]).logits[0]).abs().max() < 1e-3
        log_p = logits.log_softmax(-1)[:-1].gather(1, ids[1:, None])
        loss, count = loss - log_p.sum().item(), count + len(log_p)
    assert abs(math.exp(loss / count) - 55.7) < 0.1

    ids = tokenizer("The capital of France is")["input_ids"]
    (new,) = model.generate([ids], ends=[2], most_new=2)
    assert tokenizer.decode(new) == " Paris."
