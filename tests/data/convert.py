"""Makes convert.safetensors: small checkpoints, and what `gqa convert` must make of them. python -m pip install numpy; python convert.py

A tensor's name is CHECKPOINT/NAME; what pooling changes is in CHECKPOINT-KV_HEADS-METHOD/NAME.
"""

import json
import os
import struct

import numpy as np

rng = np.random.default_rng(1)
DIM = 2


def bf16(x):
    """Bits of the nearest bf16, ties to even."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


STORE = {"F32": lambda x: x.astype(np.float32), "F16": lambda x: x.astype(np.float32).astype(np.float16), "BF16": bf16}


def load(dtype, x):
    """The numbers of stored ones, in f64."""
    if dtype == "BF16":
        return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return x.astype(np.float64)


def normal(dtype, *shape):
    return dtype, STORE[dtype](rng.standard_normal(shape))


def pool(heads, kv_heads, method):
    """[heads, dim, columns] to [kv_heads, dim, columns]."""
    groups = heads.reshape(kv_heads, -1, *heads.shape[1:])
    return groups.mean(axis=1) if method == "mean" else groups[:, 0]


def split(tensor, count, kv_heads, method):
    dtype, x = tensor
    heads = load(dtype, x).reshape(count, DIM, -1)
    pooled = pool(heads, kv_heads, method)
    return dtype, STORE[dtype](pooled).reshape(kv_heads * DIM, *x.shape[1:])


def phi3(tensor, heads, count, kv_heads, method):
    dtype, x = tensor
    parts = load(dtype, x).reshape(heads + 2 * count, DIM, -1)
    q, k, v = parts[:heads], parts[heads : heads + count], parts[heads + count :]
    new = np.concatenate([q, pool(k, kv_heads, method), pool(v, kv_heads, method)])
    return dtype, STORE[dtype](new).reshape(-1, *x.shape[1:])


def neox(tensor, heads, kv_heads, method):
    dtype, x = tensor
    parts = load(dtype, x).reshape(heads, 3, DIM, -1)
    q = parts[:, 0].reshape(kv_heads, heads // kv_heads, DIM, -1)
    k, v = (pool(parts[:, i], kv_heads, method)[:, None] for i in (1, 2))
    new = np.concatenate([q, k, v], axis=1)
    return dtype, STORE[dtype](new).reshape(-1, *x.shape[1:])


tensors = {}


def both(checkpoint, name, tensor, changes):
    tensors[f"{checkpoint}/{name}"] = tensor
    for kv_heads, method, new in changes:
        tensors[f"{checkpoint}-{kv_heads}-{method}/{name}"] = new


# Llama: 8 query heads on 8 or 4 KV heads, each layer in another type.
for checkpoint, count, targets in (("mha", 8, (2, 1)), ("gqa", 4, (1,))):
    tensors[f"{checkpoint}/model.embed_tokens.weight"] = normal("F16", 5, 16)
    for layer, dtype in enumerate(("F32", "F16", "BF16")):
        at = f"model.layers.{layer}.self_attn"
        tensors[f"{checkpoint}/{at}.q_proj.weight"] = normal(dtype, 16, 16)
        tensors[f"{checkpoint}/{at}.k_norm.weight"] = normal(dtype, DIM)
        for part in "kv":
            for leaf, shape in (("weight", (count * DIM, 16)), ("bias", (count * DIM,))):
                tensor = normal(dtype, *shape)
                changes = [(n, m, split(tensor, count, n, m)) for n in targets for m in ("mean", "first")]
                both(checkpoint, f"{at}.{part}_proj.{leaf}", tensor, changes)

# Phi-3: 4 query heads on 4 KV heads; BERT and GPT-NeoX: 4 heads.
tensor = normal("BF16", 12 * DIM, 8)
both("phi3", "model.layers.0.self_attn.qkv_proj.weight", tensor, [(2, "mean", phi3(tensor, 4, 4, 2, "mean"))])
for leaf, shape in (("weight", (12 * DIM, 8)), ("bias", (12 * DIM,))):
    tensor = normal("F16", *shape)
    changes = [(n, "mean", neox(tensor, 4, n, "mean")) for n in (2, 1)]
    both("neox", f"gpt_neox.layers.0.attention.query_key_value.{leaf}", tensor, changes)
for part in ("query", "key", "value"):
    for leaf, shape in (("weight", (4 * DIM, 8)), ("bias", (4 * DIM,))):
        tensor = normal("F32", *shape)
        changes = [(2, "mean", split(tensor, 4, 2, "mean"))] if part != "query" else []
        both("bert", f"bert.encoder.layer.0.attention.self.{part}.{leaf}", tensor, changes)

header, data = {}, b""
for name, (dtype, x) in tensors.items():
    raw = x.tobytes()
    header[name] = {"dtype": dtype, "shape": x.shape, "data_offsets": [len(data), len(data) + len(raw)]}
    data += raw
text = json.dumps(header, separators=(",", ":")).encode()
text += b" " * (-len(text) % 8)
with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "convert.safetensors"), "wb") as f:
    f.write(struct.pack("<Q", len(text)) + text + data)
