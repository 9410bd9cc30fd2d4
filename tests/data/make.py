"""Makes the cases of this directory. python -m pip install numpy safetensors; python make.py SHARED_CASES

SHARED_CASES holds smollm2-layer*.safetensors and onnx/*.safetensors as README.md describes them.
"""

import glob
import json
import os
import shutil
import struct
import sys

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file

shared = sys.argv[1]
here = os.path.dirname(os.path.abspath(__file__))
rng = np.random.default_rng(1)


def metadata(path):
    with safe_open(path, "np") as f:
        return f.metadata() or {}


def contents(path):
    with safe_open(path, "np") as f:
        return set(f.keys()) | set(f.metadata() or {})


DTYPES = {"float32": "F32", "float16": "F16", "int32": "I32", "uint16": "BF16"}


def write(path, tensors, meta):
    """safetensors by hand: the library's files differ from run to run, and numpy has no bf16 (here: uint16)."""
    header, data = {"__metadata__": dict(sorted(meta.items()))}, b""
    for name, x in sorted(tensors.items()):
        span = [len(data), len(data) + x.nbytes]
        header[name] = {"dtype": DTYPES[x.dtype.name], "shape": list(x.shape), "data_offsets": span}
        data += x.tobytes()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text + data)


# A causal prefix of a sequence is a whole problem: its rows of out and lse are those of the full case.
TOKENS = 32
for path in sorted(glob.glob(f"{shared}/smollm2-layer*.safetensors")):
    cut = {name: np.ascontiguousarray(x[:, :, :TOKENS]) for name, x in load_file(path).items()}
    meta = metadata(path)
    meta["source"] += f"; the first {TOKENS} tokens"
    write(f"{here}/{os.path.basename(path)}", cut, meta)

NOT_YET = {"mask", "sinks", "alibi_slopes", "window_left", "window_right", "softcap"}
os.makedirs(f"{here}/onnx", exist_ok=True)
for path in sorted(glob.glob(f"{shared}/onnx/*.safetensors")):
    name = os.path.basename(path)
    if not contents(path) & NOT_YET or name in ("4d_attn_mask.safetensors", "4d_softcap.safetensors"):
        shutil.copy(path, f"{here}/onnx/{name}")
        os.chmod(f"{here}/onnx/{name}", 0o644)


def attention(q, k, v, causal, q_start=None):
    """One sequence, [heads, tokens, dim], in float64: out, lse."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    group = q.shape[0] // k.shape[0]
    k, v = np.repeat(k, group, 0), np.repeat(v, group, 0)
    logits = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[2])
    start = k.shape[1] - q.shape[1] if q_start is None else q_start
    if causal:
        position = start + np.arange(q.shape[1])[:, None]
        logits = np.where(np.arange(k.shape[1])[None] <= position, logits, -np.inf)
    top = np.maximum(logits.max(-1, keepdims=True, initial=-1e30), -1e30)
    weights = np.exp(logits - top)
    total = weights.sum(-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        out = np.where(total > 0, weights @ v / total, 0)
        lse = np.where(total > 0, top + np.log(total), -np.inf)
    return out, lse[..., 0]


def batch(q, k, v, q_lens, kv_lens, **how):
    """Every sequence; rows that do not exist are NaN."""
    out = np.full((*q.shape[:3], v.shape[3]), np.nan)
    lse = np.full(q.shape[:3], np.nan)
    for b, (n, m) in enumerate(zip(q_lens, kv_lens)):
        out[b, :, :n], lse[b, :, :n] = attention(q[b, :, :n], k[b, :, :m], v[b, :, :m], **how)
    return {"out": out.astype(np.float32), "lse": lse.astype(np.float32)}


def normal(*shape):
    return rng.standard_normal(shape).astype(np.float32)


# Lengths of their own, one of no keys, NaN behind all of them.
q, k, v = normal(3, 6, 5, 24), normal(3, 2, 33, 24), normal(3, 2, 33, 40)
q_lens, kv_lens = np.array([5, 4, 1], np.int32), np.array([17, 0, 33], np.int32)
for b in range(3):
    q[b, :, q_lens[b]:] = k[b, :, kv_lens[b]:] = v[b, :, kv_lens[b]:] = np.nan
tensors = {"q": q, "k": k, "v": v, "q_lens": q_lens, "kv_lens": kv_lens}
how = {"source": "numpy, float64, seed 1 (make.py)", "causal": "true"}
write(f"{here}/ragged.safetensors", tensors | batch(q, k, v, q_lens, kv_lens, causal=True), how)

# No expected answer; a q_start before the first key, so that some rows see nothing.
tensors = {"q": normal(1, 4, 7, 16), "k": normal(1, 1, 9, 16), "v": normal(1, 1, 9, 16)}
write(f"{here}/no-answer.safetensors", tensors, how | {"q_start": "-3", "scale": "0.3"})


# All of it bf16, which numpy does not have: the upper halves of f32.
def upper(x):
    return (x.view(np.uint32) >> 16).astype(np.uint16)


q, k, v = (normal(2, 4, n, 32) for n in (3, 40, 40))
k, v = k[:, :2].copy(), v[:, :2].copy()
q, k, v = ((upper(x).astype(np.uint32) << 16).view(np.float32) for x in (q, k, v))
expected = batch(q, k, v, [3, 3], [40, 40], causal=False)
tensors = {"q": upper(q), "k": upper(k), "v": upper(v)} | expected
write(f"{here}/bf16.safetensors", tensors, {"source": how["source"]})
