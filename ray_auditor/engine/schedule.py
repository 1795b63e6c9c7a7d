"""The steps that vLLM made of fixed prompts, run again for every candidate without asking it anew.

Every candidate runs the same prompts, so vLLM's scheduler, its block tables and its attention metadata would
come out the same each time; making them costs the host more than the arithmetic costs an H100. The first
pass is vLLM's own and is recorded; later ones call the same model on the same inputs under the same context,
so they compute the same numbers, bit for bit, into the same blocks of the KV cache.
"""

# Shape suffixes: N packed tokens of one step, D = d_in.

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

OWN_ADDRESSES = "scheduler_metadata"  # made for one step alone; on a CPU a copy's addresses would be wrong
PLAIN = (bool, int, float, str, bytes, Enum, type, torch.dtype, torch.device, torch.Size, nn.Module)
Turns = Sequence[tuple[Sequence[int], int]]
"""Prompts of token ids in the order they run, each with the number of its first token among all."""


class NotRecordable(TypeError):
    """A step holds an object that is neither a container, a tensor, a module nor a plain value."""


@dataclass
class Step:
    """One call of the model, as vLLM made it."""

    context: Any  # vLLM's ForwardContext
    inputs: dict[str, Any]
    rows_N: Tensor | None = None  # which token of the prompts each of the step's rows is; on the device


class Schedule:
    """The steps of one pass."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.is_whole = True  # False where a step holds what cannot be kept: then vLLM is asked every time
        self._steps: list[Step] = []

    def begin_step(self, inputs: dict[str, Any]) -> None:
        """Keep what the model is about to be called with; vLLM writes the next step over its own buffers."""
        from vllm.forward_context import get_forward_context

        try:
            context, inputs = _kept((get_forward_context(), inputs), {})
        except NotRecordable:
            self.is_whole = False
            return
        self._steps.append(Step(context, inputs))

    def end_step(self, rows_N: Tensor) -> None:
        """Keep which tokens the step's rows are."""
        if self.is_whole:
            self._steps[-1].rows_N = rows_N

    @torch.inference_mode()
    def run(self, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """Call the model as recorded.

        Yields:
            tuple: `[N]` numbers of the step's tokens, and `[N, D]` what the model returned for them.
        """
        from vllm.forward_context import override_forward_context

        for step in self._steps:
            assert step.rows_N is not None
            with override_forward_context(step.context):
                resid_ND = model(**step.inputs)
            yield step.rows_N, resid_ND[: len(step.rows_N)]


def _kept(thing: Any, known: dict[int, Any]) -> Any:
    """A copy of `thing` down to its tensors; modules and plain values are shared.

    Raises:
        NotRecordable: It holds something else, which the next step may change in place.
    """
    if id(thing) in known:
        return known[id(thing)]
    kept: Any
    if isinstance(thing, Tensor):
        kept = thing.clone()
    elif isinstance(thing, dict):
        kept = {name: _kept(value, known) for name, value in thing.items()}
    elif isinstance(thing, tuple) and hasattr(thing, "_fields"):
        kept = type(thing)(*(_kept(value, known) for value in thing))
    elif isinstance(thing, (list, tuple)):
        kept = type(thing)(_kept(value, known) for value in thing)
    elif is_dataclass(thing) and not isinstance(thing, type):
        kept = copy.copy(thing)
        for field in fields(thing):
            if field.name != OWN_ADDRESSES:
                object.__setattr__(kept, field.name, _kept(getattr(thing, field.name), known))
    elif thing is None or isinstance(thing, PLAIN):
        kept = thing
    else:
        raise NotRecordable(type(thing).__qualname__)
    known[id(thing)] = kept
    return kept
