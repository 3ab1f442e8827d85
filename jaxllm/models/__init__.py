"""Models; importing this registers the families."""

from jaxllm.models import families as families
from jaxllm.models.family import FAMILIES as FAMILIES
from jaxllm.models.lm import LM as LM
