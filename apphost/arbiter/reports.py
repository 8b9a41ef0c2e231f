"""What the arbiter says about its processes, and what it tells the fleet of the settings. Pure."""

from __future__ import annotations

import signal
from typing import Any, NamedTuple

from apphost.arbiter.processes import Failure, WorkerProcess
from apphost.arbiter.vocabulary import Config, GenerationGivenUp, Reason
from apphost.errors import ExitCode
from apphost.settings import Settings


class Report(NamedTuple):
    level: str
    message: str
    detail: str = ""


def counted(count: int, noun: str) -> str:
    """`1 worker`, `2 workers`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def who(worker: WorkerProcess) -> dict[str, Any]:
    """A worker for the machine-readable log."""
    return {"worker": worker.wid, "generation": worker.generation, "worker_pid": worker.pid}


def describe_exit(status: int | None) -> str:
    """`exit 0`, `died of SIGKILL`, or what can be said when nobody told."""
    if status is None:
        return "ended without a status"
    if status >= 0:
        return f"exit {status}"
    try:
        return f"died of {signal.Signals(-status).name}"
    except ValueError:
        return f"died of signal {-status}"


def boot_failure(worker: WorkerProcess, status: int | None, last_words: str) -> Failure | None:
    """Why a worker never became ready; None when it did, or was told to go."""
    if worker.ready_at is not None or worker.expected:
        return None
    how = describe_exit(status)
    return worker.failure or Failure(f"its process ended early ({how})", last_words, ExitCode.APPLICATION)


def end_of_worker(worker: WorkerProcess, status: int | None, last_words: str, age: float) -> Report:
    how = describe_exit(status)
    failure = boot_failure(worker, status, last_words)
    if failure is not None:
        return Report("error", f"{worker.name} could not boot: {failure.message}", failure.detail or last_words)
    if worker.expected and not last_words:
        return Report("info", f"{worker.name} gone: {how} after {age:.1f} s, {worker.requests} requests")
    why = f" ({worker.failure.message})" if worker.failure else ""
    lost = "; the requests that it had in progress are lost" if worker.ready_at is not None else ""
    detail = last_words or (worker.failure.detail if worker.failure else "")
    return Report("error", f"{worker.name} gone: {how}{why} after {age:.1f} s{lost}", detail)


def stuck(reason: Reason, settings: Settings) -> str:
    """What it means that a worker hangs."""
    if reason is Reason.BOOT_TIMEOUT:
        return (
            f"it was not ready within boot_timeout, {settings.boot_timeout:g} s: the application hangs while it is "
            "imported or started"
        )
    return f"its event loop did not answer for timeout, {settings.timeout:g} s: code of the application blocks it"


def complete(generation: int, settings: Settings, size: int, seconds: float, stand_in: bool) -> Report:
    what = f"an error page in place of {settings.app}" if stand_in else settings.app
    with_ = counted(size, "worker")
    return Report(
        "info", f"generation {generation} is serving {what} with {with_}, {seconds:.2f} s after it was asked for"
    )


def given_up(action: GenerationGivenUp, failure: Failure | None) -> Report:
    why = failure.message.removesuffix(".") if failure else "it could not boot"
    if action.stand_in:
        what_now = "An error page is served until it is mended"
    elif action.keeping:
        what_now = f"Generation {action.keeping} keeps serving; mend the new code or settings and reload again"
    else:
        what_now = "The reload that was asked for meanwhile is tried"
    return Report("error", f"generation {action.generation} given up: {why}. {what_now}")


def fleet_config(settings: Settings) -> Config:
    return Config(
        size=settings.workers,
        boot_timeout=settings.boot_timeout,
        timeout=settings.timeout,
        graceful_timeout=settings.graceful_timeout,
        stop_timeout=settings.stop_timeout,
        shutdown_delay=0.0 if settings.reload else settings.shutdown_delay,
        canary=0.0 if settings.reload else settings.canary,
        stand_in=settings.reload,
        keep_good=settings.reload_on_error == "keep",
    )
