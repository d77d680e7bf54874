"""The embedded default: a tiny instruction-tuned gated-GELU T5 and the generated tasks it is fine-tuned on.

``tasks`` writes the rows, ``model/`` holds the pretrained weights and tokenizer, and ``pretrain`` made them. Together
they let a sweep run from an installed package alone: no download, no accelerator.
"""

from __future__ import annotations

from pathlib import Path

MODEL_DIR: Path = Path(__file__).resolve().parent / "model"
"""Folder with the pretrained model and its tokenizer; give it to ``from_pretrained``."""
