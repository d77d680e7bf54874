"""From a YAML file and overrides to a checked spec, or to all of its faults, each with its line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deft_ray.errors import SpecError
from deft_ray.spec.catalog import FAMILY_KINDS, TASKS
from deft_ray.spec.domains import Domain
from deft_ray.spec.loading import check_tree, load_spec
from deft_ray.spec.machine import Machine
from deft_ray.spec.schema import AdapterSection, DeftSection, ModelSection, SweepSpec

HEAD = """\
name: try
data:
  tasks: [nano-sentiment]
train:
  steps: 10
"""
MODEL, ADAPTER, DEFT = (", ".join(section.model_fields) for section in (ModelSection, AdapterSection, DeftSection))
SECTIONS = (
    "name, model, data, adapter, deft, dial, train, search, constraint, reference, budget, resources, tracking, "
    "baseline, storage"
)


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "spec.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def load(tmp_path: Path, text: str, *overrides: str) -> SweepSpec:
    return load_spec(write(tmp_path, text), overrides, Machine(cpus=4, gpus=0))


def faults_of(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    """Return the faults with the file's name in place of its path."""
    with pytest.raises(SpecError) as caught:
        load(tmp_path, text, *overrides)
    assert str(caught.value) == "\n".join(caught.value.faults)
    return [fault.replace(f"{tmp_path}/", "") for fault in caught.value.faults]


def test_the_smallest_spec_gets_every_default(tmp_path: Path) -> None:
    spec = load(tmp_path, HEAD)
    assert (spec.name, spec.family, spec.data.tasks, spec.train.steps) == ("try", "t5", ["nano-sentiment"], 10)
    assert (spec.deft.alpha, spec.adapter.r, spec.resources.hosts, spec.space) == (1.0, 16, 1, {})


def test_domains_are_taken_out_of_any_trial_section(tmp_path: Path) -> None:
    text = """\
name: try
data: {tasks: [nano-sentiment]}
adapter:
  r: {choice: [4, 8]}
deft:
  alpha:
    uniform: [0, 2]
train:
  steps: {randint: [10, 20]}
  learning_rate: {loguniform: [1e-5, 1e-2]}
baseline: {adapter.r: 8, train.steps: 20, train.learning_rate: 3e-4}
"""
    spec = load(tmp_path, text)
    assert spec.space == {
        "adapter.r": Domain("choice", (4, 8)),
        "deft.alpha": Domain("uniform", (0.0, 2.0)),
        "train.steps": Domain("randint", (10, 20)),
        "train.learning_rate": Domain("loguniform", (1e-5, 1e-2)),
    }
    assert (spec.adapter.r, spec.deft.alpha, spec.train.steps) == (4, 0.0, 10)


@pytest.mark.parametrize("text", ["1e-7", "1E-7", "1.e-7", "1.0e-7", "+1e-7", ".1e-6", "0.0000001"])
def test_a_number_may_be_written_as_people_write_it(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, f"{HEAD}deft: {{epsilon: {text}}}\n").deft.epsilon == 1e-7


@pytest.mark.parametrize("epsilon", [1e-9, 1.0])
def test_epsilon_may_be_at_either_end(tmp_path: Path, epsilon: float) -> None:
    assert load(tmp_path, f"{HEAD}deft: {{epsilon: {epsilon}}}\n").deft.epsilon == epsilon


def test_whole_numbers_stay_whole_and_quotes_stay_texts(tmp_path: Path) -> None:
    spec = load(tmp_path, HEAD + "tracking: {experiment: '1e-7'}\nsearch: {seeds: [0, 7]}\n")
    assert spec.tracking.experiment == "1e-7"
    assert [type(seed) for seed in spec.search.seeds] == [int, int]


def test_anchors_are_yaml_and_point_where_the_value_stands(tmp_path: Path) -> None:
    text = HEAD + "search:\n  seed: &number -1\n  seeds:\n    - *number\n"
    assert faults_of(tmp_path, text) == [
        "spec.yaml:7: search.seed: must be at least 0 (got -1)",
        "spec.yaml:7: search.seeds.0: must be at least 0 (got -1)",
    ]


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    assert load(tmp_path, "\ufeff" + HEAD).name == "try"


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        # Unknown keys, with the nearest known one.
        (
            "adapter:\n  lora_dropuot: 0.1",
            "7: adapter.lora_dropuot: unknown key; did you mean 'lora_dropout'? allowed: kind, r, "
            "lora_alpha, lora_dropout, target_modules, reduction_factor, reads, virtual_tokens, head",
        ),
        (
            "adapter:\n  lora_dropuot: {uniform: [0, 1]}",
            f"7: adapter.lora_dropuot: unknown key; did you mean 'lora_dropout'? allowed: {ADAPTER}",
        ),
        ("serach:\n  trials: 3", f"6: serach: unknown key; did you mean 'search'? allowed: {SECTIONS}"),
        ("space: {deft.alpha: 1}", f"6: space: unknown key; allowed: {SECTIONS}"),
        ("space:\n  deft.alpha: {uniform: [0, 1]}", f"6: space: unknown key; allowed: {SECTIONS}"),
        ("7: x", f"6: 7: unknown key; allowed: {SECTIONS}"),
        # Wrong types.
        ("adapter:\n  r: many", '7: adapter.r: must be a whole number (got "many")'),
        ("adapter:\n  r: 4.0", "7: adapter.r: must be a whole number (got 4.0)"),
        ("adapter:\n  r: true", "7: adapter.r: must be a whole number (got true)"),
        ("adapter:\n  r: 08", '7: adapter.r: must be a whole number (got "08")'),
        ("adapter:\n  r: 0x_", '7: adapter.r: must be a whole number (got "0x_")'),
        ("adapter:\n  r: [4, 8]", "7: adapter.r: must be a whole number (got [4, 8])"),
        ("adapter:\n  r:", "7: adapter.r: must be a whole number (got null)"),
        ("adapter:\n  r: 2024-13-45", '7: adapter.r: must be a whole number (got "2024-13-45")'),
        ("deft:\n  alpha: true", "7: deft.alpha: must be a number (got true)"),
        ("deft:\n  alpha: '1'", '7: deft.alpha: must be a number (got "1")'),
        ("model:\n  double_quant: 1", "7: model.double_quant: must be true or false (got 1)"),
        ("model:\n  revision: 1234567", "7: model.revision: must be a text (got 1234567)"),
        ("model:\n  dtype: float8", "7: model.dtype: must be 'float32' or 'bfloat16' (got \"float8\")"),
        (
            "model:\n  dtype: float16",
            "7: model.dtype: float16 overflows in T5 and in the density loss; use 'bfloat16' or "
            "'float32' (got \"float16\")",
        ),
        (
            "model:\n  family: [t5]",
            "7: model.family: must be 't5', 'bert', 'roberta', 'opt', 'gpt2' or 'vit' (got [\"t5\"])",
        ),
        ("adapter:\n  target_modules: 5", "7: adapter.target_modules: must be 'all-linear' or a list (got 5)"),
        (
            "adapter:\n  target_modules: []",
            "7: adapter.target_modules: must be 'all-linear' or must not be empty (got [])",
        ),
        ("adapter:\n  target_modules:\n  - q\n  - 5", "9: adapter.target_modules.1: must be a text (got 5)"),
        ("resources:\n  hosts: many", "7: resources.hosts: must be a whole number or 'auto' (got \"many\")"),
        ("resources:\n  hosts: 0", "7: resources.hosts: must be above 0 or 'auto' (got 0)"),
        (
            "resources:\n  slots_per_host: true",
            "7: resources.slots_per_host: must be a whole number or 'auto' (got true)",
        ),
        ("resources:\n  slots_per_host: 0", "7: resources.slots_per_host: must be above 0 or 'auto' (got 0)"),
        ("search:\n  try_first: [5]", "7: search.try_first.0: must be a mapping (got 5)"),
        ("search:\n  try_first: {a: 5}", '7: search.try_first: must be a list (got {"a": 5})'),
        ("search:\n  seeds: []", "7: search.seeds: must not be empty (got [])"),
        ("search:\n  seeds: [0, -1]", "7: search.seeds.1: must be at least 0 (got -1)"),
        ("search:\n  seeds: [0, 3000000000]", "7: search.seeds.1: must be at most 2147483647 (got 3000000000)"),
        ("storage: [s3]", '6: storage: must be a text (got ["s3"])'),
        ("storage: 2024-01-02: x", None),
        # Out of the field's range.
        ("adapter:\n  lora_dropout: 1", "7: adapter.lora_dropout: must be below 1 (got 1)"),
        ("adapter:\n  r: 0", "7: adapter.r: must be above 0 (got 0)"),
        ("deft:\n  epsilon: 0", "7: deft.epsilon: must be at least 1e-09 (got 0)"),
        ("deft:\n  epsilon: 2", "7: deft.epsilon: must be at most 1 (got 2)"),
        ("deft:\n  alpha: -1", "7: deft.alpha: must be at least 0 (got -1)"),
        ("deft:\n  alpha_decoder: -1", "7: deft.alpha_decoder: must be at least 0 (got -1)"),
        ("deft:\n  beta: 0", "7: deft.beta: must be above 0 (got 0)"),
        ("deft:\n  lambda_init: 1.5", "7: deft.lambda_init: must be at most 1 (got 1.5)"),
        ("deft:\n  lambda_init: -0.1", "7: deft.lambda_init: must be at least 0 (got -0.1)"),
        ("deft:\n  lambda_noise: -1", "7: deft.lambda_noise: must be at least 0 (got -1)"),
        ("deft:\n  epsilon: 1e-10", "7: deft.epsilon: must be at least 1e-09 (got 1e-10)"),
        ("deft:\n  alpha: .nan", "7: deft.alpha: must be finite (got NaN)"),
        ("deft:\n  alpha: .inf", "7: deft.alpha: must be finite (got Infinity)"),
        ("deft:\n  alpha: 1e999", "7: deft.alpha: must be finite (got Infinity)"),
        ("constraint:\n  max_score_drop: -0.01", "7: constraint.max_score_drop: must be at least 0 (got -0.01)"),
        # Domains: empty, out of range, in the wrong place, of an unknown kind.
        (
            "deft:\n  alpha: {choice: []}",
            "7: deft.alpha.choice: empty domain: a choice needs at least one value (got [])",
        ),
        (
            "deft:\n  alpha: {uniform: [2, 1]}",
            "7: deft.alpha.uniform: empty domain: the lower bound must be below the upper (got [2, 1])",
        ),
        (
            "deft:\n  alpha:\n    uniform:\n    - 0\n    - .inf",
            "10: deft.alpha.uniform.1: must be a finite number (got Infinity)",
        ),
        ("deft:\n  alpha: {uniform: [.nan, 1]}", "7: deft.alpha.uniform.0: must be a finite number (got NaN)"),
        ("deft:\n  alpha: {uniform: [-1, 2]}", "7: deft.alpha.uniform.0: must be at least 0 (got -1.0)"),
        (
            "deft:\n  epsilon:\n    loguniform:\n    - 1e-12\n    - 1e-3",
            "9: deft.epsilon.loguniform.0: must be at least 1e-09 (got 1e-12)",
        ),
        (
            "deft:\n  approximation: {choice: [l0, l3]}",
            "7: deft.approximation.choice.1: must be 'auto', 'l0', 'tanh', 'sigmoid', 'l1' or 'l2' (got \"l3\")",
        ),
        ("deft:\n  alpha: {choice: [1, true]}", "7: deft.alpha.choice.1: must be a number (got true)"),
        (
            "deft:\n  alpha: {unifrom: [0, 1]}",
            '7: deft.alpha: must be a value or one domain (got {"unifrom": [0, 1]}); '
            "did you mean 'uniform'? domains: choice, uniform, loguniform, randint",
        ),
        (
            "deft:\n  alpha: {choice: [1], uniform: [0, 1]}",
            "7: deft.alpha: must be a value or one domain (got "
            '{"choice": [1], "uniform": [0, 1]}); domains: choice, uniform, loguniform, randint',
        ),
        (
            "deft: {choice: [1, 2]}",
            "6: deft: cannot be searched: a domain stands at a leaf; allowed: leaves of adapter, deft, train",
        ),
        (
            "storage: {choice: [a, b]}",
            "6: storage: cannot be searched: it belongs to the sweep, not to a trial; allowed: leaves of "
            "adapter, deft, train",
        ),
        (
            "model:\n  quantization: {choice: [none, nf4]}",
            "7: model.quantization: cannot be searched: one sweep has one frozen "
            "base, and densities compare only within one dtype; allowed: leaves of adapter, deft, train",
        ),
        ("model:\n  name: {a: b}", '7: model.name: must be a text (got {"a": "b"})'),
        # Sections that are none.
        ("deft: 5", f"6: deft: must be a mapping of {DEFT} (got 5)"),
        ("deft:", f"6: deft: must be a mapping of {DEFT} (got null)"),
        (
            "deft: [alpha]",
            f'6: deft: must be a mapping of {DEFT} (got ["alpha"])',
        ),
        (
            "model: nano",
            f'6: model: must be a mapping of {MODEL} (got "nano")',
        ),
        ("baseline: 5", "6: baseline: must be a mapping (got 5)"),
        # Keys.
        ("deft:\n  alpha: 1\n  beta: 2\n  alpha: 3", "9: deft.alpha: key stands twice (first on line 7)"),
        ("name: again", "6: name: key stands twice (first on line 1)"),
        ('"a\\nb": 1', f"6: 'a\\nb': unknown key; allowed: {SECTIONS}"),
    ],
)
def test_a_fault_names_its_line_path_value_and_what_is_allowed(tmp_path: Path, lines: str, fault: str | None) -> None:
    found = faults_of(tmp_path, f"{HEAD}{lines}\n")
    if fault is None:
        assert found == ["spec.yaml:6: spec: not YAML: mapping values are not allowed here"]
    else:
        assert found == [f"spec.yaml:{fault}"]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", f"1: spec: must be a mapping of {SECTIONS} (got null)"),
        ("# nothing yet\n", f"1: spec: must be a mapping of {SECTIONS} (got null)"),
        ("- name: try\n", f'1: spec: must be a mapping of {SECTIONS} (got [{{"name": "try"}}])'),
        ("quickstart", f'1: spec: must be a mapping of {SECTIONS} (got "quickstart")'),
        (
            "name: try\ndata: [a\n",
            "3: spec: not YAML: while parsing a flow sequence: expected ',' or ']', but got '<stream end>'",
        ),
        (
            "name: try\n\tdata: 1\n",
            "2: spec: not YAML: while scanning for the next token: found character '\\t' that cannot start any token",
        ),
        ("name: try\ndata: *x\n", "2: spec: not YAML: found undefined alias 'x'"),
        (
            "name: try\n---\nname: again\n",
            "2: spec: not YAML: expected a single document in the stream: but found another document",
        ),
        ("name: a\0b\n", "1: spec: not YAML: the character '\\x00' is not allowed"),
        ("name: a\ndata: \x07\n", "2: spec: not YAML: the character '\\x07' is not allowed"),
        ("name: !!python/name:os.system x\n", "1: spec: the tag !!python/name:os.system means nothing in a spec"),
        ("name: try\ntrain: !x {steps: 1}\n", "2: spec: the tag !x means nothing in a spec"),
        ("name: try\n? [a, b]\n: 1\n", "2: spec: a key must be a word, not a list or a mapping"),
        ("name: try\ndata: &x [*x]\n", "2: spec: nested too deeply; a spec has at most 20 levels"),
        ("name: " + "[" * 40 + "]" * 40, "1: spec: nested too deeply; a spec has at most 20 levels"),
        ("name: " + "[" * 1200 + "]" * 1200, "1: spec: nested too deeply; a spec has at most 20 levels"),
        (
            "\n".join(
                [
                    "a: &a [x, x, x, x, x, x, x, x, x, x]",
                    *(f"{b}: &{b} [{', '.join(['*' + a] * 10)}]" for a, b in ("ab", "bc", "cd", "de")),
                ]
            ),
            "1: spec: too large; a spec holds at most 10,000 values",
        ),
    ],
)
def test_a_text_that_is_no_spec_at_all_is_one_fault(tmp_path: Path, text: str, fault: str) -> None:
    assert faults_of(tmp_path, text) == [f"spec.yaml:{fault}"]


def test_a_file_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    file = tmp_path / "spec.yaml"
    file.write_bytes(b"name: \xff\n")
    with pytest.raises(SpecError) as caught:
        load_spec(file)
    assert str(caught.value) == (
        f"{file}: cannot be read: 'utf-8' codec can't decode byte 0xff in position 6: invalid start byte"
    )


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"cannot be read: .*Is a directory"):
        load_spec(tmp_path)
    with pytest.raises(SpecError) as caught:
        load_spec(tmp_path / "no.yaml")
    hint = "a spec is a YAML file such as search_spaces/quickstart.yaml"
    assert caught.value.faults == [f"{tmp_path}/no.yaml: no such file; {hint}"]


def test_required_keys_point_to_the_section_that_lacks_them(tmp_path: Path) -> None:
    assert faults_of(tmp_path, "# a comment\nmodel: {}\ndata:\n  dir: null\n") == [
        "spec.yaml:2: name: is required",
        "spec.yaml:2: train: is required",
        "spec.yaml:3: data.tasks: is required",
    ]


def test_all_faults_of_a_file_come_at_once_in_the_order_of_its_lines(tmp_path: Path) -> None:
    text = """\
name: a/b
modle: nano
model:
  family: bert
  quantization: int3
data:
  tasks:
  - squad
  - sst3
  - 5
  dir: /no/such/folder
adapter:
  lora_dropout: {uniform: [0, 1.2]}
  lora_dropuot: 0
deft:
  approximation: tanh
  epsilon: {loguniform: [0, 1]}
train:
  batch_size: 7
search:
  trials: -1
  trials: 3
resources:
  workers_per_host: 8
"""
    assert [fault.split(": ")[:2] for fault in faults_of(tmp_path, text)] == [
        ["spec.yaml:1", "name"],
        ["spec.yaml:2", "modle"],
        ["spec.yaml:5", "model.quantization"],
        ["spec.yaml:8", "data.tasks.0"],
        ["spec.yaml:9", "data.tasks.1"],
        ["spec.yaml:10", "data.tasks.2"],
        ["spec.yaml:11", "data.dir"],
        ["spec.yaml:13", "adapter.lora_dropout.uniform.1"],
        ["spec.yaml:14", "adapter.lora_dropuot"],
        ["spec.yaml:15", "deft.beta"],
        ["spec.yaml:17", "deft.epsilon.loguniform.0"],
        ["spec.yaml:18", "train.steps"],
        ["spec.yaml:19", "train.batch_size"],
        ["spec.yaml:22", "search.trials"],
        ["spec.yaml:24", "resources.workers_per_host"],
    ]


def test_one_mistake_is_one_fault(tmp_path: Path) -> None:
    """What follows from a fault (a missing length, a baseline of no searched leaf) is not told beside it."""
    text = """\
name: try
model: 5
data: {tasks: [nano-sentiment]}
adapter: {r: {randint: [8, 1]}}
train: {epochs: {uniform: [1]}}
search: {try_first: [{adapter.r: 4}]}
baseline: {adapter.r: 4, train.epochs: 1.0}
"""
    assert [fault.split(": ")[:2] for fault in faults_of(tmp_path, text)] == [
        ["spec.yaml:2", "model"],
        ["spec.yaml:4", "adapter.r.randint"],
        ["spec.yaml:5", "train.epochs.uniform"],
    ]


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("deft.alpha=2", "deft", "alpha", 2.0),
        (" deft.alpha = 2 ", "deft", "alpha", 2.0),
        ("deft.epsilon=1e-5", "deft", "epsilon", 1e-5),
        ("deft={alpha: 3}", "deft", "alpha", 3.0),
        ("model.name=google/flan-t5-xl", "model", "name", "google/flan-t5-xl"),
        ("data.tasks=[rte, cola]", "data", "tasks", ["rte", "cola"]),
        ("data.train_examples=null", "data", "train_examples", None),
        ("tracking.uri=http://host:5000/?a=b", "tracking", "uri", "http://host:5000/?a=b"),
    ],
)
def test_an_override_sets_a_leaf_or_a_section(
    tmp_path: Path, override: str, section: str, key: str, value: Any
) -> None:
    assert getattr(getattr(load(tmp_path, HEAD, override), section), key) == value


def test_an_override_may_be_a_domain_and_may_end_one(tmp_path: Path) -> None:
    searched = load(
        tmp_path, HEAD, "deft.alpha={uniform: [0, 2]}", "adapter.r={choice: [4, 8]}", "baseline.adapter.r=8"
    )
    assert searched.space == {"deft.alpha": Domain("uniform", (0.0, 2.0)), "adapter.r": Domain("choice", (4, 8))}
    assert searched.baseline == {"adapter.r": 8}
    fixed = load(tmp_path, HEAD + "deft: {alpha: {uniform: [0, 2]}}\n", "deft.alpha=1")
    assert (fixed.space, fixed.deft.alpha) == ({}, 1.0)


def test_the_last_override_of_a_leaf_holds_and_mends_the_file(tmp_path: Path) -> None:
    spec = load(tmp_path, HEAD + "deft: {alpha: -1}\n", "deft.alpha=x", "deft.alpha=2", "storage=/s", "search.seed=4")
    assert (spec.deft.alpha, spec.storage, spec.search.seed) == (2.0, "/s", 4)


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("deft.alpha", "must look like dotted.key=value, for example deft.alpha=1"),
        ("=1", "must look like dotted.key=value, for example deft.alpha=1"),
        ("deft..alpha=1", "must look like dotted.key=value, for example deft.alpha=1"),
        ("", "must look like dotted.key=value, for example deft.alpha=1"),
        (
            "deft.alpha=[1",
            "deft.alpha: not YAML: while parsing a flow sequence: expected ',' or ']', but got '<stream end>'",
        ),
        ("deft.alpha=!x 1", "deft.alpha: the tag !x means nothing in a spec"),
        ("deft.alpha=-1", "deft.alpha: must be at least 0 (got -1)"),
        ("deft.alpha=", "deft.alpha: must be a number (got null)"),
        (
            "deft.alhpa=1",
            f"deft.alhpa: unknown key; did you mean 'alpha'? allowed: {DEFT}",
        ),
        (
            "deft.alpha={uniform: [2, 1]}",
            "deft.alpha.uniform: empty domain: the lower bound must be below the upper (got [2, 1])",
        ),
        (
            "deft.alpha.uniform=[0, 1]x",
            "deft.alpha.uniform: not YAML: expected '<document start>', but found '<scalar>'",
        ),
        ("deft={alpha: 1, alpha: 2}", "deft.alpha: key stands twice (first on line 1)"),
        ("deft=5", f"deft: must be a mapping of {DEFT} (got 5)"),
        ("name.first=x", "name.first: 'name' has no keys (got \"try\")"),
        ("data.tasks.0=rte", "data.tasks.0: 'data.tasks' has no keys (got [\"nano-sentiment\"])"),
        ("new.key=1", f"new: unknown key; allowed: {SECTIONS}"),
        ("space={deft.alpha: 1}", f"space: unknown key; allowed: {SECTIONS}"),
        ("a.a.a=1", f"a: unknown key; allowed: {SECTIONS}"),
        (
            "data.tasks=[sst3]",
            "data.tasks.0: unknown task (got \"sst3\"); did you mean 'sst2'? allowed: " + ", ".join(TASKS),
        ),
    ],
)
def test_a_broken_override_is_named_in_place_of_a_line(tmp_path: Path, override: str, fault: str) -> None:
    assert faults_of(tmp_path, HEAD, override) == [f"--set {override}: {fault}"]


def test_faults_of_file_and_overrides_come_together_the_file_first(tmp_path: Path) -> None:
    found = faults_of(tmp_path, HEAD + "deft: {alpha: -1}\n", "deft", "train.steps=0", "adapter.r=\n0:1")
    assert [fault.split(": ")[:2] for fault in found] == [
        ["spec.yaml:6", "deft.alpha"],
        ["--set train.steps=0", "train.steps"],
        ["--set adapter.r= 0:1", "adapter.r"],
        ["--set deft", "must look like dotted.key=value, for example deft.alpha=1"],
    ]


def test_a_broken_override_leaves_the_line_of_the_file_alone(tmp_path: Path) -> None:
    found = faults_of(tmp_path, HEAD + "deft: {alpha: -1}\n", "deft.alpha=[")
    assert found[0] == "spec.yaml:6: deft.alpha: must be at least 0 (got -1)"


@pytest.mark.parametrize(
    ("name", "config", "family"),
    [
        ("nano", None, "t5"),
        ("google/flan-t5-xxl", None, "t5"),
        ("bert-base-uncased", None, "bert"),
        ("FacebookAI/roberta-large", None, "roberta"),
        ("microsoft/deberta-v3-base", None, None),
        ("distilbert-base", None, None),
        ("FacebookAI/xlm-roberta-base", None, None),
        ("folder", '{"model_type": "bert"}', "bert"),
        ("folder-t5", '{"model_type": "llama"}', None),
        ("folder-t5", '{"model_type": "gpt2"}', "gpt2"),
        ("openai-community/gpt2-medium", None, "gpt2"),
        ("facebook/opt-350m", None, "opt"),
        ("folder-t5", "not json", "t5"),
        ("folder-t5", "[]", "t5"),
    ],
)
def test_the_family_is_told_from_the_folder_or_else_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, config: str | None, family: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    if config is not None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
    text = HEAD + f"model:\n  name: {name}\n"
    if family is not None:
        assert load(tmp_path, text).family == family
    else:
        assert faults_of(tmp_path, text) == [
            f'spec.yaml:6: model.family: cannot be told from "{name}"; allowed: {", ".join(FAMILY_KINDS)}'
        ]


def test_a_plain_tree_is_checked_without_a_file() -> None:
    spec, faults = check_tree({"name": "a", "data": {"tasks": ["rte"]}, "train": {"steps": 1}, "deft": {"alpha": -1}})
    assert spec is None
    assert faults == [(("deft", "alpha"), "must be at least 0 (got -1)")]
