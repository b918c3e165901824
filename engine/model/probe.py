"""Hold a model to itself before it is trained: exact over packed rows, or refused by the name of what differs.

The truth is the model's own forward, with its own attention, on each sequence alone. Compared with it are the log-probs
of the trainer's path (sequences packed in one row), on random ids that are longer than any window, chunk or RoPE
switch: on a small copy of the config with random weights in float64, where every difference shows, and on the real
weights with fewer ids.

Legend: T tokens of a sequence or of a flat row of several, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from mgrpo.engine.model.attention import (
    Mixer,
    Packed,
    Rule,
    UnsupportedAttentionError,
    backbone,
    hidden_states,
    output_head,
    register_local_kind,
)
from mgrpo.engine.model.composite import text_lm
from mgrpo.engine.model.logits import CAPS, LogitMap, possible_maps, softcap_of
from mgrpo.engine.model.recurrent import follow_layouts, missing_packages, mixer_kinds

LENGTHS = (75, 9, 44)  # tokens of the sequences that are packed; the longest is beyond every window of a small copy
NEAR = 16  # keys that a small copy's layers see at most, where the config has windows or chunks
SWITCH = 32  # tokens after which a small copy's RoPE changes its frequencies, where the config has such a length
REAL = (77, 51)  # tokens of the sequences that the real weights are asked
SMALL = 1e-3  # nats; the small copy runs in float64, except norms, which cast to float32
ROUNDING = {torch.float64: 1e-3, torch.float32: 1e-2, torch.bfloat16: 0.15}  # nats a token, the mean of the real ids
FAILURES = (TypeError, AttributeError, RuntimeError, IndexError, KeyError, ValueError)  # of a model's own code
SPREAD = 0.25  # of the random weights: logits large enough for a cap to show
HEADS, VOCABULARY, MOST = 4, 199, 100_000_000  # of a small copy; MOST: weights
DEPTHS = ("num_hidden_layers", "num_layers", "n_layers", "depth", "encoder_layers")  # keys of a tower's config
FLAT = 1e3  # the bound of logits, without a cap: where to look whether they are still a multiple of the head's output
SIZES = (1e-3, 1.0, 1e3)  # of the logits at which the cap is verified, as shares of the bound
NARROW = {  # keys that say how wide a layer is, and the most that a small copy has
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), 96),
    **dict.fromkeys(("linear_num_heads", "mamba_num_heads"), HEADS),
    **dict.fromkeys(("linear_head_dim", "linear_key_head_dim", "linear_value_head_dim", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "mamba_chunk_size", "chunk_size"), 16),
    **dict.fromkeys(("mamba_n_groups", "n_groups"), HEADS // 2),
}
WINDOWS = ("sliding_window", "attention_chunk_size")  # keys of a config that say how near keys must be


@torch.no_grad()
def check_exact(whose: str, model: PreTrainedModel, training: bool = True, longest: int | None = None) -> LogitMap:
    """Compare a model that has our attention with itself; returns how its logits follow from the head's output.

    whose: how errors name it. training: it may run in training mode too. longest: no sequence has more tokens; None:
    any may come. Raises ValueError that names the mechanism in which they differ.
    """
    what = f"{whose}: {type(model).__name__}"
    _check_head(whose, model)
    _check_kernels(what, model)
    follow_layouts(model)
    real = Comparison(what, model, REAL, ROUNDING[model.dtype])
    small = small_copy(model, longest)
    if small is None:
        return real.run(training)
    return real.run_once(Comparison(what, small, LENGTHS, SMALL).run(training))


def _check_head(whose: str, model: PreTrainedModel) -> None:
    head = output_head(model, whose)
    if getattr(type(head), "forward", None) is not nn.Linear.forward:  # what a subclass adds would be left out
        kind = f"{type(head).__module__}.{type(head).__qualname__}"
        raise ValueError(
            f"{whose}: {type(model).__name__} has a head of class {kind}: expected a plain nn.Linear, because what an "
            "adapter adds to the head would be left out: leave the head out of the adapter's targets, as PEFT's "
            "exclude_modules = ['lm_head'] does"
        )


def _check_kernels(what: str, model: PreTrainedModel) -> None:
    if model.device.type == "cuda" and (missing := missing_packages(model)):
        raise ValueError(
            f"{what} has recurrent layers, whose states only the kernels of {' and '.join(missing)} keep apart in a "
            "packed row on a GPU: expected these packages, which are not installed"
        )


class _Watched(Packed):
    """Count the layers that attend or mix through us, and how often each does."""

    def __init__(self, cu_seqlens: Tensor, max_seqlen: int):
        super().__init__(cu_seqlens, max_seqlen)
        self.layers: list[int] = []
        self.mixed: list[int] = []

    def attend(self, layer: int, q_ATD: Tensor, k_GTD: Tensor, v_GTE: Tensor, rule: Rule) -> Tensor:
        self.layers.append(layer)
        return super().attend(layer, q_ATD, k_GTD, v_GTE, rule)

    def mix(self, mixer: Mixer, hidden_1TH: Tensor) -> Tensor:
        self.mixed.append(mixer.layer)
        return super().mix(mixer, hidden_1TH)


class Comparison:
    """Compare a model's log-probs by its own forward with ours, over the same random ids."""

    def __init__(self, what: str, model: PreTrainedModel, lengths: Sequence[int], limit: float):
        self.what, self.model, self.limit = what, model, limit
        generator = torch.Generator().manual_seed(0)
        embeddings: Any = model.get_input_embeddings()
        vocabulary, most = embeddings.weight.shape[0], _context(model)
        self.ids = [torch.randint(1, vocabulary, (min(n, most),), generator=generator) for n in lengths]
        self.ids = [ids.to(model.device) for ids in self.ids]
        self.map = LogitMap()

    def run(self, training: bool) -> LogitMap:
        """Return how logits follow from the head's output. Raises ValueError that names what differs."""
        with _mode(self.model, training=False):
            truth = self._logits(self.ids)
            self.find_map(truth[0][0])
            own = [self._gathered(logits, ids) for logits, ids in zip(truth, self.ids, strict=True)]
            self._check_alone(own)
            self.require(self._ours(self.ids), own, self._cause_packed())
            again = self._ours(self.ids)
            self.require(self._ours(self.ids), again, "gives other log-probs for the same ids, drawing at random")
        with _mode(self.model, training):
            self.require(self._ours(self.ids), own, "computes other log-probs in training mode than in eval mode")
        return self.map

    def run_once(self, expected: LogitMap) -> LogitMap:
        """Compare the packed row alone, with as few forwards as can be; for the real weights, whose code is checked.

        expected: the map of a small copy; another is looked for only if that is not the real one's.
        """
        with _mode(self.model, training=False):
            truth = self._logits(self.ids)
            self.find_map(truth[0][0], expected)
            own = [self._gathered(logits, ids) for logits, ids in zip(truth, self.ids, strict=True)]
            self.require(self._ours(self.ids), own, "computes other log-probs with its own weights")
        return self.map

    def _check_alone(self, own: Sequence[Tensor]) -> None:
        """Compare each sequence alone. Layers that see near keys only are taken for windows first, then for chunks."""
        kind = self.model.config.get_text_config().model_type
        alone = [self._ours([ids])[0] for ids in self.ids]
        if _is_local(self.model) and not self._gap(alone, own) <= self.limit:
            register_local_kind(kind, "chunk")
            alone = [self._ours([ids])[0] for ids in self.ids]
            if not self._gap(alone, own) <= self.limit:
                register_local_kind(kind, "window")
        self.require(alone, own, "has a mask of its own, which is neither causal nor one of windows or chunks")

    def own(self) -> list[Tensor]:
        """Return the log-probs of each sequence's tokens but the first, by the model's own forward on it alone."""
        return [self._gathered(logits, ids) for logits, ids in zip(self._logits(self.ids), self.ids, strict=True)]

    def _logits(self, sequences: Sequence[Tensor]) -> list[Tensor]:
        """Return the logits (T, V) of each sequence by the model's own forward."""
        with _own_attention(self.model):
            try:
                return [text_lm(self.model)(input_ids=ids[None], use_cache=False).logits[0] for ids in sequences]
            except torch.OutOfMemoryError:
                raise
            except FAILURES as error:
                raise ValueError(f"{self.what} does not run on plain token ids: {error}") from error

    def _hidden(self, sequences: Sequence[Tensor]) -> Tensor:
        lengths = torch.tensor([0, *(len(ids) for ids in sequences)], device=self.model.device)
        layout = _Watched(lengths.cumsum(0).to(torch.int32), int(lengths.max()))
        positions_T = torch.cat([torch.arange(len(ids), device=ids.device) for ids in sequences])
        try:
            hidden_TH = hidden_states(self.model, torch.cat(list(sequences)), positions_T, layout)
        except torch.OutOfMemoryError:
            raise
        except UnsupportedAttentionError as error:
            raise ValueError(f"{self.what} {error}: expected causal attention that a packed row can carry") from error
        except FAILURES as error:
            raise ValueError(f"{self.what} does not run over a packed row: {error}") from error
        if not layout.mixed and (kinds := mixer_kinds(self.model)):
            names = ", ".join(kind.__name__ for kind in kinds)
            raise ValueError(
                f"{self.what} has recurrent layers ({names}) that do not get the arguments of its forward: "
                "expected layers that can be told where a packed sequence begins"
            )
        if not layout.mixed and len(set(layout.layers)) < self.model.config.get_text_config().num_hidden_layers:
            raise ValueError(
                f"{self.what} has layers without attention, or with code of their own for it: expected transformers' "
                "attention interface in every layer"
            )
        if len(layout.layers) > len(set(layout.layers)):
            raise ValueError(f"{self.what} attends more than once in a layer: expected one attention a layer")
        return hidden_TH.to(output_head(self.model).weight.dtype)  # which a caller may have made wider

    def _ours(self, sequences: Sequence[Tensor]) -> list[Tensor]:
        """Return the log-probs of each sequence's tokens but the first, all packed in one row."""
        head = output_head(self.model)
        logits_TV = self.map(F.linear(self._hidden(sequences), head.weight, head.bias))
        rows = logits_TV.split([len(ids) for ids in sequences])
        return [self._gathered(logits, ids) for logits, ids in zip(rows, sequences, strict=True)]

    def _gathered(self, logits_TV: Tensor, ids_T: Tensor) -> Tensor:
        wide = torch.promote_types(logits_TV.dtype, torch.float32)
        return logits_TV[:-1].to(wide).log_softmax(-1).gather(-1, ids_T[1:, None])[:, 0]

    def find_map(self, truth_V: Tensor | None = None, expected: LogitMap | None = None) -> LogitMap:
        """Find and keep the map from the head's output to the logits. Raises ValueError if there is none.

        truth: the first token's logits by the model's own forward; only these are compared, because that token attends
        to itself alone under any mask. expected: used if it gives these logits; otherwise the map is searched for, with
        the head's output also made small and large.
        """
        head, first = output_head(self.model), [self.ids[0][:1]]
        plain_V = F.linear(self._hidden(first)[0], head.weight, head.bias).double()
        pairs = [(plain_V, self._logits(first)[0][0].double() if truth_V is None else truth_V.double())]
        if expected is None or not self._gives(expected, pairs):
            bound = softcap_of(self.model.config)
            pairs += self._resized(plain_V, bound or FLAT)
            expected = next((found for found in possible_maps(pairs, bound) if self._gives(found, pairs)), None)
        if expected is None:
            raise ValueError(
                f"{self.what} changes its logits after the head: expected a multiple of the head's output, capped by "
                f"tanh if its config has one of {', '.join(CAPS)}"
            )
        self.map = expected
        return expected

    def _gives(self, found: LogitMap, pairs: Sequence[tuple[Tensor, Tensor]]) -> bool:
        """Return whether the map gives these logits, up to a share of the largest."""
        limit = 0.05 if self.model.dtype == torch.bfloat16 else 1e-3
        return all(
            float((truth_V - found(plain_V)).abs().max()) <= limit * float(truth_V.abs().max())
            for plain_V, truth_V in pairs
        )

    def _resized(self, plain_V: Tensor, bound: float) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the head's output at each of SIZES, and the logits that the model's own code makes of it.

        Yield nothing if that code computes the head's output without calling the head.
        """
        called = []
        for size in SIZES:
            factor = 2.0 ** round(math.log2(size * bound / float(plain_V.abs().max().clamp(min=1e-30))))  # exact

            def resize(module: nn.Module, _: Any, output: Tensor, factor: float = factor) -> Tensor:
                called.append(module)
                return output * factor

            hook = output_head(self.model).register_forward_hook(resize)
            try:
                truth_V = self._logits([self.ids[0][:1]])[0][0]
            finally:
                hook.remove()
            if not called:
                return
            yield factor * plain_V, truth_V.double()

    def _gap(self, found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
        """Return the largest difference in float64, else, where each token is rounded, the mean."""
        gaps = (torch.cat(list(found)) - torch.cat(list(truth))).abs()
        return float(gaps.max() if self.model.dtype == torch.float64 else gaps.mean())

    def require(self, found: Sequence[Tensor], truth: Sequence[Tensor], cause: str) -> None:
        if not (gap := self._gap(found, truth)) <= self.limit:
            raise ValueError(f"{self.what} {cause}: log-probs differ by {gap:.2g} nats, expected at most {self.limit}")

    def _cause_packed(self) -> str:
        """Name what of a model can reach from one packed sequence to the next."""
        if "position_ids" not in inspect.signature(backbone(self.model).forward).parameters:
            return "counts positions by itself and takes no position_ids"
        if _has_switch(self.model):
            return "has RoPE whose frequencies follow the longest sequence of a row"
        return "carries state from one packed sequence into the next"


def _context(model: PreTrainedModel) -> int:
    """Return the most tokens that a model with learned positions has; with RoPE there may be more."""
    config = model.config.get_text_config()
    if getattr(config, "rope_parameters", None):
        return max(*LENGTHS, *REAL)
    return (
        getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or max(*LENGTHS, *REAL)
    )


def _is_local(model: PreTrainedModel) -> bool:
    """Return whether the config says that some layers see near keys only."""
    config = model.config.get_text_config()
    return any(getattr(config, name, None) for name in WINDOWS)


def _has_switch(model: PreTrainedModel) -> bool:
    """Return whether RoPE's frequencies depend on the sequence length."""
    return any(rope.get("rope_type") in ("longrope", "dynamic") for rope in _ropes(model.config.get_text_config()))


def _ropes(config: Any) -> Iterator[dict[str, Any]]:
    """Yield the RoPE parameters of a config: one dictionary, or one for each kind of layer."""
    given = getattr(config, "rope_parameters", None) or {}
    yield from (part for part in (given, *given.values()) if isinstance(part, dict))


@contextmanager
def _mode(model: PreTrainedModel, training: bool) -> Iterator[None]:
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, was in before:
            module.training = was


@contextmanager
def _own_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let the model attend as its own code does."""
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation("mgrpo")


def small_copy(model: PreTrainedModel, longest: int | None = None) -> PreTrainedModel | None:
    """Return a model of the same kind, on the CPU, in float64, with few narrow layers and random weights.

    None if none can be made from the config, of at most MOST weights; then the real weights alone are asked.
    """
    model = text_lm(model)
    for narrow in (True, False):
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                config = _cut(copy.deepcopy(model.config), narrow, longest)
                if not narrow and _weights(type(model), config) > MOST:
                    continue
                made: PreTrainedModel = type(model)._from_config(
                    config, dtype=torch.float64, attn_implementation="eager"
                )
                for param in made.parameters():
                    drawn = torch.randn_like(param)
                    param.copy_(drawn * SPREAD if param.ndim > 1 else param + 0.1 * drawn)
            made.eval()(input_ids=torch.arange(1, 6)[None], use_cache=False)
            made.set_attn_implementation("mgrpo")
        except Exception:  # third-party code may raise anything for a config that it does not know
            continue
        without_dropout(made)
        return made
    return None


def _weights(kind: type[PreTrainedModel], config: Any) -> int:
    """Return how many weights a model of this config would have."""
    with torch.device("meta"):
        return sum(param.numel() for param in kind._from_config(copy.deepcopy(config)).parameters())


def without_dropout(model: PreTrainedModel) -> list[tuple[nn.Module, str, float]]:
    """Switch dropout off, as the trainer must see the distribution that the sampler saw.

    Returns what `with_dropout` takes to switch it on again: modules, their attributes, and the values they had.
    """
    before = []
    for module in model.modules():
        names = ["p"] if isinstance(module, nn.Dropout) else [name for name in vars(module) if "drop" in name]
        for name in names:
            value = getattr(module, name)
            if isinstance(value, float):
                before.append((module, name, value))
                setattr(module, name, 0.0)
    return before


def with_dropout(before: list[tuple[nn.Module, str, float]]) -> None:
    """Switch dropout on again."""
    for module, name, value in before:
        setattr(module, name, value)


def _cut(config: Any, narrow: bool, longest: int | None) -> Any:
    """Make a config small: one layer of each kind and at least two, near keys, and narrow if asked to."""
    text = config.get_text_config()
    config._experts_implementation = text._experts_implementation = "eager"  # the grouped matmul has no float64
    kinds = list(getattr(text, "layer_types", None) or [])
    chosen = [kinds.index(kind) for kind in dict.fromkeys(kinds)] or [0, 1]
    layers = text.num_hidden_layers
    chosen = (chosen + [i for i in range(layers) if i not in chosen])[: max(2, len(chosen))]
    if getattr(text, "num_kv_shared_layers", 0):  # the last layers use the keys and values of others
        chosen = [*(i for i in chosen if i != layers - 1), layers - 1]
        text.num_kv_shared_layers = 1
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == layers:
            setattr(text, name, [value[i] for i in sorted(chosen)])
    text.num_hidden_layers = len(chosen)
    for name in WINDOWS:
        if getattr(text, name, None):
            setattr(text, name, NEAR)
    for holder in (vars(text), *_ropes(text)):
        if 0 < (holder.get("original_max_position_embeddings") or 0) < (longest or math.inf):  # else it never switches
            holder["original_max_position_embeddings"] = SWITCH
    dynamic = any(rope.get("rope_type") == "dynamic" for rope in _ropes(text))
    if dynamic and text.max_position_embeddings < (longest or math.inf):
        text.max_position_embeddings = SWITCH
    if narrow:
        _narrow(text)
    cut_towers(config, text)
    return config


def cut_towers(config: Any, text: Any) -> None:
    """Leave one layer of each tower beside the text model, such as for images, which no text runs through."""
    for tower in (getattr(config, name, None) for name in config.sub_configs):
        for name, value in list(vars(tower).items()) if tower not in (None, text) else ():
            if name in DEPTHS:
                setattr(tower, name, 1)
            elif name.endswith("_indexes") and value:  # layers that do something else
                setattr(tower, name, [0])


def _narrow(text: Any) -> None:
    """Cut widths and heads; a head's size stays."""
    heads, groups = text.num_attention_heads, getattr(text, "num_key_value_heads", None)
    derived = text.hidden_size // heads if vars(text).get("head_dim") is None else 0
    text.vocab_size = min(text.vocab_size, VOCABULARY)
    text.bos_token_id = text.eos_token_id = None
    text.pad_token_id = None if getattr(text, "pad_token_id", None) is None else 0  # no id that is tried
    text.num_attention_heads = min(heads, HEADS)
    if groups is not None:
        text.num_key_value_heads = min(groups, HEADS // 2 if groups < heads else HEADS)
    text.hidden_size = derived * text.num_attention_heads if derived else min(text.hidden_size, 16 * HEADS)
    for name, most in NARROW.items():
        if isinstance(getattr(text, name, None), int):
            setattr(text, name, min(getattr(text, name), most))
    _narrow_mixers(text)


def _narrow_mixers(text: Any) -> None:
    """Cut the heads of recurrent layers whose number must fit another key of the config."""
    keys, values = (getattr(text, f"linear_num_{name}_heads", None) for name in ("key", "value"))
    if keys and values:
        text.linear_num_key_heads = min(keys, HEADS // 2)
        text.linear_num_value_heads = text.linear_num_key_heads * max(1, values // keys)
    if getattr(text, "mamba_n_heads", None):
        width = text.mamba_expand * text.hidden_size
        text.mamba_n_heads, text.mamba_d_head = HEADS, width // HEADS
        if getattr(text, "mamba_d_ssm", None):
            text.mamba_d_ssm = width
