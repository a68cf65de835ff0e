"""All families. Where several express a model, the earlier one is written."""

from __future__ import annotations

from zoo.hf.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3, DEEPSEEK_V32
from zoo.hf.families.llama import LLAMA
from zoo.hf.families.mixtral import MIXTRAL
from zoo.hf.families.olmoe import OLMOE
from zoo.hf.families.qwen3 import QWEN3, QWEN3_MOE

FAMILIES = (LLAMA, QWEN3, MIXTRAL, QWEN3_MOE, OLMOE, DEEPSEEK_V2, DEEPSEEK_V3, DEEPSEEK_V32)
