"""Keep the states of recurrent layers for the calls being sampled (model/recurrent.py).

A state cannot be cut back to fewer tokens as keys and values can. So that a prompt which a live call holds need not be
computed again, its states before the last token are kept beside those of the call.

Legend: S slots of the cache, R calls of a run, N new tokens of a call, H hidden size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mgrpo.engine.model.attention import Mixer

State = dict[tuple[str, int], Tensor]  # of one layer: by "conv" or "recurrent", and the number within the layer


class MixerCache:
    """Stand in for the cache of transformers in one run of a mixer, whose calls all have a state or none."""

    def __init__(self, state: State):
        self.state = dict(state)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Return the last inputs of a convolution, None at the begin; a mixer may change them in place."""
        return self.state.get(("conv", state_idx))

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Return the state of a recurrence, None at the begin; a mixer may change it in place."""
        return self.state.get(("recurrent", state_idx))

    def update_conv_state(
        self, new_RHN: Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None
    ) -> Tensor:
        """Keep as many inputs of a convolution as its kernel is wide; return all of them, old and new."""
        before = self.get_conv_state(layer_idx, state_idx)
        inputs = new_RHN if before is None else torch.cat([before, new_RHN], -1)
        size = (new_RHN if before is None else before).shape[-1] if conv_kernel_size is None else conv_kernel_size
        self.state["conv", state_idx] = F.pad(inputs, (max(size - inputs.shape[-1], 0), 0))[..., -size:].clone()
        return inputs

    def update_recurrent_state(self, new: Tensor, layer_idx: int, state_idx: int = 0) -> Tensor:
        """Keep the state of a recurrence."""
        self.state["recurrent", state_idx] = new
        return new

    def is_recording_past(self, layer_idx: int) -> bool:
        """Return False: no state is ever cut back."""
        return False


class RecurrentStates:
    """Hold the states of S calls: per layer tensors (S, …), made when the layer first runs.

    begins: of a slot the states of each layer before the last token of its prompt; slots with the same prompt share it.
    """

    def __init__(self, slots: int):
        self.slots = slots
        self.layers: dict[int, State] = {}
        self.begins: dict[int, dict[int, State]] = {}

    def begin(self, mixer: Mixer, slot: int, hidden_1NH: Tensor) -> Tensor:
        """Run a call from its first token on; returns the mixer's output (1, N, H)."""
        cache, found = MixerCache({}), []
        last = hidden_1NH.shape[1] - 1
        if last:
            found.append(mixer.run(hidden_1NH[:, :last], cache=cache))
            kept = {key: x.clone() for key, x in cache.state.items()}
            self.begins.setdefault(slot, {})[mixer.layer] = kept
        found.append(mixer.run(hidden_1NH[:, last:], cache=cache))
        self._write(mixer.layer, slice(slot, slot + 1), cache.state)
        return torch.cat(found, 1)

    def advance(self, mixer: Mixer, slots_R: Tensor, hidden_RNH: Tensor) -> Tensor:
        """Run calls on from their states; returns the mixer's output (R, N, H)."""
        cache = MixerCache({key: x[slots_R] for key, x in self.layers[mixer.layer].items()})
        out_RNH = mixer.run(hidden_RNH, cache=cache)
        self._write(mixer.layer, slots_R, cache.state)
        return out_RNH

    def copy(self, source: int, target: int) -> None:
        """Let a slot begin with another's prompt, except its last token."""
        if not self.layers:
            return
        self.begins[target] = self.begins[source]
        for layer, state in self.begins[source].items():
            for key, x in state.items():
                self.layers[layer][key][target] = x[0]

    def _write(self, layer: int, slots_R: Tensor | slice, state: State) -> None:
        held = self.layers.setdefault(layer, {})
        for key, x in state.items():
            if key not in held:
                held[key] = x.new_zeros(self.slots, *x.shape[1:])
            held[key][slots_R] = x
