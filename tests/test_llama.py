"""Llama, Mistral and Qwen2: their function, files and tokenizers, and all methods on a tiny one."""

import copy
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_causal import ENDS, check_logits_and_gradients, check_tokens, check_what_a_token_reads
from test_causal import random_prompts, theirs_of
from test_errors import refused
from test_generate import check_mask_files, dataset_of
from test_train import flags_of, interrupted_at, result_of, rows, run, same
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

import eval as evaluation
import prune
import train
from conftest import SIZES
from models.checkpoint import config_values, load_model, read_config, save_model
from models.compaction import compact
from models.llama import Llama, Mistral, Qwen2, frequencies, rotate
from models.llama_config import LlamaConfig
from models.runs import load_run
from models.sparse import sparse
from models.tokenizer import load_tokenizer
from models.tokenizer_classes import QWEN2_WORDS
from support.matrices import encoder_linears
from support.terminal import UserError
from tools import deploy, pictures

SLOWER = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SLOWER |= {"original_max_position_embeddings": 32}
LLAMA3 = {"rope_theta": 500.0, "rope_scaling": {"rope_type": "llama3", **SLOWER}}
# What the models of these tests differ in: (class, changes of the config).
MODELS = {
    "llama": (Llama, {}),
    "llama with all options": (
        Llama,
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 12}
        | LLAMA3,
    ),
    "mistral": (Mistral, {"num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True}),
    "qwen2": (Qwen2, {"num_key_value_heads": 4, "rope_theta": 1e6}),
    "qwen2, tied": (Qwen2, {"tie_word_embeddings": True}),
}


def random_model(name="llama", seed=0, spread=0.25, **changes):
    """A model in evaluation, whose logits differ much."""
    Model, more = MODELS[name]
    model = Model(Model.Config(**SIZES | more | changes), "vocabulary").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            around = 1.0 if "norm" in path else 0.0
            parameter.normal_(around, spread, generator=generator)
    return model


def random_ids(*size, seed=0):
    return torch.randint(0, 97, size, generator=torch.Generator().manual_seed(seed))


def load(folder, **options):
    return load_model(folder, "vocabulary", form="vocabulary", **options)


# ---------- the function --------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_token_reads_what_is_before_it(name):
    check_what_a_token_reads(random_model(name))


def test_dropout_on_a_cpu_sees_no_later_token():
    """In training, with dropout, position 0 attends to itself only, and the rest is random."""
    model = random_model(attention_dropout=0.5).train()
    ids = random_ids(2, 9)
    changed = ids.clone()
    changed[:, 5:] = 1
    found = []
    for row in (ids, changed, ids):
        torch.manual_seed(3)
        found.append(model(row).detach())
    assert torch.equal(found[0], found[2])
    assert (found[0][:, :5] - found[1][:, :5]).abs().max() < 1e-5
    torch.manual_seed(4)
    assert (model(ids) - found[0]).abs().max() > 0.1


def test_heads_that_share_keys_and_values():
    """Two heads of keys and values for four of queries are four, of which two are alike."""
    model = random_model()
    whole = random_model(num_key_value_heads=4)
    state = dict(model.state_dict())
    for name, tensor in state.items():
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            heads = tensor.unflatten(0, (2, 8))
            state[name] = torch.stack([heads[0], heads[0], heads[1], heads[1]]).flatten(0, 1)
    whole.load_state_dict(state)
    ids = random_ids(2, 9)
    with torch.no_grad():
        assert (model(ids) - whole(ids)).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["llama", "llama with all options"])
def test_positions_count_from_anywhere(name):
    """Rotary positions tell how far tokens are apart, and nothing else, but they do tell it."""
    model = random_model(name)
    ids = random_ids(2, 9)
    places = torch.arange(9).expand(2, 9)
    with torch.no_grad():
        first, shifted = model.body(ids, places), model.body(ids, places + 21)
        wider = model.body(ids, 2 * places)
    assert (first - shifted).abs().max() < 1e-4
    assert (first - wider).abs().max() > 0.1


def test_scaled_frequencies():
    """By the definition: slow pairs turn slower by the factor, fast ones do not, others between."""
    config = LlamaConfig(**SIZES | LLAMA3 | {"head_dim": 16})
    found = frequencies(config, torch.device("cpu")).tolist()
    seen = set()
    for i, turn in enumerate(found):
        plain = 500.0 ** (-2 * i / 16)
        length = 2 * math.pi / plain  # in positions
        if length < 32 / 4.0:
            expected, kind = plain, "fast"
        elif length > 32 / 1.0:
            expected, kind = plain / 8.0, "slow"
        else:
            smooth = (32 / length - 1.0) / (4.0 - 1.0)
            expected, kind = (1 - smooth) * plain / 8.0 + smooth * plain, "between"
        assert turn == pytest.approx(expected, rel=1e-5)
        seen.add(kind)
    assert len(found) == 8 and seen == {"slow", "between", "fast"}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("beams, penalty, no_repeat", [(1, 1, 2), (3, 0.8, 0)])
def test_batches_and_the_cache_change_nothing(name, beams, penalty, no_repeat):
    """Prompts of unequal length, together or alone, with and without the cache: equal tokens."""
    model = random_model(name)
    prompts = random_prompts(8, least=1)
    options = (ENDS, beams, penalty, no_repeat, 10)
    together = model.generate(prompts, *options)
    assert model.generate(prompts, *options, cached=False) == together
    assert [model.generate([prompt], *options)[0] for prompt in prompts] == together
    assert len({tuple(text) for text in together}) > 4


def test_bf16():
    """Under autocast logits are float32, and what was rotated has the data type that it had."""
    x = torch.ones(1, 1, 2, 4, dtype=torch.bfloat16)
    assert rotate(x, torch.ones(2, 2), torch.zeros(2, 2)).dtype == torch.bfloat16
    model = random_model(spread=0.1)
    ids = random_ids(2, 9)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(ids)
        assert logits.dtype == torch.float32
        model.generate([[1, 2, 3], [4]], [0], beams=2, most_new=4)
    with torch.no_grad():
        assert (logits - model(ids)).abs().max() < 0.1


# ---------- files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_is_read_as_it_was_written(name, tmp_path, capsys):
    """All tensors come back. Where the head is tied, a copy of it in the file does no harm."""
    model = random_model(name)
    save_model(tmp_path, model, model.state_dict(), ())
    saved = load_file(tmp_path / "model.safetensors")
    tied = model.config.tie_word_embeddings
    assert ("lm_head.weight" in saved) == (not tied)
    assert saved["model.layers.1.mlp.gate_proj.weight"].shape == (48, 32)
    assert read_config(tmp_path) == (type(model), model.config)

    old = {name.removeprefix("model."): tensor for name, tensor in saved.items()}
    old["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    if tied:
        old["lm_head.weight"] = old["embed_tokens.weight"].clone()
    (tmp_path / "old").mkdir()
    shutil.copy(tmp_path / "config.json", tmp_path / "old")
    save_file(old, tmp_path / "old" / "model.safetensors")
    for folder in (tmp_path, tmp_path / "old"):
        again = load(folder).state_dict()
        assert again.keys() == model.state_dict().keys()
        for path, tensor in model.state_dict().items():
            assert torch.equal(tensor, again[path]), path
    assert "not used" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, tensors, changes, message",
    [
        ("qwen2, tied", {"lm_head.weight": torch.zeros(97, 32)}, {}, "lm_head.weight differs from"),
        ("llama", {"lm_head.weight": None}, {}, "missing lm_head.weight"),
        ("llama", {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}, {}, "unknown model.l"),
        ("llama", {}, {"attention_bias": True}, "missing model.layers.0.self_attn.q_proj.bias"),
        ("llama", {}, {"hidden_act": "gelu"}, "hidden_act is 'gelu'; expected 'silu'"),
        ("llama", {}, {"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of"),
        ("llama", {}, {"head_dim": 7}, "head_dim 7 is odd"),
        ("llama", {}, {"hidden_size": 30}, "hidden_size 30 is not a multiple of 4 attention heads"),
        ("llama", {}, {"num_hidden_layers": 0}, "are > 0"),
        ("llama", {}, {"num_attention_heads": 0, "head_dim": None}, "are > 0"),
        ("llama", {}, {"attention_dropout": 2}, "attention_dropout is 2; expected float from 0"),
        ("llama", {}, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("llama", {}, {"is_causal": False}, "is_causal is False; expected True"),
        ("llama", {}, {"layer_types": 3}, "config.json: 'int' object is not iterable"),
        ("llama", {}, {"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
        ("llama", {}, {"rope_scaling": {"type": "linear", "factor": 2}}, "rope_type is 'linear'"),
        ("llama", {}, {"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn'; exp"),
        ("llama", {}, {"rope_parameters": {"mrope_section": [2]}}, "has mrope_section"),
        ("llama", {}, {"rope_scaling": {"rope_type": "llama3"}}, "factor of rope_scaling is None"),
        ("llama", {}, {"rope_scaling": {"rope_theta": 0}}, "rope_theta of rope_scaling is 0"),
        ("llama", {}, {"rope_scaling": [1]}, "rope_scaling is [1]; expected an object"),
        ("mistral", {}, {"sliding_window": 32}, "sliding_window is 32; expected None"),
        ("mistral", {}, {"sliding_window": ...}, "sliding_window is 4096; expected None"),
        ("mistral", {}, {"attention_bias": True}, "attention_bias is True"),
        ("qwen2", {}, {"use_sliding_window": True}, "use_sliding_window is True"),
        ("qwen2", {}, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has"),
        ("qwen2", {}, {"model_type": "qwen3"}, "model_type is 'qwen3'; expected 'bert' or"),
    ],
)
def test_what_is_refused(name, tensors, changes, message, tmp_path):
    """A checkpoint that computes something else is refused by the name of the tensor or key."""
    model = random_model(name)
    save_model(tmp_path, model, model.state_dict(), ())
    saved = load_file(tmp_path / "model.safetensors") | tensors
    saved = {path: tensor for path, tensor in saved.items() if tensor is not None}
    save_file(saved, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not ...}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as error:
        load(tmp_path)
    assert message in str(error.value), error.value
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


FORMS = [
    {"rope_theta": 500.0, "rope_scaling": {"type": "llama3", **SLOWER}},
    {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, **SLOWER}},
    {"rope_theta": 500.0, "rope_parameters": {"rope_type": "llama3", **SLOWER}},
    {"rope_theta": 1.0, "rope_scaling": {"rope_type": "llama3", "rope_theta": 500.0, **SLOWER}},
]


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_the_rotary_keys(form, tmp_path):
    """Those of today and of older versions say the same."""
    path = tmp_path / "config.json"
    more = {"head_dim": None, "torch_dtype": "bfloat16", "layer_types": ["full_attention"] * 3}
    more |= {"eos_token_id": [1, 2], "pad_token_id": None, "sliding_window": None}
    path.write_text(json.dumps({"model_type": "llama", **SIZES, **more, **form}))
    _, config = read_config(tmp_path)
    assert config == LlamaConfig(**SIZES | LLAMA3 | {"eos_token_id": [1, 2]})
    assert config.head_dim == 8
    for more in ({}, {"rope_theta": 45e9}):  # that of a model for very long texts
        path.write_text(json.dumps({"model_type": "llama", **SIZES, **more}))
        assert read_config(tmp_path)[1] == LlamaConfig(**SIZES, **more)


# ---------- tokenizers ----------------------------------------------------------------------------


def write_tokenizer(texts, folder, change=None, **says):
    """Write the tokenizer of `texts` into a folder, changed, with a tokenizer_config.json."""
    tokenizer = Tokenizer.from_file(f"{texts[1]}/tokenizer.json")
    if change:
        change(tokenizer)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(says))
    return tokenizer


def write_config(folder, kind, **more):
    sizes = {"model_type": kind, **SIZES, "vocab_size": 400, "sliding_window": None, **more}
    (folder / "config.json").write_text(json.dumps(sizes))


def by_digits(tokenizer):
    """Split digits, as SmolLM2 does."""
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, tokenizer.pre_tokenizer])


def as_qwen2(tokenizer):
    """Split texts as Qwen2's tokenizer.json does."""
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated")
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False, trim_offsets=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_of])


def with_a_turn(tokenizer):
    """Let "<end>" be a token that ends a turn."""
    tokenizer.add_special_tokens(["<end>"])


@pytest.mark.parametrize(
    "says, more, expected",
    [
        ({"eos_token": "<end>"}, {}, "<end>"),
        ({"eos_token": {"content": "<end>"}}, {"eos_token_id": 0}, "<end>"),
        ({}, {"eos_token_id": [319, 0]}, "<end>"),
        ({}, {"eos_token_id": 319}, "<end>"),
        ({}, {"eos_token_id": None}, "<|endoftext|>"),
    ],
)
def test_the_end_token(says, more, expected, texts, tmp_path):
    """It is that of tokenizer_config.json, or the first one of config.json."""
    write_tokenizer(texts, tmp_path, with_a_turn, **says)
    last = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).token_to_id("<end>")
    if more.get("eos_token_id") == 319:
        more = {"eos_token_id": last}
    if isinstance(more.get("eos_token_id"), list):
        more = {"eos_token_id": [last, 0]}
    write_config(tmp_path, "llama", **more)
    tokenizer = load_tokenizer(tmp_path, 400, framed=False)
    assert tokenizer.encode("Bibi").tokens[-1] == expected


def test_tokenizers_that_are_refused(texts, tmp_path):
    """What transformers builds in another way, and SentencePiece, are refused by name."""
    (tmp_path / "a").mkdir()
    write_config(tmp_path / "a", "llama")
    (tmp_path / "a" / "tokenizer.model").write_bytes(b"")
    with pytest.raises(UserError, match="tokenizer.model: SentencePiece is not read; expected tok"):
        load_tokenizer(tmp_path / "a", 400, framed=False)
    write_tokenizer(texts, tmp_path / "b", tokenizer_class="PreTrainedTokenizerFast")
    write_config(tmp_path / "b", "qwen2")
    with pytest.raises(UserError, match="its normalizer is not that of Qwen2Tokenizer"):
        load_tokenizer(tmp_path / "b", 400, framed=False)

    whole = write_tokenizer(texts, tmp_path / "d", tokenizer_class="LlamaTokenizer")
    write_config(tmp_path / "d", "mistral", eos_token_id=0)
    expected = load_tokenizer(tmp_path / "d", 400, framed=False).encode("the cat").tokens
    whole.model.save(str(tmp_path / "d"))  # vocab.json and merges.txt
    (tmp_path / "d" / "tokenizer.json").unlink()
    assert load_tokenizer(tmp_path / "d", 400, framed=False).encode("the cat").tokens == expected

    def without_bytes(tokenizer):
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = tokenizer.post_processor = None

    for name, message in (("LlamaTokenizerFast", "not byte-level"), ("PreTrainedTokenizer", "")):
        write_tokenizer(texts, tmp_path / "c", without_bytes, tokenizer_class=name)
        write_config(tmp_path / "c", "llama", eos_token_id=0)
        if message:
            with pytest.raises(UserError, match=message):
                load_tokenizer(tmp_path / "c", 400, framed=False)
        else:
            load_tokenizer(tmp_path / "c", 400, framed=False)


# ---------- whole runs ----------------------------------------------------------------------------


def test_random_weights(llama, capsys):
    """Without weights they are random ones of the seed, N(0, 0.02) in every matrix."""
    one, same_one, other = [load(llama[1], seed=seed) for seed in (0, 0, 1)]
    assert f"{llama[1]}: no weights; the model starts from random ones" in capsys.readouterr().out
    layer = one.layers[1]
    for weight in (layer.self_attn.k_proj.weight, layer.mlp.down_proj.weight, one.lm_head.weight):
        assert weight.detach().std() == pytest.approx(0.02, rel=0.1)
    assert layer.input_layernorm.weight.eq(1).all()
    assert torch.equal(one.lm_head.weight, same_one.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


@pytest.mark.parametrize("method", prune.CRITERIA)
def test_every_method_runs(method, llama, tmp_path):
    """Each trains with a teacher that computes beside it, and its run is read again."""
    out = tmp_path / "run"
    own = {"hold": 0, "ramp": 0.2, "pins_window": 1, "density": 0.5}
    options = {name: own[name] for name in own.keys() & prune.METHODS[method].uses}
    options |= {"method": method, "eval_every": 3, "teacher": "self", "max_steps": 5}
    result = run(llama, out, **options)
    losses = [row["loss"] for row in rows(out) if "loss" in row]
    assert len(losses) == 5 and np.isfinite(losses).all()
    assert [row["step"] for row in rows(out) if "teacher" in row] == [3]
    model, _, _, _ = load_run(out)
    weights = [linear.weight for linear in encoder_linears(model)]
    kept = sum(int(w.count_nonzero()) for w in weights) / sum(w.numel() for w in weights)
    assert result["achieved_density"] == pytest.approx(kept, abs=1e-6)
    if method not in ("dense", "l0", "soft-movement"):
        assert kept == pytest.approx(0.5, abs=0.01)
    assert evaluation.main([str(out)]) == 0


@pytest.mark.parametrize("method", ["movement", "smp-l"])
@pytest.mark.parametrize("pattern, density", [("head", 0.5), ("unit", 0.25), ("2:4", 0.5)])
def test_patterns(pattern, density, method, llama, tmp_path):
    """A unit is a row of G and U with a column of D; a head has the queries that share its keys."""
    out = tmp_path / "run"
    run(llama, out, method=method, pattern=pattern, density=density, max_steps=8, beams=1)
    model, _, _, _ = load_run(out)
    base = load(llama[1])
    for layer, whole in zip(model.layers, base.layers):
        kept = {}
        for letter, name in model.matrices.items():
            kept[letter] = layer.get_submodule(name).weight != 0
            assert whole.get_submodule(name).weight.count_nonzero() == kept[letter].numel()
        if pattern == "2:4":
            for mask in kept.values():
                assert (mask.unflatten(1, (-1, 4)).sum(-1) == 2).all()
            continue
        units = kept["U"].all(1)  # (F,)
        assert 0 < units.sum() < 48
        assert torch.equal(kept["G"], units[:, None].expand(48, 32))
        assert torch.equal(kept["U"], units[:, None].expand(48, 32))
        assert torch.equal(kept["D"], units[None].expand(32, 48))
        if pattern == "head":
            heads = kept["K"].unflatten(0, (2, 8)).all(2).all(1)  # (G,)
            assert heads.sum() == 1
            rows_of = heads.repeat_interleave(8)  # of K and V
            queries = heads.repeat_interleave(16)  # two query heads for each
            assert torch.equal(kept["K"], rows_of[:, None].expand(16, 32))
            assert torch.equal(kept["V"], rows_of[:, None].expand(16, 32))
            assert torch.equal(kept["Q"], queries[:, None].expand(32, 32))
            assert torch.equal(kept["O"], queries[None].expand(32, 32))
    if pattern == "head":
        assert set(pictures.head_densities(model).flatten().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("method", ["pins", "smp-s"])
def test_resume_with_a_teacher(method, llama, tmp_path):
    """A run that teaches itself, interrupted and resumed, ends bit for bit so."""
    options = {"method": method, "teacher": "self", "eval_every": 3, "max_steps": 14, "lr": 1e-3}
    run(llama, tmp_path / "a", **options)
    argv = [*llama, *flags_of(**options), "--out", str(tmp_path / "b")]
    Method = prune.METHODS[method]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Method, "update", interrupted_at(9, Method.update))
        assert train.main(argv) != 0
    assert train.main([*argv, "--resume"]) == 0
    same(tmp_path / "a", tmp_path / "b")


@pytest.fixture(scope="module")
def finished(llama, tmp_path_factory):
    """A folder with finished runs of the methods dense and smp-s."""
    folder = tmp_path_factory.mktemp("finished")
    options = {"method": "dense", "max_steps": 150, "lr": 1e-2, "warmup": 0.1, "dropout": 0}
    run(llama, folder / "dense", **options, eval_every=150)
    flags = ["--model", str(folder / "dense" / "model"), *llama[2:]]
    run(flags, folder / "smp-s", method="smp-s", density=0.6, max_steps=12)
    return folder


def test_the_head_of_its_own(finished, llama):
    """Dense training changes it. SMP keeps the base's, and a run from another task takes it on."""
    heads = []
    for folder in (finished / "dense" / "model", finished / "smp-s" / "model"):
        heads.append(load_file(folder / "model.safetensors")["lm_head.weight"])
    assert not torch.equal(heads[0], load(llama[1]).lm_head.weight)
    assert torch.equal(*heads)
    trained = load_file(finished / "smp-s" / "checkpoint.safetensors")
    trained = [name for name in trained if not name.startswith(("optimizer.", "method."))]
    assert len(trained) == 14 and all(name.endswith(".scores") for name in trained)
    assert result_of(finished / "dense")["metrics"]["bleu"] > 0.3


def test_go_on_with_another_task(finished, llama, tmp_path):
    """`fixed` on a task of another name begins with the whole model, and so with its head."""
    task = Path(llama[3]).with_name("other.json")
    task.write_text(json.dumps(json.loads(Path(llama[3]).read_text()) | {"name": "other"}))
    flags = ["--model", llama[1], "--task-file", str(task), *llama[4:]]
    argv = [*flags, "--method", "fixed", "--from", str(finished / "dense"), "--out"]
    assert train.main([*argv, str(tmp_path / "run"), "--max-steps", "1", "--lr", "0"]) == 0
    ours = load_file(tmp_path / "run" / "model" / "model.safetensors")
    theirs = load_file(finished / "dense" / "model" / "model.safetensors")
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def test_mask_files(finished, llama, tmp_path, capsys):
    check_mask_files(finished, llama, tmp_path, capsys)


def test_compaction_is_refused(finished, tmp_path, capsys):
    """In one line, before anything is changed or written."""
    argv = ["compact", str(finished / "smp-s"), str(tmp_path / "compact")]
    refused(capsys, argv, "compact: not offered for Llama", "export", main=deploy.main)
    assert not (tmp_path / "compact").exists()
    model = random_model()
    state = copy.deepcopy(model.state_dict())
    for shrink, message in ((compact, "compact: not offered"), (sparse, "not for Llama")):
        with pytest.raises(UserError, match=message):
            shrink(model)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


# ---------- against transformers ------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_those_of_transformers(name, hf, tmp_path):
    check_logits_and_gradients(hf, random_model(name), tmp_path)


@pytest.mark.real
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("beams, penalty", [(1, 1.0), (4, 0.8)])
def test_tokens_are_those_of_transformers(name, beams, penalty, hf, tmp_path):
    model = random_model(name)
    check_tokens(model, theirs_of(hf, model, tmp_path), 40, beams, penalty)


TOKENIZERS = [
    ("llama", by_digits, {}),
    ("llama", by_digits, {"tokenizer_class": "PreTrainedTokenizerFast"}),
    ("llama", by_digits, {"tokenizer_class": "LlamaTokenizerFast"}),
    ("llama", by_digits, {"tokenizer_class": "TokenizersBackend"}),
    ("mistral", by_digits, {"tokenizer_class": "LlamaTokenizerFast"}),
    ("mistral", by_digits, {}),
    ("qwen2", as_qwen2, {"tokenizer_class": "Qwen2Tokenizer"}),
    ("qwen2", as_qwen2, {"tokenizer_class": "PreTrainedTokenizerFast"}),
    ("qwen2", as_qwen2, {"tokenizer_class": "LlamaTokenizerFast"}),
    ("qwen2", as_qwen2, {}),
]


@pytest.mark.real
@pytest.mark.parametrize("kind, change, says", TOKENIZERS)
def test_tokens_of_a_folder_are_those_of_transformers(kind, change, says, hf, texts, tmp_path):
    """Whatever class a folder names, and again after a round through a run's folder."""
    write_tokenizer(texts, tmp_path / "a", change, eos_token="<|endoftext|>", **says)
    write_config(tmp_path / "a", kind)
    ours = load_tokenizer(tmp_path / "a", 400, framed=False)
    _, config = read_config(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "run")
    deploy.save_tokenizer(tmp_path / "run", ours, config)
    lines = ["Bibi has fish.", " You get soup at  The Mill.", "Zu\u0308rich £20 in 1998", ""]
    lines += ["a<|endoftext|>b", "it's\n\n  12:30", "你好 x"]
    for name in ("a", "run"):
        ours = load_tokenizer(tmp_path / name, 400, framed=False)
        theirs = hf.AutoTokenizer.from_pretrained(tmp_path / name)
        for line in lines:
            expected = theirs(line, add_special_tokens=False)["input_ids"]
            assert ours.encode(line, add_special_tokens=False).ids == expected, (name, line)
        if name == "run":
            assert theirs(lines[0])["input_ids"] == ours.encode(lines[0]).ids


@pytest.mark.real
def test_exports_generate_the_same(hf, finished, llama, tmp_path):
    """transformers, with the settings of the exported folder alone, writes the same texts."""
    folder = tmp_path / "export"
    assert deploy.main(["export", str(finished / "smp-s"), str(folder)]) == 0
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    model = hf.AutoModelForCausalLM.from_pretrained(folder)
    ours, _, _, _ = load_run(finished / "smp-s")
    dev = dataset_of(llama, "dev")
    dev.kind.task.settings.update(beams=3)
    said = dev.kind.predict(ours, dev, torch.device("cpu"), "fp32")
    for (source, _), text in list(zip(dev.examples, said))[:8]:
        inputs = tokenizer(source, return_tensors="pt")
        tokens = model.generate(**inputs)[0, inputs["input_ids"].size(1) :]
        theirs = tokenizer.decode(tokens, skip_special_tokens=True)
        assert " ".join(theirs.split()) == text
    assert config_values(ours)["model_type"] == "llama"
