#!/usr/bin/env python3
"""OPTIONAL check: a directory written by this program loads in Hugging Face transformers and gives the same logits.

Needs PyPI's torch, transformers and safetensors. MODEL is a stock-shaped directory (`lightmoe export --format hf`, a recovered
`train` output, or `random`); DUMP is what `lightmoe dump MODEL --input IN --out DUMP` wrote for the ids in IN:
    build/lightmoe dump DIR --input in.safetensors --out dump.safetensors
    python3 scripts/check_hf.py DIR in.safetensors dump.safetensors
Exit 0 when the largest logit difference is below --tolerance, 1 otherwise.
"""
import argparse
import sys

from safetensors.torch import load_file
import torch
from transformers import OlmoeForCausalLM


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("input")
    parser.add_argument("dump")
    parser.add_argument("--tolerance", type=float, default=1e-3)
    arguments = parser.parse_args()
    model = OlmoeForCausalLM.from_pretrained(arguments.model, torch_dtype=torch.float32).eval()
    ids = load_file(arguments.input)["input_ids"].long()
    ours = load_file(arguments.dump)["logits"].float()
    with torch.inference_mode():
        theirs = model(ids, use_cache=False).logits
    difference = (ours - theirs).abs().max().item()
    same_top = (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item()
    print(f"largest logit difference {difference:.3e} (largest logit {theirs.abs().max().item():.3f}), same top-1 {same_top:.4f}")
    sys.exit(0 if difference <= arguments.tolerance else 1)


if __name__ == "__main__":
    main()
