"""The methods of parameter-efficient fine-tuning; importing this registers them."""

from jaxllm.peft import adalora as adalora
from jaxllm.peft import freeze as freeze
from jaxllm.peft import ia3 as ia3
from jaxllm.peft import lisa as lisa
from jaxllm.peft import lora as lora
from jaxllm.peft import prefix as prefix
from jaxllm.peft import prompt as prompt
from jaxllm.peft.base import METHODS as METHODS
from jaxllm.peft.base import Full as Full
from jaxllm.peft.base import PeftConfig as PeftConfig
