"""Options that keep a sampler from drawing any token are refused by name; what leaves it free is not."""

from __future__ import annotations

from typing import Any

import pytest

from mgrpo.engine.config.masks import check_free, check_server
from mgrpo.engine.inference.vllm.api import generate_body


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("top_p", 0.95, "expected 1"),
        ("top_k", 20, "expected 0 or -1"),
        ("min_p", 0.05, "expected 0"),
        ("repetition_penalty", 1.1, "expected 1"),
        ("presence_penalty", 0.5, "expected 0"),
        ("logit_bias", {"7": -100}, r"expected \{\}"),
        ("bad_words", ["no"], r"expected \[\]"),
        ("response_format", {"type": "json_object"}, r"expected \{'type': 'text'\}"),
        ("tool_choice", "required", "expected 'auto' or 'none'"),
        ("tool_choice", {"type": "function", "function": {"name": "search"}}, "expected 'auto' or 'none'"),
        ("guided_json", {"type": "object"}, "expected none"),
        ("json_schema", "{}", "expected none"),
    ],
)
def test_a_mask_is_refused_by_name(name: str, value: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=rf"^row 3, {name}: .* given: {expected}, because the trainer's log-probs"):
        check_free({"temperature": 0.7, name: value}, "row 3, ")


def test_options_that_leave_all_tokens_are_taken() -> None:
    free = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "tool_choice": "auto", "logit_bias": None, "temperature": 0.5}
    check_free(free, "")
    check_free({"regex": "a task's own"}, "", only_options=False)


@pytest.mark.parametrize("form", ["{}", "{}=x", "{}.top_k=5", "{}.a.b"])
@pytest.mark.parametrize("name", ["--override-generation-config", "--override_generation_config", "--watermark-config"])
def test_a_mask_of_a_server_is_refused_in_every_form_that_vllm_takes(form: str, name: str) -> None:
    with pytest.raises(ValueError, match=r"^serve: --[a-z-]+ given: expected no argument"):
        check_server(["--port", "1", form.format(name)], "serve")


def test_a_request_to_a_server_says_that_all_tokens_are_free() -> None:
    """A server may have other defaults, from its model's generation_config.json."""
    body = generate_body([1], max_tokens=2, temperature=0.7, top_p=1.0, stop=[], ends=[0])
    given = body["sampling_params"]
    check_free(given, "")
    assert {"top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"} <= given.keys()
