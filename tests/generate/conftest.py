"""Tests of generation compile the same few programs again and again: they are kept for the session."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

SETTINGS = {"jax_persistent_cache_min_compile_time_secs": 0.0, "jax_persistent_cache_min_entry_size_bytes": -1}


@pytest.fixture(scope="package", autouse=True)
def _kept_programs(tmp_path_factory):
    before = {name: getattr(jax.config, name) for name in ("jax_compilation_cache_dir", *SETTINGS)}
    for name, value in {"jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")), **SETTINGS}.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
