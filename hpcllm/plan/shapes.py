"""What a model holds and does, block by block: numbers, counted by `count` or written down from a formula."""

import dataclasses
from dataclasses import dataclass
from operator import add


@dataclass(frozen=True)
class Part:
    """A block, or what comes before the first or after the last one; all but parameters for one sequence, forward.

    parameters, cut: elements, and those of them that the tensor axis divides; flops: of matrix products, all divided;
    traffic, traffic_cut: bytes of activations that operations read and write, whole on every rank of the tensor axis
    and divided; saved, saved_cut: bytes of them that are kept for backward, likewise; copies, copies_cut: bytes of
    weights in the precision of the products, likewise; entering: bytes that are handed in, all that is kept under
    activation checkpointing; sums, sums_back: bytes summed over the tensor axis in forward and backward; meetings: how
    many such sums; calls: operations that a GPU is told one by one; entered, traffic_entered: what of saved and traffic
    is of what enters regions, which is whole there even if ranks hold slices between them; gathered: bytes of it, those
    of each region once, in the precision of the products; attended: bytes of keys and values as attention takes them;
    masks: of a mask that says which token sees which; keys: of keys and values before they are copied for the queries
    that share them, as they travel over the context axis; attentions: how many there are; frozen: elements that are not
    trained, of those that parts share in the first of them.
    """

    parameters: float = 0
    cut: float = 0
    flops: float = 0
    traffic: float = 0
    traffic_cut: float = 0
    saved: float = 0
    saved_cut: float = 0
    copies: float = 0
    copies_cut: float = 0
    entering: float = 0
    sums: float = 0
    sums_back: float = 0
    meetings: int = 0
    calls: int = 0
    entered: float = 0
    traffic_entered: float = 0
    gathered: float = 0
    attended: float = 0
    masks: float = 0
    keys: float = 0
    attentions: int = 0
    frozen: float = 0

    def __add__(self, other):
        return Part(*map(add, dataclasses.astuple(self), dataclasses.astuple(other)))

    def held(self, ranks):
        """Parameters of one of `ranks` ranks of a tensor axis."""
        return self.parameters - self.cut + self.cut / ranks

    def trained(self, ranks):
        """Of those, parameters that have gradients and a state of the optimizer."""
        return self.held(ranks) * (1 - self.frozen / self.parameters) if self.frozen else self.held(ranks)

    def kept(self, ranks, parts=1, sliced=False, again=False):
        """Bytes of activations that one of `ranks` ranks of a tensor axis keeps, a sequence in `parts` parts.

        Where there are several, a rank keeps the keys and values of all of them, and a mask that says which is where.
        sliced: each has a slice of its part between regions; again: computed once more, so that it keeps what it has
        gathered.
        """
        whole = (parts > 1) * (self.attended * (1 - 1 / parts) / ranks + self.masks / parts)
        if not sliced:
            return (self.saved + self.saved_cut / ranks) / parts + whole
        gathered = self.gathered * (ranks if again else 1)
        return (self.saved - self.entered + gathered + self.saved_cut) / ranks / parts + whole

    def moved(self, ranks, sliced=False):
        """Bytes of activations that the operations of one of `ranks` ranks of a tensor axis read and write."""
        between = self.traffic - self.traffic_entered
        return between / (ranks if sliced else 1) + self.traffic_entered + self.traffic_cut / ranks

    def weights(self, ranks):
        """Bytes of copies of weights that one of `ranks` ranks of a tensor axis keeps."""
        return self.copies + self.copies_cut / ranks


@dataclass(frozen=True, eq=False)
class Shapes:
    """A whole model.

    first, blocks, last: Part before, in (one each) and after the blocks; tied: parameters that first and last share,
    divided by the tensor axis; logits: elements of one sequence's logits; boundary: bytes of one sequence's activations
    between two blocks; tokens: of one sequence.
    """

    first: Part
    blocks: tuple
    last: Part
    tied: float
    logits: float
    boundary: float
    tokens: int

    @property
    def parameters(self):
        outside = self.first.parameters + self.last.parameters - self.tied
        return outside + sum(block.parameters for block in self.blocks)

    @property
    def flops(self):
        """Floating-point operations of one sequence's forward pass, nothing computed twice."""
        return self.first.flops + sum(block.flops for block in self.blocks) + self.last.flops
