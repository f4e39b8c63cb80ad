"""A step of AdamW (arXiv:1711.05101) on a flat shard, in one pass over it.

The operations, their order and their scalars are those of `torch.optim.AdamW`. The gradient may be narrow; it
is multiplied with a factor first, which holds clipping and the inverse loss scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from zerompi.device.compiler import THREADS, launch
from zerompi.kernels.casting import CONVERSIONS, NAMES, narrow, require_flat, widen

Array = np.ndarray[Any, Any]

_CHUNK = 16 << 10  # values at a time; the host's intermediate results stay in a core's own cache

SOURCE = (
    CONVERSIONS
    + r"""
struct Scalars {
    float factor, decay, weight_1, beta_2, weight_2, root_correction_2, eps, minus_step_size;
};

template <typename G>
__device__ __forceinline__ float update(
    float* weights, const G* gradient, float* mean, float* square, const Scalars& s, int64 i
) {
    float g = widen(gradient[i]) * s.factor;
    float m = mean[i];
    m = m + s.weight_1 * (g - m);
    float v = square[i] * s.beta_2 + s.weight_2 * g * g;
    float denominator = __fsqrt_rn(v) / s.root_correction_2 + s.eps;
    float w = weights[i] * s.decay + s.minus_step_size * m / denominator;
    mean[i] = m;
    square[i] = v;
    weights[i] = w;
    return w;
}

#define STEP(NAME, G)                                                                       \
    extern "C" __global__ void step_##NAME(                                                 \
        float* weights, const G* gradient, float* mean, float* square, Scalars s, int64 n   \
    ) {                                                                                     \
        for (int64 i = first_index(); i < n; i += stride())                                 \
            update(weights, gradient, mean, square, s, i);                                  \
    }

#define STEP_AND_CAST(NAME, G, P)                                                           \
    extern "C" __global__ void step_##NAME(                                                 \
        float* weights, const G* gradient, float* mean, float* square, Scalars s, int64 n,  \
        P* parameters                                                                       \
    ) {                                                                                     \
        for (int64 i = first_index(); i < n; i += stride())                                 \
            narrow(update(weights, gradient, mean, square, s, i), parameters[i]);           \
    }

STEP(float32, float)
STEP(float16, float16)
STEP(bfloat16, bfloat16)
STEP_AND_CAST(float32_to_float16, float, float16)
STEP_AND_CAST(float32_to_bfloat16, float, bfloat16)
STEP_AND_CAST(float16_to_float16, float16, float16)
STEP_AND_CAST(bfloat16_to_bfloat16, bfloat16, bfloat16)
"""
)


@dataclass(frozen=True)
class Shard:
    """What a step reads and writes: flat arrays of one length, which do not overlap.

    Attributes:
        weights: float32.
        gradient: float32, float16 or bfloat16; only read.
        exp_avg: float32.
        exp_avg_sq: float32.
        parameters: a narrow copy of the weights that is written, too; None: there is none. Of the
            gradient's dtype, if that is narrow.
    """

    weights: Any
    gradient: Any
    exp_avg: Any
    exp_avg_sq: Any
    parameters: Any = None

    def __post_init__(self) -> None:
        arrays = {name: a for name, a in vars(self).items() if a is not None}
        for name, array in arrays.items():
            require_flat(name, array)
            if array.shape != self.weights.shape:
                raise ValueError(f"{name}: expected shape {self.weights.shape}, got {array.shape}")
            if name not in ("gradient", "parameters") and array.dtype != np.float32:
                raise TypeError(f"{name}: expected float32, got {array.dtype}")
        if self.parameters is not None:
            allowed = {np.dtype(np.float16), np.dtype(np.uint16)}
            if self.gradient.itemsize == 2:
                allowed = {self.gradient.dtype}
            if self.parameters.dtype not in allowed:
                names = " or ".join(sorted(map(str, allowed)))
                raise TypeError(f"parameters: expected {names}, got {self.parameters.dtype}")


@dataclass(frozen=True)
class Hyperparameters:
    """Those of `torch.optim.AdamW`, of one parameter group."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2

    def scalars(self, step: int, factor: float) -> Array:
        """What the kernel multiplies with, in its order: float32, (8,).

        Args:
            step: 1 in the first step.
            factor: of the gradient.
        """
        beta_1, beta_2 = self.betas
        return np.array(
            [
                factor,
                1 - self.lr * self.weight_decay,
                1 - beta_1,
                beta_2,
                1 - beta_2,
                (1 - beta_2**step) ** 0.5,
                self.eps,
                -(self.lr / (1 - beta_1**step)),
            ],
            np.float32,
        )


def adamw(shard: Shard, hyper: Hyperparameters, step: int, factor: float = 1.0) -> None:
    """Step number `step` (from 1) of NumPy arrays; the gradient counts `factor` times."""
    scalars = hyper.scalars(step, factor)
    spare = np.empty((2, min(_CHUNK, shard.weights.size)), np.float32)
    with np.errstate(all="ignore"):
        for start in range(0, shard.weights.size, _CHUNK):
            part = slice(start, start + _CHUNK)
            weights = shard.weights[part]
            _update(
                (weights, shard.gradient[part], shard.exp_avg[part], shard.exp_avg_sq[part]),
                scalars,
                spare[:, : weights.size],
            )
            if shard.parameters is not None:
                narrow(weights, shard.parameters[part])


def launch_adamw(shard: Shard, hyper: Hyperparameters, step: int, factor: float = 1.0) -> None:
    """`adamw` on the device, with CuPy arrays."""
    numel = shard.weights.size
    name = f"step_{NAMES[shard.gradient.dtype]}"
    extra: tuple[Any, ...] = ()
    if shard.parameters is not None:
        name += f"_to_{NAMES[shard.parameters.dtype]}"
        extra = (shard.parameters,)
    scalars = hyper.scalars(step, factor).view(_SCALARS)
    states = (shard.weights, shard.gradient, shard.exp_avg, shard.exp_avg_sq)
    launch(SOURCE, name, -(-numel // THREADS), *states, scalars, np.int64(numel), *extra)


_SCALARS = np.dtype([("", np.float32)] * 8)  # passed by value


def _update(arrays: tuple[Array, Array, Array, Array], scalars: Array, spare: Array) -> None:
    """What the kernel does to each element, in the same order."""
    weights, gradient, mean, square = arrays
    factor, decay, weight_1, beta_2, weight_2, root_correction_2, eps, minus_step_size = scalars
    g, x = spare
    if gradient.itemsize == 2:
        widen(gradient, g)
        g *= factor
    else:
        np.multiply(gradient, factor, out=g)
    np.subtract(g, mean, out=x)
    x *= weight_1
    mean += x
    np.multiply(g, weight_2, out=x)
    x *= g
    square *= beta_2
    square += x
    denominator = np.sqrt(square, out=g)
    denominator /= root_correction_2
    denominator += eps
    np.multiply(mean, minus_step_size, out=x)
    x /= denominator
    weights *= decay
    weights += x
