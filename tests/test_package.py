"""What `import jaxllm` gives, and what it costs."""

import doctest
import inspect
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import jaxllm
from jaxllm.models import FAMILIES, LM
from tests.support.whole_runs import start, tiny_config


def test_importing_the_package_imports_nothing_heavy():
    program = "import sys, jaxllm; print([m for m in ('jax', 'flax', 'torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_reading_a_checkpoint_needs_neither_torch_nor_transformers():
    program = (
        "import sys; from jaxllm import load_hf; "
        "print([m for m in ('torch', 'transformers', 'tokenizers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_train_command_needs_no_torch(shared, tmp_path):
    """Where torch is installed and cannot be imported."""
    package = tmp_path / "broken" / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('this torch is damaged')")
    path = os.pathsep.join([str(package.parent), os.environ.get("PYTHONPATH", "")])
    process = start(
        tiny_config(tmp_path, shared), "train.steps=3", PYTHONPATH=path, JAXLLM_CACHE=str(tmp_path / "cache")
    )
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert (tmp_path / "run/export/hf/model.safetensors").is_file()


def test_the_signatures_are_those_that_are_promised():
    """The names, the kinds and the defaults; a caller may rely on each."""
    promised = {
        jaxllm.load_hf: "(folder, *, param_dtype=None, compute_dtype=None, layout=None)",
        jaxllm.save_hf: "(lm, params, folder)",
        LM.logits: "(self, params, tokens, *, positions=None, segments=None)",
    }
    for function, signature in promised.items():
        plain = [p.replace(annotation=p.empty) for p in inspect.signature(function).parameters.values()]
        assert str(inspect.Signature(plain)) == signature
        assert function.__doc__


def test_every_public_name_is_there():
    for name in jaxllm.__all__:
        assert getattr(jaxllm, name).__doc__, name
    assert set(dir(jaxllm)) == set(jaxllm.__all__)
    with pytest.raises(AttributeError, match="'load_fh'"):
        getattr(jaxllm, "load_" + "fh")


def test_the_examples_of_the_docstrings_run():
    from jaxllm import hf

    result = doctest.testmod(hf)
    assert result.attempted > 5
    assert result.failed == 0


def test_logits_name_what_has_the_wrong_shape():
    llama = FAMILIES["llama"]
    sizes = dict(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    lm = LM(llama, llama.config(**sizes), jaxllm.Layout.single())
    params, tokens = lm.init(jax.random.key(0)), jnp.ones((2, 3), jnp.int32)
    for wrong, name in (
        ({"tokens": tokens[0]}, r"tokens must be whole numbers of the shape \[B, T\]; got int32 \(3,\)"),
        ({"tokens": [[1, 2, 3]]}, r"tokens must be an array of numpy or JAX of the shape \[B, T\], got a list"),
        ({"tokens": None}, r"got a NoneType"),
        ({"tokens": tokens[:, :0]}, r"tokens are empty, of the shape \(2, 0\)"),
        ({"tokens": tokens[:0]}, r"tokens are empty, of the shape \(0, 3\)"),
        ({"tokens": tokens == 1}, r"tokens must be whole numbers .* got bool"),
        ({"tokens": tokens - 5}, r"tokens must not be negative, got -"),
        ({"tokens": tokens + 10**6}, r"tokens must be ids below \d+, the size of the model's vocabulary, got 100"),
        ({"tokens": tokens, "positions": tokens - 10**6}, r"positions must not be negative"),
        ({"tokens": tokens * 1.0}, r"tokens must be .*got float32 \(2, 3\)"),
        ({"segments": tokens[:1]}, r"segments must be .* of tokens; got int32 \(1, 3\), and tokens are \(2, 3\)"),
        ({"positions": tokens[:, :2]}, r"positions must be .*got int32 \(2, 2\)"),
    ):
        with pytest.raises(ValueError, match=name):
            lm.logits(params, **{"tokens": tokens, **wrong})
