"""llama.cpp on the CPU, answering JSON lines: its side of `launch.bench_serve`.

Runs by its path in an environment of its own and imports nothing of this project but its neighbour `answering.py`,
which says how it is asked.

The model is a Hugging Face folder of the Qwen2 family, written to GGUF beside it in the wanted dtype; token ids go in
and out, so the file carries no tokenizer.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from answering import answer_requests

_TENSORS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_STORED = {"F32": np.float32}


def export(folder: Path, dtype: str) -> Path:
    """The folder's model as GGUF: matrices in `dtype` ("float32" or "bfloat16"), norms and biases in float32."""
    target = folder / f"{dtype}.gguf"
    if target.exists():
        return target
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] != "qwen2":
        raise ValueError(f"model_type: found {config['model_type']!r}, expected 'qwen2'")
    partial = target.with_suffix(f".{os.getpid()}.partial")
    writer = gguf.GGUFWriter(str(partial), "qwen2")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16 if dtype == "bfloat16" else gguf.LlamaFileType.ALL_F32)
    for name, array in _tensors(folder / "model.safetensors"):
        module, _, kind = name.rpartition(".")
        if module in _OUTER:
            renamed = f"{_OUTER[module]}.{kind}"
        else:
            layer, _, rest = module.removeprefix("model.layers.").partition(".")
            renamed = f"blk.{layer}.{_TENSORS[rest]}.{kind}"
        if dtype == "bfloat16" and array.ndim == 2:
            data = gguf.quants.quantize(array, gguf.GGMLQuantizationType.BF16)
            writer.add_tensor(renamed, data, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(renamed, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(target)
    return target


def _tensors(file: Path):
    """Names and arrays of a float32 safetensors file."""
    with file.open("rb") as handle:
        (size,) = np.frombuffer(handle.read(8), np.uint64)
        header = json.loads(handle.read(int(size)))
    data = np.memmap(file, np.uint8, "r", offset=8 + int(size))
    for name, about in header.items():
        if name != "__metadata__":
            begin, end = about["data_offsets"]
            yield name, np.array(data[begin:end]).view(_STORED[about["dtype"]]).reshape(about["shape"])


class Peer:
    """One model; contexts are made for each mode and kept while the mode stays. Times are seconds, measured here."""

    def load(self, folder: str, threads: int, dtype: str) -> dict:
        began = time.perf_counter()
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        file = export(Path(folder), dtype)
        self.model = llama_cpp.llama_model_load_from_file(str(file).encode(), parameters)
        if not self.model:
            raise RuntimeError(f"llama.cpp could not load {file.name}")
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.threads, self.dtype = threads, dtype
        self.context: Any = None
        self.settings: dict | None = None
        return {
            "seconds": time.perf_counter() - began,
            "versions": {"llama_cpp_python": llama_cpp.__version__, "system": self._system()},
            "wait_policy": os.environ.get("OMP_WAIT_POLICY", ""),
        }

    def choose_threads(self, candidates: list[int], prompt: int = 256, decodes: int = 32) -> dict:
        """Seconds of a few prompts with answers by number of threads; keeps the fastest number."""
        seconds = {}
        prompts = [[(7 * i + j) % self.vocab_size for j in range(prompt // decodes)] for i in range(decodes)]
        for threads in candidates:
            self.threads = threads
            runs = [
                self.shared_batch(prompts, [4] * decodes, window=64, sequences=decodes, batch=512, micro_batch=512)
                for _ in range(2)
            ]
            seconds[threads] = min(run["wall_s"] for run in runs)
            self._close()
        self.threads = min(seconds, key=seconds.__getitem__)
        return {"threads": self.threads, "seconds": {str(n): s for n, s in seconds.items()}}

    def shared_batch(
        self,
        prompts: list[list[int]],
        max_tokens: list[int],
        window: int,
        sequences: int,
        batch: int,
        micro_batch: int,
        flash: bool = False,
        unified: bool = False,
    ) -> dict:
        """All requests at once as llama.cpp's server does it: every step has a token of each running sequence, and
        prompt tokens up to `batch`.
        """
        settings = {
            "window": window,
            "sequences": sequences,
            "batch": batch,
            "micro_batch": micro_batch,
            "flash": flash,
            "unified": unified,
        }
        context = self._open(settings)
        memory = llama_cpp.llama_get_memory(context)
        llama_cpp.llama_memory_clear(memory, True)
        packed = llama_cpp.llama_batch_init(batch, 0, 1)
        try:
            wall, cpu = time.perf_counter(), time.process_time()
            tokens = self._run(context, packed, batch, prompts, max_tokens)
            return {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu, "tokens": tokens}
        finally:
            llama_cpp.llama_batch_free(packed)

    def _run(self, context, packed, room: int, prompts: list[list[int]], max_tokens: list[int]) -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in prompts]
        done = [0] * len(prompts)  # tokens of each sequence that are in the cache
        while True:
            rows: list[tuple[int, int]] = []  # sequence, row whose logits give its next token
            count = 0

            def put(sequence: int, token: int, position: int, wanted: bool, rows=rows) -> None:
                nonlocal count
                packed.token[count], packed.pos[count] = token, position
                packed.n_seq_id[count], packed.seq_id[count][0] = 1, sequence
                packed.logits[count] = wanted
                if wanted:
                    rows.append((sequence, count))
                count += 1

            for i, answer in enumerate(answers):
                if answer and len(answer) < max_tokens[i]:
                    put(i, answer[-1], done[i], True)
                    done[i] += 1
            for i, prompt in enumerate(prompts):
                while done[i] < len(prompt) and count < room:
                    put(i, prompt[done[i]], done[i], done[i] == len(prompt) - 1)
                    done[i] += 1
            if not count:
                return answers
            packed.n_tokens = count
            if code := llama_cpp.llama_decode(context, packed):
                raise RuntimeError(f"llama_decode returned {code}")
            for sequence, row in rows:
                logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, row), (self.vocab_size,))
                answers[sequence].append(int(logits.argmax()))

    def _open(self, settings: dict):
        if settings == self.settings:
            return self.context
        self._close()
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = settings["window"] * settings["sequences"]
        parameters.n_seq_max = settings["sequences"]
        parameters.n_batch, parameters.n_ubatch = settings["batch"], settings["micro_batch"]
        parameters.n_threads = parameters.n_threads_batch = self.threads
        parameters.flash_attn_type = 1 if settings["flash"] else 0
        parameters.kv_unified = settings["unified"]
        parameters.no_perf = True
        # The cache in the model's dtype; of the 16-bit kinds llama.cpp's own choice, half precision.
        kind = gguf.GGMLQuantizationType.F32 if self.dtype == "float32" else gguf.GGMLQuantizationType.F16
        parameters.type_k = parameters.type_v = int(kind)
        self.context = llama_cpp.llama_init_from_model(self.model, parameters)
        if not self.context:
            raise RuntimeError(f"llama.cpp refuses a context of {settings}")
        self.settings = settings
        return self.context

    def _close(self) -> None:
        if self.context:
            llama_cpp.llama_free(self.context)
        self.context = self.settings = None

    def _system(self) -> str:
        return llama_cpp.llama_print_system_info().decode()


if __name__ == "__main__":
    answer_requests(Peer())
