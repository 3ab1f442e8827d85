"""What a run counts besides its loss: useful floating-point operations, and the share of the peak that they are."""

from jaxllm.core.mesh import Layout
from jaxllm.models.base import LM

# Dense bf16 peaks in FLOP/s by a part of the device's name, from the vendors' data sheets.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12}


def peak_flops(layout: Layout) -> float | None:
    """The dense bf16 peak of all devices together in FLOP/s, or None if it is not known."""
    devices = layout.mesh.devices
    kind = devices.flat[0].device_kind
    return next((peak * devices.size for name, peak in PEAK_FLOPS.items() if name in kind), None)


def flops_per_token(lm: LM, seq_len: int) -> tuple[float, float]:
    """Floating-point operations of training on one token: by the papers' convention, and the useful ones.

    The first is 6N + 12·L·H·Q·T (Chowdhery et al., arXiv 2204.02311, appendix B): N all parameters, attention not
    halved. The second counts causal attention.
    """
    c = lm.config
    attention = 12 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * seq_len
    weights = 6 * lm.parameter_count()
    return weights + attention, weights + attention / 2
