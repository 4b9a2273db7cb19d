"""A byte-level BPE vocabulary (Sennrich et al. 2016) in CLIP's form, learnt from captions and plain fashion English."""

import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer

from fashiondpo_pipeline.demo.garments import CATEGORIES, COLOURS, FORMS, PATTERNS, Look, caption

LENGTH = 24
VOCABULARY = 960
START, END = "<|startoftext|>", "<|endoftext|>"

# Words people use of clothes beyond the captions, so that most of a free prompt stays whole words.
ENGLISH = """
the a an of and with without in on at for from to by is are this that it one two some very more less no not
photo picture image photograph drawing shot view front side studio product catalogue background white plain clean
clothes clothing garment outfit fashion style item piece pair set wear wearing worn woman women man men kids girl boy
shirt t-shirt tee top blouse tunic pullover sweater jumper hoodie cardigan sweatshirt vest jacket coat parka blazer
dress gown skirt trousers pants jeans leggings shorts suit sandal heel flip-flop slipper sneaker trainer shoe boot
ankle bag handbag purse backpack tote clutch hat scarf belt sock glove
sleeve sleeves sleeveless long short collar button zip hood pocket strap laces sole hem waist neck neckline
cotton wool leather denim silk linen suede velvet knit lace fabric cloth
red orange yellow green blue navy teal purple pink brown black grey gray beige gold silver dark light bright pale deep
striped stripes dotted dots floral plain checked checks print pattern logo
high good best low poor quality detailed sharp soft beautiful elegant simple modern classic vintage casual formal
sporty summer winter spring autumn new old small large big slim loose tight fit wide narrow
"""


def word_counts() -> Counter[str]:
    """How often each word and each run of other signs comes in the captions and, eight times each, in ENGLISH."""
    looks = [Look(kind, colour, pattern, colour) for colour in COLOURS for kind in CATEGORIES for pattern in PATTERNS]
    captions = [caption(look, form) for look in looks for form in range(len(FORMS))]
    return Counter(re.findall(r"[a-z]+|[^a-z\s]+", " ".join([*captions, *[ENGLISH] * 8])))


def learn() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges. All 256 bytes are in it, inside and at the end of words, so any text can be encoded.

    The trainer of `tokenizers` breaks ties in a different order each time; here the greater pair wins, so that every
    build gives the same numbers to the same words.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = dict.fromkeys([*letters, *(letter + "</w>" for letter in letters)])  # an ordered set
    counts = word_counts()
    pieces = {word: [*word[:-1], word[-1] + "</w>"] for word in counts}
    merges = []
    while len(tokens) < VOCABULARY - 2:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, count in counts.items():
            for pair in pairwise(pieces[word]):
                pairs[pair] += count
        merges.append(max(pairs, key=lambda pair: (pairs[pair], pair)))
        tokens["".join(merges[-1])] = None
        pieces = {word: merged(parts, merges[-1]) for word, parts in pieces.items()}
    return {token: number for number, token in enumerate([*tokens, START, END])}, merges


def merged(parts: list[str], pair: tuple[str, str]) -> list[str]:
    """Join each neighbouring `pair`, from the left: merged(["b", "o", "o", "t"], ("o", "o")) == ["b", "oo", "t"]."""
    out: list[str] = []
    for part in parts:
        if out and (out[-1], part) == pair:
            out[-1] += part
        else:
            out.append(part)
    return out


def write(folder: Path) -> CLIPTokenizer:
    """A tokenizer folder that every version of transformers reads, the old by vocab.json and merges.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, merges = learn()
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, "do_lower_case": True, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2))
    (folder / "tokenizer.json").unlink(missing_ok=True)  # else it is read in place of the files above
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer
