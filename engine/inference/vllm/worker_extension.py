"""Receive new weights inside a vLLM worker while it samples, and load them while it is paused.

The transfer engine `tcp` receives in a thread, into its own memory, and touches the model only after everything has
arrived. So an update that fails in the middle leaves the old weights whole, and a server is paused only for the
loading, not for the network. This costs the size of the weights once more in main memory.

This is a worker extension (`--worker-extension-cls`). It registers that engine and adds `check`, also for servers that
use vLLM's own engines (`nccl`, `ipc`).
"""

from __future__ import annotations

import json
import os
import socket
import traceback
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from mgrpo.engine.inference.manifest import Manifest, manifest_of, misfit
from mgrpo.engine.inference.vllm import tcp_frames
from mgrpo.engine.model.composite import auto_class
from mgrpo.engine.system.process import keep_memory


class Extension:
    """Add methods to every worker of a server, to be called by `/collective_rpc`."""

    vllm_config: Any
    weight_transfer_engine: Any
    _weight_update_active: bool

    def check(self, text: str) -> dict[str, str]:
        """Check that a trainer's weights and way of sending them (JSON) fit this server. Return {} or {"error": …}."""
        given, config = json.loads(text), self.vllm_config.model_config
        found = {"logprobs_mode": config.logprobs_mode, "transfer": self.vllm_config.weight_transfer_config.backend}
        for key, value in {"logprobs_mode": "processed_logprobs", "transfer": given["transfer"]}.items():
            if found[key] != value:
                return {"error": f"the server was started with {key} {found[key]!r}: expected {value!r}"}
        manifest = expected(config.hf_config, config.dtype)
        if error := misfit(manifest, given["weights"]):
            return {"error": error}
        self.weight_transfer_engine.expected = manifest
        return {}

    def abandon(self) -> None:
        """Abandon an update that was left open. Only for the engine `tcp`, which has loaded nothing of it yet."""
        assert isinstance(self.weight_transfer_engine, ReceiveEngine)
        self.weight_transfer_engine.arriving = None
        self._weight_update_active = False


def expected(config: PretrainedConfig, dtype: torch.dtype) -> Manifest:
    """Describe what a trainer of this model sends: its parameters under transformers' names, without a tied head."""
    with torch.device("meta"):
        model = auto_class(config).from_config(config, trust_remote_code=False)
    return manifest_of(dict(model.named_parameters()), dtype)


@dataclass
class Begin(WeightTransferInitInfo):
    """Hold nothing: this engine needs no agreement before the first update."""


@dataclass
class FetchRequest(WeightTransferUpdateInfo):
    """Say where to fetch weights, and with which secret. timeout: seconds without a byte."""

    host: str
    port: int
    secret: str
    timeout: float


class ReceiveEngine(WeightTransferEngine):
    """Implement the transfer engine `tcp`."""

    init_info_cls, update_info_cls = Begin, FetchRequest

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        keep_memory()  # a whole set of weights is allocated and freed in every update
        self.thread = ThreadPoolExecutor(1, "weights")
        self.arriving: Future[dict[str, Tensor]] | None = None
        self.expected: Manifest = {}  # empty until `check` has accepted a trainer

    def init_transfer_engine(self, init_info: Begin) -> None:
        pass

    def start_weight_update(self) -> None:
        self.arriving = None

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Begin to receive and return at once, unlike the base class, which would wait for an accelerator."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: FetchRequest) -> None:
        self.arriving = self.thread.submit(_receive, update_info)

    def finish_weight_update(self) -> None:
        """Load what arrived. Raises what receiving raised, or ValueError on a misfit; the model is then unchanged.

        If loading fails, this process exits, so that nothing is sampled with a half-loaded model.
        """
        assert self.arriving is not None, "finish_weight_update before update_weights"
        tensors, whole = self.arriving.result(), False
        if error := misfit(self.expected, manifest_of(tensors)):
            raise ValueError(error)
        try:
            load(self.model, self.model_config, tensors)
            whole = True
        finally:
            if not whole:
                traceback.print_exc()
                os._exit(1)
        self.arriving = None

    def shutdown(self) -> None:
        self.thread.shutdown(wait=False, cancel_futures=True)


def _receive(request: FetchRequest) -> dict[str, Tensor]:
    with closing(socket.create_connection((request.host, request.port), request.timeout)) as connection:
        tcp_frames.send_secret(connection, request.secret)
        return dict(tcp_frames.receive_tensors(connection))


@torch.no_grad()
def load(model: Any, config: Any, tensors: dict[str, Tensor]) -> None:
    """Load a whole set of weights into a running model, in place."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    initialize_layerwise_reload(model)
    model.load_weights(tensors.items())
    finalize_layerwise_reload(model, config)
    tied = getattr(config.hf_config, "tie_word_embeddings", False)
    if tied and model.lm_head.weight.device.type == "cpu":
        # The tied head came with the embedding, but nothing else renews the CPU's packed copy of it.
        dispatch_cpu_unquantized_gemm(model.lm_head, remove_weight=False)


WeightTransferEngineFactory.register_engine("tcp", ReceiveEngine)
