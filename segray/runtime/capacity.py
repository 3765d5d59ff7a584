"""Compute what a cluster has and what its autoscaler may add, so that impossible requests fail immediately.

Ray itself waits for them forever. Its autoscaler reports what it cannot add, but only in a log on the head.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from segray.errors import ClusterError

# `ray up` writes its configuration to this file on the head, where the drivers of submitted jobs run.
LAUNCH_CONFIG = Path("~/ray_bootstrap_config.yaml")
HEAD_RESOURCE = "node:__internal_head__"
_NODE_TYPE_LABEL = "ray.io/node-group"
_SHOWN = ("CPU", "GPU")
_EPSILON = 1e-9


@dataclass(frozen=True)
class NodeType:
    """A type of node that may be added: resources of one node, and how many more nodes there may be."""

    name: str
    resources: Mapping[str, float]
    num_more: int


@dataclass(frozen=True)
class Capacity:
    """The nodes of a cluster, and the nodes that may be added.

    Attributes:
        nodes: Resources of every living node.
        types: Types of nodes that may be added.
        num_more: Maximum number of nodes that may be added, over all types.
        is_open: Whether nodes with unknown resources may be added.
    """

    nodes: tuple[Mapping[str, float], ...]
    types: tuple[NodeType, ...] = ()
    num_more: int = 0
    is_open: bool = False

    def count(self, each: Mapping[str, float], *, with_more: bool = True) -> float:
        """Return how many tasks can run at a time on the otherwise idle cluster.

        Args:
            each: Resources that one task needs.
            with_more: Also count the nodes that may be added; infinity if these are unknown.
        """
        if with_more and self.is_open:
            return math.inf
        return sum(_count_on(node, each) for node in [*self.nodes, *(self._choose_more(each) if with_more else ())])

    def count_nodes(self, each: Mapping[str, float]) -> int:
        """Return how many living nodes have enough resources for a task that needs ``each``."""
        return sum(_count_on(node, each) > 0 for node in self.nodes)

    def _choose_more(self, each: Mapping[str, float]) -> list[Mapping[str, float]]:
        """Return the nodes that would be added for such tasks, starting with the type that holds the most."""
        ranked = sorted(self.types, key=lambda node_type: -_count_on(node_type.resources, each))
        return [node_type.resources for node_type in ranked for _ in range(node_type.num_more)][: self.num_more]

    def describe(self) -> str:
        """Return a description for messages: total resources, number of nodes, and what may be added."""
        total = {name: sum(node.get(name, 0) for node in self.nodes) for name in _SHOWN}
        text = f"the cluster has {_format(total)} on {len(self.nodes)} node{'s' if len(self.nodes) != 1 else ''}"
        if self.is_open:
            return f"{text}, and only its autoscaler knows which nodes it may add"
        if not self.types:
            return f"{text} and may add no nodes"
        kinds = ", ".join(f"{kind.num_more} {kind.name} ({_format(kind.resources)})" for kind in self.types)
        limit = f"{self.num_more} of: " if self.num_more < sum(kind.num_more for kind in self.types) else ""
        return f"{text} and may add {limit}{kinds}"


def require_placeable(capacity: Capacity, what: str, each: Mapping[str, float], count: int, setting: str) -> None:
    """Check that the cluster can run ``count`` tasks at a time, now or after it has grown.

    Args:
        capacity: The cluster's capacity.
        what: Name of the task, in the singular.
        each: Resources that one task needs.
        count: Number of tasks that must run at a time.
        setting: The setting that requests them, for the message.

    Raises:
        ClusterError: The cluster cannot; the message names the requested and the available resources.
    """
    num_fitting = capacity.count(each)
    if num_fitting < count:
        raise ClusterError(
            f"{setting}: requested {describe_work(count, what, each)}, but at most {num_fitting:g} can be placed: "
            f"{capacity.describe()}; request less, or allow the cluster more nodes"
        )


def describe_work(count: int, what: str, each: Mapping[str, float]) -> str:
    """Return a phrase such as "4 workers with 1 CPU and 1 GPU each"; ``what`` is in the singular."""
    ending = "" if count == 1 else "es" if what.endswith("s") else "s"
    resources = " and ".join(f"{amount:g} {name}" for name, amount in each.items())
    return f"{count} {what}{ending} with {resources}{' each' if count != 1 else ''}"


def describe_wait(capacity: Capacity, what: str, each: Mapping[str, float], count: int) -> str | None:
    """Return a message that tasks wait for nodes to be added, or None if the living nodes suffice."""
    if capacity.count(each, with_more=False) >= count:
        return None
    return f"waiting for nodes for {describe_work(count, what, each)}: {capacity.describe()}"


def read_capacity(nodes: Iterable[Mapping[str, Any]], *, is_head: bool, is_open: bool) -> Capacity:
    """Return the capacity of a cluster.

    The nodes that may be added are read from the configuration that ``ray up`` writes on the head.

    Args:
        nodes: The output of ``ray.nodes()``.
        is_head: Whether this machine is the head of a launched cluster.
        is_open: Whether nodes may be added although there is no such configuration.
    """
    alive = [node for node in nodes if node["Alive"]]
    resources = tuple(node["Resources"] for node in alive)
    path = LAUNCH_CONFIG.expanduser()
    if not is_head or not path.exists():
        return Capacity(resources, is_open=is_open)
    config = yaml.safe_load(path.read_text())
    workers = [node for node in alive if HEAD_RESOURCE not in node["Resources"]]
    num_more = max(0, config["max_workers"] - len(workers))
    types = []
    for name, node_type in config["available_node_types"].items():
        num_alive = sum(node.get("Labels", {}).get(_NODE_TYPE_LABEL) == name for node in workers)
        num_more_of_it = min(num_more, node_type.get("max_workers", 0) - num_alive)
        if num_more_of_it <= 0:
            continue
        if not node_type.get("resources"):  # On-premises machines, whose resources are not in the configuration.
            return Capacity(resources, is_open=True)
        # Not every provider reports the memory of its machines.
        types.append(NodeType(name, {"memory": math.inf, **node_type["resources"]}, num_more_of_it))
    return Capacity(resources, tuple(types), num_more)


def _count_on(node: Mapping[str, float], each: Mapping[str, float]) -> float:
    """Return how many tasks fit on a node; a fraction of a GPU is never split over two GPUs."""
    return min((_count_in(node.get(name, 0), amount) for name, amount in each.items() if amount), default=math.inf)


def _count_in(amount: float, each: float) -> float:
    if math.isinf(amount):
        return math.inf
    if each < 1:
        return int(amount + _EPSILON) * int(1 / each + _EPSILON)
    return int(amount / each + _EPSILON)


def _format(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{resources.get(name, 0):g} {name}" for name in _SHOWN)
