"""Run a Ray cluster of a head and more nodes on this machine until standard input is closed.

It is a separate process because Ray reads its settings only once: ``python -m tests.faults.cluster_host NUM_NODES``. It
prints one line of JSON: the cluster's address, the folder of its logs, and the process ids of the head's servers and of
each other node's raylet.
"""

import json
import sys

from ray.cluster_utils import Cluster

_OBJECT_STORE_BYTES = 150 * 2**20


def main() -> None:
    num_nodes = int(sys.argv[1])
    # With fewer CPUs, the stages of a segmentation may wait for each other; each more costs every run a process.
    num_head_cpus = 3 if num_nodes else 4
    options = {"node_ip_address": "127.0.0.1", "object_store_memory": _OBJECT_STORE_BYTES}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": num_head_cpus, "include_dashboard": False, **options},
    )
    nodes = [cluster.add_node(num_cpus=1, **options) for _ in range(num_nodes)]
    cluster.wait_for_nodes()
    head = cluster.head_node.all_processes
    print(
        json.dumps(
            {
                "address": cluster.address,
                "head": [process.process.pid for kind in ("gcs_server", "raylet") for process in head[kind]],
                "session": cluster.head_node.get_session_dir_path(),
                "raylets": [node.all_processes["raylet"][0].process.pid for node in nodes],
            }
        ),
        flush=True,
    )
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main()
