"""Exact attention on machines that are reached by SSH: a worker on each.

    pip install 'oocattn[remote]' asyncssh
    python examples/ssh_cluster.py s3://bucket/qkv.zarr s3://bucket/out.zarr --hosts node1 node2 node3

The scheduler runs on the first machine too. Each has the same Python with the same packages, at --python. Inputs, result and
job state are in an object store, or at paths that all machines share. For TLS, name certificates in Dask's configuration
(docs/clusters.md) with require-encryption: they are used here, and must be at the same paths on every machine.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import dask
from distributed import Client, SpecCluster, SSHCluster

import oocattn


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(description="Exact attention on machines that are reached by SSH.")
    parser.add_argument("inputs", help="path or URL of the dataset")
    parser.add_argument("result", help="path or URL of the result")
    parser.add_argument("--hosts", nargs="+", required=True, help="the machines")
    parser.add_argument("--python", default=sys.executable, help="Python on every machine (default: the path of this one)")
    parser.add_argument("--threads", type=int, default=4, help="threads of a worker, which mostly wait (default: 4)")
    parser.add_argument("--host-memory", default="8GiB", help="the run's budget on each machine (default: 8GiB)")
    return parser.parse_args(arguments)


def make_cluster(asked: argparse.Namespace, connect_options: Mapping[str, Any]) -> SpecCluster:
    """A scheduler on the first machine, and a worker on every one; the options are those of `asyncssh.connect`."""
    protocol = "tls://" if dask.config.get("distributed.comm.require-encryption") else "tcp://"
    return SSHCluster(
        [asked.hosts[0], *asked.hosts],
        connect_options=dict(connect_options),
        scheduler_options={"protocol": protocol, "port": 0, "dashboard_address": ":0"},
        worker_options={"protocol": protocol, "nthreads": asked.threads, "memory_limit": 0},
        worker_class="distributed.Worker",
        remote_python=asked.python,
    )


def main(arguments: Sequence[str], connect_options: Mapping[str, Any] = {}) -> int:
    """The exit code."""
    asked = parse(arguments)
    with make_cluster(asked, connect_options) as cluster, Client(cluster) as client:
        client.wait_for_workers(len(asked.hosts))
        result = oocattn.attention(
            asked.inputs,
            asked.result,
            causal=True,
            host_memory=asked.host_memory,
            scratch="store" if "://" in asked.result else None,
            client=client,
        )
        print(result.report)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
