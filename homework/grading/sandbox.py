"""One notebook's cells in a kernel that can do no harm: bubblewrap on Linux, or, where a teacher insists, nothing."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import queue
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

INSIDE = Path(__file__).with_name("inside.py")
PACKAGE = Path(importlib.util.find_spec("tmlcourse").origin).resolve().parent  # importing it would import torch
START = 150.0  # seconds for a kernel to come up on a busy machine


@dataclass(frozen=True)
class Limits:
    """What one submission may use: seconds a cell and in all, bytes of memory and disk, processes and threads."""

    cell: float = 60.0
    seconds: float = 300.0
    memory: int = 4 << 30
    processes: int = 128
    disk: int = 128 << 20


class Unavailable(RuntimeError):
    """There is no sandbox on this machine."""


class NotStarted(RuntimeError):
    """A kernel did not come up: no fault of the student's."""


@functools.cache
def check() -> None:
    """Raise `Unavailable`, with the reason, where student code cannot be locked in."""
    if not sys.platform.startswith("linux"):
        raise Unavailable("bubblewrap, which locks student code in, needs Linux (a Linux container serves as well)")
    if not shutil.which("bwrap"):
        raise Unavailable("bubblewrap is not installed (Debian, Ubuntu: sudo apt install bubblewrap)")
    if os.getuid() == 0 and not shutil.which("setpriv"):
        raise Unavailable("run as root, it needs setpriv (Debian, Ubuntu: the package util-linux)")
    answer = subprocess.run([*_locked_in(Path("/tmp/home"), Limits()), "/bin/true"], capture_output=True, text=True)
    if answer.returncode:
        raise Unavailable(f"bubblewrap does not work here: {answer.stderr.strip()[:300]}")


def _environment(home: Path) -> dict[str, str]:
    """Everything that the notebook's processes know of the outside."""
    return {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(home), "TMPDIR": str(home),
        "JUPYTER_RUNTIME_DIR": str(home), "IPYTHONDIR": str(home / ".ipython"), "PYTHONPATH": str(PACKAGE.parent),
        "LANG": "C.UTF-8", "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1",
        "CUDA_VISIBLE_DEVICES": "", "TMLCOURSE_OFFLINE": "1", "TQDM_DISABLE": "1", "XDG_CACHE_HOME": str(home / ".cache"),
    }  # fmt: skip


@functools.cache
def _fonts() -> Path | None:
    """Matplotlib's list of this machine's fonts, if it has made one."""
    with contextlib.suppress(ImportError):
        import matplotlib
        import matplotlib.font_manager  # makes the list

        folder = Path(matplotlib.get_cachedir())
        return folder if any(folder.glob("fontlist*.json")) else None
    return None


def _locked_in(home: Path, limits: Limits) -> list[str]:
    """bwrap: a system that can only be read, of which nothing but Python is there, and one small folder of its own."""
    command = ["bwrap", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--die-with-parent",
               "--new-session", "--clearenv"]  # fmt: skip
    for folder in ("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime"):
        path = Path(folder)
        if path.is_symlink() and not folder.startswith("/etc"):
            command += ["--symlink", os.readlink(folder), folder]
        elif path.exists():
            command += ["--ro-bind", folder, folder]
    size = str(limits.disk)
    command += ["--dev", "/dev", "--proc", "/proc", "--perms", "1777", "--size", size, "--tmpfs", "/tmp"]
    command += ["--perms", "1777", "--size", size, "--tmpfs", "/dev/shm"]
    python = {Path(sys.prefix), Path(sys.base_prefix), Path(sys.executable).resolve().parent.parent, PACKAGE, INSIDE}
    fonts = _fonts()
    for path in sorted({*python, *([fonts] if fonts else [])}):
        if not path.is_relative_to("/usr"):
            for parent in reversed(path.parents):
                if str(parent) not in ("/", "/tmp"):
                    command += ["--perms", "0755", "--dir", str(parent)]
            command += ["--ro-bind", str(path), str(path)]
    for name, value in _environment(home).items():
        command += ["--setenv", name, value]
    command += ["--chdir", "/tmp"]
    if (
        os.getuid() == 0
    ):  # root has no limits and sees more: become nobody, a new one, whose processes are counted alone
        nobody = str(200_000 + secrets.randbelow(1 << 20))
        command += [
            "--cap-drop",
            "ALL",
            "--cap-add",
            "CAP_SETUID",
            "--cap-add",
            "CAP_SETGID",
            "--cap-add",
            "CAP_SETPCAP",
        ]
        command += ["--", "setpriv", f"--reuid={nobody}", f"--regid={nobody}", "--clear-groups", "--no-new-privs",
                    "--bounding-set=-all", "--inh-caps=-all"]  # fmt: skip
    else:
        command += ["--unshare-user", "--cap-drop", "ALL", "--"]
    return command


def _tasks() -> int:
    """Processes and threads of this user: where the kernel counts them all together, a limit must allow for them."""
    uid, count = os.getuid(), 0
    if uid == 0:  # each sandbox is a user of its own
        return 0
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if process.stat().st_uid == uid:
                count += len(os.listdir(process / "task"))
    return count


ENDED = "ended its sandbox (more memory or processes than allowed, or killed by its own code)"


class Session:
    """A kernel to which cells are given one after the other; `run` never raises and never waits longer than the limits.

    `with Session(limits) as session: session.run("1 + 1")`. Once a kernel has died, every further cell is "dead".
    """

    def __init__(self, limits: Limits, *, unsafe: bool = False):
        self.limits, self.unsafe, self.why = limits, unsafe, ""

    def __enter__(self):
        self.folder = tempfile.TemporaryDirectory(prefix="hw", ignore_cleanup_errors=True)
        home = Path(self.folder.name) if self.unsafe else Path("/tmp/home")
        # Without a sandbox all processes of the user would be counted.
        processes = None if self.unsafe else self.limits.processes + _tasks()
        settings = {
            "home": str(home), "fonts": str(_fonts() or ""), "memory": self.limits.memory, "disk": self.limits.disk,
            "processes": processes, "alone": not self.unsafe,
        }  # fmt: skip
        inside = [sys.executable, str(INSIDE), json.dumps(settings)]
        command = inside if self.unsafe else [*_locked_in(home, self.limits), *inside]
        environment = {**os.environ, **_environment(home)} if self.unsafe else None
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, env=environment,
            start_new_session=True, text=True, encoding="utf-8", errors="replace", cwd=self.folder.name,
        )  # fmt: skip
        self.answers: queue.Queue = queue.Queue()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        self.timer = threading.Timer(self.limits.seconds, self._over)
        self.timer.daemon = True
        try:
            started = self.answers.get(timeout=START) is not None
        except queue.Empty:
            started = False
        if not started:
            self._kill()
            self.process.wait()
            said = self._said()
            self.__exit__()
            raise NotStarted(said or "the kernel did not start")
        self.timer.start()
        return self

    def _read(self):
        for line in self.process.stdout:
            self.answers.put(line)
        self.answers.put(None)

    def _over(self):
        self.why = self.why or f"used up the {self.limits.seconds:g} seconds of a submission"
        self._kill()

    def _kill(self):
        with contextlib.suppress(OSError):
            if hasattr(os, "killpg"):
                os.killpg(self.process.pid, signal.SIGKILL)
            else:
                self.process.kill()

    def run(self, code: str, seconds: float | None = None) -> dict:
        """The status and outputs of one cell (see inside.py); "why" says what happened to a kernel that is gone."""
        if not self.why:
            try:
                self.process.stdin.write(json.dumps({"code": code, "seconds": seconds or self.limits.cell}) + "\n")
                self.process.stdin.flush()
                line = self.answers.get()
                answer = json.loads(line) if line else None
            except (OSError, ValueError):
                answer = None
            if answer and answer["status"] != "dead":
                return answer
            self.why = self.why or (answer or {}).get("why") or ENDED
        return {"status": "dead", "outputs": [], "why": self.why}

    def _said(self) -> str:
        self.errors.seek(0)
        return self.errors.read()[-300:].decode("utf-8", "replace").strip()

    def __exit__(self, *_):
        self.timer.cancel()
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        self._kill()
        self.process.wait()
        self.reader.join(timeout=5)
        self.process.stdout.close()
        self.errors.close()
        self.folder.cleanup()
