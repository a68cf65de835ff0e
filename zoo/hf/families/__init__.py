"""All families. Where several express a model, the earlier one is written."""

from __future__ import annotations

from zoo.hf.families.arctic import ARCTIC
from zoo.hf.families.bailing import BAILING_MOE
from zoo.hf.families.dbrx import DBRX
from zoo.hf.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3, DEEPSEEK_V32
from zoo.hf.families.ernie import ERNIE4_5, ERNIE4_5_MOE
from zoo.hf.families.gemma import GEMMA, GEMMA2, GEMMA3_TEXT
from zoo.hf.families.gemma4 import GEMMA4_TEXT
from zoo.hf.families.glm4 import GLM4, GLM4_MOE
from zoo.hf.families.glm_latent import AXK1, GLM4_MOE_LITE, GLM_MOE_DSA, MISTRAL4
from zoo.hf.families.gpt2 import GPT2
from zoo.hf.families.gpt_oss import GPT_OSS
from zoo.hf.families.granite import GRANITEMOE
from zoo.hf.families.granite_hybrid import GRANITE_HYBRID
from zoo.hf.families.hunyuan import HUNYUAN_V1_MOE, HY_V3
from zoo.hf.families.jamba import JAMBA
from zoo.hf.families.kda import BAILING_HYBRID, KIMI_LINEAR
from zoo.hf.families.laguna import LAGUNA, MELLUM
from zoo.hf.families.lfm import LFM2_MOE, LFM3
from zoo.hf.families.llama import LLAMA
from zoo.hf.families.llama4 import LLAMA4_TEXT
from zoo.hf.families.mimo import MIMO_V2_FLASH
from zoo.hf.families.minimax import MINIMAX_M2
from zoo.hf.families.minimax_m3 import MINIMAX_M3
from zoo.hf.families.mistral import MINISTRAL3, MISTRAL
from zoo.hf.families.mixtral import MIXTRAL
from zoo.hf.families.nemotron import NEMOTRON_H
from zoo.hf.families.olmo2 import OLMO2, OLMO3
from zoo.hf.families.olmo_hybrid import OLMO_HYBRID
from zoo.hf.families.olmoe import OLMOE
from zoo.hf.families.phi3 import PHI3, PHIMOE
from zoo.hf.families.qwen2 import QWEN2, QWEN2_MOE
from zoo.hf.families.qwen3 import QWEN3, QWEN3_MOE
from zoo.hf.families.qwen_next import QWEN3_5, QWEN3_5_MOE, QWEN3_NEXT
from zoo.hf.families.smollm3 import SMOLLM3
from zoo.hf.families.solar import SOLAR_OPEN
from zoo.hf.families.step3 import STEP3P5

FAMILIES = (
    LLAMA,
    QWEN3,
    MIXTRAL,
    QWEN3_MOE,
    OLMOE,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    DEEPSEEK_V32,
    GEMMA,
    GEMMA2,
    GEMMA3_TEXT,
    GLM4,
    GLM4_MOE,
    GPT2,
    GPT_OSS,
    MINISTRAL3,
    MISTRAL,
    OLMO2,
    OLMO3,
    QWEN2,
    QWEN2_MOE,
    GLM4_MOE_LITE,
    GLM_MOE_DSA,
    AXK1,
    MISTRAL4,
    PHI3,
    PHIMOE,
    GRANITEMOE,
    MINIMAX_M2,
    HUNYUAN_V1_MOE,
    HY_V3,
    ERNIE4_5,
    ERNIE4_5_MOE,
    DBRX,
    NEMOTRON_H,
    LLAMA4_TEXT,
    GEMMA4_TEXT,
    SOLAR_OPEN,
    MIMO_V2_FLASH,
    LAGUNA,
    MELLUM,
    SMOLLM3,
    QWEN3_NEXT,
    QWEN3_5,
    QWEN3_5_MOE,
    BAILING_MOE,
    ARCTIC,
    STEP3P5,
    KIMI_LINEAR,
    BAILING_HYBRID,
    GRANITE_HYBRID,
    OLMO_HYBRID,
    JAMBA,
    LFM2_MOE,
    LFM3,
    MINIMAX_M3,
)
