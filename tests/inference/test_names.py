"""Test how weights are named and described: versions, the labels of servers, and manifests."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mgrpo.engine.inference.manifest import manifest_of, misfit
from mgrpo.engine.inference.vllm.api import UNSET, label, read_label
from mgrpo.engine.types import NO_WEIGHTS, WeightsVersion

STEPS = st.integers(0, 2**62)
WEIGHTS = {"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


@given(STEPS, STEPS)
def test_a_version_survives_its_text_and_its_label(optimizer_steps: int, rl_steps: int):
    version = WeightsVersion(optimizer_steps, rl_steps)
    assert WeightsVersion.parse(str(version)) == version == read_label(label(version))


def test_the_text_of_a_version_and_the_label_of_no_weights():
    assert str(WeightsVersion(12, 3)) == label(WeightsVersion(12, 3)) == "12/3"
    assert label(NO_WEIGHTS) == UNSET and read_label(UNSET) == NO_WEIGHTS


@pytest.mark.parametrize(
    "text", ["", "12", "12/", "/3", "12/3/4", "-1/0", "1.5/0", "True/0", " 12/3", "12/3\n", "newest"]
)
def test_invalid_texts_are_refused(text: str):
    for read in (WeightsVersion.parse, read_label):
        with pytest.raises(ValueError, match="given: expected OPTIMIZER_STEPS/RL_STEPS, such as 12/3"):
            read(text)


def test_versions_are_ordered_by_optimizer_steps_and_then_by_rl_steps():
    texts = ["0/0", "0/6", "2/1", "10/1", "10/2"]
    versions = [WeightsVersion.parse(text) for text in texts]
    assert sorted(reversed(versions)) == versions and min(versions) > NO_WEIGHTS


def test_a_manifest_is_the_same_after_json_and_as_another_dtype():
    manifest = manifest_of(WEIGHTS)
    assert misfit(manifest, json.loads(json.dumps(manifest))) == ""
    rounded = {name: tensor.to(torch.bfloat16) for name, tensor in WEIGHTS.items()}
    assert misfit(manifest_of(WEIGHTS, torch.bfloat16), manifest_of(rounded)) == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": torch.ones(4)}, "weight 'b' is float32 [4]: expected bfloat16 [4], as in the model"),
        ({"a": torch.ones(3, 2)}, "weight 'a' is float32 [3, 2]: expected float32 [2, 3], as in the model"),
        ({"c": torch.ones(())}, "weight 'c' is float32 []: expected no such weight, as in the model"),
    ],
)
def test_a_misfit_names_the_weight_and_both_descriptions(change: dict[str, torch.Tensor], message: str):
    assert misfit(manifest_of(WEIGHTS), manifest_of(WEIGHTS | change)) == message


def test_a_missing_weight_is_a_misfit():
    missing = misfit(manifest_of(WEIGHTS), manifest_of({"a": WEIGHTS["a"]}))
    assert missing == "weight 'b' is missing: expected bfloat16 [4], as in the model"
