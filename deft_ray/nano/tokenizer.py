"""The nano tokenizer: a unigram tokenizer whose pieces are written down instead of learned.

Every word of the generated text is one piece, so a label word is one token. Anything else is spelled with one- and
two-letter pieces; a character outside ``CHARACTERS`` becomes the unknown token.
"""

from __future__ import annotations

from itertools import product
from string import ascii_lowercase

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from deft_ray.nano.skills import CHARACTERS, SENTINELS, VOCABULARY

PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"

# Log-probabilities, set so that the fewest pieces win: one word before any spelling, one pair before two letters.
_WORD, _BLANK, _CHARACTER, _PAIR = -8.0, -6.0, -10.0, -14.0


def build_tokenizer(max_length: int = 512) -> PreTrainedTokenizerFast:
    """Build the tokenizer; it lower-cases, and ends every text with ``</s>`` as T5's does.

    Args:
        max_length: Longest input in tokens when truncation is asked for.
    """
    tokenizer = Tokenizer(models.Unigram(_pieces(), unk_id=2, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Strip(), normalizers.Replace(Regex(r"\s+"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", pair=f"$A {EOS} $B {EOS}", special_tokens=[(EOS, 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        additional_special_tokens=list(SENTINELS),
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
    )


def _pieces() -> list[tuple[str, float]]:
    special = [(piece, 0.0) for piece in (PAD, EOS, UNKNOWN, *SENTINELS)]
    words = [(f"▁{word}", _WORD) for word in VOCABULARY]
    letters = [(character, _CHARACTER) for character in CHARACTERS]
    pairs = [(first + second, _PAIR) for first, second in product(ascii_lowercase, repeat=2)]
    pieces = [*special, ("▁", _BLANK), *words, *letters, *pairs]
    return pieces + [(f"<unused_{number}>", _PAIR * 10) for number in range(-len(pieces) % 64)]
