"""Inside a vLLM worker: new weights arrive while it samples, and are put in while it pauses.

The transfer engine `tcp` receives in a thread, into memory of its own, and touches the model only when all of it is
there: an update that breaks off leaves the old weights whole, and a server is paused for as long as the loading takes,
not for as long as the network does. That costs the weights' size once more in main memory.

Loaded as a worker extension (`--worker-extension-cls`), which registers the engine and adds `check`, for servers that
use vLLM's own engines (`nccl`, `ipc`) too.
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
from transformers import AutoModelForCausalLM, PretrainedConfig
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from mgrpo.engine.inference.vllm import tcp_frames as wire
from mgrpo.engine.system.process import keep_memory

Manifest = dict[str, tuple[str, list[int]]]  # of each weight its dtype, without "torch.", and its shape


class Extension:
    """Methods that every worker of a server has beside vLLM's own, to be called by `/collective_rpc`."""

    vllm_config: Any
    weight_transfer_engine: Any
    _weight_update_active: bool

    def check(self, text: str) -> dict[str, str]:
        """Whether a trainer's weights and way of sending them (JSON) fit this server: {}, or {"error": …}."""
        given, config = json.loads(text), self.vllm_config.model_config
        ways = {"logprobs_mode": config.logprobs_mode, "transfer": self.vllm_config.weight_transfer_config.backend}
        for key, way in {"logprobs_mode": "processed_logprobs", "transfer": given["transfer"]}.items():
            if ways[key] != way:
                return {"error": f"it was started with {key} {ways[key]!r}: expected {way!r}"}
        wanted = expected(config.hf_config, str(config.dtype).removeprefix("torch."))
        if error := misfit(wanted, given["weights"]):
            return {"error": error}
        self.weight_transfer_engine.wanted = wanted
        return {}

    def abandon(self) -> None:
        """Give up an update that was left open. Nothing of it is in the model: only for the engine `tcp`."""
        assert isinstance(self.weight_transfer_engine, ReceiveEngine)
        self.weight_transfer_engine.arriving = None
        self._weight_update_active = False


def expected(config: PretrainedConfig, dtype: str) -> Manifest:
    """What a trainer of this model sends: the parameters as transformers names them, a tied head not among them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: (dtype, list(parameter.shape)) for name, parameter in model.named_parameters()}


def misfit(wanted: Manifest, given: Manifest) -> str:
    """Empty if they are the same, else a sentence about the first weight, by name, that is not."""
    for name in sorted(wanted.keys() | given.keys()):
        one, other = (list(of[name]) if name in of else None for of in (wanted, given))
        if one != other:
            return f"weight {name!r} is {other}: expected {one}, as the server's model has"
    return ""


@dataclass
class Begin(WeightTransferInitInfo):
    """Nothing is agreed on beforehand."""


@dataclass
class FetchRequest(WeightTransferUpdateInfo):
    """Whom to call for the weights, and what to say."""

    host: str
    port: int
    secret: str
    timeout: float  # seconds without a byte


class ReceiveEngine(WeightTransferEngine):
    """The engine `tcp`."""

    init_info_cls, update_info_cls = Begin, FetchRequest

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        keep_memory()  # a set of weights comes and goes with every update
        self.thread = ThreadPoolExecutor(1, "weights")
        self.arriving: Future[dict[str, Tensor]] | None = None
        self.wanted: Manifest = {}  # as long as no trainer was found to fit

    def init_transfer_engine(self, init_info: Begin) -> None:
        pass

    def start_weight_update(self) -> None:
        self.arriving = None

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Returns at once. Departs from the base class, which would wait for an accelerator."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: FetchRequest) -> None:
        self.arriving = self.thread.submit(_receive, update_info)

    def finish_weight_update(self) -> None:
        """Load what arrived. Raises what receiving it raised, or ValueError if it does not fit: the model is as it was.

        A process that could not load all of it ends: nothing may be sampled by a half.
        """
        assert self.arriving is not None, "finish_weight_update before update_weights"
        tensors, whole = self.arriving.result(), False
        given = {name: (str(of.dtype).removeprefix("torch."), list(of.shape)) for name, of in tensors.items()}
        if error := misfit(self.wanted, given):
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


def _receive(call: FetchRequest) -> dict[str, Tensor]:
    with closing(socket.create_connection((call.host, call.port), call.timeout)) as connection:
        wire.send_secret(connection, call.secret)
        return dict(wire.receive_tensors(connection))


@torch.no_grad()
def load(model: Any, config: Any, tensors: dict[str, Tensor]) -> None:
    """Put a whole set of weights into a model that runs, in the memory that it has them in."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    initialize_layerwise_reload(model)
    model.load_weights(tensors.items())
    finalize_layerwise_reload(model, config)
    tied = getattr(config.hf_config, "tie_word_embeddings", False)
    if tied and model.lm_head.weight.device.type == "cpu":
        # It came with the embedding; the CPU's packed copy of it is made anew by nobody else.
        dispatch_cpu_unquantized_gemm(model.lm_head, remove_weight=False)


WeightTransferEngineFactory.register_engine("tcp", ReceiveEngine)
