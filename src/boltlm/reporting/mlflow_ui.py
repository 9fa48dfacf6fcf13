"""MLflow in the browser, on the runs of all experiments in its model-training view.

    python -m boltlm.reporting.mlflow_ui [--port 5000]     # make ui

Serves mlflow.db on 127.0.0.1 only, or shows the address of the server at MLFLOW_TRACKING_URI.
"""

import argparse
import os
import socket
import subprocess
import sys
import time
import webbrowser
from pathlib import Path

import requests

from boltlm.errors import UserError, run_main
from boltlm.reporting.mlflow_store import (
    TrackingStore,
    experiment_id,
    mlflow_client,
    tracking_store,
)

_HOST = "127.0.0.1"
_POLL_SECONDS = 0.3


def runs_address(server: str, experiment: str) -> str:
    """The page of an experiment's runs. Without the last part, MLflow opens its view for agents."""
    return f"{server}/#/experiments/{experiment}/runs?workflowType=machine_learning"


def open_ui(store: TrackingStore, port: int) -> None:
    """Serve the store's database until Ctrl-C, print the address of its runs and open it in a
    browser where there is a display; of a server, only show the address.

    Raises UserError where the port is in use, or MLflow cannot be started or reached.
    """
    with mlflow_client(store) as client:
        experiment = experiment_id(client, store)
        if not client.search_runs([experiment], max_results=1):
            print("There are no runs yet; dvc repro logs those of this workspace.")
    if store.is_server:
        _show(runs_address(store.uri.rstrip("/"), experiment), store)
        return
    port = _free_port(port)
    command = [sys.executable, "-m", "mlflow", "server", "--host", _HOST, "--port", str(port)]
    command += ["--workers", "1", "--backend-store-uri", store.uri]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # seven processes
    server = subprocess.Popen(command, env=environment)
    try:
        _await(f"http://{_HOST}:{port}", server)
        _show(runs_address(f"http://{_HOST}:{port}", experiment), store)
        server.wait()
    except KeyboardInterrupt:
        print()
    finally:
        server.terminate()
        server.wait()


def _free_port(port: int) -> int:
    """`port` if it can be used; for 0, any free one."""
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((_HOST, port))
        except (OSError, OverflowError) as error:
            raise UserError(
                f"--port {port} cannot be used ({error}); give another, or 0 for any free one"
            ) from error
        return listening.getsockname()[1]


def _await(server: str, process: "subprocess.Popen[bytes]") -> None:
    """Wait until the server answers. Raises UserError where it ends instead."""
    while True:
        if (code := process.poll()) is not None:
            raise UserError(f"mlflow server ended with exit code {code}; its messages are above")
        try:
            requests.get(f"{server}/health", timeout=5)
            return
        except requests.RequestException:
            time.sleep(_POLL_SECONDS)


def _show(address: str, store: TrackingStore) -> None:
    print(f"{store.masked(address)}  (Ctrl-C ends it)", flush=True)
    display = sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY")
    if display or os.environ.get("WAYLAND_DISPLAY"):
        webbrowser.open(address)


def _main() -> None:
    parser = argparse.ArgumentParser(description="Open the runs of all experiments in MLflow.")
    parser.add_argument("--port", type=int, default=5000, help="default: 5000; 0: any free one")
    parser.add_argument("--db", type=Path, default=Path("mlflow.db"))
    parser.add_argument("--artifacts", type=Path, default=Path("mlartifacts"))
    args = parser.parse_args()
    open_ui(tracking_store(args.db, args.artifacts), args.port)


if __name__ == "__main__":
    run_main(_main)
