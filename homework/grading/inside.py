"""Runs inside the sandbox: one kernel for one notebook. Cells come in on stdin, one line of JSON each; outputs go out.

    {"code": ..., "seconds": ...}  ->  {"status": "ok" | "error" | "timeout" | "dead", "outputs": [...]}

What the notebook prints cannot reach this process's stdout; what it does to the kernel ends the kernel and not the
grading. Needs nothing but jupyter_client.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from jupyter_client import KernelManager

try:
    import resource
except ImportError:  # Windows, where there is no sandbox either
    resource = None

MOST_TEXT = 20_000  # characters of output kept from a cell
PATIENCE = 5.0  # seconds between the interrupt of a cell and the end of its kernel
START = 120.0


def limit(memory: int, disk: int, processes: int | None):
    """Bound every process of the sandbox: its own memory, the size of a file, the number of tasks."""
    if resource is None:
        return
    limits = {"RLIMIT_DATA": memory, "RLIMIT_FSIZE": disk, "RLIMIT_CORE": 0}
    if processes is not None:
        limits["RLIMIT_NPROC"] = processes
    for name, value in limits.items():
        # macOS does not know all of them.
        with contextlib.suppress(AttributeError, ValueError, OSError):
            resource.setrlimit(getattr(resource, name), (value, value))


def hide():
    """Let no other process of this user read this one's memory or open its pipes (Linux)."""
    with contextlib.suppress(Exception):
        import ctypes

        ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE


def resident() -> int:
    """Bytes of memory that all processes seen from here hold."""
    pages = 0
    for statm in Path("/proc").glob("[0-9]*/statm"):
        with contextlib.suppress(OSError, ValueError):
            pages += int(statm.read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def watch(memory: int):
    """End the whole sandbox when its processes together hold more than `memory`."""
    while True:
        time.sleep(0.25)
        if resident() > memory:
            os.kill(os.getpid(), signal.SIGKILL)  # the sandbox ends with this process


class Kernel:
    """A kernel over Unix sockets (there is no network in the sandbox)."""

    def __init__(self, home: Path):
        sockets = {} if os.name == "nt" else {"transport": "ipc", "ip": str(home / "kernel")}
        self.manager = KernelManager(connection_file=str(home / "kernel.json"), **sockets)
        self.manager.start_kernel(cwd=str(home), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=START)
        self.run("%xmode Minimal", START)  # tracebacks are thrown away: do not spend time on them

    def run(self, code: str, seconds: float) -> dict:
        """Run a cell; interrupt it when its time is over, and end the kernel where that does not help."""
        outputs, room, late = [], MOST_TEXT, None
        end = time.monotonic() + seconds
        asked = self.client.execute(code, store_history=False, allow_stdin=False, stop_on_error=False)
        while True:
            try:
                message = self.client.get_iopub_msg(timeout=0.25)
            except queue.Empty:
                message = None
            if time.monotonic() > end:
                if late:
                    self.manager.shutdown_kernel(now=True)
                    return {"status": "dead", "outputs": outputs, "why": "did not stop when interrupted"}
                late, end = True, time.monotonic() + PATIENCE
                self.manager.interrupt_kernel()
            if message is None:
                if not self.manager.is_alive():
                    return {"status": "dead", "outputs": outputs, "why": "ended its own kernel"}
                continue
            if message["parent_header"].get("msg_id") != asked:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "status" and content["execution_state"] == "idle":
                break
            output, room = kept(kind, content, room)
            outputs += [output] if output else []
        if late:
            return {"status": "timeout", "outputs": outputs}
        return {"status": self.reply(asked), "outputs": outputs}

    def reply(self, asked: str) -> str:
        while True:
            try:
                message = self.client.get_shell_msg(timeout=PATIENCE)
            except queue.Empty:
                return "dead"
            if message["parent_header"].get("msg_id") == asked:
                return "ok" if message["content"].get("status") == "ok" else "error"


def kept(kind: str, content: dict, room: int) -> tuple[dict | None, int]:
    """An output as text, cut to the room that is left."""
    if kind == "stream":
        text = str(content.get("text", ""))[:room]
        output = {"output_type": "stream", "name": str(content.get("name")), "text": text}
        return (output if text else None), room - len(text)
    if kind == "error":
        name, value = str(content.get("ename")), str(content.get("evalue"))[:2000]
        return {"output_type": "error", "ename": name, "evalue": value, "traceback": []}, room
    return None, room


def main():
    settings = json.loads(sys.argv[1])
    home = Path(settings["home"])
    home.mkdir(parents=True, exist_ok=True)
    if settings["fonts"]:  # listing the machine's fonts takes seconds
        fonts = home / ".cache" / "matplotlib"
        with contextlib.suppress(OSError):
            shutil.copytree(settings["fonts"], fonts)
        os.environ["MPLCONFIGDIR"] = str(fonts)
    limit(settings["memory"], settings["disk"], settings["processes"])
    hide()
    if settings["alone"]:  # a process space of its own: all that is seen there is this notebook's
        threading.Thread(target=watch, args=(settings["memory"],), daemon=True).start()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # nothing else may write between the answers
    kernel = Kernel(home)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        answers.write(json.dumps(kernel.run(**json.loads(line))) + "\n")
        answers.flush()
    kernel.manager.shutdown_kernel(now=True)


if __name__ == "__main__":
    main()
