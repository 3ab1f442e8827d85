"""The sections of optax's own optimizers, and of Muon, whose keys are not the parameters of its function.

Each is built of optax's transforms with the conventions of all others here: state and arithmetic in float32, weight
decay multiplied by the rate and masked, statistics of one layer's matrix. Beta and eps have optax's defaults.
"""

from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Literal

import optax
from pydantic import Field, PositiveInt

from jaxllm.core.config import ByType
from jaxllm.optim import averaged
from jaxllm.optim.config import Decay, DecayMask, OptimizerConfig, Positive
from jaxllm.optim.muon import muon
from jaxllm.optim.precision import in_float32
from jaxllm.optim.schedule_config import SCHEDULES, Constant, NotNegative, ScheduleConfig
from jaxllm.optim.wrappers import layer_matrices


class _Scaled(OptimizerConfig):
    """θ ← θ − η·(u + weight_decay·θ) for the direction u of `scaled`."""

    @abstractmethod
    def scaled(self) -> list[optax.GradientTransformation]:
        """The transforms that make u of the gradient."""

    def transform(self, rate: optax.Schedule, mask: DecayMask) -> optax.GradientTransformationExtraArgs:
        decay = optax.add_decayed_weights(self.weight_decay, mask)
        return in_float32(optax.chain(*self.scaled(), decay, optax.scale_by_learning_rate(rate)))


class Sgd(_Scaled):
    """Stochastic gradient descent: m ← momentum·m + g; u = m, or g + momentum·m with nesterov.

    State: 4 bytes per parameter, none without momentum.
    """

    type: Literal["sgd"]
    momentum: Decay = 0.0
    """Decay of the momentum; 0 keeps none."""
    nesterov: bool = False
    """Look ahead along the momentum."""

    def scaled(self) -> list[optax.GradientTransformation]:
        return [optax.trace(self.momentum, self.nesterov)] if self.momentum else []


class NAdamW(_Scaled):
    """AdamW with Nesterov's momentum (Dozat, "Incorporating Nesterov Momentum into Adam", 2016).

    State: 8 bytes per parameter.
    """

    type: Literal["nadamw"]
    b1: Decay = 0.9
    b2: Decay = 0.999
    eps: Positive = 1e-8

    def scaled(self) -> list[optax.GradientTransformation]:
        return [optax.scale_by_adam(self.b1, self.b2, self.eps, nesterov=True)]


class RAdam(_Scaled):
    """Rectified Adam (Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond", arXiv 1908.03265).

    The first steps, whose second moment is of few gradients, are smaller or go along the momentum alone. State: 8 bytes
    per parameter.
    """

    type: Literal["radam"]
    b1: Decay = 0.9
    b2: Decay = 0.999
    eps: Positive = 1e-8

    def scaled(self) -> list[optax.GradientTransformation]:
        return [optax.scale_by_radam(self.b1, self.b2, self.eps)]


class AdEMAMix(_Scaled):
    """AdamW with a second, slow momentum (Pagliardini et al., "The AdEMAMix Optimizer", arXiv 2409.03137).

    m₁, m₂ and v are the averages of g, g and g² with b1, b3 and b2; u = (m₁/(1 − b1ᵗ) + alpha·m₂) / (√(v/(1 − b2ᵗ)) +
    eps). alpha and b3 are constant here, which the paper warms up in long runs. State: 12 bytes per parameter.
    """

    type: Literal["ademamix"]
    b1: Decay = 0.9
    b2: Decay = 0.999
    b3: Decay = 0.9999
    """Decay of the slow momentum; 0.999 for a run of few thousand steps."""
    alpha: NotNegative = 5.0
    """Weight of the slow momentum."""
    eps: Positive = 1e-8

    def scaled(self) -> list[optax.GradientTransformation]:
        scale = optax.contrib.scale_by_ademamix(self.b1, self.b2, self.b3, self.alpha, self.eps)
        return [scale]


class Adagrad(_Scaled):
    """Adagrad (Duchi et al., JMLR 12, 2011): u = g/√(v + eps), v being the sum of all g².

    State: 4 bytes per parameter.
    """

    type: Literal["adagrad"]
    initial_accumulator_value: NotNegative = 0.1
    """What the sum of squares starts from."""
    eps: Positive = 1e-7

    def scaled(self) -> list[optax.GradientTransformation]:
        return [optax.scale_by_rss(self.initial_accumulator_value, self.eps)]


class RmsProp(_Scaled):
    """RMSProp (Hinton, 2012), as in PyTorch: u = g/(√v + eps), v being the average of g²; and momentum of u.

    State: 4 bytes per parameter, 8 with momentum.
    """

    type: Literal["rmsprop"]
    decay: Decay = 0.9
    """Decay of the second moment."""
    eps: Positive = 1e-8
    momentum: Decay = 0.0
    """Decay of the momentum; 0 keeps none."""

    def scaled(self) -> list[optax.GradientTransformation]:
        scale = optax.scale_by_rms(self.decay, self.eps, eps_in_sqrt=False)
        return [scale, optax.trace(self.momentum)] if self.momentum else [scale]


class Adafactor(_Scaled):
    """Adafactor (Shazeer & Stern, arXiv 1804.04235), without momentum: see `adalomo` for the equations.

    Unlike there, small matrices keep their whole second moment, and weight decay is multiplied by the rate alone.
    State: 4·(n + m) bytes for a matrix [n, m] that is factored, else 4 bytes per parameter.
    """

    type: Literal["adafactor"]
    has_statistics: ClassVar[bool] = True
    min_dim_size_to_factor: PositiveInt = 128
    """The least size of both dimensions of a matrix whose second moment is kept as rows and columns."""
    decay_rate: Positive = 0.8
    """How fast the memory of the second moment grows."""
    eps: Positive = 1e-30
    """Added to the squared gradient."""
    clipping_threshold: Positive = 1.0
    """The largest RMS of a tensor's update, before the rate and the parameter's scale."""
    multiply_by_parameter_scale: bool = True
    """Whether an update is multiplied by its parameter's RMS, which is at least 1e-3."""

    def scaled(self) -> list[optax.GradientTransformation]:
        factored = optax.scale_by_factored_rms(
            decay_rate=self.decay_rate, min_dim_size_to_factor=self.min_dim_size_to_factor, epsilon=self.eps
        )
        clip = optax.clip_by_block_rms(self.clipping_threshold)
        return [factored, clip, *([optax.scale_by_param_block_rms()] if self.multiply_by_parameter_scale else [])]


class _ScheduleFree(OptimizerConfig):
    """See `averaged.schedule_free`: the rate stays at its peak, and an average of the parameters is evaluated."""

    averages: ClassVar[str] = "z"
    schedule: Annotated[ScheduleConfig, ByType(SCHEDULES)] = Constant(type="constant")
    b1: Annotated[float, Field(gt=0, lt=1)] = 0.9
    """How much of the average is in the parameters at which gradients are taken."""

    @abstractmethod
    def scaled(self) -> list[optax.GradientTransformation]:
        """The transforms, without momentum, that make the direction of the gradient."""

    def transform(self, rate: optax.Schedule, mask: DecayMask) -> optax.GradientTransformationExtraArgs:
        decay = optax.add_decayed_weights(self.weight_decay, mask)
        base = optax.chain(*self.scaled(), decay, optax.scale_by_learning_rate(rate))
        return averaged.schedule_free(base, rate, self.b1)

    def evaluation_params(self, params: Any, averaged_with: Any) -> Any:
        return averaged.evaluation_params(params, averaged_with, self.b1)


class ScheduleFreeSgd(_ScheduleFree):
    """Stochastic gradient descent without a schedule (Defazio et al., arXiv 2405.15682).

    State: 4 bytes per parameter.
    """

    type: Literal["schedule_free_sgd"]

    def scaled(self) -> list[optax.GradientTransformation]:
        return []


class ScheduleFreeAdamW(_ScheduleFree):
    """AdamW without a schedule (Defazio et al., arXiv 2405.15682), whose average is in place of the first moment.

    State: 8 bytes per parameter.
    """

    type: Literal["schedule_free_adamw"]
    b2: Decay = 0.999
    eps: Positive = 1e-8

    def scaled(self) -> list[optax.GradientTransformation]:
        return [optax.scale_by_rms(self.b2, self.eps, eps_in_sqrt=False, bias_correction=True)]


class Muon(OptimizerConfig):
    """Muon for the matrices of the layers; AdamW for embedding, head, norms and biases: see `muon.muon`.

    State: 4 bytes per entry of a layer's matrix, 8 of all else.
    """

    type: Literal["muon"]
    has_statistics: ClassVar[bool] = True
    needs_whole_matrices: ClassVar[bool] = True
    beta: Decay = 0.95
    """Decay of the matrices' momentum."""
    ns_steps: PositiveInt = 5
    """Steps of the Newton-Schulz iteration."""
    consistent_rms: Positive | None = None
    """The RMS of a matrix's update before the rate: with 0.2, AdamW's rates can be kept; null: scaled by shape."""
    adam_learning_rate: Positive | None = None
    """The peak learning rate of what AdamW updates; default: learning_rate."""
    b1: Decay = 0.9
    b2: Decay = 0.999
    eps: Positive = 1e-8

    def transform(self, rate: optax.Schedule, mask: DecayMask) -> optax.GradientTransformationExtraArgs:
        ratio = 1.0 if self.adam_learning_rate is None else self.adam_learning_rate / self.learning_rate
        adam = (self.b1, self.b2, self.eps)
        how = (self.beta, self.ns_steps, self.consistent_rms)
        return muon(rate, layer_matrices, *how, ratio, *adam, self.weight_decay, mask=mask)
