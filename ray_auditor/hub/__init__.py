"""Untrusted repositories become trusted values here, or a refusal with a reason.

    for found in list_folder(path):                       # Candidate | Refused
        admitted = admit(found, base, num_layers=16, max_lora_rank=64)   # or CandidateError
        for name, tensor in checkpoint.iter_tensors(admitted.tensors): ...

Nothing of a repository is executed, unpickled, rendered or imported; no file outside its folder is opened.
`hub.checkpoint` needs torch and is imported by its own name.
"""

from ray_auditor.hub.admit import admit, open_base
from ray_auditor.hub.candidate import (
    Admitted,
    BaseModel,
    Candidate,
    CandidateError,
    LoraModule,
    LoraSpec,
    MergedTensor,
    Refused,
    TensorSource,
    TensorSpec,
    WeightFile,
)
from ray_auditor.hub.sources import list_folder
from ray_auditor.hub.weights import lies_below_hook

__all__ = [
    "Admitted",
    "BaseModel",
    "Candidate",
    "CandidateError",
    "LoraModule",
    "LoraSpec",
    "MergedTensor",
    "Refused",
    "TensorSource",
    "TensorSpec",
    "WeightFile",
    "admit",
    "lies_below_hook",
    "list_folder",
    "open_base",
]
