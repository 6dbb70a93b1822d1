"""BucketExchange: one bucket's gradients on their way to their owners, and the owners' parameters on their way back.

Knows tensors, a group and a codec; knows nothing of plans, steps or schedules. The caller says when: leave, land,
spread, arrive, in this order, each once a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hybrid.collectives.base import Group, Work
from hybrid.collectives.error_feedback import ErrorFeedback
from hybrid.scheduler.reduction import Piece


class BucketExchange:
    """One bucket of one rank.

    Args:
        name: the same at every step; names the bucket's error feedback.
        parameters: of the bucket's layers, by name; contiguous.
        pieces_of_member: by position, what each member owns of them; no element twice and none left out.
        group: its members hold the same parameters; operations of a group come in one order on all of them.
        feedback: the codec of gradients, with what it has lost.

    Numerics:
        A gradient is the members' contributions added in the order of positions, the owner's own as it is and the
        others' as decoded, in the parameters' format. Parameters travel as they are.

    Cost:
        Of N elements: sends the encoded bytes of the others' parts and (M - 1) times the own part.
    """

    def __init__(
        self,
        name: str,
        parameters: Mapping[str, Tensor],
        pieces_of_member: Sequence[Sequence[Piece]],
        group: Group,
        feedback: ErrorFeedback,
    ) -> None:
        self.name, self.group = name, group
        self._parameters, self._pieces, self._feedback = parameters, pieces_of_member, feedback
        self._dtype = next(iter(parameters.values())).dtype
        self._sizes = [sum(piece.size for piece in pieces) for pieces in pieces_of_member]
        self._parts = [torch.zeros(size, dtype=self._dtype) for size in self._sizes]
        own = self._sizes[group.rank]
        codec = feedback.codec
        # Nothing goes from a member to itself.
        given = [0 if member == group.rank else size for member, size in enumerate(self._sizes)]
        taken = [0 if member == group.rank else own for member in range(group.size)]
        self._given, self._taken = (
            [torch.empty(codec.encoded_bytes(size, self._dtype), dtype=torch.uint8) for size in sizes]
            for sizes in (given, taken)
        )
        self._owed = torch.zeros(0, dtype=self._dtype)
        self._under_way: Work | None = None
        self.sent_bytes = 0
        """What this rank has sent so far."""

    @property
    def own_pieces(self) -> Sequence[Piece]:
        """What this member owns."""
        return self._pieces[self.group.rank]

    @torch.no_grad()
    def leave(self) -> None:
        """Send every other owner this member's gradients of its part; the gradients may change afterwards."""
        for member, data in enumerate(self._given):
            if member != self.group.rank:
                part = self._collect(member, _gradient)
                self._feedback.encode(f"{self.name}/{member}", part, data)
                self.sent_bytes += data.numel()
        self._under_way = self.group.all_to_all(self._taken, self._given)

    @torch.no_grad()
    def land(self) -> None:
        """Wait for the others, and leave the sums of the own part in its gradients.

        Raises:
            CommTimeout, PeerLost: a member was silent or has gone.
        """
        self._wait()
        own = self.group.rank
        mine = self._collect(own, _gradient)
        if len(self._owed):
            mine.add_(self._owed)
            self._owed = torch.zeros(0, dtype=self._dtype)
        other = torch.empty_like(mine)
        total: Tensor | None = None
        for member, data in enumerate(self._taken):
            if member != own:
                self._feedback.codec.decode(data, other)
            contribution = mine if member == own else other
            total = contribution.clone() if total is None else total.add_(contribution)
        assert total is not None, "a group has members"
        self._place(own, total, _gradient)

    @torch.no_grad()
    def spread(self) -> None:
        """Send everyone the own part's parameters."""
        own = self.group.rank
        self._collect(own, _parameter)
        self._under_way = self.group.all_gather(self._parts, self._parts[own])
        self.sent_bytes += (self.group.size - 1) * self._parts[own].nbytes

    @torch.no_grad()
    def arrive(self) -> None:
        """Wait for the others' parts of the parameters, and take them."""
        self._wait()
        for member, part in enumerate(self._parts):
            if member != self.group.rank:
                self._place(member, part, _parameter)

    @torch.no_grad()
    def gather(self, own: Mapping[str, Tensor], root: int) -> dict[str, Tensor] | None:
        """Return every parameter's state at the member that is the root, from what each owner has of it; else None.

        Args:
            own: by name, flat, of this member's pieces.

        Shapes:
            returns: of each parameter, in its shape
        """
        mine = self._parts[self.group.rank]
        parts = [own[piece.name].to("cpu").view(-1) for piece in self.own_pieces]
        mine.copy_(torch.cat(parts) if parts else mine)
        at_root = self.group.rank == root
        self.group.gather(self._parts if at_root else None, mine, root).wait()
        if not at_root:
            return None
        whole = {name: torch.empty(p.numel(), dtype=self._dtype) for name, p in self._parameters.items()}
        for pieces, part in zip(self._pieces, self._parts, strict=True):
            for piece, values in _cut(pieces, part):
                whole[piece.name][piece.start : piece.end] = values
        return {name: flat.view(self._parameters[name].shape) for name, flat in whole.items()}

    def lost(self) -> dict[str, Tensor]:
        """Return what the codec has lost of this member's gradients so far, by parameter; for a checkpoint.

        Shapes:
            returns: of each parameter, in its shape, float32
        """
        state = self._feedback.state()
        whole = {name: torch.zeros(p.numel()) for name, p in self._parameters.items()}
        for member, pieces in enumerate(self._pieces):
            error = state.get(f"{self.name}/{member}")
            for piece, values in [] if error is None else _cut(pieces, error):
                whole[piece.name][piece.start : piece.end] = values
        return {name: flat.view(self._parameters[name].shape) for name, flat in whole.items()}

    def load_lost(self, lost: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take over what was lost, also of what this member now owns itself: that is added to its next gradients.

        Returns:
            the error feedback's state by bucket, for `ErrorFeedback.load`.
        """

        def part(member: int) -> Tensor:
            flats = [lost[piece.name].view(-1)[piece.start : piece.end] for piece in self._pieces[member]]
            return torch.cat(flats) if flats else torch.zeros(0)

        self._owed = part(self.group.rank).to(self._dtype)
        return {f"{self.name}/{member}": part(member) for member in range(self.group.size) if member != self.group.rank}

    def _wait(self) -> None:
        assert self._under_way is not None, "nothing is under way"
        work, self._under_way = self._under_way, None
        work.wait()

    def _collect(self, member: int, of: _Of) -> Tensor:
        """Return a member's part, copied to the host, flat."""
        flat = self._parts[member]
        for piece, into in _cut(self._pieces[member], flat):
            into.copy_(of(self._parameters[piece.name]).view(-1)[piece.start : piece.end])
        return flat

    def _place(self, member: int, flat: Tensor, of: _Of) -> None:
        for piece, values in _cut(self._pieces[member], flat):
            of(self._parameters[piece.name]).view(-1)[piece.start : piece.end].copy_(values)


class _Of:
    """Which tensor of a parameter is meant."""

    def __init__(self, *, gradient: bool) -> None:
        self._gradient = gradient

    def __call__(self, parameter: Tensor) -> Tensor:
        if not self._gradient:
            return parameter.detach()
        assert parameter.grad is not None, "a parameter has no gradient after a step"
        return parameter.grad


_gradient, _parameter = _Of(gradient=True), _Of(gradient=False)


def _cut(pieces: Sequence[Piece], flat: Tensor) -> list[tuple[Piece, Tensor]]:
    """Return each piece with its place in a flat part."""
    return list(zip(pieces, torch.split(flat, [piece.size for piece in pieces]), strict=True))
