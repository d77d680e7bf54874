"""What docs/method.md calls the default is the default."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from deft_ray.spec.catalog import PUBLISHED_ADAPTERS
from deft_ray.spec.loading import check_tree
from deft_ray.spec.schema import SweepSpec

ROOT = Path(__file__).parents[2]
ROWS = {
    row.split("|")[1].strip(): row.split("|")[4].strip()
    for row in (ROOT / "docs" / "method.md").read_text().splitlines()
    if row.startswith("| ")
}


def defaults() -> SweepSpec:
    spec, faults = check_tree({"name": "s", "data": {"tasks": ["nano-sentiment"]}, "train": {"steps": 1}})
    assert spec is not None, faults
    return spec


def test_the_defaults_are_those_of_the_schema() -> None:
    deft, train, data, adapter = defaults().deft, defaults().train, defaults().data, defaults().adapter
    assert ROWS["ε of l0"].startswith("1e-7;")
    assert deft.epsilon == 1e-7
    assert ROWS["approximation"].startswith("as the paper (`auto`)")
    assert deft.approximation == "auto"
    assert ROWS["what the loss is of"].startswith("each activation (`deft.loss_of: activations`)")
    assert deft.loss_of == "activations"
    assert ROWS["padding in loss and density"].startswith("not counted")
    assert not deft.count_padding
    assert ROWS["RoBERTa's and BERT's head"].startswith("the model's own (`adapter.head: own`)")
    assert adapter.head == "own"
    assert ROWS["bottleneck: what enters it"].startswith("the MLP's own output (`adapter.reads: mlp`)")
    assert adapter.reads == "mlp"
    assert ROWS["encoder and decoder"].startswith("`deft.alpha` for both")
    assert deft.alpha_decoder is None
    assert ROWS["warm-up, weight decay, clipping"].startswith("6 %, 0, at 1;")
    assert (train.warmup_share, train.weight_decay, train.max_grad_norm) == (0.06, 0.0, 1.0)
    assert ROWS["virtual tokens of prefix and prompt"].startswith("60;")
    assert adapter.virtual_tokens == 60
    assert ROWS["learning rates"].startswith("3e-4;")
    assert train.learning_rate == 3e-4
    assert ROWS["which epoch is reported"].startswith("the last: a trial is evaluated once, at its end;")
    assert train.evaluations == 1
    assert "at the adapter's own, 0.8 would need thousands of steps" in ROWS["how λ comes to 0"]
    assert (deft.lambda_init, deft.lambda_noise) == (0.8, 0.05)
    assert ROWS["length of a batch's rows"].startswith("of like length together, to the longest;")
    assert (data.padding, data.grouping) == ("longest", "length")


@pytest.mark.parametrize("file", sorted((ROOT / "search_spaces" / "paper").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_published_settings_have_what_the_page_says_of_them(file: Path) -> None:
    spec = yaml.safe_load(file.read_text())
    assert spec["search"]["seeds"] == [42, 43, 44]
    assert spec["deft"]["count_padding"] is True or spec["model"]["family"] == "vit"
    if spec["adapter"]["kind"] in ("prefix", "prompt"):
        assert spec["adapter"]["virtual_tokens"] == (50 if spec["model"]["family"] == "bert" else 60)


def test_as_many_shares_are_met_as_the_page_says() -> None:
    met = [row for row in PUBLISHED_ADAPTERS if row.met in ("truncated", "rounded")]
    assert (len(met), len(PUBLISHED_ADAPTERS)) == (17, 20)
    assert "seventeen of twenty shares are met" in ROWS["ranks of LoRA"]
