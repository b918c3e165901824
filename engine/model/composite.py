"""Find the causal LM inside a checkpoint that also sees or hears, which is trained on text alone.

Such a checkpoint is loaded whole, so that its weights keep their names and none is lost: the towers for images and
sound, with their projectors, run nowhere, stay as they are, and are checkpointed and published with the rest.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel


def auto_class(config: PreTrainedConfig) -> Any:
    """Return the class of transformers by which a checkpoint of this config is made or loaded whole.

    AutoModelForCausalLM would leave the towers of some kinds out, give their weights other names, and refuse the rest.
    """
    text_only = (config.architectures or [""])[0].endswith("ForCausalLM")
    if is_composite(config) and not text_only and type(config) in AutoModelForImageTextToText._model_mapping:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def is_composite(config: PreTrainedConfig) -> bool:
    """Return whether text is but a part of what a model takes: its text model has a config of its own."""
    return config.get_text_config() is not config


def text_part(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model itself or, of one that also sees or hears, the part that reads text; it may have no head."""
    if not is_composite(model.config):
        return model
    part: PreTrainedModel = model.get_decoder()
    return part


def text_lm(model: PreTrainedModel) -> PreTrainedModel:
    """Return the smallest part of a model that gives the logits of a text: the whole, or a causal LM inside it."""
    part = text_part(model)
    return model if part.get_output_embeddings() is None else part


def other_weights(model: PreTrainedModel, head: nn.Linear) -> dict[str, nn.Parameter]:
    """Return the weights, by name, of which no log-prob of a text depends: all but those of text part and head."""
    used = {id(param) for part in (text_part(model), head) for param in part.parameters()}
    return {name: param for name, param in model.named_parameters() if id(param) not in used}
