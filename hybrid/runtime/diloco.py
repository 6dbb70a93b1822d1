"""DiLoCo: replicas train by themselves and meet every so many steps, to average where they have got to.

Between two meetings each replica runs its own AdamW on its own samples and sends nothing. At a meeting the replicas'
way since the last one, the *outer gradient*, is averaged, and an outer Nesterov step moves the common weights. What
decides which layers meet when is `scheduler/fragments.py`; what travels is a codec's bytes. Knows tensors, a group and
a codec; knows nothing of pipelines, plans or wires.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid.collectives.base import Group, Work
from hybrid.collectives.error_feedback import ErrorFeedback
from hybrid.errors import TrainingDiverged
from hybrid.scheduler.fragments import OuterSchedule

OUTER_STATE_NAMES = ("outer", "outer_momentum")
"""What is kept for each parameter, by the names that checkpoints use."""


_ALIGNMENT_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class OuterRule:
    """The outer step.

    Source:
        Douillard et al. 2023, "DiLoCo": Nesterov, learning rate 0.7 (and momentum 0.9, over many more meetings).
    """

    learning_rate: float = 0.7
    momentum: float = 0.5
    mixing: float = 0.5
    """Where inner steps went on meanwhile: the share of the replica's own weights in what it goes on with."""


_AVERAGE = OuterRule(learning_rate=1.0, momentum=0.0)
"""The rule of the warm-up: go on from the mean of where the replicas are."""


@dataclass(slots=True)
class _Meeting:
    """One fragment's outer step under way."""

    work: Work
    messages: list[Tensor]


class Fragments:
    """The outer step of one rank's layers, fragment by fragment.

    Args:
        parameters_of_layer: this rank's layers; local weights by global name, contiguous, on the host or a device.
        schedule: which layers meet when.
        groups: by layer, the ranks of all replicas that hold it, this one among them.
        shares: each replica's share of a step's samples, by position in the groups; they sum to 1.
        feedback: encodes each parameter by itself, so that two tied ones that are equal stay equal, wherever they lie
            in a message.

    Numerics:
        Outer gradients, their mean and the outer weights are float32; messages are decoded and added in the order of
        positions, one's own as everyone else's, so that every replica gets the same outer weights bit for bit.

    Cost:
        A meeting of M replicas sends (M - 1) times the encoded bytes of the rank's part of the fragment.
    """

    def __init__(
        self,
        parameters_of_layer: Mapping[int, Mapping[str, Tensor]],
        schedule: OuterSchedule,
        groups: Mapping[int, Group],
        shares: Sequence[float],
        feedback: ErrorFeedback,
        rule: OuterRule,
    ) -> None:
        self._schedule, self._rule, self._shares = schedule, rule, tuple(shares)
        self._parts = [
            part
            for index, fragment in enumerate(schedule.fragments)
            for part in _parts_of(index, fragment.layers, parameters_of_layer, groups, feedback)
        ]
        self._under_way: dict[int, _Meeting] = {}
        self.sent_bytes = 0
        """What this rank has sent so far."""

    def after_step(self, steps_done: int) -> None:
        """Take in what ends now and start what leaves now; call it after every inner step, on every replica.

        Raises:
            CommTimeout, PeerLost: another replica was silent or has gone.
            TrainingDiverged: an outer gradient is not finite; the common weights stay as they were.
        """
        if self._schedule.is_warming_up(steps_done):
            self._meet(tuple(range(len(self._schedule.fragments))), _AVERAGE)
            return
        ends = self._schedule.ends_after(steps_done)
        # An overlap of 0 ends what starts now; else what started earlier makes room before the next leaves.
        if self._schedule.overlap_steps:
            self._finish(ends, self._rule.mixing)
        self._start(self._schedule.starts_after(steps_done))
        if not self._schedule.overlap_steps:
            self._finish(ends, 0.0)

    def meet_now(self) -> None:
        """Have all layers meet, and go on from the mean of the replicas: before an evaluation or a checkpoint.

        Every replica calls it after the same step. Directly after a meeting of all it changes nothing.
        """
        everything = tuple(range(len(self._schedule.fragments)))
        self._finish(everything, self._rule.mixing)
        self._meet(everything, _AVERAGE)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return, by parameter name, `OUTER_STATE_NAMES`, as copies on the host in the parameter's shape."""
        return {
            name: {"outer": outer.clone(), "outer_momentum": momentum.clone()}
            for part in self._parts
            for name, outer, momentum in part.named_state()
        }

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Set the outer weights and momentum of every parameter; the local weights stay."""
        for part in self._parts:
            for name, outer, momentum in part.named_state():
                outer.copy_(state[name]["outer"])
                momentum.copy_(state[name]["outer_momentum"])

    def _meet(self, fragments: Sequence[int], rule: OuterRule) -> None:
        self._start(fragments)
        self._finish(fragments, 0.0, rule)

    @torch.no_grad()
    def _start(self, fragments: Sequence[int]) -> None:
        for key, part in enumerate(self._parts):
            if part.fragment in fragments:
                assert key not in self._under_way, "a fragment leaves before it has come back"
                size_bytes, group = part.message_bytes, part.group
                messages = [torch.empty(size_bytes, dtype=torch.uint8) for _ in range(group.size)]
                part.encode(messages[group.rank])
                work = group.all_gather(messages, messages[group.rank])
                self.sent_bytes += (group.size - 1) * size_bytes
                self._under_way[key] = _Meeting(work, messages)

    @torch.no_grad()
    def _finish(self, fragments: Sequence[int], mixing: float, rule: OuterRule | None = None) -> None:
        for key, part in enumerate(self._parts):
            if part.fragment in fragments and key in self._under_way:
                meeting = self._under_way.pop(key)
                meeting.work.wait()
                mean = torch.zeros_like(part.outer)
                way = torch.empty_like(part.outer)
                for share, message in zip(self._shares, meeting.messages, strict=True):
                    part.decode(message, way)
                    mean.add_(way, alpha=share)
                if not bool(mean.isfinite().all()):
                    raise TrainingDiverged(
                        f"the outer gradient of {part.first_name} and what travels with it is not finite",
                        fix="lower optimizer.learning_rate or diloco.learning_rate",
                    )
                part.step(mean, rule or self._rule)
                part.go_on(mixing)


class _Part:
    """The layers of one fragment that this rank shares with one group, as one flat buffer."""

    def __init__(self, fragment: int, parameters: Mapping[str, Tensor], group: Group, feedback: ErrorFeedback) -> None:
        self.fragment, self.group = fragment, group
        self._parameters = dict(parameters)
        self._feedback, self._codec = feedback, feedback.codec
        self.first_name = next(iter(self._parameters))
        self._sizes = [parameter.numel() for parameter in self._parameters.values()]
        self._message_sizes = [
            -(-self._codec.encoded_bytes(size) // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES for size in self._sizes
        ]
        self.message_bytes = sum(self._message_sizes)
        self.outer = self._local()
        self._momentum = torch.zeros_like(self.outer)

    def encode(self, into: Tensor) -> None:
        """Write the message: how far this replica has gone from the common weights, as a gradient, the way back."""
        gradient = self.outer - self._local()
        for name, data, x in self._pieces(into, gradient):
            self._feedback.encode(name, x, data)

    def decode(self, message: Tensor, into: Tensor) -> None:
        """Write what a replica's message says."""
        for _, data, x in self._pieces(message, into):
            self._codec.decode(data, x)

    def _pieces(self, message: Tensor, flat: Tensor) -> list[tuple[str, Tensor, Tensor]]:
        datas = torch.split(message, self._message_sizes)
        return [
            (name, data[: self._codec.encoded_bytes(x.numel())], x)
            for name, data, x in zip(self._parameters, datas, torch.split(flat, self._sizes), strict=True)
        ]

    def _local(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1).to("cpu", torch.float32) for p in self._parameters.values()])

    def step(self, gradient: Tensor, rule: OuterRule) -> None:
        """Move the common weights by Nesterov's rule; without momentum straight, and what there is of it stays."""
        if not rule.momentum:
            self.outer.add_(gradient, alpha=-rule.learning_rate)
            return
        self._momentum.mul_(rule.momentum).add_(gradient)
        self.outer.add_(gradient.add(self._momentum, alpha=rule.momentum), alpha=-rule.learning_rate)

    def go_on(self, mixing: float) -> None:
        """Set the local weights to the common ones, with `mixing` of their own."""
        for parameter, common in zip(self._parameters.values(), self._cut(self.outer), strict=True):
            there = common.to(parameter.device, parameter.dtype)
            if mixing:
                parameter.detach().mul_(mixing).add_(there, alpha=1.0 - mixing)
            else:
                parameter.detach().copy_(there)

    def named_state(self) -> list[tuple[str, Tensor, Tensor]]:
        """Return (name, outer weights, momentum) of every parameter, as views in its shape."""
        return list(zip(self._parameters, self._cut(self.outer), self._cut(self._momentum), strict=True))

    def _cut(self, flat: Tensor) -> list[Tensor]:
        return [
            piece.view(parameter.shape)
            for piece, parameter in zip(torch.split(flat, self._sizes), self._parameters.values(), strict=True)
        ]


def _parts_of(
    fragment: int,
    layers: Sequence[int],
    parameters_of_layer: Mapping[int, Mapping[str, Tensor]],
    groups: Mapping[int, Group],
    feedback: ErrorFeedback,
) -> list[_Part]:
    """Return a part for every group that shares layers of the fragment with this rank, in the order of the layers."""
    parameters_of_group: dict[int, dict[str, Tensor]] = {}
    group_of_key: dict[int, Group] = {}
    for layer in layers:
        if layer in parameters_of_layer:
            group = groups[layer]
            group_of_key[id(group)] = group
            parameters_of_group.setdefault(id(group), {}).update(parameters_of_layer[layer])
    return [_Part(fragment, found, group_of_key[key], feedback) for key, found in parameters_of_group.items()]
