"""Autocast for the simulated GPUs: the operators CUDA runs in lower precision, and those it runs in float32.

torch has such kernels for each backend of its own and none for one that is registered from outside. The lists are those
of "CUDA Ops that can autocast" in torch's documentation (docs/source/amp.md, 2.13), as far as language models use them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree

_KEY = "AutocastPrivateUse1"

# Their floating-point arguments are cast to autocast's dtype.
_LOWER = (
    "addbmm addmm addmv addr baddbmm bmm linear matmul mm mv scaled_dot_product_attention einsum "
    "conv1d conv2d conv3d conv_transpose1d prelu"
).split()
# Their arguments of lower precision are cast to float32.
_FLOAT32 = (
    "acos asin cosh cosine_similarity cross_entropy_loss cumprod cumsum dist exp expm1 group_norm kl_div l1_loss "
    "layer_norm log log10 log1p log2 log_softmax.int mse_loss native_layer_norm nll_loss norm.Scalar "
    "norm.ScalarOpt_dim pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar prod prod.dim_int reciprocal rsqrt sinh "
    "smooth_l1_loss softmax.int softplus sum sum.dim_IntList tan rms_norm"
).split()


def register() -> list[torch.library.Library]:
    """Registers the kernels; everything else ignores autocast, as on CUDA.

    Returns:
        What holds the registration: keep it as long as the process lives.
    """
    others = torch.library.Library("_", "IMPL")
    others.fallback(torch.library.fallthrough_kernel, _KEY)
    library = torch.library.Library("aten", "IMPL")
    for names, target in ((_LOWER, _autocast_dtype), (_FLOAT32, lambda: torch.float32)):
        for name in names:
            library.impl(name, _kernel(_operator(name), target), _KEY)
    return [others, library]


def _operator(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def _autocast_dtype() -> torch.dtype:
    return torch.get_autocast_dtype("sim")


def _kernel(operator: Any, target: Callable[[], torch.dtype]) -> Callable[..., Any]:
    """`operator`, run without autocast on arguments that have been cast."""
    here = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _KEY))

    def run(*args: Any, **kwargs: Any) -> Any:
        dtype = target()

        def cast(value: Any) -> Any:
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype is not torch.float64:
                return value.to(dtype) if value.device.type == "sim" else value
            return value

        with torch._C._ExcludeDispatchKeyGuard(here):
            args, kwargs = _pytree.tree_map(cast, (args, kwargs))
            return operator(*args, **kwargs)

    return run
