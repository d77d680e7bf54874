"""Padding not paid for: batches of like length beside the authors' fixed length, on real text.

    python benchmarks/padding.py --data FOLDER --encoder FOLDER

FOLDER of the data: GLUE and SQuAD as parquet; of the encoder: a pretrained BERT. SST-2 and RTE train that encoder;
SQuAD trains a T5 of Flan-T5-small's shape with random weights on the encoder's tokens. The same examples are trained
both ways, one after the other, batch by batch; real tokens per second are compared within each batch.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from density_loss import timed
from peft import LoraConfig, TaskType, get_peft_model
from shapes import build_t5
from store import store, summary
from torch import Tensor
from transformers import AutoTokenizer

from deft_ray.models.adapters import Lora, attach_adapter
from deft_ray.models.base import load_base
from deft_ray.spec.catalog import TASKS
from deft_ray.tasks.encoding import EncodedTask, Example, encode_task
from deft_ray.tasks.rows import load_rows
from deft_ray.train.batches import BatchOrder, training_batch

#: Task: (batch size, source tokens, answer tokens), the last two as published.
SETTINGS = {"sst2": (32, 128, 30), "rte": (32, 128, 30), "squad": (8, 384, 30)}
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def load(task: str, data: str, tokenizer: Any, source: int, target: int) -> EncodedTask:
    """Tokenise a task's training split."""
    rows = load_rows(TASKS[task], "train", data, None)
    options = {"max_source_tokens": source, "max_target_tokens": target}
    return encode_task(TASKS[task], rows, rows[:1], tokenizer, text_to_text=task == "squad", **options)


def real_share(examples: list[Example], batch_size: int, *, grouped: bool) -> float:
    """Real tokens, of answers too, over those computed, of one epoch with batches padded to their longest."""
    lengths = lengths_of(examples)
    order = BatchOrder(len(examples), batch_size, 0, lengths if grouped else None)
    batches = [[lengths[i] for i in order.indices(step)] for step in range(len(examples) // batch_size)]
    computed = sum(sum(map(max, zip(*batch, strict=True))) * len(batch) for batch in batches)
    return sum(sum(both) for batch in batches for both in batch) / computed


def lengths_of(examples: list[Example]) -> list[tuple[int, int]]:
    """Tokens of the source, and of the answer that a text-to-text model writes."""
    return [(example.source_tokens, len(example.target_ids)) for example in examples]


def measure(task: str, model: Any, data: EncodedTask, pad_id: int, batches: int) -> dict[str, Any]:
    """Train the same examples at their own length and at the fixed one, in turn."""
    batch_size, source, target = SETTINGS[task]
    order = BatchOrder(len(data.train), batch_size, 0, lengths_of(data.train))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    times: dict[str, list[float]] = {"grouped": [], "fixed": []}
    tokens, differences = [], []
    for step in range(batches + 1):
        examples = [data.train[index] for index in order.indices(step)]
        losses = {}
        for way, (longest, answer) in {"grouped": (None, None), "fixed": (source, target)}.items():
            batch = training_batch(
                examples,
                pad_id=pad_id,
                text_to_text=task == "squad",
                regression=False,
                device=DEVICE,
                source_length=longest,
                target_length=answer,
            )
            seconds = timed(lambda batch=batch: _step(model, optimizer, batch.inputs), DEVICE)
            with torch.no_grad():
                losses[way] = per_example_loss(model, batch.inputs)
            if step:
                times[way].append(seconds)
        tokens.append(sum(sum(both) for both in lengths_of(examples)))
        differences.append(float(((losses["grouped"] - losses["fixed"]) / losses["fixed"]).abs().max()))
    speeds = {way: [n / s for n, s in zip(tokens[1:], values, strict=True)] for way, values in times.items()}
    return {
        "real_tokens_per_s": {way: summary(values) for way, values in speeds.items()},
        "grouped_over_fixed": summary([a / b for a, b in zip(speeds["grouped"], speeds["fixed"], strict=True)]),
        "largest_relative_difference_of_a_loss": max(differences),
    }


def _step(model: Any, optimizer: torch.optim.Optimizer, inputs: dict[str, Tensor]) -> None:
    model(**inputs).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def per_example_loss(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Loss of each example, (B,): of a class, or summed over an answer's tokens."""
    logits, labels = model(**inputs).logits.float(), inputs["labels"]
    if labels.dim() == 1:
        return torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(dim=-1)


def main() -> None:
    """Measure the three tasks and store the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--batches", type=int, default=12)
    asked = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(asked.encoder)
    figures: dict[str, Any] = {}
    for task, (batch_size, source, target) in SETTINGS.items():
        data = load(task, asked.data, tokenizer, source, target)
        model = build_model(task, asked.encoder)
        computed = source + target * (task == "squad")
        figures[task] = {
            "examples": len(data.train),
            "batch_size": batch_size,
            "real_share_grouped": real_share(data.train, batch_size, grouped=True),
            "real_share_ungrouped": real_share(data.train, batch_size, grouped=False),
            "real_share_fixed": sum(sum(both) for both in lengths_of(data.train)) / (computed * len(data.train)),
            **measure(task, model, data, tokenizer.pad_token_id, asked.batches),
        }
    aims = {"real share": "at least 0.9", "grouped over fixed on squad": "at least 2"}
    store("padding", {"tasks": figures, "aims": aims})


def build_model(task: str, encoder: str) -> Any:
    """The encoder with LoRA, or a T5 of random weights; dropout off, so that losses can be compared."""
    if task == "squad":
        base = build_t5("small", quantization="none", dtype=torch.float32, device=DEVICE)
        config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type=TaskType.SEQ_2_SEQ_LM)
        return get_peft_model(base, config).eval()
    loaded = load_base(encoder, "bert", device=DEVICE)
    return attach_adapter(loaded, Lora(16, 32.0, 0.0, "all-linear"), outputs=2).eval()


if __name__ == "__main__":
    main()
