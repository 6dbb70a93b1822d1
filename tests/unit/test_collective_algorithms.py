"""Every algorithm's programs, run on paper: what each block holds is written out as an expression."""

from dataclasses import dataclass, field

import pytest

from hybrid.collectives.algorithms import ALGORITHMS, Program

SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 11, 16)
CASES = [(operation, name) for operation, algorithms in ALGORITHMS.items() for name in algorithms]


@dataclass
class Member:
    blocks: dict[int, object] = field(default_factory=dict)
    """A contribution is (block, member); a reduction is a tuple of what was reduced, in order."""
    finished: set[int] = field(default_factory=set)
    sent_messages: int = 0
    sent_blocks: int = 0


def members_of(value: object) -> list[int]:
    return [value[1]] if value[0] == "from" else [m for part in value[1] for m in members_of(part)]  # type: ignore[index]


def run(programs: list[Program], held: list[set[int]]) -> list[Member]:
    """Run all members' programs step by step; a message must have its two ends in the same step."""
    members = [Member({b: ("from", rank, b) for b in blocks}) for rank, blocks in enumerate(held)]
    assert len({(p.num_blocks, len(p.reduce), len(p.share)) for p in programs}) == 1
    for at in range(len(programs[0].steps) + 1):
        if at == len(programs[0].reduce):
            for member, program in zip(members, programs, strict=True):
                member.finished |= set(program.finish)
        if at < len(programs[0].steps):
            run_step(programs, members, at)
    return members


def run_step(programs: list[Program], members: list[Member], at: int) -> None:
    letters: dict[tuple[int, int], list[tuple[tuple[int, ...], bool, list[object]]]] = {}
    for rank, program in enumerate(programs):
        for send in program.steps[at].sends:
            values = [members[rank].blocks[block] for block in send.blocks]
            sums = [v[0] == "sum" and b not in members[rank].finished for v, b in zip(values, send.blocks, strict=True)]
            assert all(each == send.partial for each in sums), "partial says what is sent"
            letters.setdefault((rank, send.peer), []).append((send.blocks, send.partial, values))
            members[rank].sent_messages += 1
            members[rank].sent_blocks += len(send.blocks)
    for rank, program in enumerate(programs):
        received: dict[int, list[object]] = {}
        step = program.steps[at]
        for receive in step.receives:
            blocks, partial, values = letters[receive.peer, rank].pop(0)
            assert len(blocks) == len(receive.blocks)
            assert partial == receive.partial
            received[receive.peer] = values
            if not step.combine:
                assert not set(receive.blocks) & members[rank].finished
                members[rank].blocks.update(zip(receive.blocks, values, strict=True))
                if not partial:
                    members[rank].finished |= {b for b, v in zip(blocks, values, strict=True) if v[0] == "sum"}  # type: ignore[index]
        if step.combine:
            targets = {receive.blocks for receive in step.receives}
            assert len(targets) == 1
            for index, block in enumerate(targets.pop()):
                parts = {peer: values[index] for peer, values in received.items()}
                parts[rank] = members[rank].blocks[block]
                assert set(parts) == set(step.combine)
                assert len(parts) == len(step.combine)
                members[rank].blocks[block] = ("sum", tuple(parts[position] for position in step.combine))
    assert not any(letters.values()), "every message is received in its step"


def play(operation: str, name: str, size: int, root: int = 0) -> list[Member]:
    programs = [ALGORITHMS[operation][name](size, rank, root) for rank in range(size)]
    everything, nothing = set(range(programs[0].num_blocks)), set[int]()
    held = {
        "all_gather": [{rank} for rank in range(size)],
        "gather": [{rank} for rank in range(size)],
        "broadcast": [everything if rank == root else nothing for rank in range(size)],
        "scatter": [everything if rank == root else nothing for rank in range(size)],
        "all_to_all": [set(range(size)) for _ in range(size)],
    }.get(operation, [everything] * size)
    return run(programs, held)


@pytest.mark.parametrize(("operation", "name"), CASES)
@pytest.mark.parametrize("size", SIZES)
def test_an_algorithm_gives_each_member_what_its_operation_promises(operation: str, name: str, size: int) -> None:
    for root in {0, size // 2, size - 1}:
        members = play(operation, name, size, root)
        for rank, member in enumerate(members):
            num_blocks = ALGORITHMS[operation][name](size, rank, root).num_blocks
            match operation:
                case "all_reduce":
                    wanted, summed = range(num_blocks), True
                case "reduce_scatter":
                    wanted, summed = range(rank, rank + 1), True
                case "reduce":
                    wanted, summed = range(num_blocks if rank == root else 0), True
                case "all_gather":
                    assert [member.blocks[b] for b in range(size)] == [("from", b, b) for b in range(size)]
                    continue
                case "broadcast":
                    assert member.blocks[0] == ("from", root, 0)
                    continue
                case "gather":
                    assert rank != root or [member.blocks[b] for b in range(size)] == [
                        ("from", b, b) for b in range(size)
                    ]
                    continue
                case "scatter":
                    assert member.blocks[rank] == ("from", root, rank)
                    continue
                case "all_to_all":
                    others = [peer for peer in range(size) if peer != rank]
                    assert [member.blocks[size + peer] for peer in others] == [("from", peer, rank) for peer in others]
                    continue
                case _:
                    continue
            for block in wanted:
                assert sorted(members_of(member.blocks[block])) == list(range(size)), "each contributes once"
                assert (
                    member.blocks[block]
                    == members[root if operation == "reduce" else 0].blocks.get(block, member.blocks[block])
                    or operation == "reduce_scatter"
                ), "the same order of summation on every member"
            assert not summed or size == 1 or operation == "all_reduce" or set(wanted) <= member.finished


@pytest.mark.parametrize("size", [2, 4, 8])
def test_an_algorithm_costs_what_its_docstring_says(size: int) -> None:
    def most(operation: str, name: str) -> tuple[int, float]:
        members = play(operation, name, size)
        num_blocks = ALGORITHMS[operation][name](size, 0, 0).num_blocks
        return max(m.sent_messages for m in members), max(m.sent_blocks for m in members) / num_blocks

    rounds = size.bit_length() - 1
    assert most("all_reduce", "ring") == (2 * (size - 1), 2 * (size - 1) / size)
    assert most("all_reduce", "direct") == (2 * (size - 1), 2 * (size - 1) / size)
    assert most("all_reduce", "halving") == (2 * rounds, 2 * (size - 1) / size)
    assert most("all_reduce", "doubling") == (rounds, rounds)
    assert most("all_reduce", "exchange") == (size - 1, size - 1)
    assert most("reduce_scatter", "halving") == (rounds, (size - 1) / size)
    assert most("all_gather", "doubling") == (rounds, (size - 1) / size)
    assert most("broadcast", "chain") == (1, 1)
    assert most("broadcast", "tree") == (rounds, rounds)
    assert most("barrier", "dissemination")[0] == rounds


@pytest.mark.parametrize("name", ["exchange", "direct"])
def test_direct_algorithms_sum_in_the_order_of_positions(name: str) -> None:
    for member in play("all_reduce", name, 5):
        assert all(members_of(value) == [0, 1, 2, 3, 4] for value in member.blocks.values())
