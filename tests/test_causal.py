"""GPT-2 and how it continues texts: layout, random weights, cache, greedy decoding, beam search."""

import itertools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_errors import refused

import prune
from models.causal import ban_repeats
from models.checkpoint import config_values, load_model, read_config, save_model
from models.gpt2 import GPT2, GPT2Config
from models.tokenizer import load_tokenizer, save_tokenizer
from support.terminal import UserError

ENDS = list(range(0, 97, 2))  # many, so that most outputs end early
SIZES = {"vocab_size": 97, "n_positions": 64, "n_embd": 32, "n_layer": 3, "n_head": 4}


def random_gpt2(seed=0, spread=0.25, **changes):
    """A GPT-2 in evaluation, whose logits differ much."""
    model = GPT2(GPT2Config(**SIZES | changes), "vocabulary").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, spread, generator=generator)
    return model


def random_prompts(count, least=4, most=24):
    generator = torch.Generator().manual_seed(1)

    def draw(low, high, *size):
        return torch.randint(low, high, size, generator=generator)

    return [draw(1, 97, int(draw(least, most + 1, 1))).tolist() for _ in range(count)]


# ---------- files ---------------------------------------------------------------------------------


def test_layout(tmp_path, capsys):
    """A folder in Hugging Face's layout is read and written; what is no weight is left out."""
    model = random_gpt2()
    save_model(tmp_path / "a", model, model.state_dict(), ())
    saved = load_file(tmp_path / "a" / "model.safetensors")
    c_attn = saved["transformer.h.1.attn.c_attn.weight"]
    assert c_attn.shape == (32, 96)
    assert torch.equal(c_attn[:, 32:64], model.layers[1].attn.key.weight.T)
    assert saved["transformer.h.0.mlp.c_fc.weight"].shape == (32, 128)
    assert "lm_head.weight" not in saved
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["model_type"] == "gpt2" and config["architectures"] == ["GPT2LMHeadModel"]

    shutil.copytree(tmp_path / "a", tmp_path / "b")
    old = {name.removeprefix("transformer."): tensor for name, tensor in saved.items()}
    old["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    old["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    old["lm_head.weight"] = old["wte.weight"].clone()
    save_file(old, tmp_path / "b" / "model.safetensors")
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    del old["wte.weight"]  # one of two tied tensors, and the head of another class
    save_file(old | {"score.weight": torch.ones(2, 32)}, tmp_path / "c" / "model.safetensors")
    for folder in ("a", "b", "c"):
        again = load_model(tmp_path / folder, "vocabulary", form="vocabulary").eval()
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, again.state_dict()[name]), (folder, name)
    assert f'{tmp_path / "c"}: not used: "score.weight"' in capsys.readouterr().out


def test_names_of_other_models(tmp_path):
    """config.json may have the names that most models have; end tokens may be several."""
    (tmp_path / "config.json").write_text(
        '{"model_type": "gpt2", "hidden_size": 24, "num_hidden_layers": 3, "eos_token_id": [1, 2],'
        '"num_attention_heads": 6, "max_position_embeddings": 64}'
    )
    expected = GPT2Config(n_embd=24, n_layer=3, n_head=6, n_positions=64, eos_token_id=[1, 2])
    assert read_config(tmp_path)[1] == expected


@pytest.mark.parametrize(
    "tensors, changes, message",
    [
        ({"lm_head.weight": torch.zeros(97, 32)}, {}, "lm_head.weight differs from the word emb"),
        ({"h.0.attn.rotary": torch.zeros(2)}, {}, "unknown transformer.h.0.attn.rotary"),
        ({"h.0.ln_1.weight": None}, {}, "missing transformer.h.0.ln_1.weight"),
        ({}, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({}, {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn is True"),
        ({}, {"scale_attn_weights": False}, "scale_attn_weights is False"),
        ({}, {"add_cross_attention": True}, "add_cross_attention is True"),
        ({}, {"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({}, {"activation_function": "relu"}, "activation_function is 'relu'"),
        ({}, {"n_inner": 100}, "h.0.mlp.c_fc.weight is (128, 32), expected (100, 32)"),
        ({}, {"n_head": 5}, "is not a multiple of 5 attention heads"),
        ({}, {"n_layer": 0}, "are > 0"),
        ({}, {"attn_pdrop": 2}, "attn_pdrop is 2"),
        ({}, {"is_causal": False}, "is_causal is False"),
        ({}, {"quantization_config": {"bits": 8}}, "quantization_config is {'bits': 8}"),
        ({}, {"model_type": ["gpt2"]}, "config.json: unhashable type"),
    ],
)
def test_what_is_refused(tensors, changes, message, tmp_path):
    """A checkpoint that computes something else is refused by the name of the tensor or key."""
    model = random_gpt2()
    save_model(tmp_path, model, model.state_dict(), ())
    saved = load_file(tmp_path / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor is None:
            del saved[f"transformer.{name}"]
        else:
            saved[name] = tensor
    save_file(saved, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError) as error:
        load_model(tmp_path, "vocabulary", form="vocabulary")
    assert message in str(error.value), error.value


def test_random_weights(tmp_path, texts, capsys):
    """Without weights they are random ones of the seed; both c_proj are smaller by sqrt(2 L)."""
    config = {**config_values(random_gpt2(n_layer=8)), "n_inner": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    one, same, other = [
        load_model(tmp_path, "vocabulary", form="vocabulary", seed=seed) for seed in (0, 0, 1)
    ]
    assert f"{tmp_path}: no weights; the model starts from random ones" in capsys.readouterr().out
    layer = one.layers[3]
    assert layer.attn.query.weight.detach().std() == pytest.approx(0.02, rel=0.1)
    assert layer.mlp["c_proj"].weight.detach().std() == pytest.approx(0.02 / 4, rel=0.1)
    assert layer.attn.c_proj.weight.detach().std() == pytest.approx(0.02 / 4, rel=0.1)
    assert layer.ln_1.weight.eq(1).all() and layer.mlp["c_fc"].bias.eq(0).all()
    assert torch.equal(layer.attn.query.weight, same.layers[3].attn.query.weight)
    assert not torch.equal(layer.attn.query.weight, other.layers[3].attn.query.weight)


def test_weights_in_another_form_are_not_replaced_by_random_ones(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_values(random_gpt2())))
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(UserError, match="pickled .bin checkpoints are refused"):
        load_model(tmp_path, "vocabulary", form="vocabulary")


def test_each_kind_of_task_needs_its_architecture(tiny, texts, tmp_path, capsys):
    """A decoder has no head for classes, and an encoder none for texts; one line says so."""
    out = ["--out", tmp_path / "out"]
    message = ("model_type is gpt2; expected bert or roberta", "config.json")
    refused(capsys, ["--model", texts[1], *tiny[2:], *out], *message)
    message = ("model_type is bert; expected gpt2", "config.json")
    refused(capsys, ["--model", tiny[1], *texts[2:], *out, "--max-length", 16], *message)


def test_tokenizer(texts, tmp_path):
    """The end token follows each text, before and after a round through a run's folder."""
    config = GPT2Config(**SIZES | {"vocab_size": 400})
    tokenizer = load_tokenizer(texts[1], 400, framed=False)
    pair = tokenizer.encode("name : Bibi", " Bibi has fish.")
    assert pair.tokens.count("<|endoftext|>") == 2 and pair.tokens[-1] == "<|endoftext|>"
    assert tokenizer.decode(pair.ids) == "name : Bibi Bibi has fish."
    save_tokenizer(tmp_path, tokenizer, config)
    again = load_tokenizer(tmp_path, 400, framed=False)
    assert again.encode("name : Bibi", " Bibi has fish.").ids == pair.ids
    says = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert says["eos_token"] == says["pad_token"] == "<|endoftext|>"
    assert says["model_input_names"] == ["input_ids", "attention_mask"]
    says = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(says))
    shutil.copy(f"{texts[1]}/tokenizer.json", tmp_path)
    with pytest.raises(UserError, match='has no token "<end>"; name the end token as "eos_token"'):
        load_tokenizer(tmp_path, 400, framed=False)


# ---------- the decoder ---------------------------------------------------------------------------


def check_what_a_token_reads(model):
    """A later token changes nothing before it; `reads` gives the logits of some places alone."""
    ids = torch.randint(0, 97, (3, 12), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[:, 7:] = 1
    with torch.no_grad():
        whole, other = model(ids), model(changed)
        some = model(ids, reads=torch.tensor([0, 13, 35]))
    assert (whole[:, :7] - other[:, :7]).abs().max() < 1e-5
    assert (whole[:, 7:] - other[:, 7:]).abs().max() > 0.1
    assert (whole.flatten(0, 1)[[0, 13, 35]] - some).abs().max() < 1e-5


def test_a_token_reads_what_is_before_it():
    check_what_a_token_reads(random_gpt2())


def test_dropout_on_a_cpu_sees_no_later_token():
    """In training, with dropout in attention alone, position 0 attends to itself only."""
    model = random_gpt2(embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.5).train()
    ids = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[:, 5:] = 1
    found = []
    for row in (ids, changed, ids):
        torch.manual_seed(3)
        found.append(model(row).detach())
    assert torch.equal(found[0], found[2])
    assert (found[0][:, :5] - found[1][:, :5]).abs().max() < 1e-5
    torch.manual_seed(4)
    assert (model(ids) - found[0]).abs().max() > 0.1  # it is random


# ---------- to continue texts ---------------------------------------------------------------------


WAYS = [(1, 1, 0), (1, 1, 2), (4, 0.8, 3), (3, 1, 0)]


@pytest.mark.parametrize("beams, penalty, no_repeat", WAYS)
def test_batches_and_the_cache_change_nothing(beams, penalty, no_repeat):
    """Prompts of unequal length, together or alone, with and without the cache: equal tokens."""
    model = random_gpt2()
    prompts = random_prompts(12, least=1)
    options = (ENDS, beams, penalty, no_repeat, 12)
    together = model.generate(prompts, *options)
    assert model.generate(prompts, *options, cached=False) == together
    assert [model.generate([prompt], *options)[0] for prompt in prompts] == together
    early = [text for text in together if text[-1] in ENDS]
    assert len(early) > 3 and len({len(text) for text in together}) > 2
    for prompt, text in zip(prompts, together):
        assert not set(text[:-1]) & set(ENDS)  # an end ends a text
        grams = list(zip(*[(prompt + text)[i:] for i in range(no_repeat)]))
        repeats = len(grams) - len(set(grams))
        before = list(zip(*[prompt[i:] for i in range(no_repeat)]))
        assert repeats == len(before) - len(set(before))


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
def test_with_all_beams_the_best_text_is_found(penalty):
    """With as many beams as there are texts, the best of all of them by the definition."""
    model = random_gpt2(vocab_size=6, spread=0.6)
    end, most = 2, 3
    prompt = [1, 3, 4]
    scores = {}
    for length in range(1, most + 1):
        for text in itertools.product(range(6), repeat=length):
            if end in text[:-1] or (length < most and text[-1] != end):
                continue
            with torch.no_grad():
                log_p = model(torch.tensor([prompt + list(text)])).log_softmax(-1)[0]
            total = sum(float(log_p[len(prompt) - 1 + i, token]) for i, token in enumerate(text))
            scores[text] = total / length**penalty
    best = max(scores, key=scores.get)
    (found,) = model.generate([prompt], [end], beams=36, length_penalty=penalty, most_new=most)
    assert tuple(found) == best


def test_greedy_takes_the_most_probable_token():
    """Each token is the largest logit after all before it."""
    model = random_gpt2()
    (prompt,) = random_prompts(1)
    (text,) = model.generate([prompt], [0], most_new=8)
    for i, token in enumerate(text):
        with torch.no_grad():
            assert int(model(torch.tensor([prompt + text[:i]]))[0, -1].argmax()) == token


def test_bans():
    """A token that would repeat n tokens is banned; padding, -1, repeats nothing."""
    tokens = torch.tensor([[1, 2, 3, 1, 2], [-1, -1, 4, 6, 4], [5, 5, 5, 5, 5]])
    cases = [(3, [{3}, set(), {5}]), (2, [{3}, {6}, {5}]), (1, [{1, 2, 3}, {4, 6}, {5}])]
    for n, banned in (*cases, (0, [set()] * 3)):
        scores = torch.zeros(3, 8)
        ban_repeats(scores, tokens, n)
        assert [set(row.isinf().nonzero()[:, 0].tolist()) for row in scores] == banned


def test_where_generation_ends():
    """No more tokens than positions, and no prompt that is empty or too long."""
    model = random_gpt2(n_positions=16)
    (text,) = model.generate([[1] * 10], [97], most_new=50)  # no token ends it
    assert len(text) == 7  # the last one is never read
    for prompt in ([], [1] * 17):
        with pytest.raises(ValueError, match="expected 1 to 16 tokens"):
            model.generate([prompt], [96])


def test_masks_are_applied_once():
    """`plain` computes the same, without a mask in any layer, and puts all back."""
    model = random_gpt2().train()
    masked = prune.mask_matrices(model)
    for linears in masked.values():
        for linear in linears:
            linear.mask.copy_(torch.rand(linear.mask.shape) > 0.4)
    ids = torch.randint(0, 97, (3, 12))
    model.eval()
    with torch.no_grad():
        before = model(ids)
    model.train()
    with model.plain(), torch.no_grad():
        assert not prune.masked_linears(model) and not model.training
        assert (model(ids) - before).abs().max() < 1e-5
    assert model.training and len(prune.masked_linears(model)) == 18
    assert masked["Q"][0] is model.layers[0].attn.query


# ---------- against transformers ------------------------------------------------------------------


def theirs_of(hf, model, folder):
    """The same model in transformers, by way of a folder; no key is missing or unexpected."""
    save_model(folder, model, model.state_dict(), ())
    loaded, told = hf.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(told[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded).__name__ == model.hub_class
    return loaded


def check_logits_and_gradients(hf, model, folder, seed=0):
    """On padded batches, and the gradients of the loss of some places, to 1e-5; both ways."""
    theirs = theirs_of(hf, model, folder / "ours")
    ids = torch.randint(0, 97, (4, 30), generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(30) < torch.tensor([30, 25, 9, 12])[:, None]
    labels = torch.where(mask & (torch.arange(30) >= 5), ids, -100)
    output = theirs(ids, attention_mask=mask.long(), labels=labels)
    logits = model(ids)
    assert (logits - output.logits)[mask].abs().max() < 1e-5
    assert logits.std() > 0.5
    output.loss.backward()
    next_one = labels[:, 1:].flatten()
    places = torch.arange(120).view(4, 30)[:, :-1].flatten()[next_one >= 0]
    logits = model(ids, reads=places)
    loss = torch.nn.functional.cross_entropy(logits, next_one[next_one >= 0])
    assert loss.item() == pytest.approx(output.loss.item(), abs=1e-5)
    loss.backward()
    ours = model.to_hub({name: p.grad for name, p in model.named_parameters()})
    for name, parameter in theirs.named_parameters():
        assert (ours[name] - parameter.grad).abs().max() < 1e-5, name
    theirs.save_pretrained(folder / "theirs")
    again = load_model(folder / "theirs", "vocabulary", form="vocabulary")
    assert again.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def check_tokens(model, theirs, count, beams, penalty, no_repeat=0):
    """Prompts of unequal length, most of whose outputs end early: every token is equal."""
    prompts = random_prompts(count)
    width = max(map(len, prompts))
    padded = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    options = {"num_beams": beams, "length_penalty": penalty, "no_repeat_ngram_size": no_repeat}
    options |= {"max_new_tokens": 16, "eos_token_id": ENDS, "pad_token_id": 0, "do_sample": False}
    found = theirs.generate(padded, attention_mask=mask, **options)[:, width:].tolist()
    ours = model.generate(prompts, ENDS, beams, penalty, no_repeat, 16)
    assert sum(text[-1] in ENDS for text in ours) > count / 2
    for theirs, text in zip(found, ours):
        ends = [i + 1 for i, token in enumerate(theirs) if token in ENDS]
        assert theirs[: ends[0] if ends else 16] == text


@pytest.mark.real
@pytest.mark.parametrize("sizes", [{}, {"n_inner": 48, "n_head": 2}, {"n_layer": 1}])
def test_logits_and_gradients_are_those_of_transformers(sizes, hf, tmp_path):
    changes = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "n_positions": 64}
    check_logits_and_gradients(hf, random_gpt2(**changes | sizes), tmp_path)


@pytest.mark.real
@pytest.mark.parametrize("no_repeat", [0, 4])
@pytest.mark.parametrize(
    "beams, penalty", [(1, 1.0), (4, 0.8), (4, 1.0), (5, 0.8), (5, 1.0), (10, 0.8), (10, 1.0)]
)
def test_tokens_are_those_of_transformers(hf, beams, penalty, no_repeat, tmp_path):
    model = random_gpt2()
    check_tokens(model, theirs_of(hf, model, tmp_path), 60, beams, penalty, no_repeat)


@pytest.mark.real
def test_tokens_of_a_folder_are_those_of_transformers(hf, texts, tmp_path):
    """A tokenizer.json without a class, vocab.json with merges.txt, and a run's folder."""
    shutil.copytree(texts[1], tmp_path / "json")
    shutil.copytree(texts[1], tmp_path / "files")
    (tmp_path / "files" / "tokenizer.json").unlink()
    tokenizer = load_tokenizer(texts[1], 400, framed=False)
    tokenizer.model.save(str(tmp_path / "files"))
    (tmp_path / "json" / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    config = GPT2Config(**SIZES | {"vocab_size": 400})
    shutil.copytree(texts[1], tmp_path / "run")
    save_tokenizer(tmp_path / "run", tokenizer, config)
    lines = ["Bibi has fish.", " You get soup at  The Mill.", "Zürich £20", "", "a<|endoftext|>b"]
    for name in ("json", "files", "run"):
        ours = load_tokenizer(tmp_path / name, 400, framed=False)
        theirs = hf.AutoTokenizer.from_pretrained(tmp_path / name)
        for line in lines:
            expected = theirs(line, add_special_tokens=False)["input_ids"]
            assert ours.encode(line, add_special_tokens=False).ids == expected, (name, line)
        if name == "run":
            assert theirs(lines[0])["input_ids"] == ours.encode(lines[0]).ids
