"""In a packed row, all sequences but the first get wrong positions if the decoder counts positions itself.

Such decoders take no position_ids: BART, mBART, Pegasus, Marian, PLBART, Blenderbot and others.
"""

from transformers import BartConfig, BartForCausalLM, MBartConfig, MBartForCausalLM, PegasusConfig, PegasusForCausalLM

from reproduction.models import EAGER, judge

KINDS = ((BartForCausalLM, BartConfig), (MBartForCausalLM, MBartConfig), (PegasusForCausalLM, PegasusConfig))
sizes = {
    "vocab_size": 97,
    "d_model": 32,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "decoder_layers": 2,
    "encoder_layers": 2,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 1,
}
judge(kind._from_config(config(**sizes), **EAGER) for kind, config in KINDS)
