"""Makes backward.json. python -m pip install numpy torch==2.7.1; python backward.py

Attention in float64 from torch operations, gradients by torch's autograd: an oracle that knows nothing of this library. Where torch has
the whole of it, `scaled_dot_product_attention` must give the same output first.
"""

import json
import math
import os

import numpy as np
import torch
import torch.nn.functional as F

rng = np.random.default_rng(7)
Q_LEN, KV_LEN = 9, 11


def numbers(*shape):
    return torch.tensor(rng.standard_normal(shape).astype(np.float32).astype(np.float64), requires_grad=True)


def turn(x, positions, theta=10_000.0):
    """Llama's rotation of halves; x is [tokens][heads][dim]."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def case(name, heads=(4, 2), dims=(8, 8), causal=True, window=None, softcap=None, sinks=False, alibi=False, rope=False,
         documents=None, keep=False, add=False):
    (q_heads, kv_heads), (dim, v_dim) = heads, dims
    q, k, v = numbers(Q_LEN, q_heads, dim), numbers(KV_LEN, kv_heads, dim), numbers(KV_LEN, kv_heads, v_dim)
    sink = numbers(q_heads) if sinks else None
    d_out = numbers(Q_LEN, q_heads, v_dim).detach()
    i, j = torch.arange(Q_LEN)[:, None] + KV_LEN - Q_LEN, torch.arange(KV_LEN)[None]
    visible = torch.ones(Q_LEN, KV_LEN, dtype=torch.bool)
    if causal:
        visible &= j <= i
    if window:
        visible &= (j >= i - window[0]) & (j <= i + window[1])
    if documents:
        which = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(documents))
        visible &= which[i] == which[j]
    mask = None
    if keep:
        mask = torch.tensor(rng.random((Q_LEN, KV_LEN)) < 0.7)
        visible &= mask
    bias = torch.zeros(q_heads, Q_LEN, KV_LEN, dtype=torch.float64)
    if add:
        mask = numbers(Q_LEN, KV_LEN).detach()
        bias += mask
    slopes = None
    if alibi:
        slopes = torch.tensor([2.0 ** (-8 * (h + 1) / q_heads) for h in range(q_heads)], dtype=torch.float64)
        bias -= slopes[:, None, None] * (i - j)

    tq, tk = (turn(q, i[:, 0].double()), turn(k, j[0].double())) if rope else (q, k)
    group = q_heads // kv_heads
    tk, tv = tk.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    logits = torch.einsum("ihd,jhd->hij", tq, tk) / math.sqrt(dim)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logits = (logits + bias).masked_fill(~visible, float("-inf"))
    some = visible.any(-1)
    if sinks:
        logits = torch.cat([logits, sink[:, None, None].expand(-1, Q_LEN, 1)], -1)
    weights = torch.softmax(logits.masked_fill(~some[:, None], 0.0), -1)[..., :KV_LEN] * some[:, None]
    out = torch.einsum("hij,jhd->ihd", weights, tv)
    if not (softcap or sinks):
        sdpa = F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (tq, tk, tv)), attn_mask=bias.masked_fill(~visible, float("-inf")))
        assert torch.allclose(sdpa.transpose(0, 1)[some], out[some], atol=1e-12)
    inputs = [q, k, v] + ([sink] if sinks else [])
    gradients = torch.autograd.grad(out, inputs, d_out)
    flat = lambda x: [] if x is None else x.detach().double().flatten().tolist()
    return {
        "name": name, "q_heads": q_heads, "kv_heads": kv_heads, "head_dim": dim, "v_head_dim": v_dim, "q_len": Q_LEN,
        "kv_len": KV_LEN, "causal": causal, "window": window, "softcap": softcap, "rope": rope, "documents": documents,
        "keep": flat(mask) if keep else [], "add": flat(mask) if add else [], "slopes": flat(slopes), "sinks": flat(sink),
        "q": flat(q), "k": flat(k), "v": flat(v), "d_out": flat(d_out), "dq": flat(gradients[0]), "dk": flat(gradients[1]),
        "dv": flat(gradients[2]), "d_sinks": flat(gradients[3]) if sinks else [],
    }


cases = [
    case("causal"),
    case("full, MHA", heads=(2, 2), causal=False),
    case("MQA, other values", heads=(3, 1), dims=(8, 5)),
    case("window", window=(3, 1), causal=False),
    case("softcap", softcap=0.8),
    case("sinks", sinks=True),
    case("alibi", alibi=True),
    case("rope", rope=True),
    case("documents", documents=[4, 5, 2]),
    case("keep", keep=True, causal=False),
    case("add, softcap, sinks, rope", add=True, softcap=2.0, sinks=True, rope=True),
]
path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "backward.json")
with open(path, "w") as file:
    file.write("[\n" + ",\n".join(json.dumps(c) for c in cases) + "\n]\n")
