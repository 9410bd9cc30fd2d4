"""Makes ../tests/data/minilm.json: embeddings of all-MiniLM-L6-v2, as it is and with its K/V heads pooled, according to someone else.

Why: the example `uptrain` reads the same weights, so its tokenizer, its layers and its pooling are checked here against transformers
and numpy. A model with pooled heads is one of as many heads as before, in which those of a group are alike: that transformers can run.

    cargo xtask model
    python -m venv venv
    venv/bin/pip install torch==2.7.1 transformers==5.24.0 safetensors==0.8.0 numpy==2.4.6
    venv/bin/python integrations/burn/oracle/minilm.py

Made with Python 3.11 on a CPU, in f32.
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file
from transformers import AutoTokenizer, BertConfig, BertModel

ROOT = Path(__file__).resolve().parents[3]
MODEL = ROOT / "target/models/minilm"
SENTENCES = ROOT / "integrations/burn/examples/uptrain/held_out.txt"
HEADS, DIM = 12, 32


def pooled(weights, kv_heads, how):
    """Each group's heads become one, which is then written for each of them."""
    weights = dict(weights)
    for name, x in weights.items():
        if ".self.key." in name or ".self.value." in name:
            groups = x.reshape(kv_heads, HEADS // kv_heads, DIM, -1)
            one = groups.astype(np.float64).mean(1).astype(np.float32) if how == "mean" else groups[:, 0]
            weights[name] = np.repeat(one, HEADS // kv_heads, 0).reshape(x.shape)
    return weights


def embed(weights, inputs):
    model = BertModel(BertConfig.from_pretrained(MODEL), add_pooling_layer=False)
    missing = model.load_state_dict({k: torch.tensor(v) for k, v in weights.items()}, strict=False).missing_keys
    assert not missing, missing
    with torch.no_grad():
        hidden = model.eval()(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))


sentences = SENTENCES.read_text().splitlines()[:4]
tokenizer = AutoTokenizer.from_pretrained(MODEL)
inputs = tokenizer(sentences, padding=True, return_tensors="pt")
weights = load_file(MODEL / "model.safetensors")
cases = [(12, "mean"), (4, "mean"), (1, "first")]
case = lambda kv_heads, how: {
    "kv_heads": kv_heads,
    "pooling": how,
    "embeddings": [[round(x, 6) for x in row] for row in embed(pooled(weights, kv_heads, how), inputs).tolist()],
}
ids = [row[mask == 1].tolist() for row, mask in zip(inputs["input_ids"], inputs["attention_mask"])]
result = {"ids": ids, "cases": [case(*each) for each in cases]}
(ROOT / "integrations/burn/tests/data/minilm.json").write_text(json.dumps(result) + "\n")
