"""One live vLLM engine, cut at the hook: load a candidate, prove it, stream its features."""

# Shape suffixes: M tokens of all prompts, K = kept features.

import gc
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import accumulate
from typing import NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ray_auditor.config import EngineConfig
from ray_auditor.engine import check_fit, num_layers_of
from ray_auditor.engine.adapter import (
    AdapterReader,
    AdapterTensors,
    drop_adapter,
    prove_adapter,
    put_adapter,
)
from ray_auditor.engine.parameters import ParameterMap, checksums
from ray_auditor.engine.residuals import Comparison, Recording
from ray_auditor.engine.schedule import Schedule, Turns
from ray_auditor.engine.staging import Staging
from ray_auditor.hub import Admitted, BaseModel, TensorSource, TensorSpec
from ray_auditor.hub.checkpoint import TORCH_DTYPES, iter_tensors
from ray_auditor.hub.weights import lies_below_hook
from ray_auditor.sae import Sae

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", USE_HUB_KERNELS="0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")  # nothing is sampled
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

LEAST_FREE = 0.01  # of a device, without which vLLM refuses to start: by default 0.92, whatever it will take


class Features(NamedTuple):
    """The engine's rows on the host, one a token, tokens numbered in the order of the prompts."""

    top_acts_MK: NDArray[np.float32]  # in the order of the indices; NaN where the residual is not finite
    top_idx_MK: NDArray[np.int32]  # ascending; -1 where inactive, last
    fvu_error_M: NDArray[np.float32]
    fvu_total_M: NDArray[np.float32]
    sq_norm_M: NDArray[np.float32]  # squared norm of the residual


class Loaded(NamedTuple):
    """What `Engine.load` did."""

    proof: str  # what holds, for the record
    seconds: dict[str, float]  # stage (waiting for the readers), swap (copying), prove, adapter


class Engine:
    """A base model truncated at the SAE's hook, into which candidates are swapped one after another.

    vLLM keeps process-wide state, so a process holds one engine at a time; it computes in the calling
    process, and `close` must come before another is made.
    """

    def __init__(self, base: BaseModel, sae: Sae, *, k: int, max_tokens: int, config: EngineConfig) -> None:
        """Start vLLM on the base and prove that the base is what it holds.

        Args:
            base: The reference model; its tensors up to the hook are the only ones read.
            sae: Encoder and hook.
            k: Features kept per token.
            max_tokens: Longest prompt, in tokens.
            config: Numeric type, step size and memory of the engine.

        Raises:
            ValueError: As `check_fit`.
            SwapError: vLLM's own loader did not place the base's tensors where this project reads them.
        """
        from vllm import LLM

        from ray_auditor.engine.model import MODEL_INPUTS, FeaturePool, ModelInputs, register_residual_model

        check_fit(base, sae, k)
        num_layers = num_layers_of(sae)
        architecture = register_residual_model(base.config["architectures"][0])
        self._base = base
        self._names = tuple(name for name in base.tensors if lies_below_hook(name, num_layers))
        self.encode_s = 0.0
        self._adapter: AdapterTensors = {}
        self._schedule: Schedule | None = None
        self._inputs = ModelInputs(base, self._names, sae, k)
        self._k = k
        MODEL_INPUTS.append(self._inputs)
        overrides = {"architectures": [architecture], "num_hidden_layers": num_layers}
        if layer_types := base.config.get("layer_types"):
            overrides["layer_types"] = layer_types[:num_layers]
        self._llm = LLM(
            str(base.path),
            runner="pooling",
            pooler_config={"tok_pooling_type": "ALL", "use_activation": False},
            hf_overrides=overrides,
            load_format="ray_auditor",
            dtype=config.dtype.value,
            max_model_len=max_tokens,
            max_num_batched_tokens=max(config.max_step_tokens, max_tokens),
            max_num_seqs=config.max_step_prompts,
            enable_chunked_prefill=True,
            enable_prefix_caching=False,
            enforce_eager=True,
            distributed_executor_backend="uni",
            kv_cache_memory_bytes=config.kv_cache_bytes,
            gpu_memory_utilization=LEAST_FREE,
            disable_log_stats=True,
        )
        model = self._inputs.model
        assert model is not None
        self._model = model
        self._pool = cast(FeaturePool, model.pooler.pooling)  # type: ignore[union-attr]
        self._map = ParameterMap(model, {name: base.tensors[name].shape for name in self._names})
        self._staging = Staging(self._map, config.read_ahead_bytes)
        self._adapters = AdapterReader(self._map.dtype)
        self._beside = None if self.computes_on_host else torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._loaded = base.content_sha256
        # vLLM's own loader wrote the base: where its tensors lie now is where candidates are written.
        base_tensors = iter_tensors(base.tensors, self._names)
        expected = {name: checksums([tensor.to(self._map.dtype)])[0] for name, tensor in base_tensors}
        self._map.prove(expected)
        self._staging.keep(self._loaded, expected)

    def load(self, candidate: Admitted | None) -> Loaded:
        """Make `candidate` (None: the base) what the next `encode` runs.

        Full weights are proven here, tensor by tensor; an adapter is proven after each `encode`, in the
        slot it was applied from. A candidate whose weights are live already is not read again.

        Raises:
            SwapError: The swap could not be proven; the engine must be discarded.
            CandidateError: The candidate's files are not what was admitted.
        """
        drop_adapter(self._model)
        self._adapter = {}
        key, tensors = self._weights_of(candidate)
        begun = swapped = time.perf_counter()
        waited_s = 0.0
        if key != self._loaded:
            self._loaded = ""
            expected = self._staging.swap(key, tensors)
            swapped, waited_s = time.perf_counter(), self._staging.waited_s
            self._map.prove(expected)
            self._loaded = key
        proven = time.perf_counter()
        proof = f"{len(self._map.slots)} tensors on the device by checksum against the file"
        if swapped == begun:
            proof += ", not written since"
        if candidate is not None and candidate.lora is not None:
            self._adapter = self._adapters.take(candidate)
            put_adapter(self._model, self._map, self._adapter)
            proof = f"{len(self._adapter)} adapter modules value for value on the device, after the run"
        adapted = time.perf_counter()
        seconds = {
            "stage": waited_s,
            "swap": swapped - begun - waited_s,
            "prove": proven - swapped,
            "adapter": adapted - proven,
        }
        return Loaded(proof, seconds)

    def read_ahead(self, candidate: Admitted | None) -> None:
        """Begin to read what the next `load` will ask for, while the present candidate computes."""
        key, tensors = self._weights_of(candidate)
        if key != self._loaded:
            self._staging.read_ahead(key, tensors)
        if candidate is not None and candidate.lora is not None:
            self._adapters.read_ahead(candidate)

    def _weights_of(self, candidate: Admitted | None) -> tuple[str, Mapping[str, TensorSource]]:
        if candidate is None or candidate.lora is not None:
            return self._base.content_sha256, self._base.tensors
        return candidate.content_sha256, candidate.tensors

    def weights_beside_base(self, candidate: Admitted) -> Mapping[str, tuple[Tensor, Tensor]] | None:
        """Each tensor of the full candidate that is loaded, and the base's, on the device.

        Returns:
            None where the base's are not kept there, or the files' own values were rounded on their way.
        """
        base = self._staging.kept
        read = [tensors[name] for tensors in (candidate.tensors, self._base.tensors) for name in self._names]
        kinds = {TORCH_DTYPES[spec.dtype] if isinstance(spec, TensorSpec) else None for spec in read}
        if base is None or kinds != {self._map.dtype}:
            return None
        return {name: (self._map.rows(name), tensor) for name, tensor in base.items()}

    def beside_the_run(self) -> AbstractContextManager[None]:
        """A stream of its own for what another thread computes on the device meanwhile."""
        return torch.cuda.stream(self._beside)

    @property
    def computes_on_host(self) -> bool:
        """Whether the host's cores are the device."""
        return self._map.device.type == "cpu"

    def record(self, num_tokens: int, num_suites: int) -> Recording:
        """What keeps the residuals of the next `encode`, which must be the base's."""
        return Recording(num_tokens, self._inputs.sae.d_in, num_suites, self._map.dtype, self._map.device)

    def compare(
        self, residuals: NDArray[np.uint8], suite_M: NDArray[np.int64], num_suites: int
    ) -> Comparison:
        """What holds every later `encode` to the base.

        Args:
            residuals: `Recording.to_bytes` of an engine of the same class; stays where it is on a CPU.
            suite_M: Number of each token's suite, `num_suites` where it is not scored.
            num_suites: How many there are.
        """
        base_MD = torch.from_numpy(residuals).view(self._map.dtype).view(len(suite_M), self._inputs.sae.d_in)
        return Comparison(base_MD.to(self._map.device), torch.from_numpy(suite_M), num_suites)

    def encode(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        reverse: bool = False,
        watch: Recording | Comparison | None = None,
    ) -> Features:
        """Run prompts of token ids through what was loaded; rows come in the order of the prompts.

        Args:
            prompts: Token ids.
            reverse: Run the last prompt first: another batching of the same tokens.
            watch: Is shown the residuals; tokens are numbered in the order of `prompts`.

        Raises:
            SwapError: The adapter was not in its place; nothing of this call may be kept.
        """
        *first_rows, num_tokens = accumulate(map(len, prompts), initial=0)
        turns = list(zip(prompts, first_rows, strict=True))[:: -1 if reverse else 1]
        if self._schedule is not None and self._schedule.turns == turns:
            self._pool.open_table(num_tokens, watch)
            for rows_N, resid_ND in self._schedule.run(self._model):
                self._pool.add(rows_N, resid_ND)
        else:
            recording = Schedule(turns)
            self._pool.open_table(num_tokens, watch, recording)
            self._run(turns)
            self._schedule = recording if recording.is_whole else None
        table = self._pool.close_table().numpy()
        self.encode_s = self._pool.clock.take()  # of this call: encoding and comparing; the rest is the model
        prove_adapter(self._model, self._map, self._adapter)
        k = self._k
        return Features(
            table[:, :k],
            table[:, k : 2 * k].view(np.int32),
            table[:, 2 * k],
            table[:, 2 * k + 1],
            table[:, 2 * k + 2],
        )

    def _run(self, turns: Turns) -> None:
        """Have vLLM schedule prompts, each with the number of its first row, and run them."""
        from vllm import PoolingParams

        from ray_auditor.engine.model import FIRST_ROW

        self._llm.encode(
            [{"prompt_token_ids": list(ids)} for ids, _ in turns],
            [PoolingParams(task="token_embed", extra_kwargs={FIRST_ROW: row}) for _, row in turns],
            pooling_task="token_embed",
            use_tqdm=False,
        )

    def close(self) -> None:
        """Shut vLLM down and free the device, so that another engine can start in this process."""
        from vllm.distributed import cleanup_dist_env_and_memory

        from ray_auditor.engine.model import MODEL_INPUTS

        self._staging.close()
        self._adapters.close()
        self._llm.llm_engine.engine_core.shutdown()
        MODEL_INPUTS.remove(self._inputs)
        del self._llm, self._model, self._pool, self._map, self._staging, self._adapters, self._inputs
        del self._schedule
        gc.collect()
        cleanup_dist_env_and_memory()
