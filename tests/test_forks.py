"""In a forked process what cannot hang works, and what would never end is refused with what to do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed import Client
from support import carry_out, plan_for

from oocattn import Event, ProblemError
from oocattn.planning.measure import choose_device

FORK = """
import json, os, signal, sys, threading, time
import torch
from distributed import Client
import oocattn
from oocattn import forks
from oocattn.cli.doctor import examine

dataset, result, unfinished = sys.argv[1:]
forks.ASLEEP_SECONDS = 0.1
answers = {}

def in_fork(name, call):
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            call()
            answer = "works"
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(writing, answer.encode())
        os._exit(0)
    os.close(writing)
    watch = threading.Timer(30, os.kill, (process, signal.SIGKILL))
    watch.start()
    answers[name] = os.read(reading, 10_000).decode() or "never ends"
    watch.cancel()
    os.waitpid(process, 0)

def compute():
    torch.ones(1 << 20).exp_()

def multiply():
    torch.ones(300, 300) @ torch.ones(300, 300)

def plan():
    oocattn.plan(dataset, kernel="cpu")

assert not forks.is_forked()
assert torch.get_num_threads() > 1 or torch.set_num_threads(2) is None
in_fork("nothing computed", lambda: oocattn.attention(dataset, result + ".2", kernel="cpu"))
other = threading.Thread(target=compute)
other.start()
other.join()
in_fork("a loop in another thread", plan)
other = threading.Thread(target=multiply)
other.start()
other.join()
in_fork("a product in another thread", plan)
oocattn.attention(dataset, result + ".5", kernel="cpu")
in_fork("after a run", lambda: oocattn.attention(dataset, result + ".6", kernel="cpu"))
compute()
in_fork("plan", plan)
in_fork("attention", lambda: oocattn.attention(dataset, result + ".3", kernel="cpu"))
in_fork("doctor", lambda: list(examine()))
in_fork("status", lambda: oocattn.status(result))
in_fork("verify", lambda: oocattn.verify(result, rows=4))
in_fork("resume", lambda: oocattn.resume(result))
in_fork("resume of an unfinished run", lambda: oocattn.resume(unfinished))
torch.set_num_threads(1)
in_fork("one thread", plan)
with Client(processes=False, dashboard_address=None) as client:
    forks.ENOUGH_SECONDS = 0.5
    in_fork("client", lambda: oocattn.attention(dataset, result + ".4", client=client))
print(json.dumps(answers))
"""

REFUSES = (
    *("after a run", "plan", "attention", "doctor", "one thread"),
    "resume of an unfinished run",
)

REFUSED = "ProblemError: this process was forked from one in which PyTorch had computed"


def interrupt(event: Event) -> None:
    if event.kind == "started":
        raise KeyboardInterrupt


def test_a_fork_refuses_what_would_never_end_and_does_the_rest(client: Client, dataset: Path, result: Path) -> None:
    carry_out(plan_for(dataset), dataset, result, client)
    unfinished = result.with_name("unfinished.zarr")
    with pytest.raises(KeyboardInterrupt):
        carry_out(plan_for(dataset), dataset, unfinished, client, [interrupt])
    arguments = [sys.executable, "-c", FORK, str(dataset), str(result), str(unfinished)]
    answers = json.loads(subprocess.run(arguments, check=True, stdout=subprocess.PIPE).stdout)
    assert answers.pop("client").startswith("ProblemError: the client was made before this process was forked")
    product = answers.pop("a product in another thread")  # which a fork survives or not, as the BLAS has it
    assert product == "works" or product.startswith(REFUSED)
    refused = {name: answers.pop(name) for name in REFUSES}
    assert all(answer.startswith(REFUSED) and "spawn" in answer for answer in refused.values()), refused
    assert set(answers.values()) == {"works"}, answers


def test_gpus_that_were_used_before_the_fork_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    with pytest.raises(ProblemError, match=r"forked from one that had used CUDA.*spawn.*kernel='cpu'"):
        choose_device("torch")
    assert choose_device("cpu") == "cpu"
