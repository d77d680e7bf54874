"""Task heads of models with one stack: each trial trains its own, from scratch.

A model's own head is what transformers gives it: one linear layer behind BERT's pooler, at the last token of OPT and
GPT-2, at ViT's class token; RoBERTa's has two layers. The library that the authors of DEFT ran (adapter-transformers
3.2.1) puts two layers on all of them where its own adapters and LoRA are trained,

.. math:: W_2\\, \\mathrm{drop}(\\tanh(W_1\\, \\mathrm{drop}(h) + b_1)) + b_2,

with :math:`h` the last hidden state of the token that is read; BERT's pooler is then passed over. RoBERTa's own head is
the same.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.models.roberta.modeling_roberta import RobertaClassificationHead

from deft_ray.models.families import Family

#: Modules that no adapter is put on where nobody reads the pooler, whatever its targets say.
UNREAD = r"(.*\.)?pooler\..*"


class TwoLayerHead(nn.Module):
    """Two linear layers with a tanh between them.

    Args:
        width: Of what it reads.
        outputs: Classes, or 1 for a regression.
        dropout: Between the layers.
        dropout_before: Before the first one; 0 where the model has a dropout of its own there.
    """

    def __init__(self, width: int, outputs: int, dropout: float, dropout_before: float) -> None:
        super().__init__()
        self.before, self.between = nn.Dropout(dropout_before), nn.Dropout(dropout)
        self.dense, self.out_proj = nn.Linear(width, width), nn.Linear(width, outputs)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return (..., outputs) of (..., width)."""
        answer: Tensor = self.out_proj(self.between(torch.tanh(self.dense(self.before(hidden)))))
        return answer


class FirstToken(nn.Module):
    """Stands in a pooler's place and hands the first token's hidden state on.

    Args:
        pooler: What it stands for; kept, but not run.
    """

    def __init__(self, pooler: nn.Module) -> None:
        super().__init__()
        self.pooler = pooler

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """Return (batch, d_model)."""
        return hidden_BTD[:, 0]


def renew_head(model: Any, family: Family, outputs: int, *, two_layers: bool = False) -> None:
    """Put a freshly initialised task head on a model with one stack; uses torch's global random state.

    Whoever opens a trial's adapter with PEFT calls this first where ``adapter.head`` is ``two-layer``, as PEFT finds no
    place for its values otherwise.

    Args:
        model: A sequence- or image-classification model.
        family: Its family.
        outputs: Number of classes, or 1 for a regression.
        two_layers: Two layers in place of the model's own; the same on RoBERTa.
    """
    config = model.config
    config.num_labels = outputs
    config.problem_type = "regression" if outputs == 1 else "single_label_classification"
    model.num_labels = outputs
    old = next(getattr(model, family.head).parameters())
    head = _new_head(config, family, outputs, two_layers=two_layers)
    std = config.init_std if family.name == "opt" else config.initializer_range
    for module in head.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    head.register_forward_pre_hook(_to_float32)
    head.to(device=old.device, dtype=torch.float32)
    if isinstance(there := getattr(model, family.head), ModulesToSaveWrapper):
        there.original_module = head  # another adapter's head lies beside it
    else:
        setattr(model, family.head, head)
        _read_pooler(model)
        if leaves_pooler_unread(family, two_layers=two_layers):
            _pass_over_pooler(model)


def remove_head(model: Any) -> None:
    """Let go of what trained heads have left on a model once the last adapter is off; a pooler is read again."""
    for name, module in list(model.named_children()):
        if isinstance(module, ModulesToSaveWrapper):  # PEFT would leave the trained head, or know nothing of it
            setattr(model, name, module.original_module)
    _read_pooler(model)


def leaves_pooler_unread(family: Family, *, two_layers: bool) -> bool:
    """Tell whether a head reads past a pooler, so that nothing in there can be trained."""
    return two_layers and family.name == "bert"


def _pass_over_pooler(model: Any) -> None:
    body = model.base_model
    if not isinstance(body.pooler, FirstToken):
        body.pooler = FirstToken(body.pooler)


def _read_pooler(model: Any) -> None:
    body = model.base_model
    if isinstance(pooler := getattr(body, "pooler", None), FirstToken):
        body.pooler = pooler.pooler


def _new_head(config: Any, family: Family, outputs: int, *, two_layers: bool) -> nn.Module:
    if family.name == "roberta":
        return RobertaClassificationHead(config)
    width = getattr(config, "word_embed_proj_dim", config.hidden_size)  # OPT-350m's last hidden state is narrower
    if not two_layers:
        return nn.Linear(width, outputs, bias=family.head != "score")  # as transformers has it
    dropout = next(getattr(config, name) for name in _DROPOUTS if hasattr(config, name))
    return TwoLayerHead(width, outputs, dropout, 0.0 if family.name == "bert" else dropout)  # BERT has one before it


_DROPOUTS = ("hidden_dropout_prob", "resid_pdrop", "dropout")


def _to_float32(_head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The head trains in float32 whatever the base computes in."""
    return tuple(hidden.float() for hidden in inputs)
