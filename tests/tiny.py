"""Tiny models with random weights, made-up rows and images, laid out on disk as the real ones are.

Models have d_model 64, d_ff 128 and two layers a stack; every width is a multiple of 64, so NF4 takes them. The rows
have something to learn: what decides a label stands in the text.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    OPTConfig,
    OPTForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from deft_ray.spec.schema import (
    AdapterSection,
    DataSection,
    DeftSection,
    DialSection,
    ModelSection,
    TrainSection,
    TrialSpec,
)

Row = dict[str, Any]

VOCABULARY = 512
GLUE_TASKS = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")
#: Columns that every trial needs beside ``label`` and ``idx``.
GLUE_COLUMNS: dict[str, tuple[str, ...]] = {
    "cola": ("sentence",),
    "sst2": ("sentence",),
    "mrpc": ("sentence1", "sentence2"),
    "stsb": ("sentence1", "sentence2"),
    "qqp": ("question1", "question2"),
    "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"),
    "rte": ("sentence1", "sentence2"),
}

#: How a text-to-text model is asked for MRPC's label, and its answers.
MRPC = "mrpc sentence1: {sentence1} sentence2: {sentence2}"
MRPC_LABELS = ("not_equivalent", "equivalent")

_NOUNS = ("boat", "garden", "letter", "cousin", "kettle", "horse", "window", "tailor")
_GOOD = ("bright", "gentle", "splendid", "merry")
_BAD = ("dreary", "sour", "wretched", "clumsy")
_PLAIN = ("wooden", "small", "northern", "quiet", "second")
_COLOURS = ("red", "blue", "green")
_WORDS = (*_NOUNS, *_GOOD, *_BAD, *_PLAIN, *_COLOURS)


def write_tiny_t5(folder: Path, *, gated: bool = True, spread: float = 3.0, dropout: float = 0.1) -> Path:
    """Write a random T5 with its tokenizer.

    Args:
        folder: Where to.
        gated: Gated GELU as Flan-T5 has it, or the ReLU of the first T5.
        spread: Factor on the first MLP weights; at 3 a fair share of the activations is exactly zero.
        dropout: Dropout rate.
    """
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu" if gated else "relu",
        tie_word_embeddings=False,  # as Flan-T5's; see _untied_t5
        dropout_rate=dropout,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    specials = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = _tokenizer(specials, ["<pad>", "</s>", "<unk>"], "$A </s>", "$A </s> $B </s>")
    return _write(folder, lambda: _untied_t5(config), tokenizer, ("wi_0", "wi."), spread)


def write_tiny_bert(folder: Path, *, spread: float = 20.0, dropout: float = 0.1) -> Path:
    """Write a random BERT, less its task head, with its tokenizer; arguments as in :func:`write_tiny_t5`."""
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=512,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    specials = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    order = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer = _tokenizer(specials, order, "[CLS]:0 $A:0 [SEP]:0", "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1")
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return _write(folder, lambda: BertForSequenceClassification(config), tokenizer, ("intermediate.dense",), spread)


def write_tiny_roberta(folder: Path, *, spread: float = 20.0, dropout: float = 0.1) -> Path:
    """Write a random RoBERTa, less its task head, with its tokenizer; arguments as in :func:`write_tiny_t5`."""
    config = RobertaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=514,
        type_vocab_size=1,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
    )
    specials = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    order = ["<s>", "<pad>", "</s>", "<unk>"]
    tokenizer = _tokenizer(specials, order, "<s> $A </s>", "<s> $A </s> </s> $B </s>")
    return _write(folder, lambda: RobertaForSequenceClassification(config), tokenizer, ("intermediate.dense",), spread)


def write_tiny_gpt2(folder: Path, *, spread: float = 20.0, dropout: float = 0.1) -> Path:
    """Write a random GPT-2, less its task head; its tokenizer has no padding token, as the real one has none."""
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_inner=128,
        n_positions=512,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=0,
        eos_token_id=0,
    )
    specials = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    tokenizer = _tokenizer(specials, ["<|endoftext|>"], "$A", "$A $B")
    return _write(folder, lambda: GPT2ForSequenceClassification(config), tokenizer, ("mlp.c_fc",), spread)


def write_tiny_opt(folder: Path, *, dropout: float = 0.1, narrow: bool = False) -> Path:
    """Write a random OPT, less its task head, with its tokenizer.

    Args:
        folder: Where to.
        dropout: Dropout rate.
        narrow: As OPT-350m is: layer norm after the blocks, embeddings narrower than the hidden state.
    """
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=128,
        max_position_embeddings=512,
        word_embed_proj_dim=32 if narrow else 64,
        do_layer_norm_before=not narrow,
        dropout=dropout,
        init_std=0.1,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=2,
    )
    specials = {"bos_token": "</s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "</s>"}
    tokenizer = _tokenizer(specials, ["<s>", "<pad>", "</s>"], "</s> $A", "</s> $A </s> $B")
    return _write(folder, lambda: OPTForSequenceClassification(config), tokenizer, (), 1.0)


def write_tiny_vit(folder: Path, *, spread: float = 20.0, dropout: float = 0.1) -> Path:
    """Write a random ViT, less its task head, with its image processor: 16 patches of a 32 x 32 image."""
    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=32,
        patch_size=8,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    return _write(folder, lambda: ViTForImageClassification(config), processor, ("mlp.fc1",), spread)


def write_cifar10(folder: Path, rows: int = 30, validation_rows: int = 14) -> Path:
    """Write made-up images as the hub has CIFAR-10's: ``<folder>/cifar10/train.parquet`` and ``test.parquet``."""
    for split, count in (("train", rows), ("test", validation_rows)):
        made = [
            {"img": {"bytes": png(make_image(split, index)), "path": f"{index}.png"}, "label": index % 10}
            for index in range(count)
        ]
        _write_rows(folder / "cifar10" / f"{split}.parquet", made)
    return folder


def write_images(folder: Path, rows: int = 30, validation_rows: int = 14) -> Path:
    """Write a folder of images: ``<folder>/images/<split>/<class>/<number>.png``; three classes."""
    for split, count in (("train", rows), ("validation", validation_rows)):
        for index in range(count):
            file = folder / "images" / split / _COLOURS[index % 3] / f"{index:03}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(png(make_image(split, index)))
    return folder


def make_image(split: str, index: int) -> Image.Image:
    """Draw a rectangle on a ground of another colour; sizes vary."""
    dice = random.Random(f"image {split} {index}")
    width, height = dice.randint(20, 60), dice.randint(20, 60)
    ground = (0, 0, 0)
    image = Image.new("RGB", (width, height), ground)
    colour = tuple(230 if channel == index % 3 else dice.randint(0, 80) for channel in range(3))
    ImageDraw.Draw(image).rectangle((3, 3, dice.randint(8, width - 4), dice.randint(8, height - 4)), fill=colour)
    return image


def png(image: Image.Image) -> bytes:
    """The content of a PNG file."""
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def write_glue(folder: Path, tasks: Sequence[str] = GLUE_TASKS, rows: int = 32, validation_rows: int = 16) -> Path:
    """Write made-up rows of GLUE tasks: ``<folder>/glue/<task>/<split>.parquet``."""
    for task in tasks:
        _write_rows(folder / "glue" / task / "train.parquet", glue_rows(task, "train", rows))
        name = "validation_matched" if task == "mnli" else "validation"
        _write_rows(folder / "glue" / task / f"{name}.parquet", glue_rows(task, "validation", validation_rows))
    return folder


def write_squad(folder: Path, rows: int = 32, validation_rows: int = 16) -> Path:
    """Write made-up SQuAD rows: ``<folder>/squad/<split>.parquet``."""
    _write_rows(folder / "squad" / "train.parquet", squad_rows("train", rows))
    _write_rows(folder / "squad" / "validation.parquet", squad_rows("validation", validation_rows))
    return folder


def tiny_trial(model: Path, family: str, data: Path | None, task: str, **leaves: Any) -> TrialSpec:
    """A trial of a few small steps.

    Args:
        model: Model folder.
        family: Its family.
        data: Data folder; None for nano tasks.
        task: Name of the task.
        leaves: ``section__key=value``, over the settings here; a trial's own (``trial``, ``seed``, …) by their names.
    """
    sections: dict[str, dict[str, Any]] = {
        "model": {"name": str(model), "family": family},
        "data": {"tasks": [task], "dir": None if data is None else str(data), "grouping": "none"},
        "adapter": {"r": 4, "lora_alpha": 8.0},
        "deft": {"alpha": 0.0},
        "dial": {},
        "train": {"steps": 4, "batch_size": 6, "eval_batch_size": 5, "learning_rate": 0.01},
    }
    fixed = {
        "trial": "t0000",
        "seed": 0,
        **{key: leaves.pop(key) for key in list(leaves) if "__" not in key},
    }
    for leaf, value in leaves.items():
        section, key = leaf.split("__")
        sections[section][key] = value
    return TrialSpec(
        **fixed,
        task=task,
        baseline=sections["deft"]["alpha"] == 0,
        model=ModelSection(**sections["model"]),
        data=DataSection(**sections["data"]),
        adapter=AdapterSection(**sections["adapter"]),
        deft=DeftSection(**sections["deft"]),
        dial=DialSection(**sections["dial"]),
        train=TrainSection(**sections["train"]),
    )


def glue_rows(task: str, split: str, count: int) -> list[Row]:
    """Make up rows of one GLUE task; labels are balanced, STS-B's lie anywhere in [0, 5]."""
    dice = random.Random(f"{task} {split}")
    return [{**_GLUE_ROWS[task](dice, index), "idx": index} for index in range(count)]


def squad_rows(split: str, count: int) -> list[Row]:
    """Make up questions about colours; every third has a second gold answer."""
    dice = random.Random(f"squad {split}")
    rows = []
    for index in range(count):
        noun, other = dice.sample(_NOUNS, 2)
        colour = dice.choice((*_COLOURS, "red", "red"))
        context = f"the {noun} is {colour}. {_sentence(dice, other, _PLAIN)}"
        answers = [colour, f"the {colour} {noun}"] if index % 3 == 0 else [colour]
        start = context.index(colour)
        rows.append(
            {
                "id": f"{split}-{index}",
                "title": noun,
                "context": context,
                "question": f"which colour is the {noun}?",
                "answers": {"text": answers, "answer_start": [start] * len(answers)},
            }
        )
    return rows


def _sentence(dice: random.Random, noun: str, adjectives: Sequence[str]) -> str:
    middle = " and ".join(dice.sample(adjectives, dice.randint(1, 3)))
    tail = f" near the {dice.choice(_NOUNS)}" * dice.randint(0, 2)
    return f"the {noun} is {middle}{tail}."


def _cola(dice: random.Random, index: int) -> Row:
    words = _sentence(dice, dice.choice(_NOUNS), _PLAIN)
    return {"sentence": words if index % 2 else " ".join(reversed(words.split())), "label": index % 2}


def _sst2(dice: random.Random, index: int) -> Row:
    return {"sentence": _sentence(dice, dice.choice(_NOUNS), _GOOD if index % 2 else _BAD), "label": index % 2}


def _same_noun(first: str, second: str, same: int) -> Callable[[random.Random, int], Row]:
    """Two texts that speak of one noun or of two; ``same`` is the label of the former."""

    def make(dice: random.Random, index: int) -> Row:
        noun, other = dice.sample(_NOUNS, 2)
        texts = _sentence(dice, noun, _PLAIN), _sentence(dice, other if index % 2 else noun, _PLAIN)
        return {first: texts[0], second: texts[1], "label": 1 - same if index % 2 else same}

    return make


def _stsb(dice: random.Random, _index: int) -> Row:
    words = dice.sample(_WORDS, 5)
    kept = dice.randint(0, 5)
    other = words[:kept] + dice.sample(_WORDS, 5 - kept)
    label = round(min(5.0, kept + dice.choice((0.0, 0.2, 0.25, 0.333, 0.5))), 3)
    return {"sentence1": " ".join(words), "sentence2": " ".join(other), "label": label}


def _mnli(dice: random.Random, index: int) -> Row:
    noun, label = dice.choice(_NOUNS), index % 3
    said = dice.choice(_GOOD)
    claimed = (said, dice.choice(_PLAIN), dice.choice(_BAD))[label]
    return {"premise": f"the {noun} is {said}.", "hypothesis": f"the {noun} is {claimed}.", "label": label}


_GLUE_ROWS: dict[str, Callable[[random.Random, int], Row]] = {
    "cola": _cola,
    "sst2": _sst2,
    "mrpc": _same_noun("sentence1", "sentence2", 1),
    "stsb": _stsb,
    "qqp": _same_noun("question1", "question2", 1),
    "mnli": _mnli,
    "qnli": _same_noun("question", "sentence", 0),
    "rte": _same_noun("sentence1", "sentence2", 0),
}


def _write_rows(file: Path, rows: list[Row]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), file)


def _corpus() -> list[str]:
    """Some of all that a tokenizer will read: rows, prompts, label words, numbers."""
    texts = [
        str(value)
        for task in GLUE_TASKS
        for row in glue_rows(task, "train", 20)
        for value in [task, *row.keys(), *row.values()]
    ]
    texts += [str(value) for row in squad_rows("train", 20) for value in [*row.keys(), *row.values()]]
    labels = "unacceptable acceptable negative positive not_equivalent equivalent not_duplicate duplicate "
    return [*texts, labels + "entailment neutral contradiction not_entailment", *(f"{n / 5:.1f}" for n in range(26))]


def _tokenizer(specials: dict[str, str], order: list[str], single: str, pair: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE: no text is unknown to it, and decoding gives the text back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=order,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=list(zip(order, range(len(order)), strict=True))
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **specials,
    )


def _untied_t5(config: T5Config) -> T5ForConditionalGeneration:
    """An output layer of its own, as Flan-T5 has it; transformers ties the two wherever they do not differ."""
    model = T5ForConditionalGeneration(config)
    model.lm_head.weight = torch.nn.Parameter(torch.randn(config.vocab_size, config.d_model) / 8)
    return model


def _write(
    folder: Path,
    build: Callable[[], PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast | ViTImageProcessorPil,
    widened: tuple[str, ...],
    spread: float,
) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("weight") and any(part in name for part in widened):
                weight.mul_(spread)
    kept = {name: weight for name, weight in model.state_dict().items() if not name.startswith(("classifier", "score"))}
    model.save_pretrained(folder, state_dict=kept)
    tokenizer.save_pretrained(folder)
    return folder
