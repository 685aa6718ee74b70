"""What a FLUX transformer's evaluations hold beside its weights, counted along its blocks.

Counted in widths: one width is D values for each of a picture's S tokens. Left out is what is
small: values per token, per head or per picture.
"""

from __future__ import annotations

from dataclasses import dataclass

from mixgrpo.planning.flux_size import FluxSize

# Without gradients, in a single-stream block: the residual and its norm, q, k and v, the
# feed-forward's four before and four after its activation, attention's result, and the five that
# are concatenated; one for copies.
WIDTHS = 20
# Feature maps at full size that live at once in the decoder's last block: input, norm, activation,
# convolution's result and its workspace, each of twice the decoder's first width.
MAPS = 5


@dataclass(frozen=True)
class Precision:
    """Bytes of a value.

    Attributes:
        product: in matrix products and in the stream of residuals.
        norm: in the blocks' norms; where it is not that of products, each product casts its own
            copy of what it takes from a norm (autocast on a GPU).
        head_norm: kept for one value by the norms of q and k.
    """

    product: int
    norm: int
    head_norm: int

    @classmethod
    def on_gpu(cls, compute: int, weights: int) -> Precision:
        """With products and weights of so many bytes; only norms of one dtype are fused."""
        fused = compute == weights
        return cls(product=compute, norm=4, head_norm=compute if fused else 8)

    @property
    def casts(self) -> bool:
        return self.norm != self.product


def evaluation_bytes(size: FluxSize, tokens: int, batch: int, product: int) -> int:
    """Of an evaluation without gradients."""
    return batch * tokens * size.width * WIDTHS * product


def decoding_bytes(pixels: int, batch: int, first_width: int, value: int) -> int:
    """Of decoding ``batch`` pictures; the decoder's first width is block_out_channels[0]."""
    return batch * pixels * MAPS * 2 * first_width * value


def double_block_bytes(precision: Precision, train_all: bool) -> int:
    """Kept for a backward pass of a double-stream block, for each width.

    For all weights: the inputs of the two norms, what these give, attention's and the
    feed-forward's results before their gates; q and k before their norms; q, k, v and attention's
    result, its copy; inputs of the projections and of the feed-forward; the feed-forward's four
    before and four after its activation. For adapters: neither results of norms nor ungated ones,
    since scales, shifts and gates are not trained.
    """
    p, copies = precision.product, 4 if precision.casts else 2
    norms, gated = (4, 2) if train_all else (2, 0)
    return (
        norms * precision.norm
        + 2 * _head_norm(precision, train_all)
        + (gated + 3 + 2 + copies + 8) * p
    )


def single_block_bytes(precision: Precision, train_all: bool) -> int:
    """Kept for a backward pass of a single-stream block, for each width.

    As above; the input of the last projection is attention's result beside the feed-forward's four.
    """
    p, copies = precision.product, 4 if precision.casts else 1
    norms, gated = (2, 1) if train_all else (1, 0)
    return (
        norms * precision.norm
        + 2 * _head_norm(precision, train_all)
        + (gated + 3 + 1 + copies + 4 + 5) * p
    )


def _head_norm(precision: Precision, train_all: bool) -> int:
    # Their weights' gradients need what was normalised.
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
    """The most that a forward and backward pass of ``batch`` pictures keeps.

    Args:
        recompute_every: of every so many blocks one keeps its input alone and is computed again
            in the backward pass; 0: none.
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
