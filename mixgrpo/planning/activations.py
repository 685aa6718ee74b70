"""Activation memory of FLUX transformer evaluations, counted block by block.

The unit is one width: D values for each of an image's S tokens. Small terms are neglected: values
per token, per head or per image.
"""

from __future__ import annotations

from dataclasses import dataclass

from mixgrpo.planning.flux_size import FluxSize

# Widths alive in a single-stream block without gradients: the residual and its norm, q, k and v,
# four before and four after the feed-forward's activation, the attention output, and the five of
# the concatenation; one more for copies.
WIDTHS = 20
# Full-size feature maps alive at the same time in the decoder's last block: input, norm,
# activation, convolution output and workspace, each of twice the decoder's first width.
MAPS = 5


@dataclass(frozen=True)
class Precision:
    """Bytes per value.

    Attributes:
        product: in matrix products and in the residual stream.
        norm: in the blocks' norms; where it differs from ``product``, a norm's output is cast for
            the matrix products, once for all of them (autocast on a GPU).
        head_norm: kept per value by the norms of q and k.
    """

    product: int
    norm: int
    head_norm: int

    @classmethod
    def on_gpu(cls, compute: int, weights: int) -> Precision:
        """For products and weights of this many bytes; norms are fused only if both are equal."""
        fused = compute == weights
        return cls(product=compute, norm=4, head_norm=compute if fused else 8)


def evaluation_bytes(size: FluxSize, tokens: int, batch: int, product: int) -> int:
    """Activation bytes of an evaluation without gradients."""
    return batch * tokens * size.width * WIDTHS * product


def decoding_bytes(pixels: int, batch: int, first_width: int, value: int) -> int:
    """Bytes for decoding ``batch`` images; the decoder's first width is block_out_channels[0]."""
    return batch * pixels * MAPS * 2 * first_width * value


def double_block_bytes(precision: Precision, train_all: bool) -> int:
    """Bytes per width that a double-stream block keeps for its backward pass.

    With all weights trained: the inputs and outputs of the two norms; the outputs of attention and
    feed-forward before their gates; q and k before their norms; q, k, v, the attention output and
    its copy; the inputs of the projections and of the feed-forward; four widths before and four
    after the feed-forward's activation. With adapters, neither the outputs of norms nor ungated
    outputs are kept, since scales, shifts and gates are not trained.
    """
    p = precision.product
    norms, gated = (4, 2) if train_all else (2, 0)
    return (
        norms * precision.norm + 2 * _head_norm(precision, train_all) + (gated + 3 + 2 + 2 + 8) * p
    )


def single_block_bytes(precision: Precision, train_all: bool) -> int:
    """Bytes per width that a single-stream block keeps for its backward pass.

    As above; the last projection's input is the attention output with the feed-forward's four.
    """
    p = precision.product
    norms, gated = (2, 1) if train_all else (1, 0)
    return (
        norms * precision.norm
        + 2 * _head_norm(precision, train_all)
        + (gated + 3 + 1 + 1 + 4 + 5) * p
    )


def _head_norm(precision: Precision, train_all: bool) -> int:
    # The gradients of the norms' weights need the normalised values.
    return precision.head_norm if train_all else min(precision.head_norm, 4)


def kept_bytes(
    size: FluxSize,
    image_tokens: int,
    text_tokens: int,
    batch: int,
    precision: Precision,
    train_all: bool,
    recompute_every: int,
) -> int:
    """Maximum bytes that a forward and backward pass of ``batch`` images keeps.

    Args:
        recompute_every: every n-th block keeps only its input and is recomputed in the backward
            pass; 0 recomputes none.
    """
    width = batch * (image_tokens + text_tokens) * size.width
    double, single = (f(precision, train_all) for f in (double_block_bytes, single_block_bytes))
    ends = batch * image_tokens * size.width * (2 * precision.norm + precision.product)
    total = ends if train_all else 0
    for block in range(size.blocks):
        if recompute_every and block % recompute_every == 0:
            total += width * precision.product
        else:
            total += width * (double if block < size.num_layers else single)
    return total + (width * double if recompute_every else 0)
