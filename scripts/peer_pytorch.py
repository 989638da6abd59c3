#!/usr/bin/env python3
"""OPTIONAL peer figures: Hugging Face OLMoE on PyTorch, random weights, on the CPU or on a GPU.

Nothing of the product or its tests needs this file. It needs PyPI's torch, transformers (4.x; 5.x for --experts grouped_mm) and, for
lora_step, nothing more: the adapters are PEFT's equation (y += B A x, rank 16, on every expert's three matrices) written here.
It measures the same things as build/lightmoe-bench, on the same shapes, with the same token counts, one JSON object a line:
  prefill      batch 1 x 512, logits of every position           generate   64 tokens after a prompt of 16, batch 1
  train_step   4 x 256: forward, backward, AdamW                 lora_step  the same with frozen weights and adapters on experts
  gemm         (cuda) cuBLAS and torch._grouped_mm per shape: TFLOP/s of gate/up and down products, and the copy bandwidth
Run it beside the product's bench, on an otherwise idle machine:
    python3 scripts/peer_pytorch.py --shape tiny --shape mid --repeat 5
    python3 scripts/peer_pytorch.py --device cuda --dtype bf16 --shape olmoe-1b-7b --experts eager --experts grouped_mm --repeat 20
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
    "olmoe-1b-7b": dict(hidden_size=2048, num_hidden_layers=16, num_experts=64, num_experts_per_tok=8, intermediate_size=1024,
                        num_attention_heads=16, num_key_value_heads=16, vocab_size=50304),
}
WHAT = ["prefill", "generate", "train_step", "lora_step", "gemm"]


class Machine:
    """Where and in what type; times work there."""

    def __init__(self, torch, device, dtype):
        self.torch, self.device = torch, device
        self.dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[dtype]
        self.label = f"pytorch-{device}-{dtype}"

    def wait(self):
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def peak_mib(self):
        if self.device == "cuda":
            return self.torch.cuda.max_memory_allocated() // 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

    def reset_peak(self):
        if self.device == "cuda":
            self.torch.cuda.empty_cache()
            self.torch.cuda.reset_peak_memory_stats()

    def timed(self, function, repeat):
        """Seconds of each run after two that warm up; on a GPU from its first kernel to its last."""
        for _ in range(2):
            function()
        self.wait()
        self.reset_peak()
        seconds = []
        for _ in range(repeat):
            start = time.perf_counter()
            function()
            self.wait()
            seconds.append(time.perf_counter() - start)
        return seconds

    def emit(self, shape, what, tokens, seconds, **extra):
        rates = [tokens / s for s in seconds]
        print(json.dumps({
            "peer": self.label, "shape": shape, "what": what, "tokens": tokens,
            "tokens_per_second_median": round(statistics.median(rates), 2), "tokens_per_second_best": round(max(rates), 2),
            "samples": len(rates), "peak_mib": self.peak_mib(), **extra
        }), flush=True)


def make_model(machine, shape, experts):
    from transformers import OlmoeConfig, OlmoeForCausalLM
    torch = machine.torch
    torch.manual_seed(1)
    config = OlmoeConfig(**SHAPES[shape], max_position_embeddings=4096, pad_token_id=1, eos_token_id=0)
    config._attn_implementation = "eager" if machine.device == "cpu" else "sdpa"
    if experts != "eager":
        config._experts_implementation = experts
    default = torch.get_default_dtype()
    torch.set_default_dtype(machine.dtype)
    try:
        with torch.device(machine.device):
            model = OlmoeForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    if experts != "eager" and getattr(model.config, "_experts_implementation", None) != experts:
        raise SystemExit(f"--experts {experts}: this transformers has no such backend")
    return model


def prefill(machine, model, shape, repeat, **extra):
    torch = machine.torch
    ids = torch.randint(0, model.config.vocab_size, (1, 512), device=machine.device)
    model.eval()
    with torch.inference_mode():
        machine.emit(shape, "prefill", 512, machine.timed(lambda: model(ids, use_cache=False), repeat), **extra)


def generate(machine, model, shape, repeat, **extra):
    torch = machine.torch
    prompt = torch.randint(2, model.config.vocab_size, (1, 16), device=machine.device)
    model.eval()

    def decode():
        with torch.inference_mode():
            out = model(prompt, use_cache=True)
            past, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
            for _ in range(64):
                out = model(token, past_key_values=past, use_cache=True)
                past, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
    machine.emit(shape, "generate", 64, machine.timed(decode, max(2, repeat // 2)), **extra)


def train(machine, model, shape, repeat, what, **extra):
    torch = machine.torch
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
    batch = torch.randint(0, model.config.vocab_size, (4, 256), device=machine.device)
    parts = {"forward": [], "backward": [], "adamw": []}

    def step():
        times = [time.perf_counter()]

        def stamp():
            machine.wait()
            times.append(time.perf_counter())
        loss = model(batch, labels=batch, output_router_logits=True, use_cache=False).loss
        stamp()
        loss.backward()
        stamp()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        stamp()
        for name, begin, end in zip(parts, times, times[1:]):
            parts[name].append(end - begin)
    seconds = machine.timed(step, repeat)
    machine.emit(shape, what, 1024, seconds, trained=sum(p.numel() for p in trained),
                 **{k + "_s": round(statistics.median(v[2:]), 5) for k, v in parts.items()}, **extra)


def add_adapters(machine, model, rank=16):
    """Freezes the model; every expert's linear layers get W x + B A x with A and B trained, as PEFT's LoRA."""
    torch = machine.torch

    class Adapted(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear = linear
            new = dict(device=machine.device, dtype=machine.dtype)
            self.a = torch.nn.Parameter(torch.randn(rank, linear.in_features, **new) * 0.02)
            self.b = torch.nn.Parameter(torch.zeros(linear.out_features, rank, **new))

        def forward(self, x):
            return self.linear(x) + (x @ self.a.T) @ self.b.T
    model.requires_grad_(False)
    count = 0
    for module in list(model.modules()):
        for name in ("gate_proj", "up_proj", "down_proj"):
            linear = getattr(module, name, None)
            if isinstance(linear, torch.nn.Linear):
                setattr(module, name, Adapted(linear))
                count += 1
    return count


def gemm(machine, repeat):
    """Dense products by cuBLAS and grouped ones by torch._grouped_mm at OLMoE's shape, rows spread evenly over 64 experts."""
    torch = machine.torch
    if machine.device != "cuda":
        raise SystemExit("--only gemm: --device cuda")
    source = torch.empty(2**29, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds = min(machine.timed(lambda: target.copy_(source), repeat))
    print(json.dumps({"peer": machine.label, "what": "copy", "gb_per_second": round(2 * source.numel() / seconds * 1e-9, 1)}), flush=True)
    del source, target
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")  # more than the L2 holds
    for name, n, k in (("gate_up", 2048, 2048), ("down", 2048, 1024)):
        weights = torch.randn(64, n, k, dtype=torch.bfloat16, device="cuda")
        for tokens in (1, 8, 64, 4096, 16384, 65536):
            rows = tokens * 8
            x = torch.randn(rows, k, dtype=torch.bfloat16, device="cuda")
            ends = (torch.arange(1, 65, device="cuda") * rows // 64).to(torch.int32)
            cases = {"cublas-dense": lambda: x @ weights[0].T}
            if hasattr(torch, "_grouped_mm"):
                cases["torch._grouped_mm"] = lambda: torch._grouped_mm(x, weights.transpose(-2, -1), offs=ends)
            for backend, call in cases.items():
                best = []
                for i in range(repeat + 2):
                    flush.zero_()
                    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                    start.record()
                    call()
                    end.record()
                    end.synchronize()
                    if i >= 2:
                        best.append(start.elapsed_time(end) * 1e-3)
                flop = 2.0 * rows * n * k
                print(json.dumps({"peer": backend, "what": "gemm", "product": name, "tokens": tokens, "rows": rows, "n": n, "k": k,
                                  "tflops_median": round(flop / statistics.median(best) * 1e-12, 2),
                                  "tflops_best": round(flop / min(best) * 1e-12, 2), "microseconds_median":
                                  round(statistics.median(best) * 1e6, 2), "samples": len(best)}), flush=True)
            del x


def measure(machine, shape, experts, repeat, only):
    extra = {"experts": experts}
    model = make_model(machine, shape, experts)
    if "prefill" in only:
        prefill(machine, model, shape, repeat, **extra)
    if "generate" in only:
        generate(machine, model, shape, repeat, **extra)
    if "train_step" in only:
        train(machine, model, shape, repeat, "train_step", **extra)
    if "lora_step" in only:
        if add_adapters(machine, model) == 0:  # transformers 5 keeps all experts of a layer in one tensor
            print(json.dumps({"peer": machine.label, "shape": shape, "what": "lora_step", "skipped":
                              "experts are no linear layers in this transformers; use 4.x"}), flush=True)
        else:
            train(machine, model, shape, repeat, "lora_step", **extra)
    del model
    machine.reset_peak()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", choices=sorted(SHAPES))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["f32", "bf16"], default="f32")
    parser.add_argument("--experts", action="append", choices=["eager", "batched_mm", "grouped_mm"])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", action="append", choices=WHAT)
    arguments = parser.parse_args()
    import torch
    import transformers
    torch.set_num_threads(arguments.threads)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: PyTorch finds no GPU here")
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else None
    print(json.dumps({"torch": torch.__version__, "transformers": transformers.__version__, "threads": arguments.threads,
                      "gpu": name, "cuda": torch.version.cuda}), flush=True)
    machine = Machine(torch, arguments.device, arguments.dtype)
    only = arguments.only or [w for w in WHAT if w != "gemm" or arguments.device == "cuda"]
    for shape in arguments.shape or ["tiny"]:
        for experts in arguments.experts or ["eager"]:
            measure(machine, shape, experts, arguments.repeat, [w for w in only if w != "gemm"])
    if "gemm" in only:
        gemm(machine, arguments.repeat)


if __name__ == "__main__":
    main()
