"""``ray up cluster.yaml`` -> ``ray job submit`` -> ``ray down``, with a real sshd, in namespaces of their own."""

from __future__ import annotations

import importlib.metadata
import json
import os
import secrets
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NEEDED = {"unshare": "util-linux", "sshd": "openssh-server", "ssh": "openssh-client", "rsync": "rsync"}
NEEDED |= {"ip": "iproute2", "curl": "curl", "pgrep": "procps"}
RUN_TIMEOUT_S = 900
NAMESPACES = ["unshare", "--pid", "--net", "--mount", "--fork", "--kill-child", "--mount-proc"]


@pytest.fixture
def work() -> Iterator[Path]:
    """A short path: a socket's has at most 107 characters."""
    folder = Path(tempfile.mkdtemp(prefix="up-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def need_a_machine_to_ourselves(work: Path) -> None:
    """Skip where namespaces, programs or packages are missing, and say which."""
    if os.geteuid() != 0:
        pytest.skip("needs root: ray up wants an sshd and namespaces of its own")
    path = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
    for program, package in NEEDED.items():
        if shutil.which(program, path=path) is None:
            pytest.skip(f"{program} is not installed (apt-get install {package})")
    for name in ("lower", "upper", "scratch", "both"):
        (work / "probe" / name).mkdir(parents=True)
    layers = "lowerdir=lower,upperdir=upper,workdir=scratch"
    probe = [*NAMESPACES, "mount", "-t", "overlay", "overlay", "-o", layers, "both"]
    tried = subprocess.run(probe, cwd=work / "probe", capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"namespaces with an overlay are not allowed here: {tried.stderr.strip()}")


def fetch_missing_pins(folder: Path) -> None:
    """Nodes install all pins and see no network: what this environment lacks (packages of other extras) is fetched."""
    installed = {_normal(dist.name): dist.version for dist in importlib.metadata.distributions()}
    pins = [line.partition("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").split()]
    missing = [f"{name}=={version}" for name, _, version in pins if installed.get(_normal(name)) != version]
    folder.mkdir()
    if missing:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), *missing]
        fetched = subprocess.run(download, capture_output=True, text=True, timeout=300, check=False)
        if fetched.returncode:
            pytest.skip(f"not installed and not to be had: {', '.join(missing)}")


def environment_of_the_tests() -> set[str]:
    """Its packages, read from the disk anew."""
    return {path.name for path in Path(sysconfig.get_path("purelib")).glob("*.dist-info")}


def _normal(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


@pytest.mark.slow
@pytest.mark.timeout(RUN_TIMEOUT_S + 360)
def test_a_cluster_comes_up_runs_a_job_and_goes_down(work: Path) -> None:
    need_a_machine_to_ourselves(work)
    fetch_missing_pins(work / "wheels")
    text = (ROOT / "cluster.yaml").read_text(encoding="utf-8")
    assert "ssh_user: ray\n" in text
    pins = "~/deepseek-ray/constraints.txt: constraints.txt"
    (work / "cluster.yaml").write_text(text.replace("ssh_user: ray\n", "ssh_user: root\n"))
    assert pins in text  # relative to the checkout, where ray up is called
    before = environment_of_the_tests()
    key = secrets.token_hex(16)
    (work / "key").write_text(key)
    tail = f"--preset debug --set train.num_workers=1 --run {work / 'run'}"
    jobs = [
        "python -c print('length',len(__import__('os').environ['DEEPSEEK_RAY_API_KEY']))",
        f"python -m pipelines.risk.ingest --synthetic {tail}",
        f"python -m pipelines.risk.train {tail}",
    ]
    (work / "jobs").write_text("\n".join(jobs) + "\n")
    environment = os.environ | {
        "WORK": str(work),
        "ENVIRONMENT": str(Path(sys.prefix).resolve()),
        "ROOT": str(ROOT),
        "PYTHON_HOME": str(Path(sys.base_prefix).resolve()),
        "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
    }
    environment.pop("DEEPSEEK_RAY_API_KEY", None)
    script = [*NAMESPACES, "bash", str(Path(__file__).with_name("ray_up.sh"))]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=RUN_TIMEOUT_S, check=False)
    shown = done.stdout + done.stderr
    assert done.returncode == 0, shown[-8000:]
    assert "--- refused without the token: 401" in shown
    assert "length 32" in shown
    assert shown.count("succeeded") >= len(jobs), shown[-8000:]
    described = next(line for line in shown.splitlines() if line.startswith("--- described: "))
    assert len(json.loads(described.removeprefix("--- described: "))) == len(jobs)
    assert key not in shown
    assert "--- left: 0" in shown
    registered = json.loads((work / "run" / "results" / "train.json").read_text())
    assert registered["rows_train"] > 0
    assert environment_of_the_tests() == before, "the cluster's nodes wrote into the environment of the tests"
