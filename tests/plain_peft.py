"""Fine-tuning and counting as anybody would do it with transformers, peft and torch: the oracle of what we do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from PIL import Image
from torch import Tensor
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    ViTImageProcessorPil,
)
from transformers.pytorch_utils import Conv1D

from deft_ray.models.families import FAMILIES
from deft_ray.models.heads import renew_head
from deft_ray.spec.schema import TrialSpec


def train_plain(
    folder: Path,
    sources: Sequence[str | tuple[str, str] | Image.Image],
    answers: Sequence[str] | Sequence[int],
    spec: TrialSpec,
    adapter: PeftConfig | None = None,
    head: Mapping[str, Tensor] | None = None,
    *,
    flat: bool = False,
    double: bool = False,
) -> tuple[list[float], dict[str, Tensor]]:
    """Fine-tune a T5, or a model with a head, with an adapter and a linear schedule without warm-up.

    Args:
        folder: The pretrained model.
        sources: Training texts, or pairs of them, or images.
        answers: Their answers, or their classes.
        spec: Where the settings come from.
        adapter: PEFT's own description of the adapter; the LoRA of ``spec`` if None.
        head: What a model with a head starts from: its trained tensors, head and adapter, by name.
        flat: Step on all trained tensors laid end to end, as ZeRO does: torch's fused AdamW rounds the last few entries
            of a tensor otherwise than the others on some CPUs.
        double: Compute in float64, whatever the dtype of ``spec``.

    Returns:
        The loss of every step, and every trained tensor by its name in the PEFT model.
    """
    train, steps = spec.train, spec.train.steps or 0
    options: dict[str, Any] = {"dtype": torch.float64 if double else spec.model.dtype}
    if spec.model.quantization == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=spec.model.double_quant,
            bnb_4bit_compute_dtype=spec.model.dtype,
            llm_int8_skip_modules=["lm_head", "classifier"],
        )
    if isinstance(sources[0], Image.Image):
        tokenizer = ViTImageProcessorPil.from_pretrained(folder)
        model = AutoModelForImageClassification.from_pretrained(folder, num_labels=len(set(answers)), **options)
    elif head is None:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForSeq2SeqLM.from_pretrained(folder, **options)
    else:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(set(answers)), **options)
        if model.config.model_type in ("opt", "gpt2"):  # answers come from the last token; GPT-2 has no padding
            tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
            model.config.pad_token_id = tokenizer.pad_token_id
    passed_over = spec.adapter.head == "two-layer" and model.config.model_type == "bert"
    if spec.adapter.head == "two-layer":
        renew_head(model, FAMILIES[model.config.model_type], len(set(answers)), two_layers=True)
    torch.manual_seed(spec.seed)
    config = LoraConfig(
        r=spec.adapter.r,
        lora_alpha=spec.adapter.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=spec.adapter.lora_dropout,
        target_modules=spec.adapter.target_modules,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        task_type=TaskType.SEQ_2_SEQ_LM if head is None else TaskType.SEQ_CLS,
        modules_to_save=["classifier"] if model.config.model_type == "vit" else None,
        exclude_modules=["pooler.dense"] if passed_over else None,
    )
    if train.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    peft = get_peft_model(model, adapter or config)
    for name, p in peft.named_parameters() if head else ():
        if p.requires_grad:
            p.data.copy_(head[name])
    peft.train()
    trained = [p for p in peft.parameters() if p.requires_grad]
    whole = torch.nn.Parameter(torch.cat([p.detach().flatten() for p in trained]))
    optimizer = torch.optim.AdamW([whole] if flat else trained, weight_decay=train.weight_decay, fused=True)
    order = [
        index
        for epoch in range(steps * train.batch_size // len(sources) + 1)
        for index in torch.randperm(
            len(sources), generator=torch.Generator().manual_seed(spec.seed * 1_000_003 + epoch)
        ).tolist()
    ]
    losses = []
    for step in range(steps):
        picked = order[step * train.batch_size : (step + 1) * train.batch_size]
        how = {} if model.config.model_type == "vit" else {"padding": True}
        batch = dict(tokenizer([sources[index] for index in picked], return_tensors="pt", **how))
        if head is None:
            batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
            wanted = tokenizer([answers[index] for index in picked], padding=True, return_tensors="pt")
            labels = wanted["input_ids"].masked_fill(wanted["attention_mask"] == 0, -100)
        else:
            labels = torch.tensor([answers[index] for index in picked])
            if model.config.model_type == "gpt2":  # counts positions of padding too unless it is told
                batch["position_ids"] = (batch["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
        loss = peft(**batch, labels=labels).loss
        peft.zero_grad()
        loss.backward()
        if train.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(peft.parameters(), train.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate * (steps - step) / steps
        whole.grad = torch.cat([p.grad.flatten() for p in trained if p.grad is not None]) if flat else None
        optimizer.step()
        for p, part in zip(trained, whole.detach().split([p.numel() for p in trained]), strict=True) if flat else ():
            p.data.copy_(part.view_as(p))
        losses.append(float(loss.detach()))
    return losses, {name: p.detach().clone() for name, p in peft.named_parameters() if p.requires_grad}


class PlainCounts:
    """Non-zeros and totals by side, and by activation the neurons ever non-zero, one unpadded row at a time.

    Args:
        model: Whose activations; counted while ``on``.
        virtual: Positions that a prompt puts before the encoder's input; they count in ``every`` alone.
    """

    def __init__(self, model: torch.nn.Module, virtual: int = 0) -> None:
        self.nonzero, self.total, self.on = {"encoder": 0, "decoder": 0}, {"encoder": 0, "decoder": 0}, True
        self.every, self.virtual, self.used = [0, 0], virtual, dict[str, Tensor]()
        for name, module in model.named_modules():
            if name.endswith(("DenseReluDense.act", "intermediate_act_fn", "mlp.act", "activation_fn")):
                side = "decoder" if any(part in f".{name}" for part in (".decoder.", ".transformer.h.")) else "encoder"
                module.register_forward_hook(lambda _m, _i, act, side=side, name=name: self.add(side, name, act))

    def add(self, side: str, name: str, act: Tensor) -> None:
        if self.on:
            real = act[:, self.virtual :] if self.virtual and side == "encoder" else act
            self.nonzero[side] += int((real != 0).sum())
            self.total[side] += real.numel()
            used = (real != 0).reshape(-1, real.shape[-1]).any(dim=0)
            self.used[name] = self.used.get(name, used) | used
            self.every[0] += int((act != 0).sum())
            self.every[1] += act.numel()


def reopened(folder: Path, adapter: Path, outputs: int | None, virtual: int = 0) -> tuple[Any, Any, PlainCounts]:
    """Open a saved adapter as anybody would.

    Args:
        folder: The pretrained model.
        adapter: Folder of the adapter.
        outputs: Outputs of the head; None for a T5.
        virtual: See :class:`PlainCounts`.

    Returns:
        Tokenizer, PEFT model, counts of its activations.
    """
    if outputs is None:
        base = AutoModelForSeq2SeqLM.from_pretrained(folder)
    else:
        base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=outputs)
    model = PeftModel.from_pretrained(base, adapter).eval()
    return AutoTokenizer.from_pretrained(folder), model, PlainCounts(model, virtual)


def texts_of(tokenizer: Any, rows: Iterable[dict[str, Any]], columns: Iterable[str]) -> list[dict[str, Tensor]]:
    """Tokenise each row by itself, unpadded."""
    columns = tuple(columns)
    return [dict(tokenizer(*(row[column] for column in columns), return_tensors="pt")) for row in rows]


def answers_of_head(model: Any, inputs: Iterable[dict[str, Tensor]]) -> list[float]:
    """Return what a head says of each row: the likeliest class, or the value where it has one output."""
    logits = [model(**row).logits[0] for row in inputs]
    return [float(row[0]) if len(row) == 1 else float(row.argmax()) for row in logits]
