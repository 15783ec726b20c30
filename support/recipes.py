"""The published settings of each method: what it has, and what differs by kind, task and density.

A method of prune.py names its recipe. In a recipe,
- "by_kind" has what differs on a kind of task, "by_task" on a task, "on_roberta" on that model,
- "up_to_density" has what differs up to a density; the first entry that fits counts, and it
  counts more than what is above,
- "at_half" has what differs at density 0.5 without a teacher,
- "source" says where the values are from.

A fraction of the run is the published number of steps over the steps of the run it is from.
"""

# fmt: off
COMMON = {
    "max_length": 128, "dropout": 0.1, "lr": 3e-5, "weight_decay": 0.0, "warmup": 0.0,
    "density": 0.1, "hold": 0.0, "ramp": 1.0, "ramp_power": 3, "score_lr": 0.0,
    "reg_lambda": 0.0, "temperature_s": 1.0, "beta1": 0.85, "beta2": 0.99,
    "teacher": "none", "dtype": "auto",
}
# What every method has on a kind. The longest example: SMP's script for SQuAD; our choice for tags;
# LoRA's code for texts. Texts are decoded with 5 beams, and without smoothing (Li and Liang 2021).
# LoRA's code ends a text after 64 tokens, which some texts of WebNLG exceed.
COMMON_OF_KIND = {
    "span": {"max_length": 384}, "tag": {"max_length": 256},
    "generate": {"max_length": 512, "label_smoothing": 0.0, "beams": 5, "length_penalty": 1.0,
                 "no_repeat_ngram": 0, "max_new_tokens": 128},
}
# Decoding of LoRA's and PST's commands on E2E.
TEN_BEAMS = {"beams": 10, "length_penalty": 0.8, "no_repeat_ngram": 4, "label_smoothing": 0.1}
# GPT-2 on E2E as PST's released command has it: 500 of 26,290 steps of warm-up; the density falls
# from 0.1 to 0.7 of the run.
TEXTS_PRUNED = TEN_BEAMS | {
    "epochs": 5, "batch_size": 8, "lr": 1e-4, "warmup": 0.019, "hold": 0.1, "ramp": 0.6,
    "source": "PST on E2E, released command",
}
# The demo has short sentences, and a model pretrained without dropout, too small to gain by bf16.
DEMO = {"max_length": 32, "dropout": 0.0, "dtype": "fp32", "lr": 5e-4, "source": "the demo"}
DEMO_PRUNED = DEMO | {"epochs": 10, "batch_size": 64}

TRIPLES = {"lr": 1e-5, "batch_size": 6, "epochs": 10}
SMALL_TASK = {"epochs": 5, "source": "Devlin et al. 2019; epochs of transformers' GLUE examples"}
DENSE = {
    "epochs": 3, "batch_size": 32, "density": 1.0, "warmup": 0.1, "weight_decay": 0.01,
    "source": "Devlin et al. 2019, A.2 and A.3",
    "by_kind": {
        "span": {"lr": 5e-5, "source": "Devlin et al. 2019, 4.2"},
        "tag": {"lr": 5e-5, "batch_size": 8, "source": "transformers' example run_ner"},
        "generate": {"lr": 5e-5, "batch_size": 10, "epochs": 5, "warmup": 0.0, "weight_decay": 0.0,
                     "source": "Li and Liang 2021 (prefix-tuning), Table 5"},
    },
    "by_task": {"mrpc": SMALL_TASK, "rte": SMALL_TASK, "wnli": SMALL_TASK, "demo": DEMO,
                "webnlg": TRIPLES, "dart": TRIPLES},
}
FIXED = DENSE | {"density": None, "by_kind": {}, "by_task": {"demo": DEMO_PRUNED}}

LARGE_TASK = {"epochs": 12, "batch_size": 64}
SMP = {
    "epochs": 60, "batch_size": 32, "score_lr": 2e-2, "reg_lambda": 400.0,
    "source": "SMP, released run scripts",
    # N / T on MNLI: 43,632, 5,250 and 3,500 of 73,632 steps
    "up_to_density": ((0.5, {"ramp": 0.593}), (0.7, {"ramp": 0.071}), (1.0, {"ramp": 0.048})),
    "on_roberta": {"ramp_power": 1},
    "by_kind": {
        "span": {
            "epochs": 10, "source": "SMP on SQuAD, released run script",
            # N / T: 22,650 of 55,340 steps, then 22,670 and 5,000 of 27,670
            "up_to_density": ((0.03, {"ramp": 0.409, "epochs": 20}),
                              (0.5, {"ramp": 0.819}), (1.0, {"ramp": 0.181})),
            "at_half": {"temperature_s": 4.0, "ramp": 0.181},
        },
        "tag": {"epochs": 20, "source": "our choice; SMP has no tagging"},
        "generate": TEN_BEAMS | {"epochs": 5, "batch_size": 8, "ramp": 0.6, "up_to_density": (),
                                 "source": "our choice; SMP has no texts"},
    },
    "by_task": {
        "mnli": LARGE_TASK | {"at_half": {"temperature_s": 3.0}},
        "qnli": LARGE_TASK, "qqp": LARGE_TASK, "sst2": LARGE_TASK, "rte": {"epochs": 100},
        "demo": DEMO_PRUNED | {"lr": 3e-5, "reg_lambda": 200.0},
    },
}

# Movement pruning on SQuAD: 10 epochs of 5,540 steps; 5,400 of warm-up, the last 10,800 settled.
MOVEMENT = {
    "epochs": 10, "batch_size": 16, "warmup": 0.0975, "hold": 0.0975, "ramp": 0.7075,
    "source": "movement pruning on SQuAD",
    "by_kind": {"generate": TEXTS_PRUNED},
    "by_task": {"demo": DEMO_PRUNED},
}

# PINS on RTE: 20 epochs of 156 steps; 200 steps of warm-up, the last 1,200 settled.
PINS = {
    "epochs": 20, "batch_size": 16, "density": 0.2, "warmup": 0.064, "hold": 0.064, "ramp": 0.551,
    "source": "PINS on RTE",
    # PLATON on SQuAD: 10 epochs of 5,533 steps; 5,400 of warm-up, the last 27,000 settled.
    "by_kind": {
        "span": {"epochs": 10, "density": 0.1, "warmup": 0.0976, "hold": 0.0976, "ramp": 0.414,
                 "beta2": 0.95, "source": "PLATON on SQuAD; PINS has published none"},
        "generate": TEXTS_PRUNED,
    },
    "by_task": {"demo": DEMO_PRUNED},
}
# fmt: on

RECIPES = {
    "dense": DENSE,
    "fixed": FIXED,
    "smp": SMP,
    "magnitude": MOVEMENT,
    "movement": MOVEMENT | {"score_lr": 1e-2},
    "soft-movement": MOVEMENT | {"score_lr": 1e-2, "reg_lambda": 400.0, "density": None},
    "l0": MOVEMENT | {"score_lr": 1e-1, "reg_lambda": 125.0, "density": None},
    "pins": PINS | {"teacher": "self"},
    "platon": PINS,
    "sensitivity": PINS | {"beta1": 0.0},
}


def recipe(name, kind, task, model_type, density, taught):
    """Return the published value of each setting, and their "source".

    `name` is the method's recipe; `kind` and `task` are names. `model_type` is that of config.json.
    `density` is None where none was asked for. `taught`: is there a teacher?
    """
    values = COMMON | COMMON_OF_KIND.get(kind, {}) | RECIPES[name]
    values |= values.get("by_kind", {}).get(kind, {})
    if model_type == "roberta":
        values |= values.get("on_roberta", {})
    values |= values.get("by_task", {}).get(task, {})
    density = density or values["density"] or 1.0
    if density >= 0.7:
        values["temperature_s"] = 4.0  # p (SMP, released code)
    for most, more in values.get("up_to_density", ()):
        if density <= most:
            values |= more
            break
    if density == 0.5 and not taught:
        values |= values.get("at_half", {})
    return values
