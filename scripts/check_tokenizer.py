#!/usr/bin/env python3
"""Optional: compare `lightmoe tokenize` with Hugging Face's tokenizers (pip install tokenizers) on random text.

  scripts/check_tokenizer.py DIR [--count 5000] [--seed 1] [--program build/lightmoe]
      DIR/tokenizer.json is loaded by both; ids and decodings must be equal. Characters that Unicode knows only since a
      later version than the older of the two libraries can differ.
  scripts/check_tokenizer.py DIR --write-golden
      writes DIR/golden.json from the strings of DIR/strings.json, which tests/tokenizer_test.cpp compares with.
"""
import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import unicodedata

from tokenizers import Tokenizer

PIECES = ["  ", "   ", "'s", "'S", "'ll", "e\u0301", "A\u030a", "\u212b", "\ufb01", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\u0085",
          "\u180e", "\u200b", "12", "1234567", "\u00b2", "\u2167", "word", "Word", "snake_case", "\U0001f600", "\u200d"]


def random_text(rnd, extra):
    def character():
        while True:
            c = chr(rnd.choice([rnd.randrange(32, 127), rnd.randrange(0x250), rnd.randrange(0x300, 0x370), rnd.randrange(0x10000),
                                rnd.randrange(0x110000)]))
            if unicodedata.category(c) not in ("Cs", "Cn"):
                return c
    parts = [rnd.choice(PIECES + extra) if rnd.random() < 0.5 else character() for _ in range(rnd.randrange(1, 16))]
    return "".join(p + (" " if rnd.random() < 0.3 else "") for p in parts)


def run(program, tokenizer, lines, *flags):
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))
        file.flush()
        out = subprocess.run([program, "tokenize", tokenizer, "--jsonl", file.name, *flags], capture_output=True, text=True)
    if out.returncode:
        sys.exit(out.stderr)
    return [json.loads(line) for line in out.stdout.split("\n")[:-1]]


def write_golden(folder, reference):
    with open(os.path.join(folder, "strings.json"), encoding="utf-8") as file:
        texts = json.load(file)
    golden = []
    for text in texts:
        ids = reference.encode(text, add_special_tokens=False)
        golden.append({"text": text, "ids": ids.ids, "tokens": ids.tokens,
                       "decoded": reference.decode(ids.ids, skip_special_tokens=False),
                       "decoded_skip_special": reference.decode(ids.ids, skip_special_tokens=True)})
    with open(os.path.join(folder, "golden.json"), "w", encoding="utf-8") as file:
        file.write("[\n" + ",\n".join(json.dumps(item) for item in golden) + "\n]\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--program", default="build/lightmoe")
    parser.add_argument("--write-golden", action="store_true")
    options = parser.parse_args()
    reference = Tokenizer.from_file(os.path.join(options.folder, "tokenizer.json"))
    if options.write_golden:
        return write_golden(options.folder, reference)
    rnd = random.Random(options.seed)
    added = [token.content for token in reference.get_added_tokens_decoder().values()]
    texts = [random_text(rnd, added) for _ in range(options.count)]
    ours = run(options.program, options.folder, [{"text": text} for text in texts])
    wrong = 0
    for flag, skip in (([], False), (["--skip-special"], True)):
        for ids, back in zip(ours, run(options.program, options.folder, ours, "--decode", *flag)):
            wrong += back["text"] != reference.decode(ids, skip_special_tokens=skip)
    for text, ids in zip(texts, ours):
        expected = reference.encode(text, add_special_tokens=False).ids
        if ids != expected:
            wrong += 1
            print(f"{ascii(text)}\n  reference {expected}\n  lightmoe  {ids}")
    print(f"{options.count} texts, {wrong} differences")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
