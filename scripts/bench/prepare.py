"""Writes what every engine of a benchmark reads: new weights of a size, and batches of tokens of real text."""

import math
import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"  # the accelerator is for the engines

import jax
import jax.numpy as jnp
import numpy as np
from job import BATCHES, SIZES, WEIGHTS

import jaxllm
from jaxllm.data.text.tokenizer import load_tokenizer, train_tokenizer
from jaxllm.models import FAMILIES, LM

DISTINCT_BATCHES = 8
TEXT_BYTES = 4_000_000
VOCABULARY = 8192  # at most: a text of this length has no use for more


def python_sources() -> str:
    """Real text that is on every machine: the standard library's modules, up to `TEXT_BYTES`."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    return "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)[:TEXT_BYTES]


def main(size_name: str, param_dtype: str, folder: Path, text_file: str | None) -> None:
    """Fills `folder`."""
    size = SIZES[size_name]
    text = Path(text_file).read_text(encoding="utf-8")[:TEXT_BYTES] if text_file else python_sources()
    train_tokenizer(text.splitlines(keepends=True), min(VOCABULARY, size.vocab_size), folder / "tokenizer")
    shape = (DISTINCT_BATCHES, size.batch_size, size.seq_len + 1)
    lines = text[: 16 * math.prod(shape)].splitlines(keepends=True)  # a token is a few characters
    encoded = load_tokenizer(folder / "tokenizer")(lines, add_special_tokens=False)["input_ids"]
    ids = np.array([token for line in encoded for token in line], np.int32)
    np.save(folder / BATCHES, np.resize(ids, shape))  # a short text is repeated

    llama = FAMILIES["llama"]
    layout = jaxllm.Layout.single()
    lm = LM(llama, llama.config(**size.fields()), layout, jnp.dtype(param_dtype))
    jaxllm.save_hf(lm, lm.init(jax.random.key(0)), folder / WEIGHTS)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4] if len(sys.argv) > 4 else None)
