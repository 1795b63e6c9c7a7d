"""What one would write first: transformers, a hook, a dense fp32 encode as sae-lens does, torch.topk."""

# Shape suffixes: B prompts of a batch, T tokens of a prompt, D = d_in, K = kept features.

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from sweep_models import K, Shape
from torch import Tensor

from ray_auditor.sae import Sae

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def sync() -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Naive:
    """One candidate, loaded afresh; `encode` is what `dense_encoder` gives.

    The whole model is read and run, head included, unless `is_trimmed`: then neither what lies above the hook
    nor the head.
    """

    def __init__(
        self,
        folder: Path,
        shape: Shape,
        encode: Callable[[Tensor], Tensor],
        dtype: torch.dtype,
        *,
        is_trimmed: bool = False,
    ) -> None:
        from transformers import AutoModel, AutoModelForCausalLM

        if is_trimmed:
            self.model = AutoModel.from_pretrained(folder, dtype=dtype, num_hidden_layers=shape.num_layers)
        else:
            self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self.model.to(DEVICE).eval()
        layer = self.model.get_decoder().layers[shape.num_layers - 1]
        layer.register_forward_hook(lambda *call: setattr(self, "resid", call[2]))
        self.encode = encode

    def rows(self, prompts: list[list[int]], batch_size: int) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Numbers of the prompts in a batch, their top activations and indices [B, T, K] on the host."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            longest = max(len(prompts[i]) for i in batch)
            ids = torch.tensor([prompts[i] + [0] * (longest - len(prompts[i])) for i in batch], device=DEVICE)
            mask = torch.tensor([[t < len(prompts[i]) for t in range(longest)] for i in batch], device=DEVICE)
            with torch.no_grad():
                self.model(ids, attention_mask=mask.long(), use_cache=False)
                resid_BTD = self.resid[0] if isinstance(self.resid, tuple) else self.resid
                acts, idx = self.encode(resid_BTD).topk(K, dim=-1)
            yield batch, acts.cpu(), idx.cpu()


def dense_encoder(sae: Sae) -> Callable[[Tensor], Tensor]:
    """sae-lens' own `encode` where it is installed, else the same sums written out; fp32."""
    encoder = sae.encoder
    weights = {
        "W_enc": encoder.W_enc_DF.to(DEVICE).contiguous(),
        "b_enc": encoder.b_enc_F.to(DEVICE),
        "b_dec": encoder.b_dec_D.to(DEVICE),
    }
    try:
        from sae_lens import StandardSAE, StandardSAEConfig
    except ImportError:
        return lambda x: torch.relu((x.float() - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"])
    oracle = StandardSAE(StandardSAEConfig(d_in=sae.d_in, d_sae=sae.d_sae, device=DEVICE))
    oracle.load_state_dict(weights | {"W_dec": encoder.W_dec_FD.to(DEVICE)})
    return lambda x: oracle.encode(x.float())


def plain_seconds(
    name: str, folder: Path, shape: Shape, encode: Callable[[Tensor], Tensor], prompts: list[list[int]]
) -> dict[str, float]:
    """The plain loop over one candidate, from its folder to rows on the host.

    Args:
        name: `DTYPE-BATCH`, or `DTYPE-BATCH-trimmed` for one that stops at the hook.
        folder: The candidate's.
        shape: Its shape.
        encode: As `dense_encoder` makes it; made once, as ours is.
        prompts: Token ids.
    """
    dtype, batch_size, *trimmed = name.split("-")
    begun = sync()
    loop = Naive(folder, shape, encode, getattr(torch, dtype), is_trimmed=bool(trimmed))
    loaded = sync()
    for _ in loop.rows(prompts, int(batch_size)):
        pass
    found = {"total": sync() - begun, "load": loaded - begun}
    print(f"plain loop, {name}: {found}", flush=True)
    return found
