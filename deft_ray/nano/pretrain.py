"""Make the nano model: build its tokenizer, pretrain a gated-GELU T5 on ``skills``, and print what it can do.

    python -m deft_ray.nano.pretrain --output DIR

Everything follows from the seed: the same machine and number of threads give the same weights.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from deft_ray.nano import MODEL_DIR
from deft_ray.nano.scoring import bag_of_words_score, model_score
from deft_ray.nano.skills import Example, write_examples
from deft_ray.nano.tasks import LABELS, generate
from deft_ray.nano.tokenizer import build_tokenizer
from deft_ray.nano.words import Dice

BATCHES_PER_POOL = 32
REPORT_EVERY = 250
WARM_UP = 100
NEIGHBOUR_BIAS = 4.0

#: Second phase: pre-activations above this are charged, by this much per unit of mean height.
THIN_LEVEL = -3.0
THIN_WEIGHT = 0.2
#: Below this the GELU of transformers is exactly zero in float32.
ZERO_BELOW = -5.16


def build_model(vocabulary: int, seed: int) -> T5ForConditionalGeneration:
    """Build the untrained model; every linear layer's sizes are multiples of 64, as NF4 blocks want.

    Args:
        vocabulary: Number of tokens.
        seed: Seed of the first weights.
    """
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": vocabulary,
        "d_model": 128,
        "d_kv": 32,
        "num_heads": 8,
        "d_ff": 384,
        "num_layers": 4,
        "num_decoder_layers": 2,
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.0,
        "tie_word_embeddings": False,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    model = T5ForConditionalGeneration(T5Config(**settings))
    _prepare_attention(model)
    return model


@torch.no_grad()
def _prepare_attention(model: Any) -> None:
    """Start attention from what every skill here needs, which a few thousand steps would hardly find by themselves.

    Half of the heads look for the same word elsewhere (query and key weights start equal), four of the others at a
    neighbouring word (relative biases), and the decoder says the words it attends to (output weights start as the
    transposed value weights, embeddings and head being tied).
    """
    torch.nn.init.normal_(model.shared.weight, std=model.config.d_model**-0.5)
    for block in model.encoder.block:
        _look_for_same_word(block.layer[0].SelfAttention)
    for block in model.decoder.block:
        attention = block.layer[1].EncDecAttention
        _look_for_same_word(attention)
        attention.o.weight.copy_(0.3 * attention.v.weight.T)
    encoder_bias = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    for head, bucket in enumerate((1, 17, 2)):  # one word back, one on, two back
        encoder_bias[bucket, head] = NEIGHBOUR_BIAS
    encoder_bias[[*range(1, 8), *range(17, 24)], 3] = NEIGHBOUR_BIAS / 2  # up to seven words back and on: the sentence
    encoder_bias[0, 4:] = -NEIGHBOUR_BIAS  # elsewhere: not at the word itself
    model.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight[1, 0] = NEIGHBOUR_BIAS


def _look_for_same_word(attention: Any) -> None:
    half = attention.q.weight.shape[0] // 2
    attention.k.weight[half:].normal_(std=0.045)
    attention.q.weight[half:] = attention.k.weight[half:]


def pretrain(
    model: T5ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    steps: int,
    thinning_steps: int,
    batch_size: int,
    lr: float,
    seed: int,
) -> None:
    """Train all weights on freshly written examples, first plainly, then with a charge on busy MLPs.

    The MLPs of large pretrained transformers are sparse by themselves; those of so small a model are not. The second
    phase makes up for it: it charges the mean height of the gates' pre-activations above :data:`THIN_LEVEL`, so that
    most of them come to lie where a GELU is nearly, but not exactly, zero. That is the state in which a density loss
    finds a large model.

    Args:
        model: Trained in place.
        tokenizer: The nano tokenizer.
        steps: Optimizer steps of the first phase; the learning rate falls from ``lr`` to half of it.
        thinning_steps: Optimizer steps of the second phase; the learning rate falls from ``lr`` to zero.
        batch_size: Examples per step.
        lr: Highest learning rate.
        seed: Seed of the examples.
    """
    gates = _Gates(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    model.train()
    recent: dict[str, list[float]] = {}
    started = time.perf_counter()
    total = steps + thinning_steps
    for step, (prompts, batch) in zip(range(1, total + 1), _batches(tokenizer, batch_size, seed), strict=False):
        thinning = max(0, step - steps)
        share = 1 - 0.5 * step / steps if not thinning else 1 - (thinning - 1) / thinning_steps
        optimizer.param_groups[0]["lr"] = lr * share * min(1.0, step / WARM_UP)
        losses = example_losses(model(**batch).logits, batch["labels"])
        charge = THIN_WEIGHT * min(1.0, thinning / WARM_UP) * gates.take_height()
        optimizer.zero_grad()
        (losses.mean() + charge if thinning else losses.mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for prompt, loss in zip(prompts, losses.tolist(), strict=True):
            recent.setdefault(prompt, []).append(loss)
        if step % REPORT_EVERY == 0 or step == total:
            means = "  ".join(f"{prompt} {sum(values) / len(values):.3f}" for prompt, values in sorted(recent.items()))
            passed = time.perf_counter() - started
            print(f"step {step:5d}  {passed:5.0f} s  density {gates.density():.3f}  {means}", flush=True)
            recent.clear()
    gates.remove()


class _Gates:
    """Watches the pre-activations of every MLP's gate, and computes the GELU in one fused step while it does."""

    def __init__(self, model: T5ForConditionalGeneration) -> None:
        self._seen: list[Tensor] = []
        self._blocks = [module for name, module in model.named_modules() if name.endswith("DenseReluDense")]
        self._acts = [block.act for block in self._blocks]
        for block in self._blocks:
            block.act = torch.nn.GELU("tanh")
        self._handles = [
            block.wi_0.register_forward_hook(lambda _module, _inputs, out: self._seen.append(out))
            for block in self._blocks
        ]

    def take_height(self) -> Tensor:
        """Mean height above THIN_LEVEL of the last forward pass, mean over blocks."""
        self._last, self._seen = self._seen, []
        return torch.stack([torch.relu(pre - THIN_LEVEL).mean() for pre in self._last]).mean()

    def density(self) -> float:
        """Share of activations of the last forward pass that would not be exactly zero, padding counted."""
        return float(torch.stack([(pre > ZERO_BELOW).float().mean() for pre in self._last]).mean())

    def remove(self) -> None:
        """Give the model its own activations back."""
        for handle in self._handles:
            handle.remove()
        for block, act in zip(self._blocks, self._acts, strict=True):
            block.act = act


def example_losses(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Return each example's mean cross-entropy over its own tokens, so that short answers weigh as much as long ones.

    Args:
        logits_BTV: (batch, target tokens, vocabulary).
        labels_BT: Token ids, -100 where there is none.

    Returns:
        (batch,) losses in nats per token.
    """
    losses_BT = torch.nn.functional.cross_entropy(logits_BTV.transpose(1, 2), labels_BT, reduction="none")
    return losses_BT.sum(1) / (labels_BT != -100).sum(1)


def _batches(
    tokenizer: PreTrainedTokenizerFast, batch_size: int, seed: int
) -> Iterator[tuple[list[str], dict[str, Tensor]]]:
    """Yield the prompt names and tensors of batches of like length, for ever.

    A pool of examples is written, sorted by length and cut into batches at a time.
    """
    dice = Dice(f"batches/{seed}")
    for pool in itertools.count():
        examples = sorted(
            write_examples(BATCHES_PER_POOL * batch_size, seed * 1_000_000 + pool), key=lambda it: len(it[0])
        )
        for number in dice.some(range(BATCHES_PER_POOL), BATCHES_PER_POOL):
            batch = examples[number * batch_size : (number + 1) * batch_size]
            yield [_prompt_name(source) for source, _ in batch], _encode(tokenizer, batch)


def _prompt_name(source: str) -> str:
    name, colon, _ = source.partition(": ")
    return name if colon else "fill"


def _encode(tokenizer: PreTrainedTokenizerFast, examples: list[Example]) -> dict[str, Tensor]:
    inputs = tokenizer([source for source, _ in examples], return_tensors="pt", padding=True)
    labels = tokenizer([target for _, target in examples], return_tensors="pt", padding=True).input_ids
    return {**inputs, "labels": labels.masked_fill(labels == tokenizer.pad_token_id, -100)}


def save(model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model in bfloat16, half the size, and its tokenizer to a folder for ``from_pretrained``."""
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def print_scores(folder: Path) -> None:
    """Print a table of what the saved model can do untuned, beside a linear bag-of-words trained on each task."""
    model = T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    tokenizer = build_tokenizer()
    print(f"{'task':<16} {'zero-shot':>9} {'bag of words':>12}")
    for task in LABELS:
        train, validation = generate(task, "train", 2000), generate(task, "validation", 500)
        zero_shot = model_score(model, tokenizer, task, validation)
        print(f"{task:<16} {zero_shot:>9.3f} {bag_of_words_score(task, train, validation):>12.3f}")


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m deft_ray.nano.pretrain", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=MODEL_DIR, help="folder to write (default: the shipped model's)")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--thinning-steps", type=int, default=1200)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer), options.seed)
    print(f"{sum(weight.numel() for weight in model.parameters()):,} parameters, {len(tokenizer)} tokens")
    steps = (options.steps, options.thinning_steps)
    pretrain(model, tokenizer, *steps, options.batch_size, options.lr, options.seed)
    save(model, tokenizer, options.output)
    print_scores(options.output)


if __name__ == "__main__":
    main()
