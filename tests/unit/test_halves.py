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
from deft_ray.models.halves import decode, encode, first_tokens, generate, generate_in_pieces, new_cache

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
def test_the_first_position_alone_is_what_it_is_among_others(base: Base, model: PeftModel) -> None:
    close = 1e-5 if base.dtype == "float32" else 0.03
    encoded, head = encode(model, source()).last_hidden_state, model.get_base_model().lm_head
    want = decode(model, encoded, MASK, LABELS)[:, :1]
    first = decode(model, encoded, MASK, LABELS, new_cache(model), first_only=True)
    assert first.shape == want.shape
    torch.testing.assert_close(first, want, rtol=close, atol=close)
    assert first_tokens(model, first, new_cache(model)) is None or torch.equal(first.argmax(-1), want.argmax(-1))
    assert not head._forward_pre_hooks


@torch.no_grad()
def test_what_is_no_number_at_a_later_position_is_seen_at_the_first(model: PeftModel) -> None:
    encoded, decoder = encode(model, source()).last_hidden_state, model.get_base_model().decoder

    def spoil(_decoder: torch.nn.Module, _given: object, found: dict[str, Tensor]) -> None:
        found["last_hidden_state"][1, 2, 3] = torch.inf

    hook = decoder.register_forward_hook(spoil)
    first = decode(model, encoded, MASK, LABELS, first_only=True)
    hook.remove()
    assert first.isfinite().all(dim=-1).squeeze(1).tolist() == [True, False, True]


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
    cache = new_cache(model)
    got = [decode(model, hidden_BTD, MASK, LABELS, cache), generate(model, encoded, source(), 6, cache)]
    got.append(decode(model, hidden_BTD, MASK, other, cache))
    for hook in hooks:
        hook.remove()

    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
    assert len(passes) == len(layers) * (1 if cache is not None else 3)


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


@torch.no_grad()
def test_an_answer_goes_on_from_the_first_token_that_another_pass_has_found(model: PeftModel) -> None:
    """Token for token what is written from the start, in one pass of the decoder less, for any longest answer."""
    base, encoded = model.get_base_model(), encode(model, source())
    passes: list[int] = []
    hook = base.decoder.register_forward_hook(lambda *_: passes.append(1))
    for longest in (1, 2, 6):
        want = generate(model, encoded, source(), longest)
        cache, alone = new_cache(model), len(passes)
        first_B = first_tokens(model, decode(model, encoded.last_hidden_state, MASK, LABELS, cache), cache)
        passes.clear()
        got = generate(model, encoded, source(), longest, cache, first_B)

        assert torch.equal(got, want)
        assert (first_B is None) == (cache is None)
        assert len(passes) == (alone if first_B is None else alone - 1) <= longest
        passes.clear()
    hook.remove()


@pytest.mark.parametrize("at_once", [1, 2, 4])
@torch.no_grad()
def test_an_answer_in_pieces_is_the_answer(model: PeftModel, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    """Token for token, whatever the model does in between; the third token of one row is made the end of an answer."""
    base, encoded = model.get_base_model(), encode(model, source())
    end = int(generate(model, encoded, source(), 6)[1, 3])
    monkeypatch.setattr(base.generation_config, "eos_token_id", end)
    want = generate(model, encoded, source(), 6)
    cache = new_cache(model)
    first_B = first_tokens(model, decode(model, encoded.last_hidden_state, MASK, LABELS, cache), cache)
    pieces = generate_in_pieces(model, encoded, source(), 6, cache, first_B, lambda: at_once)
    pauses = 0
    while True:
        try:
            next(pieces)
        except StopIteration as stop:
            got = stop.value
            break
        decode(model, encoded.last_hidden_state.flip(0), MASK.flip(0), LABELS)
        pauses += 1

    assert torch.equal(got, want)
    assert end in got[1, 1:4].tolist()
    longest = got.shape[1] - 2 if first_B is not None else 1
    assert pauses == -(-longest // at_once) - 1


@pytest.mark.parametrize("ended", [1, 3])
@torch.no_grad()
def test_an_answer_that_ends_with_its_first_token_is_not_gone_on_with(
    model: PeftModel, monkeypatch: pytest.MonkeyPatch, ended: int
) -> None:
    """What a row writes first is made the end of an answer; in a batch of it alone, nothing more is passed."""
    base, asked = model.get_base_model(), {key: value[:ended] for key, value in source().items()}
    encoded = encode(model, asked)
    end = int(generate(model, encoded, asked, 1)[0, 1])
    monkeypatch.setattr(base.generation_config, "eos_token_id", end)
    want = generate(model, encoded, asked, 6)
    cache = new_cache(model)
    logits = decode(model, encoded.last_hidden_state, MASK[:ended], LABELS[:ended], cache)
    got = generate(model, encoded, asked, 6, cache, first_tokens(model, logits, cache))

    assert torch.equal(got, want)
    assert got[0, 1:].tolist() == [end] + [0] * (got.shape[1] - 2)
    assert got.shape[1] > 2 or ended == 1


@pytest.mark.parametrize(
    "asked",
    [
        {"eos_token_id": [1, 5]},
        {"pad_token_id": None},
        {"decoder_start_token_id": 3},
        {"forced_eos_token_id": 1},
        {"suppress_tokens": [7]},
        {"repetition_penalty": 1.5},
    ],
    ids=str,
)
@torch.no_grad()
def test_a_checkpoint_that_asks_for_more_than_the_likeliest_token_begins_by_itself(
    model: PeftModel, monkeypatch: pytest.MonkeyPatch, asked: dict[str, object]
) -> None:
    cache = new_cache(model)
    logits = decode(model, encode(model, source()).last_hidden_state, MASK, LABELS, cache)
    assert (first_tokens(model, logits, cache) is None) == (cache is None)
    for key, value in asked.items():
        monkeypatch.setattr(model.get_base_model().generation_config, key, value)
    assert first_tokens(model, logits, cache) is None
