"""The cluster file passes Ray's own checks, and keeps the promises those checks cannot see."""

from __future__ import annotations

import copy
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

REPOSITORY = Path(__file__).parents[2]
UP = REPOSITORY / "cluster" / "up.yaml"

# Parameters of EC2's RunInstances that a node may set. Ray hands `node_config` on unread, so a misspelt one is found
# by AWS only; `SubnetIds` is Ray's own. What Ray sets by itself (counts, tags, subnet) is left out.
RUN_INSTANCES = {
    "BlockDeviceMappings",
    "CapacityReservationSpecification",
    "CpuOptions",
    "CreditSpecification",
    "EbsOptimized",
    "IamInstanceProfile",
    "ImageId",
    "InstanceInitiatedShutdownBehavior",
    "InstanceMarketOptions",
    "InstanceType",
    "KeyName",
    "LaunchTemplate",
    "MetadataOptions",
    "Monitoring",
    "NetworkInterfaces",
    "Placement",
    "SecurityGroupIds",
    "SubnetIds",
    "TagSpecifications",
    "UserData",
}
EBS = {"DeleteOnTermination", "Encrypted", "Iops", "KmsKeyId", "SnapshotId", "Throughput", "VolumeSize", "VolumeType"}
INSIDE = {
    "BlockDeviceMappings": {"DeviceName", "Ebs", "NoDevice", "VirtualName"},
    "Ebs": EBS,
    "IamInstanceProfile": {"Arn", "Name"},
    "InstanceMarketOptions": {"MarketType", "SpotOptions"},
    "SpotOptions": {"InstanceInterruptionBehavior", "MaxPrice", "SpotInstanceType", "ValidUntil"},
}
GPUS = {"m5.2xlarge": 0, "g5.12xlarge": 4, "p4d.24xlarge": 8}
CPUS = {"m5.2xlarge": 8, "g5.12xlarge": 48, "p4d.24xlarge": 96}

# Stands for `aws`: appends its arguments, ended by NUL each and by a newline per call, and knows of no role yet.
RECORDER = r"""#!/bin/sh
{ printf '%s\0' "$@"; printf '\n\0'; } >> "$CALLS"
[ "$2" != get-role ]
"""

Config = dict[str, Any]


@pytest.fixture
def config() -> Config:
    loaded: Config = yaml.safe_load(UP.read_text(encoding="utf-8"))
    return loaded


@pytest.fixture
def workers(config: Config) -> dict[str, Config]:
    return {name: node for name, node in config["available_node_types"].items() if name != config["head_node_type"]}


@pytest.fixture
def head(config: Config) -> Config:
    node: Config = config["available_node_types"][config["head_node_type"]]
    return node


def test_ray_accepts_it_without_a_network(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"asked for a network: {args}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)

    validate_config(prepare_config(config))


def _at_the_top(config: Config) -> Config:
    return config


def _in_a_node_type(config: Config) -> Config:
    node: Config = config["available_node_types"]["a10g"]
    return node


def _in_docker(config: Config) -> Config:
    docker: Config = config["docker"]
    return docker


@pytest.mark.parametrize(
    ("place", "typo"),
    [(_at_the_top, "idle_timeout_minute"), (_in_a_node_type, "max_worker"), (_in_docker, "run_option")],
)
def test_ray_refuses_a_planted_typo(config: Config, place: Callable[[Config], Config], typo: str) -> None:
    place(config)[typo] = 1

    with pytest.raises(ValidationError, match=rf"Additional properties are not allowed \('{typo}' was unexpected\)"):
        validate_config(prepare_config(config))


def test_ray_keeps_every_setting(config: Config) -> None:
    """Nothing is overruled by Ray's defaults; only command lists are joined."""
    prepared = prepare_config(copy.deepcopy(config))

    joined = {"head_setup_commands", "worker_setup_commands"}
    assert {key: prepared[key] for key in config if key not in joined} == {
        key: value for key, value in config.items() if key not in joined
    }
    assert prepared["worker_setup_commands"] == prepared["head_setup_commands"] == config["setup_commands"]


def test_head_drives_and_never_trains(head: Config) -> None:
    assert "InstanceMarketOptions" not in head["node_config"]
    assert "GPU" not in head["resources"]
    assert head["resources"]["TRAIN_DRIVER_RESOURCE"] >= 1
    assert head["max_workers"] == 0


def test_workers_are_spot_machines_with_gpus(workers: Mapping[str, Config]) -> None:
    for node in workers.values():
        assert node["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
        assert node["resources"]["GPU"] > 0
        assert "TRAIN_DRIVER_RESOURCE" not in node["resources"]
        assert node["min_workers"] == 0


def test_the_ceilings_add_up(config: Config, workers: Mapping[str, Config]) -> None:
    assert sum(node["max_workers"] for node in workers.values()) == config["max_workers"] > 0


def test_resources_are_those_of_the_machines(config: Config) -> None:
    for node in config["available_node_types"].values():
        machine = node["node_config"]["InstanceType"]
        assert (node["resources"]["CPU"], node["resources"].get("GPU", 0)) == (CPUS[machine], GPUS[machine])


def test_node_configs_are_what_ec2_knows(config: Config) -> None:
    for node in config["available_node_types"].values():
        assert list(_unknown_keys(node["node_config"])) == []


@pytest.mark.parametrize(
    ("node_config", "unknown"),
    [
        ({"InstanceMarketOption": {"MarketType": "spot"}}, "InstanceMarketOption"),
        ({"InstanceMarketOptions": {"marketType": "spot"}}, "InstanceMarketOptions.marketType"),
        ({"BlockDeviceMappings": [{"Ebs": {"Size": 1}}]}, "BlockDeviceMappings.Ebs.Size"),
    ],
)
def test_a_typo_in_a_node_config_is_seen(node_config: Config, unknown: str) -> None:
    assert list(_unknown_keys(node_config)) == [unknown]


def test_images_have_our_python_and_ray(config: Config) -> None:
    version = f"{ray.__version__}-py{sys.version_info.major}{sys.version_info.minor}"
    images = {key: config["docker"][key].split(":")[1] for key in ("head_image", "worker_image")}

    if sys.version_info[:2] == (3, 11):
        assert images == {"head_image": f"{version}-cpu", "worker_image": f"{version}-gpu"}
    else:
        assert {image.split("-")[0] for image in images.values()} == {ray.__version__}


def test_slow_starts_are_given_time(config: Config) -> None:
    from ray.train.v2._internal.constants import WORKER_GROUP_START_TIMEOUT_S_ENV_VAR as NAME

    (option,) = [option for option in config["docker"]["run_options"] if NAME in option]
    assert option.startswith(f"--env {NAME}=")
    assert float(option.split("=")[1]) >= 600


def test_what_is_mounted_and_installed_is_here(config: Config) -> None:
    (local,) = config["file_mounts"].values()
    (install,) = config["setup_commands"]

    assert (REPOSITORY / local / "pyproject.toml").is_file()
    assert "--constraint constraints.txt" in install
    assert "'.[aws]'" in install


def test_it_holds_no_account_and_no_key() -> None:
    text = UP.read_text(encoding="utf-8") + UP.with_name("aws_roles.sh").read_text(encoding="utf-8")

    assert not any(word.isdigit() and len(word) == 12 for word in text.replace(":", " ").split())
    assert not any(secret in text for secret in ("AKIA", "aws_secret", "SecretAccessKey"))


def test_roles_are_those_the_nodes_name(config: Config, tmp_path: Path) -> None:
    """The script, run with an `aws` that only writes down what it is asked."""
    recorder = tmp_path / "aws"
    recorder.write_text(RECORDER)
    recorder.chmod(0o755)
    calls = tmp_path / "calls"
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(calls)}
    subprocess.run(["bash", UP.with_name("aws_roles.sh"), "my-bucket"], env=env, check=True)

    made = {call["--role-name"]: call for call in _calls(calls) if "--assume-role-policy-document" in call}
    policies = {call["--role-name"]: call["--policy-document"] for call in _calls(calls) if "--policy-document" in call}
    actions = {role: [a for s in json.loads(text)["Statement"] for a in s["Action"]] for role, text in policies.items()}
    nodes = config["available_node_types"].values()
    assert set(made) == set(actions)
    assert all(json.loads(call["--assume-role-policy-document"]) for call in made.values())
    assert set(actions) == {node["node_config"]["IamInstanceProfile"]["Name"] for node in nodes}
    assert all(action.startswith("s3:") for action in actions["deft-ray-worker"])
    assert {"ssm:GetParameters", "iam:PassRole", "s3:PutObject"} <= set(actions["deft-ray-head"])
    assert "arn:aws:s3:::my-bucket/*" in policies["deft-ray-worker"]


def test_roles_need_a_bucket() -> None:
    done = subprocess.run(["bash", UP.with_name("aws_roles.sh")], capture_output=True, text=True, check=False)

    assert done.returncode != 0
    assert "usage: cluster/aws_roles.sh YOUR-BUCKET" in done.stderr


def _unknown_keys(value: object, allowed: frozenset[str] | set[str] = RUN_INSTANCES, at: str = "") -> Iterator[str]:
    """Dotted places of the keys that EC2 would refuse."""
    if isinstance(value, list):
        for item in value:
            yield from _unknown_keys(item, allowed, at)
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in allowed:
                yield at + key
            elif key in INSIDE:
                yield from _unknown_keys(inner, INSIDE[key], f"{at}{key}.")


def _calls(file: Path) -> list[dict[str, str]]:
    """The options of each recorded call."""
    calls = [line.split("\0")[:-1] for line in file.read_text().split("\n\0")[:-1]]
    return [dict(zip(words[2::2], words[3::2], strict=True)) for words in calls]
