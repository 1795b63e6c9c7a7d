"""The model the engine runs: a vLLM architecture cut at the hook, whose pooler encodes.

vLLM builds models from a class and a configuration alone, in a place its caller never sees. What ours
needs besides (the encoder, the base's tensors) travels in `MODEL_INPUTS`; one engine lives in a process.
"""

# Shape suffixes: N packed tokens, D = d_in, K = kept features.

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from auditor_kernels import EncoderWeights, encode_topk, fvu_parts
from torch import Tensor, nn
from vllm.config import ModelConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.pooler.tokwise.methods import TokenPoolingMethod
from vllm.model_executor.layers.pooler.tokwise.poolers import TokenPooler
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.models.registry import ModelRegistry
from vllm.v1.pool.metadata import PoolingMetadata

from ray_auditor.engine.adapter import slices_of
from ray_auditor.engine.device_clock import DeviceClock
from ray_auditor.engine.residuals import Comparison, Recording
from ray_auditor.engine.schedule import Schedule
from ray_auditor.hub import BaseModel
from ray_auditor.hub.checkpoint import iter_tensors
from ray_auditor.sae import Sae, normalise_resid

FIRST_ROW = "first_row"  # a request's own entry in `PoolingParams.extra_kwargs`
Watch = Recording | Comparison | None
HOST_NORMS = ("rms_norm", "fused_add_rms_norm")
NUM_SCALARS = 3  # columns behind the 2 K of a packed row: FVU error, FVU total, squared residual norm


@dataclass
class ModelInputs:
    """What the model class needs beyond its vLLM configuration, and the model once it is built."""

    base: BaseModel
    tensor_names: tuple[str, ...]
    sae: Sae
    k: int
    model: nn.Module | None = None


MODEL_INPUTS: list[ModelInputs] = []


class ResidualStream(nn.Module):
    """Stands where the final norm stood and adds the two halves of vLLM's fused residual stream.

    After the last layer kept, `hidden + residual` is `hook_resid_post` of that layer.
    """

    def forward(self, hidden_ND: Tensor, residual_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Return the residual stream, in the place and form of the norm's result."""
        return hidden_ND + residual_ND, residual_ND


class PlainLinear(UnquantizedLinearMethod):  # type: ignore[misc]
    """A matrix product that reads the parameter itself, and an adapter's two beside it.

    On a CPU vLLM would repack the weight and drop the readable copy, each version in its own way; a swap is
    proven on the parameter that the product reads, so that parameter has to stay. vLLM's own adapters are
    picked token by token, from slots of one rank for all; here every row is under the same one or none.
    """

    adds_slices = True

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Leave the parameter as it was loaded."""

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return `x W^T + bias`, and `(x A^T) B^T` added to the columns that an adapter changes."""
        y = nn.functional.linear(x, layer.weight, bias)  # type: ignore[arg-type]
        for part in slices_of(layer):
            y[:, part.start : part.start + len(part.lora_B)].addmm_(x @ part.lora_A.T, part.lora_B.T)
        return y


def has_host_norm(parameter: Tensor) -> bool:
    """Whether a parameter lies on a CPU and this build of vLLM has its kernels there."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return parameter.device.type == "cpu" and all(
        hasattr(torch.ops._C, name) and has_kernel(f"_C::{name}", "CPU") for name in HOST_NORMS
    )


def normalise_on_host(norm: RMSNorm, x_ND: Tensor, residual_ND: Tensor | None = None) -> object:
    """RMSNorm by vLLM's own kernel, which it has for CPUs too and does not call there: one pass, not six."""
    weight_D, epsilon = norm.weight.data, norm.variance_epsilon
    if not x_ND.is_contiguous():  # heads that were split off: their kernel reads what lies between
        return norm.forward_native(x_ND, residual_ND)
    if residual_ND is not None:
        torch.ops._C.fused_add_rms_norm(x_ND, residual_ND, weight_D, epsilon)
        return x_ND, residual_ND
    out_ND = torch.empty_like(x_ND)
    torch.ops._C.rms_norm(out_ND, x_ND, weight_D, epsilon)
    return out_ND


class FeaturePool(TokenPoolingMethod):  # type: ignore[misc]
    """Encodes every scheduled chunk on the device, into one table that leaves it once, at the end of a call.

    vLLM would hand over a tensor a prompt, each with its own copy to the host. It gets an empty one instead.
    """

    def __init__(self, sae: Sae, k: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.encoder = sae.encoder.to(device=device, dtype=dtype)
        self.normalisation = sae.normalisation
        self.k = k
        self.table: Tensor | None = None
        self.watch: Watch = None
        self.recording: Schedule | None = None
        self.num_rows = 0
        self.clock = DeviceClock(device)

    def open_table(self, num_tokens: int, watch: Watch, recording: Schedule | None = None) -> None:
        """Make room for the rows of a call; request `i` says in `FIRST_ROW` where its own begin.

        Args:
            num_tokens: Of all prompts.
            watch: Is shown every step's residuals.
            recording: Is told every step.
        """
        self.watch, self.recording = watch, recording
        device = self.encoder.b_enc_F.device
        self.clock.forget()
        self.table = torch.empty(num_tokens, 2 * self.k + NUM_SCALARS, device=device)
        self.num_rows = 0

    def close_table(self) -> Tensor:
        """The call's rows `[acts K | idx K as int32 bits | error | total | |resid|^2]`, on the host."""
        assert self.table is not None
        table = self.table
        if table.is_cuda:  # pinned memory is copied to several times as fast
            table = torch.empty(table.shape, pin_memory=True).copy_(table)
        self.table, self.watch, self.recording = None, None, None
        assert self.num_rows == len(table), f"{self.num_rows} rows came for {len(table)} tokens"
        return table

    def get_supported_tasks(self) -> set[str]:
        """Token-wise outputs only."""
        return {"token_embed"}

    def forward(self, hidden_states: Tensor, pooling_metadata: PoolingMetadata) -> list[Tensor | None]:
        """Encode one step of vLLM's; nothing is kept of the passes that it makes for itself at start."""
        cursor = pooling_metadata.get_pooling_cursor()
        counts, ends = cursor.num_scheduled_tokens_cpu, cursor.seq_lens_cpu
        if self.table is None:
            self.pack(hidden_states, replace(self.encoder))  # made-up tokens: what is learned from them goes
        else:
            first = torch.tensor(
                [params.extra_kwargs[FIRST_ROW] for params in pooling_metadata.pooling_params]
            )
            shift = first + ends - counts.cumsum(0)
            rows_N = torch.arange(len(hidden_states)) + shift.repeat_interleave(counts)
            rows_N = rows_N.to(hidden_states.device)
            if self.recording is not None:
                self.recording.end_step(rows_N)
            self.add(rows_N, hidden_states)
        return [torch.empty(0) if done else None for done in cursor.is_finished().tolist()]

    def add(self, rows_N: Tensor, resid_ND: Tensor) -> None:
        """Encode one step's residuals into the open table; `rows_N` are its tokens' numbers."""
        assert self.table is not None
        with self.clock:
            self.table[rows_N] = self.pack(resid_ND, self.encoder)
            self.num_rows += len(rows_N)
            if self.watch is not None:
                self.watch.add(rows_N, resid_ND)

    def pack(self, resid_ND: Tensor, encoder: EncoderWeights) -> Tensor:
        """Encode residuals `[N, D]` to table rows `[N, 2 K + 3]`, fp32, features by ascending index."""
        sq_norm_N1 = resid_ND.float().square().sum(-1, keepdim=True)
        resid_ND = normalise_resid(resid_ND, self.normalisation).to(encoder.W_enc_DF.dtype)
        top = encode_topk(resid_ND, encoder, k=self.k)
        error_N, total_N = fvu_parts(resid_ND, top, encoder)
        inactive_last_NK = top.top_idx_NK.masked_fill(top.top_idx_NK < 0, torch.iinfo(torch.int32).max)
        order_NK = inactive_last_NK.argsort(dim=-1)
        acts_NK = top.top_acts_NK.gather(1, order_NK)
        idx_NK = top.top_idx_NK.gather(1, order_NK).view(torch.float32)
        return torch.cat([acts_NK, idx_NK, error_N[:, None], total_N[:, None], sq_norm_N1], dim=-1)


@register_model_loader("ray_auditor")
class BaseLoader(BaseModelLoader):  # type: ignore[misc]
    """Feeds vLLM the base's tensors up to the hook and no others."""

    def download_model(self, model_config: ModelConfig) -> None:
        """Nothing to fetch: the base is a local folder."""

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:  # noqa: ARG002
        """Load the base through the architecture's own `load_weights`."""
        model.load_weights(self._tensors())  # type: ignore[operator]

    @staticmethod
    def _tensors() -> Iterator[tuple[str, Tensor]]:
        inputs = MODEL_INPUTS[-1]
        yield from iter_tensors(inputs.base.tensors, inputs.tensor_names)


def register_residual_model(architecture: str) -> str:
    """Derive and register the residual-stream model of a vLLM architecture.

    Returns:
        The registered name, for `hf_overrides["architectures"]`.
    """
    parent = ModelRegistry._try_load_model_cls(architecture)
    assert parent is not None, f"vLLM has no {architecture}"

    class ResidualModel(parent):  # type: ignore[misc,valid-type]
        is_pooling_model = True

        def __init__(self, *, vllm_config: object, prefix: str = "") -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            inputs = MODEL_INPUTS[-1]
            self.model.norm = ResidualStream()
            if hasattr(self, "lm_head"):
                del self.lm_head
            for module in self.modules():
                if isinstance(module, LinearBase):
                    module.quant_method = PlainLinear()
            parameter = next(self.model.layers.parameters())
            for module in self.model.layers.modules() if has_host_norm(parameter) else ():
                is_plain = type(module) is RMSNorm and module.variance_size_override is None
                if is_plain and module.has_weight and module.weight.dtype == parameter.dtype:
                    module.forward = partial(normalise_on_host, module)
            pool = FeaturePool(inputs.sae, inputs.k, parameter.dtype, parameter.device)
            self.pooler = TokenPooler(pooling=pool, head=None)
            inputs.model = self

        def forward(self, *args: object, **kwargs: object) -> object:
            if self.pooler.pooling.recording is not None:
                assert not args, "vLLM names every input"
                self.pooler.pooling.recording.begin_step(kwargs)
            return super().forward(*args, **kwargs)

    name = f"Residual{architecture}"
    ResidualModel.__name__ = ResidualModel.__qualname__ = name
    ModelRegistry.register_model(name, ResidualModel)
    return name
