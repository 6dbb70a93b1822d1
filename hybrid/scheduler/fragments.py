"""Fragments: which layers' outer steps fall on which inner steps, in low-communication training.

Pure: no torch, no clock, no network. `runtime/diloco.py` acts on what is decided here.
"""

from __future__ import annotations

from dataclasses import dataclass

from hybrid.errors import PlanError


@dataclass(frozen=True, slots=True, kw_only=True)
class Fragment:
    """Layers whose outer step happens together."""

    layers: tuple[int, ...]
    offset: int
    """Inner steps by which its outer steps come after those of the first fragment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OuterSchedule:
    """When each fragment leaves for its outer step and when the result is taken in.

    Args:
        every_steps: inner steps between two outer steps of one fragment.
        overlap_steps: inner steps that go on while a fragment is under way.
        warmup_steps: first inner steps, after each of which all fragments meet and are averaged.
    """

    fragments: tuple[Fragment, ...]
    every_steps: int
    overlap_steps: int
    warmup_steps: int = 0

    def is_warming_up(self, steps_done: int) -> bool:
        """Return whether the step that was done last belongs to the warm-up."""
        return 0 < steps_done <= self.warmup_steps

    def starts_after(self, steps_done: int) -> tuple[int, ...]:
        """Return the fragments, by index, that leave after so many inner steps."""
        return tuple(
            index
            for index, fragment in enumerate(self.fragments)
            if steps_done > self.warmup_steps
            and (steps_done - self.warmup_steps - fragment.offset) % self.every_steps == 0
        )

    def ends_after(self, steps_done: int) -> tuple[int, ...]:
        """Return the fragments whose outer step is taken in after so many inner steps."""
        return self.starts_after(steps_done - self.overlap_steps)


def build_outer_schedule(
    num_layers: int, *, every_steps: int, num_fragments: int, overlap_steps: int, tied: bool, warmup_steps: int = 0
) -> OuterSchedule:
    """Return a schedule in which fragment p holds layers p, p + P, p + 2P, … and leaves p/P of the period later.

    Neighbouring layers are in different fragments, so that every stage of a pipeline has something to send at every
    outer step and none has all of it at one.

    Args:
        warmup_steps: early on replicas' ways differ too much to be averaged seldom.
        tied: the last layer's weight is the first one's; the two then meet together and stay the same.

    Raises:
        PlanError: more fragments than layers or inner steps, or an overlap as long as the period.

    Source:
        Douillard et al. 2025, "Streaming DiLoCo with overlapping communication": strided fragments.
    """
    most = min(num_layers, every_steps)
    if not 1 <= num_fragments <= most:
        raise PlanError(
            "fragments must be no more than the layers and than the steps between two outer steps",
            value=num_fragments,
            valid=f"1 to {most}",
            where="diloco.num_fragments",
            fix="use fewer fragments or more steps",
        )
    if not 0 <= overlap_steps < every_steps:
        raise PlanError(
            "an outer step must end before the next one of its fragment starts",
            value=overlap_steps,
            valid=f"0 to {every_steps - 1}",
            where="diloco.overlap_steps",
            fix="shorten the overlap or lengthen every_steps",
        )
    home = [layer % num_fragments for layer in range(num_layers)]
    if tied:
        home[-1] = home[0]
    fragments = tuple(
        Fragment(
            layers=tuple(layer for layer in range(num_layers) if home[layer] == index),
            offset=index * every_steps // num_fragments,
        )
        for index in range(num_fragments)
    )
    return OuterSchedule(
        fragments=fragments, every_steps=every_steps, overlap_steps=overlap_steps, warmup_steps=warmup_steps
    )
