"""Error feedback: what a codec lost of a bucket is added to the bucket's next encoding.

Wraps any codec; the state is a tensor a bucket and goes into checkpoints. May import only torch, `errors` and `codecs`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hybrid.collectives.codecs import NARROW_FORMATS, Codec
from hybrid.errors import CheckpointError, UnsupportedFormat


class ErrorFeedback:
    """A codec with a memory of what it lost, bucket by bucket. One thread at a time for each bucket.

    Numerics:
        Over any number of encodings of a bucket, the sum of what was decoded differs from the sum of what was given by
        the last encoding's error alone (float32 rounding apart). A part that was not finite leaves no error behind:
        one bad step does not poison the next.

    Source:
        Seide et al. 2014, "1-bit stochastic gradient descent"; Karimireddy et al. 2019, "Error feedback fixes SignSGD".
    """

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self._error_of_bucket: dict[str, Tensor] = {}

    def encode(self, bucket: str, x: Tensor, into: Tensor) -> None:
        """Write the bytes of `x` plus what this bucket's encodings have lost so far.

        Args:
            bucket: names the numbers; the same ones, in the same order, each time.

        Shapes:
            x: (N,), the same N for a bucket always.  into: (codec.encoded_bytes(N, x.dtype),) uint8

        Raises:
            UnsupportedFormat: see `Codec.encode`.
        """
        if self.codec.max_error == 0.0:
            self.codec.encode(x, into)
            return
        if x.dtype not in NARROW_FORMATS:
            raise UnsupportedFormat(
                f"codec {self.codec.name} does not take this format", value=str(x.dtype), valid=NARROW_FORMATS
            )
        error = self._error_of_bucket.get(bucket)
        assert error is None or error.shape == x.shape, f"bucket {bucket} has changed its size"
        total = x.float() if error is None else x.float() + error
        self.codec.encode(total, into)
        back = torch.empty_like(total)
        self.codec.decode(into, back)
        self._error_of_bucket[bucket] = (total - back).where(back.isfinite(), 0.0)

    def state(self) -> dict[str, Tensor]:
        """Return what each bucket has lost; for a checkpoint. The tensors are the state itself, not copies."""
        return dict(self._error_of_bucket)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take the place of what was lost so far.

        Raises:
            CheckpointError: an error that is not finite or not float32; nothing is taken.
        """
        for bucket, error in state.items():
            if error.dtype != torch.float32 or error.dim() != 1 or not bool(error.isfinite().all()):
                raise CheckpointError(
                    f"error feedback of bucket {bucket} is damaged",
                    value=f"{error.dtype} {tuple(error.shape)}",
                    valid="finite flat float32",
                    fix="do not use this checkpoint",
                )
        self._error_of_bucket = {bucket: error.clone() for bucket, error in state.items()}
