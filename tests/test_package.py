"""What `import jaxllm` gives, and what it costs."""

import doctest
import subprocess
import sys

import pytest

import jaxllm


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
