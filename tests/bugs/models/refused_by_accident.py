"""Policy.of, or the sampler, ends in an AttributeError or a RuntimeError about shapes for models that it cannot take.

Its documentation promises a ValueError "for a setting or a model that will not do". The models are DeepSeek-V3 with
value heads of another size than its query heads (as in all released ones), Llama 4 (text), vision-language models, a
backbone without a head, a classifier, an encoder-decoder; in the sampler Gemma 4 with its two head sizes. Accepted, or
refused by a ValueError that names the model's class, is right.
"""

from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from mgrpo.engine import Policy
from reproduction import fault, held
from reproduction.models import SIZES, llama, tokenizer


def deepseek() -> DeepseekV3ForCausalLM:
    heads = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    experts = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1}
    sizes = SIZES | {"num_key_value_heads": 4, "topk_group": 1, "first_k_dense_replace": 1}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, **experts, **heads))


def qwen_vl() -> Qwen2VLForConditionalGeneration:
    text = SIZES | {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4}
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision))


def gemma_with_vision() -> Gemma3ForConditionalGeneration:
    text = SIZES | {"head_dim": 8, "sliding_window": 256}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1)
    return Gemma3ForConditionalGeneration(config)


def gemma_of_two_head_sizes() -> Gemma4ForCausalLM:
    config = Gemma4TextConfig(
        **SIZES,
        head_dim=8,
        global_head_dim=16,
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"],
        vocab_size_per_layer_input=97,
        hidden_size_per_layer_input=8,
    )
    return Gemma4ForCausalLM(config)


def t5() -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4))


def llama4() -> Llama4ForCausalLM:
    return Llama4ForCausalLM(Llama4TextConfig(**SIZES, head_dim=8, intermediate_size_mlp=48, num_local_experts=4))


MAKE = {
    "DeepSeek-V3": deepseek,
    "Llama 4, text": llama4,
    "Qwen2-VL": qwen_vl,
    "Gemma 3 with vision": gemma_with_vision,
    "a backbone": lambda: LlamaModel(LlamaConfig(**SIZES)),
    "a classifier": lambda: LlamaForSequenceClassification(LlamaConfig(**SIZES)),
    "T5": t5,
    "Gemma 4, two head sizes": gemma_of_two_head_sizes,
}


def take(model) -> None:
    Policy.of(model, tokenizer(), max_context=64).sampler().logprobs([5, 6, 7, 8])


take(llama())  # raises nothing: a healthy model
bad = []
for name, make in MAKE.items():
    model = make().eval()  # an exception here ends with status 2
    try:
        take(model)
        print(name, "accepted")
    except ValueError as error:
        if type(model).__name__ not in str(error):
            bad.append(f"{name}: refused without naming the model's class: {error}")
    except Exception as error:
        bad.append(f"{name}: {type(error).__name__}: {str(error)[:120]}")
if bad:
    fault("\n  ".join(["", *bad]))
held("accepted, or refused by the model's name")
