"""Packages, GPUs and servers that the settings need, on this machine and at this moment."""

import importlib.util
import os
import shlex
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from boltlm.param_values import Finding
from boltlm.preflight.models import is_hub_name
from boltlm.preflight.settings import section_entries

_SECONDS = 1.0  # that a server may take to accept a connection
_RAY_PORT = 6379


def machine_findings(params: Mapping[str, Any]) -> Iterator[Finding]:
    """What the settings need and this machine lacks."""
    sampling = section_entries(params, "sampling")
    yield from _packages(params, sampling)
    yield from _gpus(sampling)
    if sampling.get("executor") == "ray" and isinstance(address := sampling.get("address"), str):
        yield from _ray_address(address)
    yield from _launcher(params.get("launcher"))
    yield from _hub(params)


def _packages(params: Mapping[str, Any], sampling: Mapping[str, Any]) -> Iterator[Finding]:
    vllm = {"sampling.sampler": sampling.get("sampler")}
    vllm["evaluate.backend"] = section_entries(params, "evaluate").get("backend")
    for name, teacher in section_entries(params, "teachers").items():
        if isinstance(teacher, Mapping):
            vllm[f"teachers.{name}.kind"] = teacher.get("kind")
    needed = {key: "vllm" for key, value in vllm.items() if value == "vllm"}
    if sampling.get("executor") == "ray":
        needed["sampling.executor"] = "ray"
    for key, package in needed.items():
        if importlib.util.find_spec(package) is None:
            yield Finding(
                key, f" is {package}, which is not installed here; install it or change the key"
            )


def _visible_gpus() -> int:
    """The GPUs of this machine that processes may use; no CUDA library is loaded for it."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    if shutil.which("nvidia-smi") is None:
        return 0
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=5, check=False
        )
    except subprocess.TimeoutExpired:
        return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    return listed.stdout.count("GPU ")


def _gpus(sampling: Mapping[str, Any]) -> Iterator[Finding]:
    """GPUs of the workers, which are all on this machine unless a Ray cluster has an address."""
    each, workers = sampling.get("gpus_per_worker"), sampling.get("workers")
    if not isinstance(each, int | float) or not isinstance(workers, int) or not each > 0:
        return
    remote = sampling.get("executor") == "ray" and sampling.get("address") is not None
    if not remote and (gpus := _visible_gpus()) < each * workers:
        yield Finding(
            "sampling.gpus_per_worker",
            f" is {each} for {workers} workers, but this machine has {gpus} GPUs; lower one of them"
            " (0: the workers share what there is)",
        )


def _answers(host: str, port: int) -> bool:
    """Whether a server accepts a connection; the search for its name counts as well."""
    answered = threading.Event()

    def connect() -> None:
        with suppress(OSError):
            socket.create_connection((host, port), timeout=_SECONDS).close()
            answered.set()

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(_SECONDS)
    return answered.is_set()


def _ray_address(address: str) -> Iterator[Finding]:
    if address in ("auto", "local"):
        return
    try:
        parts = urlsplit(address if "://" in address else f"ray://{address}")
        host, port = parts.hostname, parts.port or _RAY_PORT
    except ValueError:
        host, port = None, 0
    if host is None:
        yield Finding("sampling.address", f" must be <host>:<port>, found {address!r}")
    elif not _answers(host, port):
        yield Finding(
            "sampling.address",
            f": nothing answers at {host}:{port} within {_SECONDS:g} s; start the Ray cluster, or"
            " set the key to null to start one here",
        )


def _launcher(launcher: object) -> Iterator[Finding]:
    """The program that `launcher` names; shell syntax in it is the user's own affair."""
    try:
        words = shlex.split(launcher) if isinstance(launcher, str) else []
    except ValueError as error:
        yield Finding("launcher", f" is no shell command ({error}), found {launcher!r}")
        return
    program = next((word for word in words if "=" not in word), None)
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    if program and not set(program) & set("$`(") and shutil.which(program, path=path) is None:
        yield Finding("launcher", f": there is no program '{program}' here; found {launcher!r}")


def _hub(params: Mapping[str, Any]) -> Iterator[Finding]:
    """Models of the hub that are not in its cache here, where the hub does not answer."""
    base, names = section_entries(params, "base"), dict[str, object]()
    if base.get("kind") == "checkpoint" and not Path("models/base/config.json").is_file():
        names["base.model"] = base.get("model")
    for name, teacher in section_entries(params, "teachers").items():
        if isinstance(teacher, Mapping) and teacher.get("kind") == "vllm":
            names[f"teachers.{name}.model"] = teacher.get("model")
    missing = {
        key: name
        for key, name in names.items()
        if isinstance(name, str)
        and not Path(name).exists()
        and is_hub_name(name)
        and not _is_cached(name)
    }
    server = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    port = server.port or (80 if server.scheme == "http" else 443)
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    proxied = any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"))
    if not missing or (proxied and not offline):
        return
    if offline or not _answers(server.hostname or "", port):
        why = "HF_HUB_OFFLINE is set" if offline else f"{server.hostname} does not answer"
        for key, name in missing.items():
            yield Finding(
                key,
                f": '{name}' is neither a folder here nor in the cache of the Hugging Face hub, and"
                f" {why}; correct the path, or download the model",
            )


def _is_cached(name: str) -> bool:
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    repository = name.partition("@")[0].replace("/", "--")
    return (cache / f"models--{repository}" / "snapshots").is_dir()
