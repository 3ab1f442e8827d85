"""The model families; importing this registers them."""

from jaxllm.models import llama as llama
from jaxllm.models import mistral as mistral
from jaxllm.models import phi3 as phi3
from jaxllm.models.base import FAMILIES as FAMILIES
from jaxllm.models.base import LM as LM
