"""Fused sparse-autoencoder encode + top-k: exact, in bounded memory, on a CPU or a GPU."""

from auditor_kernels.dispatch import describe_dispatch, encode_topk
from auditor_kernels.fvu import fvu_parts
from auditor_kernels.weights import EncoderWeights, TopK

__all__ = ["EncoderWeights", "TopK", "describe_dispatch", "encode_topk", "fvu_parts"]
