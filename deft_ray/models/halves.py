"""An encoder-decoder in its two halves, each with what the adapter adds to it.

The encoder runs once per source, the decoder over any number of answers. Virtual tokens are no module that the base
would meet on its way: whoever calls the base's own encoder passes a prompt by, so it is called here.

Shape suffixes: B batch, T tokens, D d_model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel, PrefixTuningConfig
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache
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


def new_cross(model: PeftModel) -> DynamicCache | None:
    """Make room for the keys and values of one batch of sources, so that decoder passes over it compute them once.

    None with prefix tuning, which puts its own there.
    """
    return None if isinstance(model.active_peft_config, PrefixTuningConfig) else DynamicCache()


def decode(
    model: PeftModel, encoded_BTD: Tensor, mask_BT: Tensor, labels_BT: Tensor, cross: DynamicCache | None = None
) -> Tensor:
    """Run the decoder under teacher forcing.

    Args:
        model: With any adapter.
        encoded_BTD: What :func:`encode` found, one row per answer.
        mask_BT: The source's mask, without virtual positions.
        labels_BT: Answers; -100 where there is none.
        cross: Of :func:`new_cross`: filled by the first pass over a batch, read by the others.

    Returns:
        Logits, (B, T of the labels, vocabulary).
    """
    logits: Tensor = model(
        input_ids=mask_BT.new_empty(len(mask_BT), 0),  # read for the number of rows alone
        encoder_outputs=BaseModelOutput(encoded_BTD),
        attention_mask=mask_BT,
        labels=labels_BT,
        **_cached(cross),
    ).logits
    return logits


def generate(
    model: PeftModel,
    encoded: Any,
    source: Mapping[str, Tensor],
    max_new_tokens: int,
    cross: DynamicCache | None = None,
) -> Tensor:
    """Answer greedily.

    Args:
        model: With any adapter.
        encoded: What :func:`encode` found.
        source: What it found it in.
        max_new_tokens: Longest answer.
        cross: As of :func:`decode`.

    Returns:
        Token ids, (B, T).
    """
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1, "use_cache": True}
    options |= _cached(cross)
    if isinstance(model.active_peft_config, PrefixTuningConfig):
        tokens: Tensor = model.generate(**source, encoder_outputs=encoded, **options)
    else:
        base: Any = model.get_base_model()
        mask_BT = _attended(model, source["attention_mask"])
        tokens = base.generate(encoder_outputs=encoded, attention_mask=mask_BT, **options)
    return tokens


def _cached(cross: DynamicCache | None) -> dict[str, Any]:
    """Options of a decoder that begins an answer to sources whose keys and values may be known."""
    return {} if cross is None else {"past_key_values": EncoderDecoderCache(DynamicCache(), cross), "use_cache": True}


def _attended(model: PeftModel, mask_BT: Tensor) -> Tensor:
    """Widen a source's mask by the virtual positions, to which everybody attends."""
    return torch.cat([mask_BT.new_ones(len(mask_BT), virtual_positions(model)), mask_BT], dim=1)
