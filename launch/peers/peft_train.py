"""transformers' and PEFT's side of `launch.bench_train`: LoRA fine-tuning on a CPU, one optimizer step a request.

Runs in the peers' environment and imports nothing of ours. A step is a plain PyTorch loop, faster than Trainer:
forward, sum of cross entropy over target tokens divided by their number, backward, clip, AdamW.
"""

import time
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from answering import answer_requests


class Peer:
    def load(self, folder: str, adapter: str, threads: int, learning_rate: float, clip_norm: float) -> dict:
        torch.set_num_threads(threads)
        self.folder, self.adapter, self.learning_rate, self.clip_norm = folder, adapter, learning_rate, clip_norm
        return {"versions": {module.__name__: module.__version__ for module in (torch, transformers, peft)}}

    def begin(self, steps: list, compiled: bool) -> dict:
        """Fresh weights, adapter and optimizer. `steps`: each a list of (token ids, target mask)."""
        base = transformers.AutoModelForCausalLM.from_pretrained(
            self.folder, dtype=torch.float32, attn_implementation="sdpa"
        )
        base.config.use_cache = False
        self.model = peft.PeftModel.from_pretrained(base, self.adapter, is_trainable=True)
        self.model.train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=self.learning_rate, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0
        )
        # Steps differ in their number of tokens: one program for all of them.
        self.forward = torch.compile(self.model, dynamic=True) if compiled else self.model
        self.steps = [[(np.asarray(ids), np.asarray(mask, np.float32)) for ids, mask in step] for step in steps]
        return {"trainable": sum(p.numel() for p in self.parameters)}

    def run(self, first: int, last: int, mode: dict) -> dict:
        """Steps [first, last): losses (before each update), and seconds of each."""
        losses, seconds = [], []
        for number in range(first, last):
            start = time.perf_counter()
            losses.append(self._step(self.steps[number % len(self.steps)], mode))
            seconds.append(time.perf_counter() - start)
        return {"losses": losses, "seconds": seconds}

    def peak(self) -> dict:
        """The largest resident size so far."""
        # Not getrusage: a new process inherits the figure of the one that started it.
        lines = Path("/proc/self/status").read_text().splitlines()
        return {"bytes": next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024}

    def _step(self, examples: list, mode: dict) -> float:
        total = float(sum(mask[1:].sum() for _, mask in examples))
        loss = 0.0
        self.optimizer.zero_grad(set_to_none=True)
        for batch in self._batches(examples, mode):
            targets, weights = batch.pop("targets"), batch.pop("weights")
            logits = self.forward(**batch).logits.float()
            nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
            part = (nll * weights.flatten()).sum() / total
            part.backward()
            loss += part.item()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        self.optimizer.step()
        return loss

    def _batches(self, examples: list, mode: dict):
        if mode["kind"] == "packed":
            yield self._packed(examples, mode["row_length"], mode["rows"])
            return
        if mode["kind"] == "flattened":
            yield self._flattened(examples)
            return
        ordered = sorted(examples, key=lambda e: -len(e[0])) if mode["groups"] > 1 else examples
        size = -(-len(ordered) // mode["groups"])
        for i in range(0, len(ordered), size):
            yield self._padded(ordered[i : i + size], mode.get("length"))

    def _padded(self, examples: list, length: int | None) -> dict:
        longest = length or max(len(ids) for ids, _ in examples)
        ids, mask = np.full((len(examples), longest), 0), np.zeros((len(examples), longest), np.float32)
        real = np.zeros((len(examples), longest), np.int64)
        for i, (tokens, weights) in enumerate(examples):
            ids[i, : len(tokens)], mask[i, : len(tokens)], real[i, : len(tokens)] = tokens, weights, 1
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(real), **self._targets(ids, mask)}

    def _packed(self, examples: list, row_length: int, rows: int) -> dict:
        """First fit decreasing, as the other side packs; a block mask keeps documents apart, positions restart."""
        room = [row_length] * rows
        ids, mask = np.full((rows, row_length), 0), np.zeros((rows, row_length), np.float32)
        document = np.zeros((rows, row_length), np.int64)
        position = np.zeros((rows, row_length), np.int64)
        for number, (tokens, weights) in enumerate(sorted(examples, key=lambda e: -len(e[0])), start=1):
            row = next(r for r in range(rows) if room[r] >= len(tokens))
            start = row_length - room[row]
            here = slice(start, start + len(tokens))
            ids[row, here], mask[row, here], document[row, here] = tokens, weights, number
            mask[row, start] = 0.0  # nothing predicts a document's first token
            position[row, here] = np.arange(len(tokens))
            room[row] -= len(tokens)
        doc = torch.tensor(document)
        same = (doc[:, :, None] == doc[:, None, :]) & torch.ones(row_length, row_length, dtype=torch.bool).tril()
        blocked = torch.zeros(rows, 1, row_length, row_length).masked_fill(
            ~same[:, None], torch.finfo(torch.float32).min
        )
        return {
            "input_ids": torch.tensor(ids),
            "attention_mask": blocked,
            "position_ids": torch.tensor(position),
            **self._targets(ids, mask),
        }

    def _flattened(self, examples: list) -> dict:
        """transformers' own packing: one row without padding, in which it tells documents apart by their positions."""
        ids = np.concatenate([tokens for tokens, _ in examples])[None]
        mask = np.concatenate([np.r_[0.0, weights[1:]] for _, weights in examples])[None].astype(np.float32)
        position = np.concatenate([np.arange(len(tokens)) for tokens, _ in examples])[None]
        return {"input_ids": torch.tensor(ids), "position_ids": torch.tensor(position), **self._targets(ids, mask)}

    def _targets(self, ids: np.ndarray, mask: np.ndarray) -> dict:
        ahead = lambda x: np.concatenate([x[:, 1:], np.zeros_like(x[:, :1])], axis=1)  # noqa: E731
        return {"targets": torch.tensor(ahead(ids)), "weights": torch.tensor(ahead(mask))}


if __name__ == "__main__":
    answer_requests(Peer())
