"""An encoder-decoder in its two halves, each with what the adapter adds to it.

The encoder runs once per source, the decoder over any number of answers. Virtual tokens are no module that the base
would meet on its way: whoever calls the base's own encoder passes a prompt by, so it is called here.

Shape suffixes: B batch, T tokens, D d_model.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from peft import PeftModel, PrefixTuningConfig
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig
from transformers.modeling_outputs import BaseModelOutput

from deft_ray.models.adapters import virtual_positions


def encode(model: PeftModel, source: Mapping[str, Tensor]) -> Any:
    """Run the encoder.

    Args:
        model: With any adapter.
        source: ``input_ids`` and ``attention_mask``, (B, T).

    Returns:
        The encoder's output; ``last_hidden_state`` is (B, virtual positions + T, D).
    """
    base: Any = model.get_base_model()
    if not virtual_positions(model):
        return base.get_encoder()(**source)
    embed: Any = model.word_embeddings
    embedded_BTD = embed(source["input_ids"])
    prompt_BTD = model.get_prompt(batch_size=len(embedded_BTD)).to(embedded_BTD.dtype)
    return base.get_encoder()(
        inputs_embeds=torch.cat([prompt_BTD, embedded_BTD], dim=1),
        attention_mask=_attended(model, source["attention_mask"]),
    )


def new_cache(model: PeftModel) -> EncoderDecoderCache | None:
    """Make room for what decoder passes over one batch of sources would find anew: their keys and values.

    It has those of the last pass's own tokens too. None with prefix tuning, which puts its own there.
    """
    if isinstance(model.active_peft_config, PrefixTuningConfig):
        return None
    return EncoderDecoderCache(DynamicCache(), DynamicCache())


def decode(
    model: PeftModel,
    encoded_BTD: Tensor,
    mask_BT: Tensor,
    labels_BT: Tensor,
    cache: EncoderDecoderCache | None = None,
    *,
    first_only: bool = False,
) -> Tensor:
    """Run the decoder under teacher forcing.

    Args:
        model: With any adapter.
        encoded_BTD: What :func:`encode` found, one row per answer.
        mask_BT: The source's mask, without virtual positions.
        labels_BT: Answers; -100 where there is none.
        cache: Of :func:`new_cache`: filled by the first pass over a batch, read by the others.
        first_only: Whether only the first position's logits are asked for: a fifth of the pass makes the others.

    Returns:
        Logits, (B, T of the labels, or 1, vocabulary). Of the first position alone they are no numbers in rows in which
        the decoder found at any position what is none.
    """
    base: Any = model.get_base_model()
    with _first_position(base) if first_only else nullcontext():
        logits: Tensor = model(
            input_ids=mask_BT.new_empty(len(mask_BT), 0),  # read for the number of rows alone
            encoder_outputs=BaseModelOutput(encoded_BTD),
            attention_mask=mask_BT,
            decoder_input_ids=base.prepare_decoder_input_ids_from_labels(labels=labels_BT),  # without a loss
            **_cached(cache, DynamicCache()),
        ).logits
    return logits


@contextmanager
def _first_position(base: Any) -> Iterator[None]:
    """Let the model's head see the first position of each row only."""

    def cut(_head: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
        (hidden_BTD,) = given
        is_bad_B11 = ~hidden_BTD.isfinite().all(dim=-1).all(dim=-1).reshape(-1, 1, 1)
        return (hidden_BTD[:, :1].masked_fill(is_bad_B11, torch.nan),)

    hook = base.get_output_embeddings().register_forward_pre_hook(cut)
    try:
        yield
    finally:
        hook.remove()


def first_tokens(model: PeftModel, logits_BTV: Tensor, cache: EncoderDecoderCache | None) -> Tensor | None:
    """Return the first token of each greedy answer, (B,), which a pass under teacher forcing has found by the way.

    Args:
        model: With any adapter.
        logits_BTV: What :func:`decode` found with ``cache``.
        cache: Of :func:`new_cache`.

    Returns:
        None if generation has to begin by itself: without a cache, or where the checkpoint's ``generation_config`` asks
        for more than the likeliest token (a first token, penalties, several ends).
    """
    base: Any = model.get_base_model()
    config: GenerationConfig = base.generation_config
    plain = config.to_diff_dict().keys() <= _WITHOUT_EFFECT | {"eos_token_id", "pad_token_id", "decoder_start_token_id"}
    known = isinstance(config.eos_token_id, int) and isinstance(config.pad_token_id, int)
    alike = config.decoder_start_token_id == base.config.decoder_start_token_id
    return logits_BTV[:, 0].argmax(dim=-1) if cache is not None and plain and known and alike else None


#: Of ``generation_config``: without a say in a greedy answer, or given by :func:`generate`.
_WITHOUT_EFFECT = frozenset(
    (
        *("_from_model_config", "transformers_version", "output_attentions", "output_hidden_states", "use_cache"),
        *("max_length", "max_new_tokens", "do_sample", "num_beams", "early_stopping", "length_penalty"),
        *("temperature", "top_k", "top_p", "bos_token_id"),
    )
)


def generate(
    model: PeftModel,
    encoded: Any,
    source: Mapping[str, Tensor],
    max_new_tokens: int,
    cache: EncoderDecoderCache | None = None,
    first_B: Tensor | None = None,
) -> Tensor:
    """Answer greedily.

    Args:
        model: With any adapter.
        encoded: What :func:`encode` found.
        source: What it found it in.
        max_new_tokens: Longest answer.
        cache: As of :func:`decode`.
        first_B: Of :func:`first_tokens`, if the last pass with ``cache`` has found it: goes on from there.

    Returns:
        Token ids, (B, T), the decoder's start first.
    """
    pieces = generate_in_pieces(model, encoded, source, max_new_tokens, cache, first_B, lambda: max_new_tokens)
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            tokens: Tensor = end.value
            return tokens


def generate_in_pieces(
    model: PeftModel,
    encoded: Any,
    source: Mapping[str, Tensor],
    max_new_tokens: int,
    cache: EncoderDecoderCache | None,
    first_B: Tensor | None,
    at_once: Callable[[], int],
) -> Generator[None, None, Tensor]:
    """Do the same, pausing after some tokens: between two pieces the model may do something else.

    Args:
        model: As of :func:`generate`, and so are the others.
        encoded: As of it.
        source: As of it.
        max_new_tokens: As of it.
        cache: As of it.
        first_B: As of it; without it there is one piece.
        at_once: Tells by how many tokens, at least one, answers may grow in the next piece.
    """
    base: Any = model.get_base_model()
    options: dict[str, Any] = {"do_sample": False, "num_beams": 1, "use_cache": True}
    if isinstance(model.active_peft_config, PrefixTuningConfig):
        whole: Tensor = model.generate(**source, encoder_outputs=encoded, max_new_tokens=max_new_tokens, **options)
        return whole
    options |= {"encoder_outputs": encoded, "attention_mask": _attended(model, source["attention_mask"])}
    if first_B is None:
        tokens: Tensor = base.generate(**options | _cached(cache, DynamicCache()), max_new_tokens=max_new_tokens)
        return tokens
    assert cache is not None, "without a cache no pass has found a first token"
    config = base.generation_config
    tokens = torch.stack([torch.full_like(first_B, config.decoder_start_token_id), first_B], dim=1)
    options |= _cached(cache, _start_of(cache.self_attention_cache))
    while True:
        done = tokens.shape[1]
        ended_B1 = (tokens[:, 1:] == config.eos_token_id).any(dim=1, keepdim=True)
        if done > max_new_tokens or ended_B1.all():
            return tokens
        if done > 2:
            yield
        # with the mask, generation takes the tokens for all there are, and passes those beyond the cache
        given = {"decoder_input_ids": tokens, "decoder_attention_mask": torch.ones_like(tokens)}
        count = min(at_once(), max_new_tokens + 1 - done)
        ends = [lambda *_, ended_B1=ended_B1: ended_B1.squeeze(1)]  # of which generation has seen nothing
        tokens = base.generate(**options, **given, max_new_tokens=count, stopping_criteria=ends)
        tokens[:, done:] = tokens[:, done:].masked_fill(ended_B1, config.pad_token_id)
        if tokens.shape[1] < done + count:  # all have ended
            return tokens


def _cached(cache: EncoderDecoderCache | None, own: DynamicCache) -> dict[str, Any]:
    """Options of a decoder that begins or goes on with an answer to sources whose keys and values may be known."""
    if cache is None:
        return {}
    cache.self_attention_cache = own
    return {"past_key_values": cache, "use_cache": True}


def _start_of(cache: DynamicCache) -> DynamicCache:
    """Keep the keys and values of the decoder's start alone, which are the same before any answer."""
    start, layers = DynamicCache(), cast("list[Any]", cache.layers)
    for index, layer in enumerate(layers):
        start.update(layer.keys[:, :, :1], layer.values[:, :, :1], index)
    return start


def _attended(model: PeftModel, mask_BT: Tensor) -> Tensor:
    """Widen a source's mask by the virtual positions, to which everybody attends."""
    return torch.cat([mask_BT.new_ones(len(mask_BT), virtual_positions(model)), mask_BT], dim=1)
