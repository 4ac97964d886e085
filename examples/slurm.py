"""Exact attention on workers that Slurm starts, takes away and starts again: each is a job of one worker.

    pip install 'oocattn[remote,cluster]' dask-jobqueue
    python examples/slurm.py s3://bucket/qkv.zarr s3://bucket/out.zarr --jobs 8 --cores 16 --memory 64GiB

This process is the driver, with the scheduler. It holds no data and may run on a login node, or in a job of its own:

    #SBATCH --time=24:00:00
    python examples/slurm.py s3://bucket/qkv.zarr s3://bucket/out.zarr --time-limit 23h50m
    if [ $? -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi

It waits in the queue for all jobs, or for as many as --start-with says: the plan is made for those that are there then. It
ends with exit code 75, all work saved, when the time limit is reached or when Slurm has taken all jobs away and starts none
for two minutes, and upon SIGUSR1 (#SBATCH --signal=B:USR1@120). Whatever ends it, its jobs leave the queue, and Ctrl-C and
SIGTERM have the work saved as well. The same command continues the run. Workers that are preempted hand over what they have
done, and are used again when Slurm has requeued their jobs. Inputs, result and job state are in an object store, or at paths
that all nodes share; certificates are made for the cluster, in --shared.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from dask_jobqueue import SLURMCluster
from distributed import Client
from distributed.deploy.cluster import Cluster

import oocattn
from oocattn.units import parse_duration

GO_ON_LATER = 75
"""The exit code after which the same command is to be given again, as that of `oocattn run` at its time limit."""

SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGUSR1: GO_ON_LATER}
"""Signals that end it, and the exit codes then, as those of `oocattn run`."""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(description="Exact attention on workers that Slurm starts.")
    parser.add_argument("inputs", help="path or URL of the dataset")
    parser.add_argument("result", help="path or URL of the result")
    parser.add_argument("--jobs", type=int, default=4, help="the most jobs, of one worker each (default: 4)")
    parser.add_argument("--start-with", type=int, help="jobs to wait for before the run begins (default: all)")
    parser.add_argument("--cores", type=int, default=8, help="cores of a job (default: 8)")
    parser.add_argument("--memory", default="32GiB", help="memory of a job; half of it is the run's budget on each node")
    parser.add_argument("--queue", help="Slurm's partition")
    parser.add_argument("--walltime", default="04:00:00", help="time of a job (default: 4 hours)")
    parser.add_argument("--time-limit", type=parse_duration, help="end in this time, with all work saved and exit code 75")
    parser.add_argument("--shared", default=str(Path.cwd()), help="folder that all nodes see, for certificates and logs")
    return parser.parse_args(arguments)


def make_cluster(asked: argparse.Namespace) -> SLURMCluster:
    """A cluster without workers yet, and with TLS."""
    return SLURMCluster(
        cores=asked.cores,
        processes=1,
        memory=asked.memory,
        queue=asked.queue,
        walltime=asked.walltime,
        nanny=False,  # a nanny gives its worker 8 s of the grace of a preemption
        worker_extra_args=["--memory-limit", "0"],  # Dask counts mapped files; the run's budget binds what it allocates
        python=f"exec srun {sys.executable}",  # Slurm sends its signals to job steps, not to the shell of a batch job
        job_extra_directives=["--requeue"],
        log_directory=asked.shared,
        security=True,
        shared_temp_directory=asked.shared,
    )


def compute(cluster: Cluster, asked: argparse.Namespace) -> oocattn.Result:
    """Compute causal attention on up to so many jobs of a cluster, or go on with it."""
    cluster.adapt(minimum=asked.jobs, maximum=asked.jobs)  # jobs that end are submitted again
    half, began = oocattn.units.parse_size(asked.memory) // 2, time.monotonic()
    first = asked.jobs if asked.start_with is None else max(1, min(asked.start_with, asked.jobs))
    with Client(cluster) as client:
        try:
            client.wait_for_workers(first, timeout=asked.time_limit)
        except TimeoutError as error:
            raise oocattn.TimeLimitError(f"in the queue: {error}") from error
        left = asked.time_limit and max(1.0, asked.time_limit - (time.monotonic() - began))
        return oocattn.attention(
            asked.inputs,
            asked.result,
            causal=True,
            host_memory=half,
            scratch="store" if "://" in asked.result else None,
            time_limit=left,
            client=client,
        )


def leave_on_signals() -> None:
    """Have signals end this process by an exception, so that the cluster is closed and its jobs leave the queue.

    During a run its work is saved first. Importing dask_jobqueue has made Ctrl-C end a process with exit code 0.
    """
    for number, code in SIGNALS.items():
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, lambda *_, code=code: sys.exit(code))


def main(arguments: Sequence[str]) -> int:
    """The exit code."""
    asked = parse(arguments)
    try:
        with make_cluster(asked) as cluster:
            print(compute(cluster, asked).report)
    except (oocattn.TimeLimitError, oocattn.WorkerLostError) as error:
        print(error, file=sys.stderr)
        return GO_ON_LATER
    return 0


if __name__ == "__main__":
    leave_on_signals()
    sys.exit(main(sys.argv[1:]))
