"""Processes that die in the middle of a stage, and runs that meet each other."""

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import psutil
import yaml

from tests.chaos.experiment import Experiment, Fault, Repair, nothing, wait_until
from tests.test_pipeline import run, stage_command

EXECUTORS = {"local": "spawn_main", "ray": "ray::Map"}  # and what the title of a worker holds
QUEUED_K = (3, 4)  # values of k_samples of the queued experiments
QUEUE_SECONDS = 900  # for both of them, and for the workers of the queue to end afterwards


def faults(experiment: Experiment) -> Iterator[Fault]:
    """All of this module, in the order in which they are injected."""
    names = {"local": "a local E-step worker killed", "ray": "a Ray actor killed"}
    for executor, name in names.items():
        yield Fault(name, "latents@em1", lambda e=executor: _worker_killed(experiment, e))
    yield Fault("a Ray node lost", "latents@em1", lambda: _node_lost(experiment))
    yield Fault("two dvc repro at once", "latents@em1", lambda: _two_at_once(experiment))
    yield Fault("two queued experiments at once", "latents@em1", lambda: _queued(experiment))


def _worker_killed(experiment: Experiment, executor: str) -> Repair:
    """One of two workers is killed as soon as both are there."""
    process, workers = _with_workers(experiment, EXECUTORS[executor], executor=executor, workers=2)
    workers[0].kill()
    return _finished(experiment, process)


def _node_lost(experiment: Experiment) -> Repair:
    """The node with the only actor ends without a word, and another one joins the cluster."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        lost = cluster.add_node(num_cpus=2)
        sampling = {"executor": "ray", "workers": 1, "address": cluster.address}
        process, _ = _with_workers(experiment, "", **sampling)
        cluster.add_node(num_cpus=2)
        wait_until(process, lambda: any((experiment.folder / ".work").rglob("*.sha256")))
        cluster.remove_node(lost, allow_graceful=False)
        return _finished(experiment, process)
    finally:
        cluster.shutdown()


def _with_workers(
    experiment: Experiment, title: str, **sampling: Any
) -> tuple[subprocess.Popen[bytes], list[psutil.Process]]:
    """The stage with other workers than the experiment, and these when all of them are there."""
    experiment.forget_work()
    params = yaml.safe_load((experiment.folder / "params.yaml").read_text("utf-8"))
    params["sampling"] |= {"threads": 1, **sampling}
    path = experiment.folder.with_name("workers.yaml")
    path.write_text(yaml.safe_dump(params), encoding="utf-8")
    command = stage_command(experiment.folder, "latents@em1")
    command[command.index("--params") + 1] = str(path)
    process = experiment.start_command(command)
    workers: list[psutil.Process] = []

    def are_there() -> bool:
        workers[:] = _children(process.pid, title) if title else []
        return not title or len(workers) == sampling["workers"]

    wait_until(process, are_there)
    assert process.poll() is None, f"ended before it had workers: {experiment.text()[-500:]}"
    return process, workers


def _finished(experiment: Experiment, process: subprocess.Popen[bytes]) -> Repair:
    """The run must complete by itself, with the files that the experiment's one worker makes."""
    assert process.wait() == 0, f"ended with its worker: {experiment.text()[-500:]}"
    differing = experiment.differing_files()
    assert not differing, f"{', '.join(differing)} differ"
    return nothing


def _children(pid: int, title: str) -> list[psutil.Process]:
    found: list[psutil.Process] = []
    with suppress(psutil.Error):
        for child in psutil.Process(pid).children(recursive=True):
            with suppress(psutil.Error):
                if title in " ".join(child.cmdline()):
                    found.append(child)
    return found


def _two_at_once(experiment: Experiment) -> Repair:
    """DVC lets one of them run and ends the other with a line that names the first."""
    experiment.forget_work()
    command = ("dvc", "repro", "--single-item", "--force", "--no-run-cache", "latents@em1")
    logs = ("chaos.log", "second.log")
    processes = [experiment.start_command(command, log) for log in logs]
    codes = [process.wait() for process in processes]
    texts = [experiment.text(log) for log in logs]
    assert 0 in codes, f"neither was successful: {texts}"
    assert not any("Traceback" in text for text in texts), f"a traceback: {texts}"
    return nothing


def _queued(experiment: Experiment) -> Repair:
    """Two queued experiments that draw from one model at the same time, with K of their own, in a
    copy of the repository: each has the latents of a run of its own."""
    queue = _copy(experiment, "queued")
    for k in QUEUED_K:
        change = ("-S", f"k_samples={k}")
        run(queue.folder, "dvc", "exp", "run", "--queue", "--name", f"k{k}", *change, "latents@em1")
    queue.forget_work()
    assert queue.start_command(("dvc", "queue", "start", "--jobs", "2")).wait() == 0, queue.text()
    left = queue.left_behind(time.monotonic() + QUEUE_SECONDS)
    assert not left, f"processes of the queue are left: {left}"
    shown = run(queue.folder, "dvc", "queue", "status")
    assert shown.count("Success") == len(QUEUED_K), shown
    alone = _copy(experiment, "alone")
    params = alone.folder / "params.yaml"
    text = params.read_text("utf-8")
    for k in QUEUED_K:
        params.write_text(text.replace("k_samples: 2 ", f"k_samples: {k} ", 1), encoding="utf-8")
        alone.forget_work()
        run(alone.folder, "dvc", "repro", "--no-run-cache", "latents@em1")
        lock = (alone.folder / "dvc.lock").read_text("utf-8")
        theirs = run(queue.folder, "git", "show", f"k{k}:dvc.lock")
        assert _latents_md5(theirs) == _latents_md5(lock), f"other latents with K = {k}"
    return nothing


def _copy(experiment: Experiment, name: str) -> Experiment:
    """The experiment in another folder, where all that git knows is committed."""
    folder = experiment.folder.with_name(name)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(experiment.folder, folder, symlinks=True)
    run(folder, "git", "add", "-A")
    run(folder, "git", "commit", "-qm", "chaos")
    return Experiment(folder)


def _latents_md5(lock: str) -> str:
    (out,) = (
        out
        for out in yaml.safe_load(lock)["stages"]["latents@em1"]["outs"]
        if out["path"] == "data/latents/em1"
    )
    return out["md5"]
