"""Recursive halving and doubling: partners at distances that halve or double, also where P is no power of two.

With P = 2^k + m members, the first 2m stand in pairs: the even one hands its part to the odd one, which acts for both
as one *player*, and gets the result at the end. Pure: no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from hybrid.collectives.algorithms.program import Program, Step, Transfer


@dataclass(frozen=True, slots=True)
class _Game:
    """Who plays: `num_players` is the largest power of two within `size`."""

    size: int
    rank: int

    @property
    def num_players(self) -> int:
        return 1 << (self.size.bit_length() - 1)

    @property
    def num_pairs(self) -> int:
        return self.size - self.num_players

    @property
    def partner(self) -> int | None:
        """The other member of this one's pair."""
        return self.rank ^ 1 if self.rank < 2 * self.num_pairs else None

    @property
    def sits_out(self) -> bool:
        return self.partner is not None and self.rank % 2 == 0

    @property
    def player(self) -> int:
        return self.rank // 2 if self.partner is not None else self.rank - self.num_pairs

    def rank_of(self, player: int) -> int:
        return 2 * player + 1 if player < self.num_pairs else player + self.num_pairs

    def blocks_of(self, first: int, last: int) -> tuple[int, ...]:
        """Return the blocks of the players from `first` to before `last`: one a member."""

        def border(player: int) -> int:
            return player + min(player, self.num_pairs)

        return tuple(range(border(first), border(last)))

    @property
    def everything(self) -> tuple[int, ...]:
        return tuple(range(self.size))


def doubling(size: int, rank: int, root: int) -> Program:
    """Return the all-reduce in which partners at distances 1, 2, 4, ... exchange all that they have summed.

    Cost:
        log2 P messages a member one after another (2 more where P is no power of two); log2 P * bytes on the wire a
        member.

    Numerics:
        Pairwise, the lower first, computed alike at both ends: the same bits on every member. Partial sums of float16
        and bfloat16 travel as float32.

    Source:
        Thakur, Rabenseifner and Gropp 2005, "Optimization of collective communication operations in MPICH".
    """
    game = _Game(size, rank)
    steps = _hand_in(game, (0,))
    reach = 1
    while reach < game.num_players:
        steps.append(_swap(game, reach, (0,), (0,), first=reach == 1))
        reach *= 2
    return Program(
        num_blocks=1, reduce=tuple(steps), finish=() if game.sits_out else (0,), share=tuple(_hand_out(game, (0,)))
    )


def all_reduce(size: int, rank: int, root: int) -> Program:
    """Return Rabenseifner's all-reduce: recursive halving, then recursive doubling.

    Cost:
        2 log2 P messages a member one after another (2 more where P is no power of two); 2(P-1)/P * bytes on the wire
        a member (up to 2 * bytes more where P is no power of two).

    Numerics:
        Pairwise, the lower first; each block is summed by one member. Partial sums of float16 and bfloat16 travel as
        float32.

    Source:
        Thakur, Rabenseifner and Gropp 2005, "Optimization of collective communication operations in MPICH".
    """
    game = _Game(size, rank)
    finish = () if game.sits_out else game.blocks_of(game.player, game.player + 1)
    share = [*_doubling(game), *_hand_out(game, game.everything)]
    return Program(num_blocks=size, reduce=tuple(_halving(game)), finish=finish, share=tuple(share))


def reduce_scatter(size: int, rank: int, root: int) -> Program:
    """Return recursive halving.

    Cost:
        log2 P messages a member one after another (2 more where P is no power of two); (P-1)/P * bytes on the wire a
        member (up to bytes more where P is no power of two).

    Numerics:
        As `all_reduce`.
    """
    game = _Game(size, rank)
    return Program(num_blocks=size, reduce=(*_halving(game), *_hand_own(game)), finish=(rank,))


def all_gather(size: int, rank: int, root: int) -> Program:
    """Return recursive doubling of what each holds.

    Cost:
        log2 P messages a member one after another (2 more where P is no power of two); (P-1)/P * bytes of the result
        on the wire a member (up to bytes more where P is no power of two).
    """
    game = _Game(size, rank)
    first = []
    if game.num_pairs:
        own = Transfer(peer=game.partner or 0, blocks=(rank - rank % 2,))
        step = Step() if game.partner is None else Step(sends=(own,)) if game.sits_out else Step(receives=(own,))
        first = [step]
    kept = tuple(block for block in game.everything if block != rank - rank % 2)
    return Program(num_blocks=size, share=(*first, *_doubling(game), *_hand_out(game, kept)))


def _halving(game: _Game) -> list[Step]:
    steps = _hand_in(game, game.everything)
    reach = game.num_players // 2
    while reach:
        near, far = _halves(game, reach)
        steps.append(
            _swap(game, reach, game.blocks_of(*far), game.blocks_of(*near), first=2 * reach == game.num_players)
        )
        reach //= 2
    return steps


def _doubling(game: _Game) -> list[Step]:
    steps = []
    reach = 1
    while reach < game.num_players:
        step = Step()
        if not game.sits_out:
            near, far = _halves(game, reach)
            peer = game.rank_of(game.player ^ reach)
            step = Step(
                sends=(Transfer(peer=peer, blocks=game.blocks_of(*near)),),
                receives=(Transfer(peer=peer, blocks=game.blocks_of(*far)),),
            )
        steps.append(step)
        reach *= 2
    return steps


def _halves(game: _Game, reach: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the `reach` players around this one, and those around its partner at that distance."""
    near = game.player - game.player % reach
    return (near, near + reach), (near ^ reach, (near ^ reach) + reach)


def _swap(game: _Game, reach: int, sent: tuple[int, ...], received: tuple[int, ...], *, first: bool) -> Step:
    """Return the exchange of partial sums with the player at a distance; `first`: only pairs have summed before."""
    if game.sits_out:
        return Step()
    other = game.player ^ reach
    peer = game.rank_of(other)
    return Step(
        sends=(Transfer(peer=peer, blocks=sent, partial=not first or game.player < game.num_pairs),),
        receives=(Transfer(peer=peer, blocks=received, partial=not first or other < game.num_pairs),),
        combine=(game.rank, peer) if game.player < other else (peer, game.rank),
    )


def _hand_in(game: _Game, blocks: tuple[int, ...]) -> list[Step]:
    """Return the step in which who sits out hands its part to its partner."""
    if not game.num_pairs:
        return []
    if game.partner is None:
        return [Step()]
    transfer = Transfer(peer=game.partner, blocks=blocks)
    if game.sits_out:
        return [Step(sends=(transfer,))]
    return [Step(receives=(transfer,), combine=(game.partner, game.rank))]


def _hand_out(game: _Game, blocks: tuple[int, ...]) -> list[Step]:
    """Return the step in which who sat out gets the result."""
    if not game.num_pairs:
        return []
    if game.partner is None:
        return [Step()]
    transfer = Transfer(peer=game.partner, blocks=blocks)
    return [Step(receives=(transfer,)) if game.sits_out else Step(sends=(transfer,))]


def _hand_own(game: _Game) -> list[Step]:
    """Return the step in which who sat out gets its own block, not yet finished."""
    if not game.num_pairs:
        return []
    if game.partner is None:
        return [Step()]
    transfer = Transfer(peer=game.partner, blocks=(game.rank - game.rank % 2,), partial=True)
    return [Step(receives=(transfer,)) if game.sits_out else Step(sends=(transfer,))]
