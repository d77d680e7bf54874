"""Encoder and decoder by themselves say what PEFT's whole model says, whatever the adapter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from deft_ray.models.adapters import Adapter, Bottleneck, Lora, Prefix, Prompt, attach_adapter, detach_adapter
from deft_ray.models.base import Base, load_base
from deft_ray.models.halves import decode, encode, generate, new_cross

KINDS: dict[str, Adapter] = {
    "lora": Lora(4, 8.0, 0.0, "all-linear"),
    "bottleneck": Bottleneck(8),
    "prefix": Prefix(5),
    "prompt": Prompt(5),
}

SOURCE = torch.arange(24).reshape(3, 8) + 40
MASK = torch.tensor([[1] * 8, [1] * 5 + [0] * 3, [1] * 7 + [0]])
LABELS = torch.tensor([[50, 60, 1, -100], [70, 1, -100, -100], [80, 90, 95, 1]])


@pytest.fixture(scope="module", params=[("none", "float32"), ("nf4", "float32"), ("nf4", "bfloat16")], ids=" ".join)
def base(request: pytest.FixtureRequest, tiny_models: dict[str, Path]) -> Base:
    quantization, dtype = request.param
    return load_base(str(tiny_models["t5"]), "t5", quantization=quantization, dtype=dtype)


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, base: Base) -> Iterator[PeftModel]:
    """An adapter that is far from its start."""
    torch.manual_seed(0)
    model = attach_adapter(base, KINDS[request.param], outputs=None).eval()
    dice = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=1.0 if request.param in ("prefix", "prompt") else 0.3, generator=dice)
    yield model
    detach_adapter(model)


def source() -> dict[str, Tensor]:
    return {"input_ids": SOURCE.where(MASK.bool(), 0), "attention_mask": MASK}


@torch.no_grad()
def test_the_halves_are_the_whole(model: PeftModel) -> None:
    whole = model(**source(), labels=LABELS)
    encoded = encode(model, source())
    logits = decode(model, encoded.last_hidden_state, MASK, LABELS)

    assert torch.equal(encoded.last_hidden_state, whole.encoder_last_hidden_state)
    assert torch.equal(logits, whole.logits)
    assert logits.shape == (3, 4, 512)


@torch.no_grad()
def test_many_answers_to_one_source(base: Base, model: PeftModel) -> None:
    """Rows of candidates against one full pass for each."""
    close = 1e-4 if base.dtype == "float32" else 0.1
    encoded = encode(model, source()).last_hidden_state.repeat_interleave(2, dim=0)
    answers = torch.tensor([[50, 1], [60, 1]]).repeat(3, 1)
    logits = decode(model, encoded, MASK.repeat_interleave(2, dim=0), answers)

    for row in range(6):
        whole = model(
            **{key: value[row // 2 : row // 2 + 1] for key, value in source().items()}, labels=answers[row : row + 1]
        )
        torch.testing.assert_close(logits[row], whole.logits[0], rtol=close, atol=close)


@torch.no_grad()
def test_answers_are_those_of_pefts_own_generation(model: PeftModel) -> None:
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 1}
    want = model.generate(**source(), **options)
    got = generate(model, encode(model, source()), source(), 6)

    assert torch.equal(got, want)
    assert len({tuple(row) for row in got.tolist()}) > 1


@torch.no_grad()
def test_keys_and_values_of_the_source_are_computed_once(model: PeftModel) -> None:
    """Bit for bit what is found without; and the layers that make them run once for three passes over the answers."""
    encoded = encode(model, source())
    hidden_BTD, other = encoded.last_hidden_state, LABELS.flip(0).contiguous()
    want = [decode(model, hidden_BTD, MASK, LABELS), generate(model, encoded, source(), 6)]
    want.append(decode(model, hidden_BTD, MASK, other))
    passes = []
    layers = [layer for name, layer in model.named_modules() if name.endswith("EncDecAttention.k")]
    hooks = [layer.register_forward_hook(lambda *_: passes.append(1)) for layer in layers]
    cross = new_cross(model)
    got = [decode(model, hidden_BTD, MASK, LABELS, cross), generate(model, encoded, source(), 6, cross)]
    got.append(decode(model, hidden_BTD, MASK, other, cross))
    for hook in hooks:
        hook.remove()

    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
    assert len(passes) == len(layers) * (1 if cross is not None else 3)


@torch.no_grad()
def test_a_generated_answer_is_the_likeliest_under_teacher_forcing(base: Base, model: PeftModel) -> None:
    """Generation and evaluation see one model: each word is the argmax of the decoder that is told the words before.

    In bfloat16 the first and the second may round to one another: there it is as likely as the argmax, to a rounding.
    """
    encoded = encode(model, source())
    tokens = generate(model, encoded, source(), 5)
    logits = decode(model, encoded.last_hidden_state, MASK, tokens[:, 1:].contiguous()).float()

    best, told = logits.max(dim=-1)
    written = logits.gather(-1, tokens[:, 1:].unsqueeze(-1)).squeeze(-1)
    for row in range(3):
        answer = tokens[row, 1:].tolist()
        length = answer.index(1) + 1 if 1 in answer else len(answer)
        if base.dtype == "bfloat16":
            assert float((best - written)[row, :length].max()) <= 0.03 * float(logits.abs().max())
            continue
        assert told[row, :length].tolist() == answer[:length]
