"""LoRA training of one member after another on one loaded base.

On a CPU a member is the same bytes on every run with the same number of threads, processor and library
versions, whatever was trained before it. With other threads, and on a GPU, sums are taken in another order
and training amplifies their last bits: members are then alike in loss, not equal.
"""

# Shape suffixes: T packed tokens, P tokens that are predicted, V = vocabulary.

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ray_auditor.config import Dtype
from ray_auditor.null.change import relative_change
from ray_auditor.null.examples import Example, Topic, iter_packs
from ray_auditor.null.recipe import Recipe

WARM_UP = 10  # steps, a tenth of a run at most
CLIP_NORM = 1.0
ALPHA = 2  # of the rank: what adapters are usually published with
LEAF = ".default"  # peft's name for the only adapter


@dataclass(frozen=True)
class Member:
    """A trained adapter: tensors under PEFT's names, in the training dtype."""

    state: dict[str, Tensor]
    trained_steps: int
    trained_tokens: int
    params: int
    relative_change: float  # of the tensors as they are saved
    reached_target: bool | None  # None without one


class Trainer:
    """Holds the frozen base; `train` adds an adapter, trains it, takes it off again."""

    def __init__(
        self,
        base: Path,
        *,
        dtype: Dtype,
        device: str,
        num_threads: int,
        squared: Mapping[str, float],
        pass_tokens: int,
    ) -> None:
        """Load the base.

        Args:
            base: Its folder.
            dtype: Of the frozen weights; the adapter is trained in fp32 under autocast to it.
            device: `cpu` or `cuda`.
            num_threads: Of a CPU; part of what a member's bytes depend on.
            squared: ||W||_F^2 of every module that may be adapted.
            pass_tokens: Most tokens that go through the model together; what bounds the memory. A step is
                the sum of its passes.
        """
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(num_threads)
        self._device, self._dtype, self._squared = device, getattr(torch, dtype.value), squared
        self._model = AutoModelForCausalLM.from_pretrained(
            str(base), dtype=self._dtype, local_files_only=True, trust_remote_code=False
        ).to(device)
        self._model.requires_grad_(False)
        self._pass_tokens = pass_tokens

    def loss(self, examples: Sequence[Example]) -> float:
        """Mean cross-entropy of the base on the answers, nats a token."""
        return self._mean_loss(self._model, examples)

    def train(
        self,
        recipe: Recipe,
        topics: Mapping[str, Topic],
        batch_tokens: int,
        on_step: Callable[[int], None],
    ) -> tuple[Member, dict[str, float]]:
        """Train one member.

        The learning rate rises over the first steps, then falls to 0 at the last; with a target it stays, and
        training ends at the first step whose relative change reaches it.

        Args:
            recipe: What to train.
            topics: By name, at least those of the recipe's mix.
            batch_tokens: Most tokens of a step.
            on_step: Told the number of steps done.

        Returns:
            The member, and its loss on each topic's held-out rows.
        """
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(recipe.seed)
        model = get_peft_model(
            self._model,
            LoraConfig(
                r=recipe.r,
                lora_alpha=ALPHA * recipe.r,
                target_modules=list(recipe.target_modules),
                task_type="CAUSAL_LM",
            ),
        )
        try:
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=recipe.lr, weight_decay=0.0)
            warm_up = max(1, min(WARM_UP, recipe.steps // 10))
            num_steps = num_tokens = 0
            reached = None if recipe.target is None else False
            model.train()
            for pack in islice(iter_packs(topics, recipe, batch_tokens), recipe.steps):
                decay = 1.0 if recipe.target is not None else 1 - num_steps / recipe.steps
                optimizer.param_groups[0]["lr"] = recipe.lr * min(1.0, (num_steps + 1) / warm_up) * decay
                optimizer.zero_grad()
                num_predicted = sum(int(example.answer_T.sum()) for example in pack)
                for part in split_pack(pack, self._pass_tokens):
                    torch.autograd.backward(self._losses(model, part).sum() / num_predicted)
                torch.nn.utils.clip_grad_norm_(trained, CLIP_NORM)
                optimizer.step()
                num_steps += 1
                num_tokens += sum(len(example.token_ids_T) for example in pack)
                on_step(num_steps)
                if recipe.target is not None and self._change(model) >= recipe.target:
                    reached = True
                    break
            losses = {name: self._mean_loss(model, topics[name].held_out) for name, _ in recipe.mix}
            for parameter in trained:  # as it is saved
                parameter.data = parameter.data.to(self._dtype)
            state = {
                name.replace(LEAF, ""): parameter.detach().to("cpu", copy=True).contiguous()
                for name, parameter in model.named_parameters()
                if parameter.requires_grad
            }
            num_params = sum(parameter.numel() for parameter in trained)
            member = Member(state, num_steps, num_tokens, num_params, self._change(model), reached)
        finally:
            self._model = model.unload()
        return member, losses

    def _mean_loss(self, model: Any, examples: Sequence[Example]) -> float:
        model.eval()
        with torch.no_grad():
            losses = torch.cat([self._losses(model, [example]) for example in examples])
        return float(losses.mean(dtype=torch.float64))

    def _losses(self, model: Any, pack: Sequence[Example]) -> Tensor:
        """Cross-entropy of every answer token of a pack, [P].

        Examples stand one after the other in one row; transformers reads off the positions, which begin again
        at each, that none may attend to another. Logits exist for the predicted tokens alone.
        """
        lengths = [len(example.token_ids_T) for example in pack]
        ids_T = self._put(np.concatenate([example.token_ids_T for example in pack]))
        predicted_P = self._put(np.flatnonzero(np.concatenate([example.answer_T for example in pack])))
        with torch.autocast(self._device, torch.bfloat16, enabled=self._dtype is torch.bfloat16):
            logits_PV = model(
                input_ids=ids_T[None],
                position_ids=self._put(np.concatenate([np.arange(length) for length in lengths]))[None],
                logits_to_keep=predicted_P - 1,
                use_cache=False,
            ).logits[0]
        return torch.nn.functional.cross_entropy(logits_PV.float(), ids_T[predicted_P], reduction="none")

    def _put(self, values: Any) -> Tensor:
        return torch.from_numpy(values).to(self._device)

    def _change(self, model: Any) -> float:
        return relative_change(_factors(model), self._squared)


def split_pack(pack: Sequence[Example], pass_tokens: int) -> Iterator[list[Example]]:
    """The examples of a pack in their order, in runs of at most `pass_tokens` tokens, or of one example."""
    part: list[Example] = []
    room = pass_tokens
    for example in pack:
        if part and len(example.token_ids_T) > room:
            yield part
            part, room = [], pass_tokens
        part.append(example)
        room -= len(example.token_ids_T)
    yield part


def _factors(model: Any) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A") and "default" in layer.lora_A:
            module = name.removeprefix("base_model.model.")
            yield (
                module,
                layer.lora_A["default"].weight,
                layer.lora_B["default"].weight,
                layer.scaling["default"],
            )
