"""Whether the Hopper filters, as they were built here, find what Triton's exact slices find."""

from __future__ import annotations

import functools

import torch

from auditor_kernels import hopper
from auditor_kernels.weights import EncoderWeights

# As much as meets all that a filter does: three tiles and more a cluster on an H100, so that what keeps one
# tile's winners serves the next; rows of nine steps of depth in either type, so that one consumer waits for
# the other; the last tile of tokens and the last step not full.
TOKENS, WIDTH, FEATURES, KEPT = 1000, 1096, 16384, 32
RECOMPUTED = 0.05  # of the tokens at most: one that lists nothing is never wrong, and never fast
TOLERANCE = 1e-4  # relative: sums in another order differ by 1e-6, a product that was not waited for by all


@functools.cache
def check_hopper(device: torch.device) -> tuple[bool, str]:
    """Build the Hopper filters and hold them to another implementation, once a process and device.

    A compiler or a driver that no one tried them with could make them wrong without a word: they promise
    what they counted, not what they multiplied.

    Args:
        device: A Hopper GPU.

    Returns:
        Whether they may be used, and why or why not.
    """
    library, reason = hopper.load()
    if library is None:
        return False, reason
    from auditor_kernels.dispatch import Implementation, launch

    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    w_FD = (draw(FEATURES, WIDTH) / WIDTH**0.5).bfloat16()
    zeros_F, zeros_D = torch.zeros(FEATURES, device=device), torch.zeros(WIDTH, device=device)
    encoder = EncoderWeights(w_FD.t(), 0.1 * draw(FEATURES), zeros_F, zeros_D, None, None)
    resid_ND = draw(TOKENS, WIDTH).bfloat16()
    try:
        with torch.cuda.device_of(w_FD):  # type: ignore[no-untyped-call] # kernels launch on the current one
            wanted_NK = launch(Implementation.ROWS, resid_ND, encoder, KEPT, None).val_NK
            for which in (Implementation.HOPPER, Implementation.INT8):
                found = launch(which, resid_ND, encoder, KEPT, None)
                if not torch.allclose(found.val_NK, wanted_NK, rtol=TOLERANCE, atol=TOLERANCE):
                    return False, f"{which} was {reason} and disagrees with {Implementation.ROWS}"
                if (again := found.num_recomputed()) > RECOMPUTED * TOKENS:
                    return (
                        False,
                        f"{which} was {reason} and leaves {again} of {TOKENS} tokens to others",
                    )
    except RuntimeError as error:
        return False, f"it was {reason} and does not run: {error}"
    return True, reason
