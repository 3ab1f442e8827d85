"""The model of a run's config: one to continue from, or a new one."""

from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field, create_model

from jaxllm.core.config import Conflict, Section
from jaxllm.core.registry import Registry
from jaxllm.models import FAMILIES
from jaxllm.models.family import FamilyConfig, Heads, HeadWidth, Tokens
from jaxllm.models.quantized import Quantizable


class PretrainedModel(Quantizable):
    """A model to continue from."""

    path: str
    """a Hugging Face folder, a run's output folder, one of its checkpoints, a model of the Hub: owner/name[@revision],
    or the URL of a Hugging Face folder, such as s3://bucket/model"""
    tokenizer: str | None = None
    """a tokenizer folder, or a name of the Hub; default: the model's own"""
    adapter: str | list[str] | None = None
    """an adapter folder as HF peft writes it, or the folder of a run that trained an adapter. If the peft section
    describes the same adapter, training continues with it. Otherwise it is merged into the model first. Adapters in a
    list are merged in order; training continues only with the last one, if the peft section describes it"""

    is_new: ClassVar[bool] = False
    """Whether the run draws the model's weights."""

    @property
    def adapters(self) -> Sequence[str]:
        """`adapter` as a list."""
        return [self.adapter] if isinstance(self.adapter, str) else self.adapter or []

    def conflicts(self) -> Iterator[Conflict]:
        """What in the section contradicts itself."""
        if self.quantization is not None and len(self.adapters) > 1:
            yield Conflict(
                f"model.quantize is {self.quantization}, into which no adapter is merged, and model.adapter has "
                "several",
                "merge them first (python -m jaxllm.convert merge), or remove quantize",
            )


class NewModel(Section):
    """A model to train from scratch: a family's config, and a tokenizer."""

    tokenizer: str
    """a tokenizer folder, as written by transformers, or a name of the Hub"""

    path: ClassVar[None] = None
    """The model to continue from: none."""
    is_new: ClassVar[bool] = True
    """Whether the run draws the model's weights."""
    quantization: ClassVar[None] = None
    """How the matrices of the layers are stored: as they are."""

    def conflicts(self) -> Iterator[Conflict]:
        """What in the section contradicts itself."""
        yield from ()

    def family_config(self, vocab_size: Callable[[], int]) -> FamilyConfig:
        """The family's own config, with what `vocab_size` gives where the run's config does not set one."""
        fields = self.model_dump(exclude={"tokenizer"})
        if fields["vocab_size"] is None:
            fields["vocab_size"] = vocab_size()
        return FAMILIES[fields["type"]].config(**fields)


ModelConfig = PretrainedModel | NewModel


def _new_model(family: str) -> Any:
    """The section of a new model of `family`: the fields that follow from others may be left out."""

    def derived(size: Any, otherwise: str) -> Any:
        return Annotated[size | None, Field(None, description=f"default: {otherwise}")]

    return create_model(
        f"New{family.capitalize()}",
        __base__=(FAMILIES[family].config, NewModel),
        vocab_size=derived(Tokens, "the tokenizer's"),
        num_key_value_heads=derived(Heads, "the attention heads"),
        head_dim=derived(HeadWidth, "hidden_size / attention heads"),
    )


NEW_MODELS = Registry[type[NewModel]]("model type")
for _family in FAMILIES:
    NEW_MODELS.add(_family, _new_model(_family))
