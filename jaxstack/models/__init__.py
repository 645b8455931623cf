"""Networks in flax.nnx, and the way between them and Hugging Face folders.

A folder's `config.json` becomes a `DecoderConfig` (`hf_config`), its safetensors fill a `Decoder` tensor by tensor
(`checkpoint`, with the names of `hf_names`; `hf_families` lists what the
families are), and `save_decoder` writes a folder that other software opens. The decoder
(`decoder`, built of `linear`, `moe` and `rope`) leaves attention to the caller: `attention.dense_attention` for whole
sequences, the engine's for pages. `encoder` is BERT, which turns texts into vectors; `encoder_checkpoint` reads its
folders. `lora` puts low-rank adapters into a decoder and `peft_format` reads
and writes their folders. `serving_layout` rearranges a decoder's weights for inference. `tokenizer` and
`chat_template` read the folder's text side.
"""

from jaxstack.models.attention import FULL_WINDOW, Attend, LayerContext, dense_attention
from jaxstack.models.decoder import Decoder, DecoderConfig
from jaxstack.models.decoder_config import MoeConfig
from jaxstack.models.linear import Linear, LoraParam, LoraWeights
from jaxstack.models.rope import RopeConfig

__all__ = [
    "FULL_WINDOW",
    "Attend",
    "Decoder",
    "DecoderConfig",
    "LayerContext",
    "Linear",
    "LoraParam",
    "LoraWeights",
    "MoeConfig",
    "RopeConfig",
    "dense_attention",
]
