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


DTYPES = {"float32": "F32", "float16": "F16", "int32": "I32", "uint16": "BF16", "uint8": "U8"}


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

os.makedirs(f"{here}/onnx", exist_ok=True)
for path in sorted(glob.glob(f"{shared}/onnx/*.safetensors")):
    name = os.path.basename(path)
    shutil.copy(path, f"{here}/onnx/{name}")
    os.chmod(f"{here}/onnx/{name}", 0o644)


def attention(q, k, v, causal=False, q_start=None, window=(None, None), softcap=None, slopes=None, sinks=None,
              keep=None, add=None):
    """One sequence, [heads, tokens, dim], in float64: out, lse. Slopes and sinks are [heads], masks [heads, tokens, keys]."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    group = q.shape[0] // k.shape[0]
    k, v = np.repeat(k, group, 0), np.repeat(v, group, 0)
    logits = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[2])
    start = k.shape[1] - q.shape[1] if q_start is None else q_start
    key, position = np.arange(k.shape[1])[None], start + np.arange(q.shape[1])[:, None]
    if softcap:
        logits = softcap * np.tanh(logits / softcap)
    if slopes is not None:
        logits -= slopes[:, None, None].astype(np.float64) * (position - key)
    if add is not None:
        logits += add
    hidden = np.zeros(logits.shape, bool) if keep is None else np.broadcast_to(keep == 0, logits.shape)
    for limit, beyond in [(0 if causal else None, key > position),
                          (window[0], key < position - (window[0] or 0)), (window[1], key > position + (window[1] or 0))]:
        hidden = hidden if limit is None else hidden | beyond
    logits = np.where(hidden, -np.inf, logits)
    top = np.maximum(logits.max(-1, keepdims=True, initial=-1e30), -1e30)
    if sinks is not None:
        # A row that sees no key has no sink either.
        sink = np.where(top > -1e30, sinks[:, None, None].astype(np.float64), -np.inf)
        top = np.maximum(top, sink)
    weights = np.exp(logits - top)
    total = weights.sum(-1, keepdims=True) + (0 if sinks is None else np.exp(sink - top))
    with np.errstate(divide="ignore", invalid="ignore"):
        out = np.where(total > 0, weights @ v / total, 0)
        lse = np.where(total > 0, top + np.log(total), -np.inf)
    return out, lse[..., 0]


def batch(q, k, v, q_lens, kv_lens, keep=None, add=None, **how):
    """Every sequence; rows that do not exist are NaN."""
    out = np.full((*q.shape[:3], v.shape[3]), np.nan)
    lse = np.full(q.shape[:3], np.nan)
    shape = (*q.shape[:3], k.shape[2])
    for b, (n, m) in enumerate(zip(q_lens, kv_lens)):
        masks = {"keep": keep, "add": add}
        masks = {kind: np.broadcast_to(x, shape)[b, :, :n, :m] for kind, x in masks.items() if x is not None}
        out[b, :, :n], lse[b, :, :n] = attention(q[b, :, :n], k[b, :, :m], v[b, :, :m], **masks, **how)
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

# What bends logits, hides by distance and adds to the sum, with rows that see no key.
q, k, v = normal(2, 6, 9, 16), normal(2, 2, 30, 16), normal(2, 2, 30, 24)
slopes, sinks = (0.5 ** np.arange(1, 7)).astype(np.float32), normal(6)
tensors = {"q": q, "k": k, "v": v, "alibi_slopes": slopes, "sinks": sinks}
tensors |= batch(q, k, v, [9, 9], [30, 30], q_start=-5, window=(6, 2), softcap=1.5, slopes=slopes, sinks=sinks)
meta = {"source": how["source"], "q_start": "-5", "window_left": "6", "window_right": "2", "softcap": "1.5"}
write(f"{here}/logits.safetensors", tensors, meta)

# A mask for each sequence, that hides all of one row, with garbage behind the lengths; causal and a window besides.
q, k, v = normal(3, 4, 6, 16), normal(3, 2, 70, 16), normal(3, 2, 70, 16)
q_lens, kv_lens = np.array([6, 1, 5], np.int32), np.array([70, 33, 5], np.int32)
mask = (rng.random((3, 1, 6, 70)) < 0.7).astype(np.uint8)
mask[0, 0, 2] = 0
for b in range(3):
    mask[b, :, q_lens[b]:] = mask[b, :, :, kv_lens[b]:] = 255
tensors = {"q": q, "k": k, "v": v, "q_lens": q_lens, "kv_lens": kv_lens, "mask": mask}
tensors |= batch(q, k, v, q_lens, kv_lens, keep=mask, causal=True, window=(40, None))
write(f"{here}/keep.safetensors", tensors, how | {"window_left": "40"})

# A mask for each head, the same for all sequences and tokens, some of it -inf, NaN behind the longest sequence; and sinks.
kv_lens = np.array([64, 0, 37], np.int32)
add = normal(1, 4, 1, 70)
add[:, :, :, ::5], add[:, :, :, 64:] = -np.inf, np.nan
tensors = {"q": q, "k": k, "v": v, "q_lens": q_lens, "kv_lens": kv_lens, "mask": add, "sinks": sinks[:4].copy()}
tensors |= batch(q, k, v, q_lens, kv_lens, add=add, sinks=sinks[:4])
write(f"{here}/add.safetensors", tensors, {"source": how["source"]})
