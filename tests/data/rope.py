"""Makes rope.json. python -m pip install torch==2.7.1 transformers==4.57.1; python rope.py

Frequencies and attention factors are those of transformers' modeling_rope_utils.py, rotations those of its models: nothing is
computed here but sine, cosine and their product with the attention factor.
"""

import contextlib
import json
import os
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v2.modeling_deepseek_v2 import apply_rotary_emb as turn_deepseek
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as turn_gptj
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as turn_llama
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as turn_phi3

rng = np.random.default_rng(1)
POSITIONS = [0, 1, 7, 4095, 100_000, -3]


@contextlib.contextmanager
def float64():
    """transformers names float32 in its code; here the same code runs in float64."""
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(torch, "float", torch.float64))
        patches.enter_context(mock.patch.object(torch, "float32", torch.float64))
        patches.enter_context(mock.patch.object(torch.Tensor, "float", torch.Tensor.double))
        yield


def half(x, angles, factor):
    """x: [1, 1, positions, head_dim]; angles: [positions, dim / 2]."""
    cos, sin = (torch.cat((f(angles), f(angles)), -1)[None] * factor for f in (torch.cos, torch.sin))
    turn = turn_llama if 2 * angles.shape[1] == x.shape[3] else turn_phi3
    return turn(x, x, cos, sin)[0]


def interleaved(x, angles, factor):
    """GPT-J, as GPTJAttention.forward does it: heads behind tokens, the first dim elements turn."""
    dim = 2 * angles.shape[1]
    x = x.transpose(1, 2)
    turned = turn_gptj(x[..., :dim], angles.sin()[None] * factor, angles.cos()[None] * factor)
    return torch.cat((turned, x[..., dim:]), -1).transpose(1, 2)


def deepseek(x, angles, factor):
    """DeepSeek-V2, as DeepseekV2Attention.forward does it: the last dim elements turn."""
    keep, turn = x.split([x.shape[3] - 2 * angles.shape[1], 2 * angles.shape[1]], -1)
    turned = turn_deepseek(turn, turn, (torch.polar(torch.ones_like(angles), angles) * factor)[None])[0]
    return torch.cat((keep, turned), -1)


def case(name, config, rope, turn=half, seq_len=None):
    """config: what transformers reads; rope: what gqa::Rope holds, beyond its defaults."""
    kind = (config.get("rope_scaling") or {}).get("rope_type", "default")
    defaults = {"rope_theta": 10000.0, "hidden_size": config["head_dim"], "num_attention_heads": 1}
    config = SimpleNamespace(**(defaults | config))
    compute = ROPE_INIT_FUNCTIONS[kind]
    single = compute(config, "cpu", seq_len=seq_len)[0]
    assert single.dtype == torch.float32
    row = torch.tensor(rng.integers(-128, 129, config.head_dim) / 64, dtype=torch.float64)
    with float64():
        frequencies, factor = compute(config, "cpu", seq_len=seq_len)
        assert frequencies.dtype == torch.float64
        angles = torch.tensor(POSITIONS, dtype=torch.float64)[:, None] * frequencies
        turned = turn(row.expand(1, 1, len(POSITIONS), -1), angles, factor)[0, 0]
        assert turned.dtype == torch.float64
    scaling = rope.get("scaling", {})
    if scaling.get("attention_factor") == "transformers":
        scaling["attention_factor"] = factor
    fields = {"pairing": "Half", "dim": config.head_dim, "first": 0, "theta": config.rope_theta}
    return {
        "name": name,
        "head_dim": config.head_dim,
        "rope": fields | {"scaling": {"kind": "None"}} | rope,
        "frequencies_f32": [float(str(x)) for x in single.numpy()],
        "frequencies": frequencies.tolist(),
        "magnitude": factor,
        "row": row.tolist(),
        "rotated": [{"position": p, "row": [float(f"{x:.11g}") for x in r.tolist()]} for p, r in zip(POSITIONS, turned)],
    }


def yarn(factor, original, **more):
    return {"kind": "Yarn", "factor": factor, "original_context": original, "beta_fast": 32, "beta_slow": 1} | more


def longrope(name, context, maximum, attention_factor):
    """As Phi-3: max_position_embeddings and its original are the model's, context is the length in use."""
    short, long = [1.0 + i / 64 for i in range(16)], [1.0 + i * i / 4 for i in range(16)]
    scaling = {"rope_type": "longrope", "short_factor": short, "long_factor": long}
    sizes = {"max_position_embeddings": maximum, "original_max_position_embeddings": 4096}
    ours = {"kind": "LongRope", "short": short, "long": long, "original_context": 4096, "context": context}
    ours["attention_factor"] = attention_factor
    return case(name, {"head_dim": 32, "rope_scaling": scaling} | sizes, {"scaling": ours}, seq_len=context)


def dynamic(name, context):
    config = {"head_dim": 32, "max_position_embeddings": 2048, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}
    ours = {"kind": "DynamicNtk", "factor": 4.0, "original_context": 2048, "context": context}
    return case(name, config, {"scaling": ours}, seq_len=context)


LLAMA3 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# The two mscales differ, unlike those of DeepSeek's models, where the attention factor is therefore 1.
DEEPSEEK = {"factor": 40.0, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.707}
PARTIAL = {"head_dim": 40, "partial_rotary_factor": 0.4}
cases = [
    case("default", {"head_dim": 32}, {}),
    case("partial", PARTIAL, {"dim": 16}),
    case("interleaved", {"head_dim": 32}, {"pairing": "Interleaved"}, turn=interleaved),
    case("interleaved, partial", PARTIAL, {"pairing": "Interleaved", "dim": 16}, turn=interleaved),
    case(
        "linear",
        {"head_dim": 32, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"scaling": {"kind": "Linear", "factor": 4.0}},
    ),
    dynamic("dynamic", 8192),
    dynamic("dynamic, short", 1000),
    case(
        "yarn",
        {
            "head_dim": 48,
            "rope_theta": 1e6,
            "max_position_embeddings": 32768,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        },
        {"scaling": yarn(4.0, 32768, attention_factor=None)},
    ),
    case(
        "yarn, deepseek",
        {
            "head_dim": 32,
            "max_position_embeddings": 163840,
            "rope_scaling": DEEPSEEK | {"rope_type": "yarn", "original_max_position_embeddings": 4096},
        },
        {"scaling": yarn(40.0, 4096, attention_factor="transformers")},
    ),
    case(
        "yarn, gpt-oss",
        {
            "head_dim": 64,
            "rope_theta": 150000.0,
            "max_position_embeddings": 131072,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "original_max_position_embeddings": 4096,
                "truncate": False,
            },
        },
        {"scaling": yarn(32.0, 4096, attention_factor=None, truncate=False)},
    ),
    case(
        "last elements, deepseek",
        {"head_dim": 48, "partial_rotary_factor": 2 / 3},
        {"pairing": "Interleaved", "dim": 32, "first": 16},
        turn=deepseek,
    ),
    case(
        "llama3",
        {
            "head_dim": 64,
            "rope_theta": 500000.0,
            "rope_scaling": LLAMA3 | {"rope_type": "llama3", "original_max_position_embeddings": 8192},
        },
        {"scaling": LLAMA3 | {"kind": "Llama3", "original_context": 8192}},
    ),
    longrope("longrope, long", 131072, 131072, None),
    longrope("longrope, short", 4096, 4096, None),
    longrope("longrope, a short cache of a long model", 4096, 131072, "transformers"),
]

if __name__ == "__main__":
    here = os.path.dirname(os.path.abspath(__file__))
    source = "transformers 4.57.1, torch 2.7.1, seed 1 (rope.py)"
    lines = ",\n".join(json.dumps(c, separators=(",", ":")) for c in cases)
    with open(f"{here}/rope.json", "w", encoding="utf-8") as f:
        f.write(f'{{"source":"{source}","cases":[\n{lines}\n]}}\n')
