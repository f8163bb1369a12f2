"""The whole loop on this machine: Redis, a server and a training worker as child processes.

The server and the worker are other packages' commands, started as processes and never imported: this
package lies below them.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx2

from deploy.errors import DeployError
from deploy.registry import Registry
from deploy.versions import VersionKind
from feedback.embedded import connect_url
from feedback.settings import LoopSettings

STOP_SECONDS = 45.0
"""A child that has not ended this long after SIGTERM is killed; the server drains for 30."""


class ChildFailed(DeployError):
    """A process of the loop ended by itself; the message names its log."""


@dataclass
class LocalLoop:
    """The running processes. Made by ``running``."""

    state: Path
    redis_url: str
    url: str
    environment: dict[str, str]
    children: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str, *arguments: str) -> None:
        """Start ``python -m arguments`` with its output in ``state/logs/<name>.log``.

        A session of its own keeps the terminal's Ctrl-C from it: the parent ends it, in order.
        """
        with self.log(name).open("ab") as log:
            self.children[name] = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def run(self, *arguments: str) -> None:
        """Run ``python -m arguments`` to its end, its output on this terminal. Raises ChildFailed."""
        if subprocess.run([sys.executable, "-m", *arguments], env=self.environment, check=False).returncode:
            raise ChildFailed(f"python -m {' '.join(arguments)} failed")

    def log(self, name: str) -> Path:
        """Where a child's output goes."""
        directory = self.state / "logs"
        directory.mkdir(parents=True, exist_ok=True)
        return directory / f"{name}.log"

    def check(self) -> None:
        """Raises ChildFailed when a child has ended by itself."""
        for name, child in self.children.items():
            if child.poll() is not None:
                raise ChildFailed(f"the {name} process ended with status {child.returncode}; see {self.log(name)}")

    def wait_ready(self, generation: int = 0, timeout_seconds: float = 300.0) -> None:
        """Wait until the server serves the release of that generation, or a later one.

        Raises:
            ChildFailed: A child ended, or the time is up.
        """
        deadline = time.monotonic() + timeout_seconds
        why = "it does not answer"
        while time.monotonic() < deadline:
            self.check()
            with contextlib.suppress(httpx2.TransportError):
                answer = httpx2.get(f"{self.url}/ready", timeout=10.0)
                if answer.status_code == 200 and answer.json()["generation"] >= generation:
                    return
                why = answer.text
            time.sleep(0.1)
        raise ChildFailed(f"the server was not ready after {timeout_seconds:.0f} s ({why}); see {self.log('serve')}")

    def stop(self, name: str) -> None:
        """End one child: SIGTERM, and SIGKILL for its whole session when it does not end."""
        child = self.children.pop(name)
        if child.poll() is None:
            child.terminate()
            try:
                child.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()


@contextlib.contextmanager
def running(loop: LoopSettings, port: int) -> Iterator[LocalLoop]:
    """Redis is up inside; what is started on the LocalLoop is stopped at the end, newest first."""
    with connect_url(loop) as redis_url:
        environment = os.environ | {"INSTRUCTLOOP_STATE": str(loop.state), "INSTRUCTLOOP_REDIS_URL": redis_url}
        local = LocalLoop(loop.state, redis_url, f"http://127.0.0.1:{port}", environment)
        try:
            yield local
        finally:
            for name in reversed(list(local.children)):
                local.stop(name)


def up(loop: LoopSettings, port: int, print_line: Callable[[str], None]) -> None:
    """Run the loop until SIGINT or SIGTERM. A first policy is trained when there is none.

    Raises:
        ChildFailed: A process ended by itself.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    with contextlib.suppress(KeyboardInterrupt), running(loop, port) as local:
        if not Registry(loop.state).numbers(VersionKind.POLICY):
            print_line("no policy version yet: pretraining and fine-tuning the tiny world's (about 5 minutes)")
            local.run("train", "pretrain")
            local.run("train", "sft")
        local.start("serve", "serve", "--port", str(port))
        watched = local.environment.setdefault("INSTRUCTLOOP_TRAIN__WORKER__METRICS_PORT", str(port + 1))
        local.start("worker", "train", "worker")
        print_line(f"starting; logs are in {loop.state / 'logs'}")
        local.wait_ready()
        print_line(f"completions  {local.url}/v1   (OpenAI base_url; any api_key while no keys exist)")
        print_line(f"interface    {local.url}/openapi.json")
        print_line(f"pages        {local.url}/ for labelers, {local.url}/operator for operators")
        print_line(f"metrics      {local.url}/metrics, of the worker http://127.0.0.1:{watched}/metrics")
        print_line("operate with python -m deploy status|canary|promote|rollback; Ctrl-C stops everything")
        while True:
            local.check()
            time.sleep(0.5)


def _interrupt(number: int, frame: object) -> None:
    for both in (signal.SIGINT, signal.SIGTERM):
        signal.signal(both, signal.SIG_IGN)  # once is enough: the children are being stopped in order
    raise KeyboardInterrupt
