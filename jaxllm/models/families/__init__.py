"""The model families, one file and one line here each; importing this registers them."""

from jaxllm.models.families import gemma2 as gemma2
from jaxllm.models.families import llama as llama
from jaxllm.models.families import mistral as mistral
from jaxllm.models.families import phi3 as phi3
from jaxllm.models.families import qwen3 as qwen3
