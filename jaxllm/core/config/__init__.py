"""Typed configuration: sections, components chosen by `type:`, reading and writing YAML."""

from jaxllm.core.config.conflict import Conflict
from jaxllm.core.config.on_resume import OnResume
from jaxllm.core.config.section import ByType, Section
from jaxllm.core.config.text import dump, load

__all__ = ["ByType", "Conflict", "OnResume", "Section", "dump", "load"]
