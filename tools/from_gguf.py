"""Write a Llama from a GGUF file as a folder in Hugging Face's layout, which train.py takes.

    python -m tools.from_gguf FILE.gguf FOLDER

The package `gguf` reads the file. Quantised values become the float32 numbers that they stand for.
What the file says and we do not have is refused by its name.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so it runs from any folder

from support.terminal import Parser, UserError, program, quote, tell  # first: "loading torch"

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from tokenizers.processors import TemplateProcessing

from models.checkpoint import check_tensors, config_of, save_model
from models.llama import Llama
from support.files import atomic_write, write_json

# The keys of config.json, by their names in the file.
CONFIG = {
    "llama.block_count": "num_hidden_layers",
    "llama.context_length": "max_position_embeddings",
    "llama.embedding_length": "hidden_size",
    "llama.feed_forward_length": "intermediate_size",
    "llama.attention.head_count": "num_attention_heads",
    "llama.attention.head_count_kv": "num_key_value_heads",
    "llama.attention.key_length": "head_dim",
    "llama.attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "llama.rope.freq_base": "rope_theta",
    "tokenizer.ggml.bos_token_id": "bos_token_id",
    "tokenizer.ggml.eos_token_id": "eos_token_id",
    "tokenizer.ggml.padding_token_id": "pad_token_id",
}
# Keys that must agree with others, and a key whose number the embedding says.
AGREE = ("llama.attention.value_length", "llama.rope.dimension_count")
NOT_NEEDED = "llama.vocab_size"
# The modules of the model, and of a layer "blk.N.", by their names in the file.
MODULES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
BYTES = ByteLevel(add_prefix_space=False)
# How a text is split before its bytes are merged, by the names that llama.cpp has for it.
SPLITS = {"gpt-2": BYTES, "smollm": Sequence([Digits(individual_digits=True), BYTES])}
CONTROL, USER_DEFINED = 3, 4  # the types of tokens that no merge makes
SPECIAL = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}

# ---------- reading -------------------------------------------------------------------------------


def read_gguf(path):
    """Return ({key: value}, {name: float32 tensor}) of a GGUF file.

    Raises UserError where it is missing or damaged, and where `gguf` is not installed.
    """
    try:
        from gguf import GGUFReader
        from gguf.quants import dequantize
    except ImportError:
        advice = "which is not installed: pip install gguf"
        raise UserError(f"GGUF files are read by the package gguf, {advice}") from None
    try:
        file = GGUFReader(path)
        values = {key: field.contents() for key, field in file.fields.items()}
        tensors = {}
        for tensor in file.tensors:
            array = dequantize(tensor.data, tensor.tensor_type)  # its axes are (out, in)
            tensors[tensor.name] = torch.from_numpy(np.array(array, np.float32))
    except NotImplementedError as error:  # a form of quantisation
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # the library raises many kinds of them
        raise UserError(f"{path}: not a whole GGUF file ({error}); copy it again") from None
    return values, tensors


def config_from(values, tensors):
    """Return what config.json says; ValueError where the file says what we do not have."""
    if values.get("general.architecture") != "llama":
        found = quote(str(values.get("general.architecture")))
        raise ValueError(f"the architecture is {found}; expected llama")
    ours = {}
    for key, value in values.items():
        if key in CONFIG:
            # a float32 as the number that was meant: 1e-05, not 9.999999747378752e-06
            ours[CONFIG[key]] = float(str(np.float32(value))) if type(value) is float else value
        elif key.startswith("llama.") and key not in (*AGREE, NOT_NEEDED):
            raise ValueError(f"{key} is {quote(str(value))}; we do not have this")
    if "token_embd.weight" not in tensors:
        raise ValueError("it has no tensor token_embd.weight")
    ours["vocab_size"] = len(tensors["token_embd.weight"])
    ours["tie_word_embeddings"] = "output.weight" not in tensors
    ours["attention_bias"] = "blk.0.attn_q.bias" in tensors
    ours["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    return ours


def name_of(name):
    """Return our name of a tensor; ValueError where we have none."""
    module, _, part = name.rpartition(".")
    if module in MODULES:
        return f"{MODULES[module]}.{part}"
    block, _, rest = module.partition(".")
    number, _, module = rest.partition(".")
    if block != "blk" or module not in IN_LAYER:
        raise ValueError(f"the tensor {quote(name)} is of no layer that we have")
    return f"model.layers.{number}.{IN_LAYER[module]}.{part}"


def halves_apart(tensor, heads):
    """Return the rows of Q or K in the order of `rotate` in models/llama.py.

    The file has the two dimensions that turn together beside each other. We have them D/2 apart.
    """
    pairs = tensor.unflatten(0, (heads, -1, 2))  # (H * D, ...) -> (H, D/2, 2, ...)
    return pairs.transpose(1, 2).flatten(0, 2).contiguous()


def model_from(values, tensors):
    """Return (model without values, {name: tensor}) under our names; ValueError if it is none."""
    config = config_of(Llama, config_from(values, tensors))
    for key in AGREE:
        if values.get(key, config.head_dim) != config.head_dim:
            raise ValueError(f"{key} is {values[key]}; expected {config.head_dim}, as other heads")
    ours = {}
    for name, tensor in tensors.items():
        if ".attn_q." in name:
            tensor = halves_apart(tensor, config.num_attention_heads)
        if ".attn_k." in name:
            tensor = halves_apart(tensor, config.num_key_value_heads)
        ours[name_of(name)] = tensor
    with torch.device("meta"):
        return Llama(config, "vocabulary"), ours


# ---------- the tokenizer -------------------------------------------------------------------------


def tokenizer_from(values):
    """Return (tokenizer, what tokenizer_config.json says); ValueError for one that we do not have.

    Tokens of type "control" are special. Those of type "user-defined" are only never split.
    """
    says = {key.removeprefix("tokenizer."): value for key, value in values.items()}
    if says.get("ggml.model") != "gpt2" or says.get("ggml.pre") not in SPLITS:
        found = f"{says.get('ggml.model')}, {says.get('ggml.pre')}"
        expected = f"expected gpt2, {' or '.join(SPLITS)}"
        raise ValueError(f"the tokenizer and its way to split are {quote(found)}; {expected}")
    if says.get("ggml.add_space_prefix"):
        raise ValueError("tokenizer.ggml.add_space_prefix is true; we do not have this")
    tokens = says["ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in says["ggml.merges"]]
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = SPLITS[says["ggml.pre"]]
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, says["ggml.token_type"], strict=True):
        if kind in (CONTROL, USER_DEFINED):
            special = kind == CONTROL
            tokenizer.add_tokens([AddedToken(token, special=special, normalized=False)])
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    about["model_max_length"] = values["llama.context_length"]
    for theirs, name in SPECIAL.items():
        number = says.get(f"ggml.{theirs}_token_id")
        if number is not None:
            about[f"{name}_token"] = tokens[number]
    if says.get("ggml.add_bos_token"):
        first = about["bos_token"]
        known = [(first, tokenizer.token_to_id(first))]
        tokenizer.post_processor = TemplateProcessing(f"{first} $A", special_tokens=known)
    if "chat_template" in says:
        about["chat_template"] = says["chat_template"]
    return tokenizer, about


# ---------- writing -------------------------------------------------------------------------------


def convert(path, folder):
    """Write the folder. Raises UserError before anything is written."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder}: exists already; name another place")
    values, tensors = read_gguf(path)
    try:
        model, tensors = model_from(values, tensors)
        tokenizer, about = tokenizer_from(values)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # tokenizers raises bare ones
        raise UserError(f"{path}: a key or a tensor is missing or wrong: {error}") from None
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    check_tensors(path, Llama, tensors, shapes, ())
    save_model(folder, model, tensors, ())
    atomic_write(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    write_json(folder / "tokenizer_config.json", about)
    weights = sum(tensor.numel() for tensor in tensors.values())
    tell(f"{folder}: {weights:,} weights in float32")


@program
def main(argv=None):
    parser = Parser(__doc__)
    parser.prog = "python -m tools.from_gguf"
    parser.add_argument("file", metavar="FILE.gguf", type=Path, help="a Llama in GGUF's form")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="a new folder for the model")
    args = parser.parse_args(argv)
    convert(args.file, args.folder)


if __name__ == "__main__":
    sys.exit(main())
