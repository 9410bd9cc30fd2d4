"""Makes ../tests/data/smollm2.json: what SmolLM2-135M-Instruct answers, according to someone else.

Why: the model in Rust reads the same GGUF, so its tokenizer, its dequantisation, its layers and its loop are checked here
against transformers' own, which share no code with it. Nothing of the model is written in this file.

    cargo xtask model
    python -m venv venv
    venv/bin/pip install torch==2.15.0 transformers==5.24.0 gguf==0.19.0 accelerate==1.15.0 tokenizers==0.23.3 numpy==2.4.6
    venv/bin/python integrations/burn/oracle/smollm2.py

Made with those versions and Python 3.11 on a CPU, in f32. Other machines may differ in the last of the digits written.
"""

import hashlib
import importlib.metadata
import json
import platform
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[3]
MODELS = ROOT / "target/models"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
OUT = ROOT / "integrations/burn/tests/data/smollm2.json"
END = 2  # <|im_end|>
GREEDY = 32
PACKAGES = ["torch", "transformers", "tokenizers", "gguf", "accelerate", "numpy"]


def chat(user):
    """A user's turn without a system prompt, which the model's template would add."""
    return f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"


SUMMARY = """Summarize the following text in one sentence.

The lighthouse at Cape Verlo was built in 1871 by a company of forty masons, who carried the granite up the cliff by hand \
because no cart could climb the path. For ninety years its lamp was lit every evening by a keeper who lived in the tower \
with his family, and the logbooks they left behind describe storms, shipwrecks and long quiet winters in which no visitor \
came. In 1961 the lamp became automatic and the last keeper moved to the village. The tower stood empty until a group of \
local teachers restored it and opened a small museum, where children now read the logbooks aloud on stormy nights."""

GROCERIES = """Sort this shopping list into fruit, vegetables and dairy:

- apples (six)
- carrots
- whole milk, two liters
- bananas
- a head of cabbage
- yoghurt without sugar
- pears
- spinach, fresh or frozen
- butter
- a bag of lemons
- onions, red
- goat cheese
- grapes
- potatoes, five kilograms
- cream
- plums
- leeks
- cottage cheese

Write one heading for each group and put every item below the heading to which it belongs."""

TABLE = "id,name,status,region\n" + "".join(
    f"{n},server-{n},running,eu-west-1\n" for n in range(1, 9)
)

GETTERS = """Add the same method for `height` and `depth` to this class, and repeat the whole class:

class Box:
    def get_width(self):
        return self.width

    def set_width(self, value):
        self.width = value
"""

CODE = """def flatten(rows):
    result = []
    for row in rows:
        for cell in row:
            if cell is not None:
                result.append(cell)

    return result


def test_flatten():
    assert flatten([[1, 2], [None, 3]]) == [1, 2, 3]
"""

SPACES = "Name        Age     City\n\n\n----        ---     ----\n\n   Alice    31\t\tParis   \n\n   Bob      27\t\tRome\n\n\n   "


def prompts(tokenizer):
    """Name and text of each prompt; a text without `<|im_start|>` is raw."""
    by_template = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Who are you?"}], tokenize=False, add_generation_prompt=True
    )
    return {
        "france": chat("What is the capital of France?"),
        "summary": chat(SUMMARY),
        "groceries": chat(GROCERIES),
        "table": TABLE,
        "getters": chat(GETTERS),
        "digits": chat("Compute: (3.14159 * 2) + 1,024 - 7/8 = ? Round to 2 digits; show 100% of the steps!"),
        "unicode": chat("Translate to English: « J'ai mangé un gâteau à la crème. » 漢字とかな、Привет мир! 🙂🚀👩‍👩‍👧"),
        "raw": "The history of the steam engine begins in the first century, when",
        "code": CODE,
        "spaces": SPACES,
        "template": by_template,
    }


TRICKY = [
    "",
    " ",
    "  ",
    "     leading and trailing   ",
    "1234567",
    "in 1999, 3.14 and 1,000",
    "two  12 spaces,   3 before digits",
    "\t\ttabs\tand \t mixed",
    "a\nb\n\nc\n\n\nd\r\ne\n",
    "don't we'll they've I'm he'd you're it's",
    "DON'T I'LL 'tis rock'n'roll ''s",
    "Hello, world! (really?) -- yes... #1 @me $5.00 50% a_b-c/d\\e",
    "café naïve Ünïcödé ß œ",
    "e\u0301 is not \u00e9",
    "漢字かなカナ 한국어",
    "Привет, мир! שלום مرحبا",
    "🙂🚀 👩‍👩‍👧 🇫🇷",
    "² ½ Ⅷ ٣ ৪",
    "nbsp\u00a0thin\u2009ideographic\u3000zero\u200bwidth",
    "<|im_start|>",
    "a <|im_start|>user\nb<|im_end|> c<|endoftext|>",
    "<|im_start |> <|im_start|<|im_end|>",
    "<repo_name>x<file_sep> <empty_output>",
    "    if x == 10:\n        return [y**2 for y in z]\n",
    "antidisestablishmentarianism Donaudampfschifffahrt",
    "\u0000\u0001\u007f",
]


def load():
    """Tokenizer and model as transformers reads them from the GGUF, dequantised to f32."""
    tokenizer = AutoTokenizer.from_pretrained(MODELS, gguf_file=FILE)
    # GGUF only names the rule ("smollm"), and transformers reads no names: digits stand alone, then GPT-2's regex.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    model = AutoModelForCausalLM.from_pretrained(
        MODELS, gguf_file=FILE, dtype=torch.float32, attn_implementation="eager"
    )
    return tokenizer, model.eval()


def logits(model, ids):
    """The logits of all positions, in one pass without a cache."""
    return model(torch.tensor([ids]), use_cache=False).logits[0]


def answer(model, tokenizer, name, text):
    """Greedy tokens by transformers' own loop (with its cache), then their logits in one pass over everything."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    whole = model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), do_sample=False, max_new_tokens=GREEDY, eos_token_id=END
    )[0].tolist()
    greedy = whole[len(ids) :]
    rows = logits(model, whole)[len(ids) - 1 : -1]
    best = rows.topk(5)
    assert best.indices[:, 0].tolist() == greedy, f"{name}: one pass and the loop disagree"
    margins = best.values[:, 0] - best.values[:, 1]
    print(f"{name}: {len(ids)} ids, least margin {margins.min():.4f}: {tokenizer.decode(greedy)!r}")
    return {
        "name": name,
        "text": text,
        "ids": ids,
        "greedy": greedy,
        "margins": [round(m, 4) for m in margins.tolist()],
        "top": [[i, round(v, 4)] for i, v in zip(best.indices[0].tolist(), best.values[0].tolist())],
    }


def perplexity(model, tokenizer, file, count):
    """exp of the mean of -log p(token | all before it), over all tokens but the first."""
    ids = tokenizer.encode((ROOT / file).read_text("utf-8"), add_special_tokens=False)[:count]
    assert len(ids) == count
    loss = torch.nn.functional.cross_entropy(logits(model, ids)[:-1], torch.tensor(ids[1:]))
    print(f"perplexity of {count} tokens of {file}: {loss.exp():.4f}")
    return {"text_file": file, "tokens": count, "value": round(loss.exp().item(), 4), "ids": ids}


def write(data):
    """JSON with a line for each field of each entry."""
    line = lambda value: json.dumps(value, separators=(",", ":"))
    entry = lambda fields: "{" + ",\n  ".join(f"{line(k)}: {line(v)}" for k, v in fields.items()) + "}"
    value = lambda v: "[\n " + ",\n ".join(map(entry, v)) + "\n]" if isinstance(v, list) else entry(v)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text("{\n" + ",\n".join(f"{line(k)}: {value(v)}" for k, v in data.items()) + "\n}\n")


@torch.inference_mode()
def main():
    tokenizer, model = load()
    versions = {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in PACKAGES}
    write(
        {
            "source": {
                "file": FILE,
                "sha256": hashlib.sha256((MODELS / FILE).read_bytes()).hexdigest(),
                "versions": versions,
            },
            "prompts": [answer(model, tokenizer, *item) for item in prompts(tokenizer).items()],
            "perplexity": perplexity(model, tokenizer, "LICENSE-APACHE", 1000),
            "tokenizer": [{"text": t, "ids": tokenizer.encode(t, add_special_tokens=False)} for t in TRICKY],
        }
    )


main()
