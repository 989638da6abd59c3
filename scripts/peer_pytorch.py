#!/usr/bin/env python3
"""OPTIONAL peer figures: Hugging Face OLMoE on PyTorch, CPU, f32, eager, random weights.

Nothing of the product or its tests needs this file. It needs PyPI's torch, transformers (4.x) and psutil.
It measures the same four things as build/lightmoe-bench, on the same shapes, with the same token counts:
prefill (batch 1 x 512), decode (64 tokens after a prompt of 16), train step (4 x 256: forward, backward, AdamW), and the
train step's parts; prints one JSON object a line. Run it beside the product's bench, on an otherwise idle machine:
    python3 scripts/peer_pytorch.py --shape tiny --shape mid --repeat 5
"""
import argparse
import json
import os
import resource
import statistics
import time

SHAPES = {
    "tiny": dict(hidden_size=256, num_hidden_layers=4, num_experts=16, num_experts_per_tok=4, intermediate_size=128,
                 num_attention_heads=4, num_key_value_heads=4, vocab_size=512),
    "mid": dict(hidden_size=1024, num_hidden_layers=8, num_experts=32, num_experts_per_tok=8, intermediate_size=512,
                num_attention_heads=8, num_key_value_heads=8, vocab_size=8192),
}


def emit(shape, what, tokens, seconds, **extra):
    rates = [tokens / s for s in seconds]
    print(json.dumps({
        "peer": "huggingface-pytorch-f32", "shape": shape, "what": what, "tokens": tokens,
        "tokens_per_second_median": round(statistics.median(rates), 2), "tokens_per_second_best": round(max(rates), 2),
        "samples": len(rates), "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, **extra
    }), flush=True)


def timed(function, repeat):
    function()  # warm-up
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return seconds


def measure(shape, repeat, only):
    import torch
    from transformers import OlmoeConfig, OlmoeForCausalLM
    torch.manual_seed(1)
    config = OlmoeConfig(**SHAPES[shape], max_position_embeddings=4096, pad_token_id=1, eos_token_id=0)
    config._attn_implementation = "eager"
    model = OlmoeForCausalLM(config).float()
    ids = torch.randint(0, config.vocab_size, (1, 512))
    if "prefill" in only:
        model.eval()
        with torch.inference_mode():
            emit(shape, "prefill", 512, timed(lambda: model(ids, use_cache=False), repeat))
    if "decode" in only:
        prompt = torch.randint(2, config.vocab_size, (1, 16))

        def decode():
            with torch.inference_mode():
                out = model(prompt, use_cache=True)
                past, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
                for _ in range(64):
                    out = model(token, past_key_values=past, use_cache=True)
                    past, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
        emit(shape, "decode", 64, timed(decode, max(2, repeat // 2)))
    if "train" in only:
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
        batch = torch.randint(0, config.vocab_size, (4, 256))
        parts = {"forward": [], "backward": [], "adamw": []}

        def step():
            t0 = time.perf_counter()
            loss = model(batch, labels=batch, output_router_logits=True, use_cache=False).loss
            t1 = time.perf_counter()
            loss.backward()
            t2 = time.perf_counter()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            parts["forward"].append(t1 - t0)
            parts["backward"].append(t2 - t1)
            parts["adamw"].append(time.perf_counter() - t2)
        seconds = timed(step, repeat)
        emit(shape, "train_step", 1024, seconds, **{k + "_s": round(statistics.median(v[1:]), 4) for k, v in parts.items()})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", choices=sorted(SHAPES))
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", action="append", choices=["prefill", "decode", "train"])
    arguments = parser.parse_args()
    import torch
    import transformers
    torch.set_num_threads(arguments.threads)
    print(json.dumps({"torch": torch.__version__, "transformers": transformers.__version__, "threads": arguments.threads}))
    for shape in arguments.shape or ["tiny"]:
        measure(shape, arguments.repeat, arguments.only or ["prefill", "decode", "train"])


if __name__ == "__main__":
    main()
