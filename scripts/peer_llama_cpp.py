#!/usr/bin/env python3
"""OPTIONAL peer figures: llama.cpp (bf16, CPU) beside this program, on one and the same checkpoint, one after the other in turns.

Nothing of the product or its tests needs this file. It needs PyPI's gguf and numpy, and llama.cpp itself, whose sources are in the
archive of PyPI's llama-cpp-python:
    pip download --no-deps --no-binary llama-cpp-python llama-cpp-python && tar xf llama_cpp_python-*.tar.gz
    L=$(echo llama_cpp_python-*/vendor/llama.cpp)
    cmake -B peer -S $L -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF && cmake --build peer --target llama
    g++ -std=c++20 -O2 -fopenmp scripts/peer_llama_cpp.cpp -I$L/include -I$L/ggml/include peer/src/libllama.a \
        peer/ggml/src/libggml.a peer/ggml/src/libggml-cpu.a peer/ggml/src/libggml-base.a -ldl -o peer/peer_llama_cpp
A stock OLMoE directory (bf16) becomes a GGUF file; both programs then read 512 tokens and write 64, in turns, on an idle machine:
    build/lightmoe random olmoe-1b-7b -o big --dtype bf16 --seed 1
    python3 scripts/peer_llama_cpp.py big --gguf big.gguf --peer peer/peer_llama_cpp --repeat 3
Prints one JSON object a line: tokens a second of prefill (logits of the last token alone, as in both programs) and of decode after it.
"""
import argparse
import json
import mmap
import pathlib
import statistics
import struct
import subprocess

NAMES = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate": "ffn_gate_inp",
         "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
         "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
EXPERT = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}


def read_tensors(directory):
    """name -> (shape, bytes of bf16), mapped."""
    tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        with open(path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        header_bytes = struct.unpack("<Q", data[:8])[0]
        for name, entry in json.loads(data[8:8 + header_bytes]).items():
            if name == "__metadata__":
                continue
            if entry["dtype"] != "BF16":
                raise SystemExit(f"{path}: {name} is {entry['dtype']}, expected BF16")
            begin, end = entry["data_offsets"]
            tensors[name] = (entry["shape"], memoryview(data)[8 + header_bytes + begin:8 + header_bytes + end])
    return tensors


def gguf_tensors(tensors, config):
    """(GGUF name, shape, list of byte pieces); vectors and the router go as f32, as llama.cpp wants them."""
    def plain(name, target):
        shape, data = tensors[name]
        return target + ".weight", shape, [data], len(shape) == 1 or target.endswith("ffn_gate_inp")
    for name, target in OUTER.items():
        yield plain(name + ".weight", target)
    for layer in range(config["num_hidden_layers"]):
        for name, target in NAMES.items():
            yield plain(f"model.layers.{layer}.{name}.weight", f"blk.{layer}.{target}")
        for name, target in EXPERT.items():
            each = [tensors[f"model.layers.{layer}.mlp.experts.{e}.{name}.weight"] for e in range(config["num_experts"])]
            yield f"blk.{layer}.{target}.weight", [len(each), *each[0][0]], [data for _, data in each], False


def write_gguf(directory, target):
    import gguf
    import numpy as np
    config = json.loads((directory / "config.json").read_text())
    items = list(gguf_tensors(read_tensors(directory), config))
    writer = gguf.GGUFWriter(target, "olmoe")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    kind = gguf.GGMLQuantizationType
    for name, shape, pieces, wide in items:
        size = sum(len(piece) for piece in pieces) * (2 if wide else 1)
        if wide:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), size, kind.F32)
        else:  # raw bytes: the last dimension counts them
            writer.add_tensor_info(name, [*shape[:-1], 2 * shape[-1]], np.dtype(np.uint8), size, kind.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, _, pieces, wide in items:
        data = np.concatenate([np.frombuffer(piece, np.uint8) for piece in pieces])
        writer.write_tensor_data((data.view(np.uint16).astype(np.uint32) << 16).view(np.float32) if wide else data)
    writer.close()


def run_peer(arguments):
    out = subprocess.run([arguments.peer, arguments.gguf, str(arguments.prompt), str(arguments.new), str(arguments.threads)],
                         capture_output=True, text=True, check=True)
    return json.loads(out.stdout)


def write_prompt(path, count, vocabulary):
    ids = [(17 + 31 * i) % min(vocabulary, 4000) for i in range(count)]
    header = json.dumps({"input_ids": {"dtype": "I32", "shape": [1, count], "data_offsets": [0, 4 * count]}}).encode()
    pathlib.Path(path).write_bytes(struct.pack("<Q", len(header)) + header + struct.pack(f"<{count}i", *ids))


def run_ours(arguments, model):
    out = subprocess.run([arguments.lightmoe, "generate", model, "--tokens", arguments.gguf + ".prompt", "--max-new-tokens",
                          str(arguments.new + 1), "--ignore-eos", "--compute", "bf16", "--cache", "bf16", "--json",
                          "--threads", str(arguments.threads)], capture_output=True, text=True, check=True)
    row = json.loads(out.stdout)
    return {"prefill": round(row["prefill_tokens"] / row["prefill_seconds"], 2),
            "decode": round(row["decode_tokens"] / row["decode_seconds"], 2)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="stock OLMoE directory in bf16")
    parser.add_argument("--compressed", help="directory of its compressed form, measured too")
    parser.add_argument("--gguf", required=True, help="file to write, or to use if it is there")
    parser.add_argument("--peer", required=True, help="the program of scripts/peer_llama_cpp.cpp")
    parser.add_argument("--lightmoe", default="build/lightmoe")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if not pathlib.Path(arguments.gguf).exists():
        write_gguf(pathlib.Path(arguments.model), arguments.gguf)
    vocabulary = json.loads((pathlib.Path(arguments.model) / "config.json").read_text())["vocab_size"]
    write_prompt(arguments.gguf + ".prompt", arguments.prompt, vocabulary)
    runs = {"llama.cpp": lambda: run_peer(arguments), "lightmoe": lambda: run_ours(arguments, arguments.model)}
    if arguments.compressed:
        runs["lightmoe compressed"] = lambda: run_ours(arguments, arguments.compressed)
    results = {name: [] for name in runs}
    for _ in range(arguments.repeat):
        for name, run in runs.items():
            results[name].append(run())
            print(json.dumps({"program": name, **results[name][-1]}), flush=True)
    for name, rows in results.items():
        for phase in ("prefill", "decode"):
            rates = [row[phase] for row in rows]
            print(json.dumps({"program": name, "what": phase, "tokens_per_second_median": round(statistics.median(rates), 2),
                              "range": [round(min(rates), 2), round(max(rates), 2)]}))


if __name__ == "__main__":
    main()
