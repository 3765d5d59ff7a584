"""What a cluster has, and what its autoscaler may add: work that can never be placed is refused, not waited for.

Ray itself waits for ever. Its autoscaler does know what it cannot bring, but says so in a log that nobody reads.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from segray.errors import ClusterError

# `ray up` leaves its configuration there, on the head, where the drivers of submitted jobs run
LAUNCH_CONFIG = Path("~/ray_bootstrap_config.yaml")
HEAD_RESOURCE = "node:__internal_head__"
_NODE_TYPE_LABEL = "ray.io/node-group"
_SHOWN = ("CPU", "GPU")
_EPSILON = 1e-9


@dataclass(frozen=True)
class NodeType:
    """Nodes that may be added: how many, and what each of them would have."""

    name: str
    resources: Mapping[str, float]
    num_more: int


@dataclass(frozen=True)
class Capacity:
    """A cluster as it is, and as it may become.

    Args:
        nodes: Resources of every living node.
        types: What may be added.
        num_more: Most nodes that may be added, whatever their type.
        is_open: Nodes may be added of which only the autoscaler knows what they have.
    """

    nodes: tuple[Mapping[str, float], ...]
    types: tuple[NodeType, ...] = ()
    num_more: int = 0
    is_open: bool = False

    def count(self, each: Mapping[str, float], *, with_more: bool = True) -> float:
        """Return how many pieces of work that need so much each can run at a time, with nothing else on the cluster.

        Infinity where nobody knows what may be added.
        """
        if with_more and self.is_open:
            return math.inf
        return sum(_count_on(node, each) for node in [*self.nodes, *(self._choose_more(each) if with_more else ())])

    def count_nodes(self, each: Mapping[str, float]) -> int:
        """Return how many of the living nodes have room for such a piece of work."""
        return sum(_count_on(node, each) > 0 for node in self.nodes)

    def count_most_on_one(self, each: Mapping[str, float]) -> float:
        """Return how many such pieces of work the node can hold that holds most of them; infinity if nobody knows."""
        if self.is_open:
            return math.inf
        return max((_count_on(node, each) for node in [*self.nodes, *self._choose_more(each)]), default=0)

    def _choose_more(self, each: Mapping[str, float]) -> list[Mapping[str, float]]:
        """Return the nodes that would be added for such work: of the types that hold most of it."""
        ranked = sorted(self.types, key=lambda node_type: -_count_on(node_type.resources, each))
        return [node_type.resources for node_type in ranked for _ in range(node_type.num_more)][: self.num_more]

    def describe(self) -> str:
        """Return in words what there is."""
        total = {name: sum(node.get(name, 0) for node in self.nodes) for name in _SHOWN}
        text = f"the cluster has {_format(total)} on {len(self.nodes)} node{'s' if len(self.nodes) != 1 else ''}"
        if self.is_open:
            return f"{text}, and only its autoscaler knows what it may add"
        if not self.types:
            return f"{text}, and may add none"
        kinds = ", ".join(f"{kind.num_more} {kind.name} ({_format(kind.resources)})" for kind in self.types)
        limit = f"{self.num_more} out of " if self.num_more < sum(kind.num_more for kind in self.types) else ""
        return f"{text}, and may add {limit}{kinds}"


def require_placeable(capacity: Capacity, what: str, each: Mapping[str, float], count: int, setting: str) -> None:
    """Refuse work of which some can never be placed.

    Args:
        capacity: Of the cluster.
        what: The work, in the singular.
        each: Resources that one piece of it needs.
        count: How many must run at a time.
        setting: What asks for it, for the message.

    Raises:
        ClusterError: Names the resources asked for and what there is.
    """
    num_fitting = capacity.count(each)
    if num_fitting < count:
        raise ClusterError(
            f"{setting}: {describe_work(count, what, each)} asked for, and {num_fitting:g} can ever be placed: "
            f"{capacity.describe()}; ask for less, or let the cluster have more"
        )


def describe_work(count: int, what: str, each: Mapping[str, float]) -> str:
    """Return in words how much of a cluster something needs; ``what`` is in the singular."""
    ending = "" if count == 1 else "es" if what.endswith("s") else "s"
    return f"{count} {what}{ending} of {' and '.join(f'{amount:g} {name}' for name, amount in each.items())} each"


def describe_wait(capacity: Capacity, what: str, each: Mapping[str, float], count: int) -> str | None:
    """Return in words what work will wait for, or None where the nodes of the moment have room for it."""
    if capacity.count(each, with_more=False) >= count:
        return None
    return f"waiting for room for {describe_work(count, what, each)}: {capacity.describe()}"


def read_capacity(nodes: Iterable[Mapping[str, Any]], *, is_head: bool, is_open: bool) -> Capacity:
    """Return the capacity of a cluster.

    What may be added is what the configuration of ``ray up`` says, which lies on the head.

    Args:
        nodes: As ``ray.nodes()`` gives them.
        is_head: This machine is the head of a cluster that was launched.
        is_open: Where there is no such configuration, whether there may be more nodes all the same.
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
        if not node_type.get("resources"):  # machines of one's own, of which `ray up` knows nothing
            return Capacity(resources, is_open=True)
        # not every provider knows how much memory its machines have
        types.append(NodeType(name, {"memory": math.inf, **node_type["resources"]}, num_more_of_it))
    return Capacity(resources, tuple(types), num_more)


def _count_on(node: Mapping[str, float], each: Mapping[str, float]) -> float:
    """Return how many pieces of work fit on a node; a part of a GPU is never made of two."""
    return min((_count_in(node.get(name, 0), amount) for name, amount in each.items() if amount), default=math.inf)


def _count_in(amount: float, each: float) -> float:
    if math.isinf(amount):
        return math.inf
    if each < 1:
        return int(amount + _EPSILON) * int(1 / each + _EPSILON)
    return int(amount / each + _EPSILON)


def _format(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{resources.get(name, 0):g} {name}" for name in _SHOWN)
