"""RayPlacement: one actor for each device rank, in a placement group. The only file that imports ray.

Ray places, starts and watches the workers; no tensor and no step goes through it. A local Ray is started here and
ended here; a Ray at an address is joined and left as it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, final

from hybrid.errors import FleetError, MachineError
from hybrid.hardware.bundles import bundles_of_ranks
from hybrid.hardware.discovery import NodeFacts, devices_seen
from hybrid.hardware.fleet import Island
from hybrid.hardware.neuron_environment import GrantedCores
from hybrid.runtime.device_environment import apply_before_torch, environment_of_ranks
from hybrid.runtime.placement import OnGone, Placement, WorkerSpec

_CLOSE_TIMEOUT_S = 10.0
_LOOK_TIMEOUT_S = 60.0


@final
class RayPlacement(Placement):
    """Workers as Ray actors.

    Args:
        islands: each rank's island, in rank order.
        address: a running Ray (`ray://…` clients are refused: the driver must be on the cluster); None starts one here.
        timeout_s: the longest wait for the cluster and for the placement group.
    """

    def __init__(
        self,
        islands: Sequence[Island],
        *,
        address: str | None,
        timeout_s: float,
        job_name: str,
    ) -> None:
        self._islands = tuple(islands)
        self._bundles = bundles_of_ranks(islands)
        self._address, self._timeout_s = address, timeout_s
        self._job_name = job_name
        self._actors: list[Any] = []
        self._group: Any = None
        self._opened = False
        self._closing = threading.Event()
        self.owns_process = True
        # A local Ray is on this machine alone: nothing need be reachable from outside it.
        self.host = "127.0.0.1"
        self.worker_host = "127.0.0.1" if address is None else ""

    def open(self) -> None:
        import ray

        if self._address is None:
            self._start_local(ray)
        else:
            join_cluster(self._address, self._timeout_s)
            self.host = ray.util.get_node_ip_address()
        self._opened = True
        offered = ray.cluster_resources()
        self._bundles = bundles_of_ranks(self._islands, offered)
        self._check_resources(offered)

    def launch(self, specs: Sequence[WorkerSpec], on_gone: OnGone) -> None:
        import ray
        from ray.exceptions import GetTimeoutError
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        self._group = placement_group([dict(bundle) for bundle in self._bundles.resources], strategy="PACK")
        try:
            ray.get(self._group.ready(), timeout=self._timeout_s)
        except GetTimeoutError:
            raise MachineError(
                f"the cluster did not free the devices within {self._timeout_s:.0f} s",
                value=_total(self._bundles.resources),
                fix="end the job that holds them, or raise runtime.placement_timeout_s",
            ) from None
        actor_class: Any = ray.remote(_WorkerActor)
        for spec in specs:
            share = dict(self._bundles.share_of_rank[spec.rank])
            actor = actor_class.options(
                num_cpus=share.pop("CPU", 0),
                num_gpus=share.pop("GPU", 0),
                resources=share,
                max_restarts=0,
                name=f"{self._job_name}-{id(self):x}-rank-{spec.rank}",
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement_group=self._group,
                    placement_group_bundle_index=self._bundles.bundle_of_rank[spec.rank],
                ),
            ).remote()
            self._actors.append(actor)
        variables = environment_of_ranks(specs, self._granted(specs))
        refs = {
            actor.run.remote(spec, variables.get(spec.rank, {})): spec.rank
            for actor, spec in zip(self._actors, specs, strict=True)
        }
        watcher = threading.Thread(target=self._watch, args=(refs, on_gone), name="ray-watch", daemon=True)
        watcher.start()

    def close(self) -> None:
        if not self._opened or self._closing.is_set():
            return
        import ray

        self._closing.set()
        for actor in self._actors:
            with contextlib.suppress(Exception):
                ray.kill(actor)
        if self._group is not None and self._address is not None:
            from ray.util.placement_group import remove_placement_group

            with contextlib.suppress(Exception):
                remove_placement_group(self._group)
        ray.shutdown()

    def _granted(self, specs: Sequence[WorkerSpec]) -> list[GrantedCores]:
        """Return which cores Ray gave each rank that drives some."""
        import ray
        from ray.exceptions import GetTimeoutError

        asked = {
            spec.rank: self._actors[place].granted.remote()
            for place, spec in enumerate(specs)
            if spec.plan.stages_of_rank(spec.rank)[0].backend == "neuron"
        }
        try:
            answers = ray.get(list(asked.values()), timeout=self._timeout_s)
        except GetTimeoutError:
            raise MachineError(
                f"the workers on NeuronCores did not start within {self._timeout_s:.0f} s",
                fix="see Ray's log on their nodes, or raise runtime.placement_timeout_s",
            ) from None
        return [
            GrantedCores(rank=rank, island=self._islands[rank].name, node=node, cores=tuple(cores), free_port=port)
            for rank, (node, cores, port) in zip(asked, answers, strict=True)
        ]

    def _start_local(self, ray: Any) -> None:
        total = _total(self._bundles.resources)
        num_cpus = max(1, int(total.pop("CPU", 0)))
        num_gpus = int(total.pop("GPU", 0))
        try:
            ray.init(
                address="local",
                num_cpus=num_cpus,
                num_gpus=num_gpus,
                resources=total,
                include_dashboard=False,
                log_to_driver=False,
                configure_logging=True,
                logging_level=logging.ERROR,
                object_store_memory=80 * 2**20,  # no tensor passes: Ray's minimum will do
            )
        except Exception as error:
            raise MachineError(f"a local Ray did not start: {_first_line(error)}", fix="see `hybrid doctor`") from error

    def _check_resources(self, have: Mapping[str, float]) -> None:
        for name, wanted in sorted(_total(self._bundles.resources).items()):
            if have.get(name, 0.0) < wanted:
                raise FleetError(
                    f"the cluster has {have.get(name, 0.0):g} {name}, the fleet needs {wanted:g}",
                    valid=", ".join(
                        f"{key} {value:g}" for key, value in sorted(have.items()) if ":" not in key and key != "memory"
                    ),
                    fix="shrink the fleet, add nodes, or declare the resource when starting Ray",
                )

    def _watch(self, refs: dict[Any, int], on_gone: OnGone) -> None:
        import ray

        waiting = list(refs)
        while waiting and not self._closing.is_set():
            try:
                done, waiting = ray.wait(waiting, num_returns=1, timeout=1.0)
            except Exception:
                return
            for ref in done:
                try:
                    ray.get(ref, timeout=5.0)
                    why = "it returned early"
                except Exception as error:
                    why = _first_line(error)
                if not self._closing.is_set():
                    on_gone(refs[ref], why)


class _WorkerActor:
    """The actor: its one long call runs the worker in the actor's main thread."""

    def granted(self) -> tuple[str, list[int], int]:
        """Return the node's address, the NeuronCores that Ray gave this actor, and a port that is free here."""
        import ray

        cores = ray.get_runtime_context().get_accelerator_ids().get("neuron_cores", [])
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        return ray.util.get_node_ip_address(), sorted(map(int, cores)), port

    def run(self, spec: WorkerSpec, variables: Mapping[str, str]) -> None:
        import dataclasses

        apply_before_torch(variables)
        from hybrid.runtime.worker import run_worker

        if not spec.host:
            import ray

            spec = dataclasses.replace(spec, host=ray.util.get_node_ip_address())
        run_worker(spec)


def join_cluster(address: str, timeout_s: float) -> None:
    """Connect to a running Ray.

    Raises:
        MachineError: nothing answers there.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address != "auto":
        try:
            socket.create_connection((host, int(port)), timeout=min(5.0, timeout_s)).close()
        except (OSError, ValueError) as error:
            raise MachineError(
                f"no Ray answers there: {error}",
                value=address,
                fix="give HOST:PORT of the cluster's head, or leave --address out",
            ) from None
    import ray

    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:
        raise MachineError(
            f"no Ray answers there: {_first_line(error)}",
            value=address,
            fix="check the address and the version of Ray",
        ) from None


def nodes_of_cluster() -> list[NodeFacts]:
    """Return the facts of every living node of the joined cluster.

    Raises:
        MachineError: a node that offers accelerators did not say in time which it has.
    """
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    seen = _devices_of_nodes([node["NodeID"] for node in alive if node["Resources"].keys() & {"GPU", "neuron_cores"}])
    return [
        NodeFacts(
            node_id=node["NodeID"],
            address=node["NodeManagerAddress"],
            resources=dict(node["Resources"]),
            labels=dict(node.get("Labels", {})),
            seen=seen.get(node["NodeID"], frozenset()),
        )
        for node in alive
    ]


def _devices_of_nodes(node_ids: Sequence[str]) -> dict[str, frozenset[str]]:
    """Return the accelerators whose device files are on each node: what is declared need not be there."""
    import ray
    from ray.exceptions import GetTimeoutError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look: Any = ray.remote(devices_seen)
    asked = {
        node_id: look.options(
            num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node_id, soft=False)
        ).remote()
        for node_id in node_ids
    }
    try:
        return dict(zip(asked, ray.get(list(asked.values()), timeout=_LOOK_TIMEOUT_S), strict=True))
    except GetTimeoutError:
        raise MachineError(
            f"not every node with accelerators answered within {_LOOK_TIMEOUT_S:.0f} s",
            value=", ".join(node_id[:12] for node_id in asked),
            fix="see whether the same release of hybrid is installed on every node, and Ray's log there",
        ) from None


def follow_job(address: str, *, entrypoint: str, working_dir: Path, write: Callable[[str], None]) -> int:
    """Run `entrypoint` by Ray Jobs, hand its log to `write` as it grows, and return its exit code.

    The job is stopped when this call is interrupted.

    Raises:
        MachineError: no dashboard answers at the address.
    """
    from ray.job_submission import JobStatus, JobSubmissionClient

    try:
        client = JobSubmissionClient(address)
        job_id = client.submit_job(entrypoint=entrypoint, runtime_env={"working_dir": str(working_dir)})
    except Exception as error:
        if type(error).__name__ == "AuthenticationError":
            raise MachineError(
                f"the cluster wants a token: {_first_line(error)}",
                value=address,
                fix="set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to a file that holds the cluster's token",
            ) from None
        raise MachineError(
            f"no Ray dashboard answers there: {_first_line(error)}",
            value=address,
            valid="http://HOST:PORT of the cluster's dashboard, usually port 8265",
            fix="check the address; the cluster must run with its dashboard",
        ) from None

    async def follow() -> None:
        async for text in client.tail_job_logs(job_id):
            write(text)

    try:
        asyncio.run(follow())
        deadline_s = time.monotonic() + _CLOSE_TIMEOUT_S
        while not client.get_job_status(job_id).is_terminal() and time.monotonic() < deadline_s:
            time.sleep(0.2)
    except KeyboardInterrupt:
        client.stop_job(job_id)
        raise
    info = client.get_job_info(job_id)
    if info.status == JobStatus.SUCCEEDED:
        return 0
    return info.driver_exit_code or 1


def _total(bundles: Sequence[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for bundle in bundles:
        for name, amount in bundle.items():
            total[name] = total.get(name, 0.0) + amount
    return total


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
