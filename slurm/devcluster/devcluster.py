#!/usr/bin/env python3
"""A private, real Slurm on one machine: several virtual nodes with GPUs, to try the product on and to test it with.

    devcluster.py up --nodes 4        start it, or say that it runs; then: eval "$(devcluster.py env)"
    devcluster.py up --accounting     with slurmdbd on a MariaDB of its own, so that sacct answers
    devcluster.py down                stop exactly what `up` started
    devcluster.py node n2 kill        SIGKILL a node's slurmd, as if the node had died (`start` brings it back)

Everything lies in one folder (default `.devcluster`): configuration, munge key, spools, logs, and `processes.json`, the
ids of the daemons, by which `down` ends them. Ports are free ones. Nothing of a system's Slurm is read or touched.
Needs only Python's standard library, and root: Slurm's daemons start tasks as their users.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from processes import (
    all_processes,
    die_with_parent,
    end,
    free_ports,
    is_gone,
    is_listening,
    parent_of,
    variable_of,
    words_of,
)  # fmt: skip

PACKAGES = ["slurmctld", "slurmd", "slurm-client", "munge"]
ACCOUNTING_PACKAGES = ["slurmdbd", "mariadb-server"]
PROGRAMS = {"slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "munged": "munge"}
ACCOUNTING_PROGRAMS = {"slurmdbd": "slurmdbd", "mariadbd": "mariadb-server", "mariadb-install-db": "mariadb-server"}
PATIENCE = 60.0
ACCOUNT = "research"  # the only one that jobs may be charged to, where there is accounting

SLURM_CONF = """\
ClusterName=dev
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job may start only when credentials of its last life have expired: 2 minutes by default.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/logs/slurmctld.log
SlurmdLogFile={folder}/logs/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SlurmctldTimeout=60
SlurmdTimeout=10
KillWait={kill_wait}
MinJobAge=300
MaxJobCount=50000
MaxArraySize={max_array_size}
GresTypes=gpu
# Off (the default) on many sites: impossible jobs wait for ever instead of being refused.
EnforcePartLimits=NO
{accounting}
# More cores than the machine has: nodes here share it.
SlurmdParameters=config_overrides
{nodes}
PartitionName=DEFAULT Nodes=ALL MaxTime=INFINITE State=UP
PartitionName=normal Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=urgent PriorityTier=10 PreemptMode=OFF
"""

SLURMDBD_CONF = """\
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={dbd_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
LogFile={folder}/logs/slurmdbd.log
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={sql_port}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct
"""


class ClusterError(Exception):
    """Something that the user can put right, in one line."""


class DevCluster:
    """The cluster in a folder; each of its daemons is known by its process id."""

    def __init__(self, folder: Path, tied: bool = False) -> None:
        """`tied`: the daemons end with this process, whatever ends it."""
        self.folder = folder.resolve()
        self._tied = tied
        self._children: list[subprocess.Popen[bytes]] = []  # kept: they outlive this process, or are ended by `down`

    @property
    def environment(self) -> dict[str, str]:
        """What Slurm's commands need to find this cluster."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def up(self, nodes: int, gpus: int, accounting: bool, grace: int, kill_wait: int, max_array_size: int) -> None:
        """Starts all daemons and returns once every node is idle. Raises ClusterError."""
        if self._alive():
            raise ClusterError(f"{self.folder}: a cluster runs there already; stop it with: {sys.argv[0]} down")
        for part in ("munge", "state", "spool", "logs"):
            (self.folder / part).mkdir(parents=True, exist_ok=True)
        (self.folder / "munge").chmod(0o711)
        names = [f"n{number}" for number in range(1, nodes + 1)]
        settings = {"grace": grace, "kill_wait": kill_wait, "max_array_size": max_array_size}
        try:
            self._start_munge()
            if accounting:
                self._start_accounting()
            self._write_configuration(names, gpus, accounting, settings)
            self._start("slurmctld", ["slurmctld", "-D", "-c", "-f", self._path("slurm.conf")])
            for name in names:
                self.start_node(name)
            self._wait(lambda: self._idle() >= nodes, "the nodes to become idle")
        except BaseException:
            self.down()
            raise

    def down(self) -> None:
        """Cancels all jobs, then ends every daemon that `up` started, and what they left behind."""
        if "slurmctld" in self._alive():
            with contextlib.suppress(ClusterError, subprocess.SubprocessError, OSError):
                for state in ("PENDING", "RUNNING", "SUSPENDED"):
                    self._command("scancel", "--state", state, "--user", "root")
                self._wait(lambda: not self._command("squeue", "-h").strip(), "jobs to end", 15)
        orphans = [pid for pid in all_processes() if self._is_ours(pid)]
        for name, pid in reversed(list(self._alive().items())):
            end(pid, signal.SIGKILL if name.startswith("slurmd-") else signal.SIGTERM)
        for pid in orphans:  # a step's shepherd and its tasks, where slurmd was killed
            end(pid, signal.SIGKILL)
        (self.folder / "processes.json").unlink(missing_ok=True)
        for child in self._children:
            child.wait()

    def start_node(self, name: str) -> None:
        """Starts a node's slurmd."""
        (self.folder / "spool" / name).mkdir(parents=True, exist_ok=True)
        self._start(f"slurmd-{name}", ["slurmd", "-D", "-N", name, "-f", self._path("slurm.conf")])

    def kill_node(self, name: str, with_tasks: bool = False) -> None:
        """SIGKILL for a node's slurmd; `with_tasks`, for all its steps too, as when the power fails."""
        daemon = self._alive().get(f"slurmd-{name}")
        if daemon is None:
            raise ClusterError(f"no slurmd of node {name} runs")
        # The shepherds of its steps first: without power, nobody reports how the tasks ended.
        doomed = [pid for pid in all_processes() if with_tasks and parent_of(pid) == daemon]
        doomed += [
            pid
            for pid in all_processes()
            if with_tasks and variable_of(pid, "SLURMD_NODENAME") == name and self._is_ours(pid)
        ]
        for pid in [daemon, *doomed]:
            end(pid, signal.SIGKILL)

    def _write_configuration(self, names: list[str], gpus: int, accounting: bool, settings: dict[str, int]) -> None:
        ports = free_ports(len(names) + 1)
        lines = []
        for name, port in zip(names, ports[1:], strict=True):
            gres = f" Gres=gpu:{gpus}" if gpus else ""
            lines.append(
                f"NodeName={name} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={port} "
                f"CPUs=8 RealMemory=4000{gres} State=UNKNOWN"
            )
        devices = []
        for number in range(gpus):
            device = self.folder / f"gpu{number}"
            if not device.exists():
                os.mknod(device, 0o666 | 0o020000, os.makedev(1, 3))  # a second /dev/null: something to count
            devices.append(f"Name=gpu File={device}\n")
        (self.folder / "gres.conf").write_text("".join(devices))
        text = SLURM_CONF.format(
            host=socket.gethostname(),
            folder=self.folder,
            ctld_port=ports[0],
            nodes="\n".join(lines),
            accounting=self._accounting_lines() if accounting else "AccountingStorageType=accounting_storage/none",
            **settings,
        )
        (self.folder / "slurm.conf").write_text(text)

    def _start_munge(self) -> None:
        munge = self.folder / "munge"
        key = munge / "key"
        if not key.exists():
            key.write_bytes(os.urandom(1024))
            key.chmod(0o400)
        options = {"socket": "socket", "key-file": "key", "pid-file": "pid", "seed-file": "seed", "log-file": "log"}
        words = [f"--{option}={munge / name}" for option, name in options.items()]
        self._start("munged", ["munged", "--foreground", "--force", *words])
        self._wait((munge / "socket").exists, "munge's socket")

    def _start_accounting(self) -> None:
        data = self.folder / "mariadb"
        sql_port, dbd_port = free_ports(2)
        if not data.exists():
            words = ["mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={data}", "--skip-test-db"]
            subprocess.run([*words, "--auth-root-authentication-method=normal"], check=True, capture_output=True)
        start_up = self.folder / "start.sql"
        start_up.write_text(
            "CREATE USER IF NOT EXISTS slurm@'127.0.0.1' IDENTIFIED BY 'slurm';\n"
            "GRANT ALL ON slurm_acct.* TO slurm@'127.0.0.1';\nCREATE DATABASE IF NOT EXISTS slurm_acct;\n"
        )
        words = ["mariadbd", "--no-defaults", "--user=root", f"--datadir={data}", f"--socket={self.folder}/sql"]
        words += [f"--pid-file={self.folder}/mariadb.pid", "--bind-address=127.0.0.1", f"--port={sql_port}"]
        words += ["--skip-name-resolve", f"--init-file={start_up}", "--innodb-buffer-pool-size=32M"]
        words += ["--innodb-log-file-size=8M", "--innodb-lock-wait-timeout=900"]
        self._start("mariadbd", words)
        self._wait(lambda: is_listening(sql_port), "MariaDB")
        conf = self.folder / "slurmdbd.conf"
        conf.write_text(
            SLURMDBD_CONF.format(host=socket.gethostname(), folder=self.folder, dbd_port=dbd_port, sql_port=sql_port)
        )
        conf.chmod(0o600)
        # slurmdbd looks for its configuration beside the file that SLURM_CONF names.
        self._start("slurmdbd", ["slurmdbd", "-D"])
        self._wait(lambda: is_listening(dbd_port), "slurmdbd")
        self._dbd_port = dbd_port
        # sacctmgr reads slurm.conf for where slurmdbd is, and nothing else of it.
        (self.folder / "slurm.conf").write_text(
            f"ClusterName=dev\nSlurmctldHost={socket.gethostname()}(127.0.0.1)\nAuthType=auth/munge\n"
            f"AuthInfo=socket={self.folder}/munge/socket\n{self._accounting_lines()}\n"
        )
        for words in (("cluster", "dev"), ("account", ACCOUNT), ("user", "root", f"account={ACCOUNT}")):
            self._command("sacctmgr", "--immediate", "--quiet", "add", *words)

    def _accounting_lines(self) -> str:
        return (
            "AccountingStorageType=accounting_storage/slurmdbd\nAccountingStorageHost=127.0.0.1\n"
            # For munge, the "password" is the path of its socket.
            f"AccountingStoragePort={self._dbd_port}\nAccountingStoragePass={self.folder}/munge/socket\n"
            "AccountingStorageEnforce=associations\nJobAcctGatherType=jobacct_gather/none"
        )

    def _idle(self) -> int:
        return self._command("sinfo", "-h", "-N", "-p", "normal", "-t", "idle", "-o", "%N").count("\n")

    def _command(self, *words: str) -> str:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=20, env={**os.environ, **self.environment}, check=False
        )
        return done.stdout

    def _start(self, name: str, words: list[str]) -> None:
        with open(self.folder / "logs" / f"{name}.out", "ab") as log:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self.environment},
                start_new_session=True,  # Ctrl-C in a terminal is not for the daemons
                preexec_fn=die_with_parent if self._tied else None,
            )
        self._children.append(process)
        processes = self._processes()
        processes[name] = process.pid
        (self.folder / "processes.json").write_text(json.dumps(processes))
        time.sleep(0.05)
        if process.poll() is not None:
            raise ClusterError(f"{name} ended at once; see {self.folder}/logs")

    def _processes(self) -> dict[str, int]:
        with contextlib.suppress(OSError, ValueError):
            return dict(json.loads((self.folder / "processes.json").read_text()))
        return {}

    def _alive(self) -> dict[str, int]:
        return {name: pid for name, pid in self._processes().items() if self._is_daemon(pid, name)}

    def _is_daemon(self, pid: int, name: str) -> bool:
        """Whether a process is still the daemon that was started, and not another one with its number."""
        words = words_of(pid)
        return bool(words) and Path(words[0]).name == name.partition("-")[0] and not is_gone(pid)

    def _is_ours(self, pid: int) -> bool:
        return variable_of(pid, "SLURM_CONF") == self.environment["SLURM_CONF"] and bool(
            variable_of(pid, "SLURM_JOB_ID") or (words_of(pid) or [""])[0].startswith("slurmstepd")
        )

    def _path(self, name: str) -> str:
        return str(self.folder / name)

    def _wait(self, condition: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise ClusterError(f"waited {seconds:.0f} s in vain for {what}; see {self.folder}/logs")
            time.sleep(0.1)


def install(accounting: bool) -> None:
    """Installs what is missing from Debian's packages; raises ClusterError, saying what is needed, where it may not."""
    needed = {**PROGRAMS, **(ACCOUNTING_PROGRAMS if accounting else {})}
    missing = sorted({package for program, package in needed.items() if shutil.which(program) is None})
    if not missing:
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise ClusterError(f"not installed: {' '.join(missing)} (as Debian and Ubuntu name them); install them first")
    print(f"installing {' '.join(missing)}", file=sys.stderr)
    quiet = {"stdout": subprocess.DEVNULL, "env": {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}}
    # The packages would start a cluster of their own; a policy file keeps them from it.
    policy = Path("/usr/sbin/policy-rc.d")
    mine = not policy.exists()
    if mine:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        subprocess.run(["apt-get", "update", "-qq"], check=False, **quiet)
        words = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing]
        if subprocess.run(words, check=False, **quiet).returncode:
            raise ClusterError(f"apt-get could not install {' '.join(missing)}")
    finally:
        if mine:
            policy.unlink()


def main() -> int:
    """Runs one of the commands in the module's docstring."""
    parser = argparse.ArgumentParser(description="A private, real Slurm on one machine.")
    parser.add_argument("--folder", type=Path, default=Path(".devcluster"), help="where all of it lies")
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="install what is missing, and start")
    up.add_argument("--nodes", type=int, default=4)
    up.add_argument("--gpus", type=int, default=2, help="GPUs of each node (for counting only)")
    up.add_argument("--accounting", action="store_true", help="with slurmdbd and MariaDB, for sacct")
    up.add_argument("--grace", type=int, default=20, help="seconds that partition normal gives a preempted job")
    up.add_argument("--kill-wait", type=int, default=20, help="seconds between SIGTERM and SIGKILL")
    up.add_argument("--max-array-size", type=int, default=1001)
    commands.add_parser("down", help="stop what `up` started")
    commands.add_parser("env", help="print what Slurm's commands need, for eval")
    install_parser = commands.add_parser("install", help="install what is missing, no more")
    install_parser.add_argument("--accounting", action="store_true")
    node = commands.add_parser("node", help="kill or start a node")
    node.add_argument("name")
    node.add_argument("action", choices=["kill", "kill-with-tasks", "start"])
    options = parser.parse_args()
    cluster = DevCluster(options.folder)
    try:
        if options.command == "up":
            install(options.accounting)
            cluster.up(
                options.nodes, options.gpus, options.accounting, options.grace, options.kill_wait,
                options.max_array_size,
            )  # fmt: skip
            print(f'{options.nodes} nodes are idle; now: eval "$({sys.argv[0]} --folder {options.folder} env)"')
        elif options.command == "down":
            cluster.down()
        elif options.command == "install":
            install(options.accounting)
        elif options.command == "env":
            print("\n".join(f"export {key}='{value}'" for key, value in cluster.environment.items()))
        elif options.action == "start":
            cluster.start_node(options.name)
        else:
            cluster.kill_node(options.name, with_tasks=options.action == "kill-with-tasks")
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
