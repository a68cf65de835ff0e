"""How the layers of a model are divided among the pieces of a pipeline."""

from __future__ import annotations

from itertools import accumulate, pairwise


def layers_of_pieces(num_layers: int, num_pieces: int) -> list[range]:
    """The layers of each of `num_pieces` pieces, as even as their number allows.

    Where not all can have as many as the fullest, the last piece has one less, which has the head; then the first,
    which has the embedding; then those before the last. With one or two pieces that lack a layer these are the splits
    in which the ends stand for layers (`zoo.plan.legal.ENDS`).
    """
    fullest = -(-num_layers // num_pieces)
    short = [num_pieces - 1, 0, *range(num_pieces - 2, 0, -1)][: num_pieces * fullest - num_layers]
    sizes = [fullest - (piece in short) for piece in range(num_pieces)]
    return [range(start, end) for start, end in pairwise(accumulate(sizes, initial=0))]
