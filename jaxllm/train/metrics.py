"""What a run counts besides its loss: floating-point operations, and the share of the peak that they are."""

import re

from jaxllm.core.mesh import Layout
from jaxllm.models.lm import LM

# Peaks of bf16 products accumulated in float32, without sparsity, in FLOP/s, from the vendor's data sheets. The first
# whose words are in the device's name counts, so the variants of a card stand before it.
PEAK_FLOPS = {
    "GB300": 2500e12,
    "B300": 2250e12,
    "GB200": 2500e12,
    "B200": 2250e12,
    "GH200": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A40": 150e12,
    "A30": 165e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
}


def peak_flops(layout: Layout) -> float | None:
    """The dense bf16 peak of all devices together in FLOP/s, or None if it is not known."""
    devices = layout.mesh.devices
    kind = devices.flat[0].device_kind
    known = (peak for name, peak in PEAK_FLOPS.items() if re.search(rf"\b{name}\b", kind))
    return next((peak * devices.size for peak in known), None)


def flops_per_token(lm: LM, seq_len: int, trained: int | None = None) -> tuple[float, float]:
    """Floating-point operations of training on one token: by the papers' convention, and the useful ones.

    The first is 6N + 12·L·H·Q·T (Chowdhery et al., arXiv 2204.02311, appendix B): N all parameters, attention not
    halved. The second counts causal attention, and the gradients of the weights that train alone: `trained` parameters
    (None: all).
    """
    c = lm.config
    attention = 12 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * seq_len
    parameters = lm.parameter_count()
    trained = parameters if trained is None else min(trained, parameters)
    return 6 * parameters + attention, 4 * parameters + 2 * trained + attention / 2
