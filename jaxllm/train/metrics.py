"""The floating-point operations that a run counts."""

from jaxllm.models.lm import LM


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
