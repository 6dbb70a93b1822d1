"""Formats: the JSON of profiles, links and pools; described field by field in docs/formats.md.

Pure: parsed JSON in and out, no file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from typing import Any

from hybrid.errors import PlanError
from hybrid.scheduler.search.links import LinkModel, Network
from hybrid.scheduler.search.problem import Pool
from hybrid.scheduler.search.table import Cell, ProfileTable, Sizes

VERSION = 1
_CELL = ("chip", "tensor_parallel", "microbatch", "forward_s", "update_s")
_SIZES = ("num_parameters", "saved_bytes", "output_bytes")


def write_profile(table: ProfileTable) -> dict[str, Any]:
    """Return a table as JSON data."""
    return {
        "format": "hybrid-profile",
        "version": VERSION,
        "model": table.model,
        "source": table.source,
        "note": table.note,
        "sequence_length": table.sequence_length,
        "precision": table.precision,
        "layers": list(table.layers),
        "sizes": [
            {"tensor_parallel": degree, **{name: list(getattr(sizes, name)) for name in _SIZES}}
            for degree, sizes in table.sizes.items()
        ],
        "cells": [
            {
                "chip": chip,
                "tensor_parallel": degree,
                "microbatch": microbatch,
                "forward_s": list(cell.forward_s),
                "input_gradient_s": list(cell.input_gradient_s),
                "weight_gradient_s": list(cell.weight_gradient_s),
                "update_s": cell.update_s,
            }
            for (chip, degree, microbatch), cell in table.cells.items()
        ],
    }


def read_profile(raw: Mapping[str, Any]) -> ProfileTable:
    """Return the table in JSON data.

    Raises:
        PlanError: another format or version, a key that is missing, a row a layer that is not there.
    """
    _check(raw, "hybrid-profile", ("model", "source", "sequence_length", "precision", "layers", "sizes", "cells"))
    cells = {}
    for index, cell in enumerate(raw["cells"]):
        where = f"cells[{index}]"
        _check_keys(cell, _CELL, where)
        cells[cell["chip"], cell["tensor_parallel"], cell["microbatch"]] = Cell(
            forward_s=tuple(cell["forward_s"]), update_s=cell["update_s"], **_backward(cell, where)
        )
    for index, row in enumerate(raw["sizes"]):
        _check_keys(row, ("tensor_parallel", *_SIZES), f"sizes[{index}]")
    return ProfileTable(
        model=raw["model"],
        source=raw["source"],
        note=raw.get("note", ""),
        sequence_length=raw["sequence_length"],
        precision=raw["precision"],
        layers=tuple(raw["layers"]),
        sizes={row["tensor_parallel"]: Sizes(**{name: tuple(row[name]) for name in _SIZES}) for row in raw["sizes"]},
        cells=cells,
    )


def _backward(cell: Mapping[str, Any], where: str) -> dict[str, tuple[float, ...]]:
    """Return both parts; a whole `backward_s` is halved."""
    if "backward_s" in cell:
        half = tuple(seconds / 2 for seconds in cell["backward_s"])
        return {"input_gradient_s": half, "weight_gradient_s": half}
    _check_keys(cell, ("input_gradient_s", "weight_gradient_s"), where)
    return {name: tuple(cell[name]) for name in ("input_gradient_s", "weight_gradient_s")}


def write_links(network: Network) -> dict[str, Any]:
    """Return a network as JSON data."""
    links = []
    for (a, lanes, b, other_lanes), link in network.links.items():
        plain = {name: value for name, value in asdict(link).items() if value not in (None, ())}
        links.append({"from": a, "from_lanes": lanes, "to": b, "to_lanes": other_lanes, **plain})
    egress = [{"from": a, "to": b, "usd_per_gb": usd} for (a, b), usd in network.usd_per_gb.items()]
    return {"format": "hybrid-links", "version": VERSION, "links": links, "egress": egress}


def read_links(raw: Mapping[str, Any]) -> Network:
    """Return the network in JSON data.

    Raises:
        PlanError: another format or version, or a key that is missing or unknown.
        FleetError: a link with no bandwidth or with two.
    """
    _check(raw, "hybrid-links", ("links",))
    known = {field.name for field in fields(LinkModel)}
    links = {}
    for index, row in enumerate(raw["links"]):
        where = f"links[{index}]"
        _check_keys(row, ("from", "to"), where)
        given = {key: value for key, value in row.items() if key not in ("from", "to", "from_lanes", "to_lanes")}
        unknown = sorted(set(given) - known)
        if unknown:
            raise PlanError("unknown keys of a link", value=unknown, valid=sorted(known), where=where)
        for name, convert in (("points", _pairs), ("polynomial", tuple)):
            if name in given:
                given[name] = convert(given[name])
        links[row["from"], row.get("from_lanes", 1), row["to"], row.get("to_lanes", 1)] = LinkModel(**given)
    egress = {(row["from"], row["to"]): row["usd_per_gb"] for row in raw.get("egress", ())}
    return Network(links=links, usd_per_gb=egress)


def _pairs(rows: Iterable[Iterable[float]]) -> tuple[tuple[float, ...], ...]:
    return tuple(sorted(tuple(row) for row in rows))


def write_pools(pools: Iterable[Pool]) -> dict[str, Any]:
    """Return pools as JSON data."""
    return {"format": "hybrid-pools", "version": VERSION, "pools": [asdict(pool) for pool in pools]}


def read_pools(raw: Mapping[str, Any]) -> tuple[Pool, ...]:
    """Return the pools in JSON data.

    Raises:
        PlanError: another format or version, or a key that is missing.
    """
    _check(raw, "hybrid-pools", ("pools",))
    for index, row in enumerate(raw["pools"]):
        _check_keys(row, ("name", "chip", "num_chips", "node_size", "memory_bytes"), f"pools[{index}]")
    return tuple(Pool(**row) for row in raw["pools"])


def _check(raw: Mapping[str, Any], name: str, keys: Iterable[str]) -> None:
    if raw.get("format") != name or raw.get("version") != VERSION:
        found = f"{raw.get('format')} version {raw.get('version')}"
        raise PlanError("not the format that is expected", value=found, valid=f"{name} version {VERSION}")
    _check_keys(raw, keys, name)


def _check_keys(raw: Mapping[str, Any], keys: Iterable[str], where: str) -> None:
    missing = [key for key in keys if key not in raw]
    if missing:
        raise PlanError("keys are missing", value=missing, valid=tuple(keys), where=where, fix="add them")
