"""How far an adapter in training moves the weights it adapts: ||dW||_F / ||W||_F, without forming dW.

`weight_change` measures the same of admitted files; this is asked after every step.
"""

# Shape suffixes: R = rank, I = inputs and O = outputs of a linear layer.

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ray_auditor.hub import BaseModel
from ray_auditor.hub.checkpoint import iter_tensors

Factors = Iterable[tuple[str, Tensor, Tensor, float]]
"""Module name as in the base, lora_A [R, I], lora_B [O, R], and the factor of their product."""


def squared_norms(base: BaseModel, modules: Iterable[str]) -> dict[str, float]:
    """||W||_F^2 of linear modules of the base, read one after the other."""
    names = {f"{module}.weight": module for module in modules}
    tensors = iter_tensors(base.tensors, sorted(names))
    return {names[name]: float(weight.float().square().sum(dtype=torch.float64)) for name, weight in tensors}


def relative_change(factors: Factors, squared: Mapping[str, float]) -> float:
    """Root of the sum of ||s B A||_F^2 over that of ||W||_F^2, both over the adapted modules.

    ||B A||_F^2 = trace((B^T B)(A A^T)): two products of R x R entries.

    Args:
        factors: Every adapted module once, at least one.
        squared: As `squared_norms` gives them, at least for these modules.
    """
    moved, total = [], 0.0
    for module, a_RI, b_OR, scaling in factors:
        a_RI, b_OR = a_RI.detach().float(), b_OR.detach().float()
        moved.append(scaling**2 * ((b_OR.T @ b_OR) * (a_RI @ a_RI.T)).sum(dtype=torch.float64))
        total += squared[module]
    return math.sqrt(max(float(torch.stack(moved).sum()), 0.0) / total)
