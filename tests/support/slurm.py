"""A Slurm cluster of two nodes on this machine, for one test: real daemons, every file in one directory."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

NODES = 2
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo")
_SETTINGS = """
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={base}/munge/sock,cred_expire=10
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
MailProg=/bin/true
SlurmctldPidFile={base}/slurmctld.pid
SlurmdPidFile={base}/slurmd.%n.pid
SlurmdSpoolDir={base}/spool.%n
StateSaveLocation={base}/state
SlurmctldLogFile={base}/slurmctld.log
SlurmdLogFile={base}/slurmd.%n.log
{nodes}
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why no cluster can be started here; empty where one can."""
    gone = [program for program in _PROGRAMS if _found(program) is None]
    if gone:
        return f"no {', '.join(gone)}: apt-get install --no-install-recommends slurm-wlm munge"
    return "" if os.geteuid() == 0 else "Slurm's daemons want to be started by root"


def _found(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _run(*command: str) -> str:
    path = _found(command[0])
    assert path is not None
    done = subprocess.run([path, *command[1:]], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
    return done.stdout


@contextmanager
def cluster() -> Iterator[Path]:
    """Two idle nodes, n1 and n2, with SLURM_CONF in the environment; ended with everything on it."""
    # Not in pytest's own directory: munge wants one that everybody may pass through.
    base = Path(tempfile.mkdtemp(prefix="slurm"))
    base.chmod(0o711)
    for name in ("munge", "state"):
        (base / name).mkdir(parents=True)
    (base / "munge").chmod(0o711)
    key = base / "munge" / "key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    host, ports = socket.gethostname().partition(".")[0], _free_ports(NODES + 1)
    nodes = "\n".join(
        f"NodeName=n{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=4000 State=UNKNOWN"
        for number, port in enumerate(ports[1:], 1)
    )
    settings = base / "slurm.conf"
    settings.write_text(_SETTINGS.format(host=host, ports=ports, base=base, nodes=nodes))
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(settings)
    with ExitStack() as ending:
        ending.callback(shutil.rmtree, base, ignore_errors=True)
        ending.callback(_restore, before)
        ending.callback(_end, base)
        files = (f"--{kind}={base / 'munge' / name}" for kind, name in (
            ("socket", "sock"), ("key-file", "key"), ("log-file", "log"), ("pid-file", "pid"), ("seed-file", "seed"),
        ))  # fmt: skip
        _run("munged", *files)
        _run("slurmctld", "-f", str(settings))
        for number in range(1, NODES + 1):
            _run("slurmd", "-f", str(settings), "-N", f"n{number}")
        _wait_until_idle()
        yield settings


def _wait_until_idle() -> None:
    deadline = time.monotonic() + 60
    while _run("sinfo", "-h", "-t", "idle", "-o", "%D").strip() != str(NODES):
        assert time.monotonic() < deadline, _run("sinfo", "-N", "-l")
        time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        doors = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [door.getsockname()[1] for door in doors]


def _end(base: Path) -> None:
    """The daemons by their own pid files, and no other's."""
    for path in (*base.glob("slurmd.*.pid"), base / "slurmctld.pid", base / "munge" / "pid"):
        if path.is_file() and path.read_text().strip().isdigit():
            pid = int(path.read_text())
            try:
                os.kill(pid, signal.SIGTERM)
            except ProcessLookupError:
                continue
            deadline = time.monotonic() + 20
            while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
                time.sleep(0.1)


def _restore(before: str | None) -> None:
    if before is None:
        os.environ.pop("SLURM_CONF", None)
    else:
        os.environ["SLURM_CONF"] = before


def in_queue() -> list[str]:
    """The jobs that wait or run, each of an array for itself."""
    return _run("squeue", "--noheader", "--array", "--format=%i").split()


def cancel_all() -> None:
    """End every job of the cluster and wait until it is gone."""
    _run("scancel", "--partition=debug")
    deadline = time.monotonic() + 60
    while in_queue():
        assert time.monotonic() < deadline
        time.sleep(0.5)


def state(job: str) -> str:
    """Of a job that is in the queue."""
    return _run("squeue", "--noheader", f"--jobs={job}", "--format=%T").strip()


def warn(job: str) -> None:
    """What the scheduler sends to a job that is about to end."""
    _run("scancel", "--signal=USR2", job)


def start_now(job: str) -> None:
    """A job that was queued again would wait for two minutes."""
    _run("scontrol", "update", f"JobId={job}", "StartTime=now")
