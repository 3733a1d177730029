"""Jobs of the local Hub: a command is run as a process on this machine, and its output is the log.

Not emulated: images, flavors' limits, timeouts, billing. What the client sends is kept in `JOBS`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hub_server import HubError, LocalHub, Request, Response, as_json, json, route, signed_in


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


JOBS: dict[str, Job] = {}
HARDWARE = [
    {"name": "cpu-basic", "prettyName": "CPU Basic", "cpu": "2 vCPU", "ram": "16 GB", "accelerator": None,
     "unitCostMicroUSD": 167, "unitCostUSD": 0.000167, "unitLabel": "minute"},
    {"name": "t4-small", "prettyName": "T4", "cpu": "4 vCPU", "ram": "15 GB",
     "accelerator": {"type": "gpu", "model": "T4", "quantity": "1", "vram": "16 GB", "manufacturer": "Nvidia"},
     "unitCostMicroUSD": 6667, "unitCostUSD": 0.006667, "unitLabel": "minute"},
]  # fmt: skip


class Job:
    def __init__(self, hub: LocalHub, spec: dict[str, Any], owner: str) -> None:
        self.id, self.spec, self.owner = f"{len(JOBS):024x}", spec, owner
        self.lines: list[str] = []
        self.stage, self.ended, self.asked = "RUNNING", threading.Event(), 0
        threading.Thread(target=self._run, args=(hub.url,), daemon=True).start()

    def _run(self, endpoint: str) -> None:
        private = ("HF_", "XDG_", "HUGGING")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(private)}
        with tempfile.TemporaryDirectory() as folder:
            environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": f"{folder}/home", "HF_HUB_DISABLE_XET": "1"}
            environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
            environment |= self.spec["environment"] | self.spec.get("secrets", {})
            out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            with subprocess.Popen(self.spec["command"], cwd=folder, env=environment, **out) as run:
                for line in run.stdout:
                    self.lines.append(line.rstrip())
        self.stage = "COMPLETED" if run.returncode == 0 else "ERROR"
        self.ended.set()

    def as_json(self) -> Response:
        owner = {"id": "1", "name": self.owner, "type": "user"}
        self.asked += self.ended.is_set()
        # The log ends some moments before the Hub says that the Job has.
        status = {"stage": self.stage if self.asked > 1 else "RUNNING", "message": None}
        return as_json({"id": self.id, "owner": owner, "status": status, "createdAt": now()})


def job_of(number: str) -> Job:
    if number not in JOBS:
        raise HubError(404, "Job not found")
    return JOBS[number]


@route("GET", "/api/jobs/hardware")
def list_hardware(hub: LocalHub, request: Request) -> Response:
    return as_json(HARDWARE)


@route("POST", "/api/jobs/{owner}")
def run_job(hub: LocalHub, request: Request, owner: str) -> Response:
    if not signed_in(request).writes(owner):
        raise HubError(403, "You may not run Jobs there")
    job = Job(hub, request.json(), owner)
    JOBS[job.id] = job
    return job.as_json()


@route("GET", "/api/jobs/{owner}/{number}")
def inspect(hub: LocalHub, request: Request, owner: str, number: str) -> Response:
    return job_of(number).as_json()


@route("GET", "/api/jobs/{owner}/{number}/logs")
def logs(hub: LocalHub, request: Request, owner: str, number: str) -> Response:
    job = job_of(number)

    def log() -> bytes:
        job.ended.wait()  # a log is open as long as its Job runs
        lines = [{"data": line, "timestamp": now()} for line in job.lines]
        return "".join(f"data: {json.dumps(line)}\n\n" for line in lines).encode()

    return Response(200, headers={"Content-Type": "text/event-stream"}, later=log)
