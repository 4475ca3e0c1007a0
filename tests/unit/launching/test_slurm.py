"""Slurm without a cluster: node lists, ranks, the script."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from pathlib import Path

import pytest

from alignlab.cli import main
from alignlab.configuration.frozen import load_frozen
from alignlab.errors import ConfigError
from alignlab.launching import slurm
from alignlab.launching.launch import settle, torchrun
from alignlab.request import make_request
from alignlab.runfolder import RunFolder

WORDS = ["objective=dpo", "model=tiny", "data=sums", "run.name=here"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith("SLURM_"):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("gpu01", ["gpu01"]),
        ("gpu01,gpu02", ["gpu01", "gpu02"]),
        ("gpu[1-3]", ["gpu1", "gpu2", "gpu3"]),
        ("gpu[008-011,7],login1", ["gpu008", "gpu009", "gpu010", "gpu011", "gpu7", "login1"]),
        ("r[1-2]n[01-02]-ib", ["r1n01-ib", "r1n02-ib", "r2n01-ib", "r2n02-ib"]),
        ("a[1,3]x,b[09-10]", ["a1x", "a3x", "b09", "b10"]),
    ],
)
def test_node_lists(text: str, hosts: list[str]) -> None:
    assert slurm.expand_nodelist(text) == hosts


@pytest.mark.parametrize("text", ["gpu[1-", "gpu[a-b]", "gpu[1-x]", "gpu[]"])
def test_broken_node_lists(text: str) -> None:
    with pytest.raises(ConfigError, match="node list"):
        slurm.expand_nodelist(text)


def environment(node: int, **more: str) -> dict[str, str]:
    return {
        "SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "gpu[08-10]", "SLURM_NODEID": str(node), "SLURM_LOCALID": "0",
        **more,
    }  # fmt: skip


def test_every_node_computes_the_same_rendezvous_and_its_own_ranks() -> None:
    places = [slurm.allocation(environment(node)) for node in range(3)]
    assert {place.token for place in places} == {"slurm:123456:0:0"}
    ranks: list[int] = []
    for place in places:
        command = torchrun(RunFolder("runs/x"), 4, place.rendezvous())
        options = dict(zip(command[4::2], command[5::2], strict=False))
        assert options["--master-addr"] == "gpu08"
        assert options["--master-port"] == str(20000 + 123456 % 20000)
        assert options["--nnodes"] == "3"
        node, processes = int(options["--node-rank"]), int(options["--nproc-per-node"])
        ranks += [node * processes + local for local in range(processes)]
    assert ranks == list(range(12))
    alone = slurm.allocation(environment(0, SLURM_JOB_NODELIST="gpu08"))
    assert "127.0.0.1" in alone.rendezvous()
    assert slurm.allocation(environment(0, SLURM_RESTART_COUNT="2")).token != places[0].token


def test_wrong_starts_are_explained() -> None:
    with pytest.raises(ConfigError, match="inside an allocation"):
        slurm.allocation({})
    with pytest.raises(ConfigError, match="one task a node"):
        slurm.allocation(environment(0, SLURM_LOCALID="1"))
    with pytest.raises(ConfigError, match="not among"):
        slurm.allocation(environment(3))


def test_the_script(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["launch=sbatch", "launch.dry_run=true", "launch.nnodes=2", "launch.nproc=8", "launch.partition=gpu"]
    assert main(["train", *WORDS, *words, "launch.extra=[--constraint=h100]"]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert lines[0] == "#!/bin/bash"
    for option in (
        "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=8", "--signal=USR2@180", "--requeue", "--open-mode=append",
        "--partition=gpu", "--constraint=h100", "--time=24:00:00", "--job-name=here",
    ):  # fmt: skip
        assert f"#SBATCH {option}" in lines
    assert "train runs/here/run.yaml launch=slurm" in text
    assert "scontrol requeue" in text
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    assert os.listdir(tmp_path) == []


def test_submitting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="no sbatch"):
        slurm.submit(make_request("train", [*WORDS, "launch=sbatch"]))
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "sbatch").write_text('#!/bin/sh\ncp "$2" submitted.sh\necho "4711;cluster"\n')
    (tools / "sbatch").chmod((tools / "sbatch").stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    assert main(["train", *WORDS, "launch=sbatch", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["job"] == "4711"
    folder = RunFolder("runs/here")
    assert Path("submitted.sh").read_text() == (folder.path / "launch.sbatch").read_text()
    assert folder.status()["state"] == "submitted"
    assert load_frozen(folder.path).run.name == "here"
    inside = make_request("train", ["runs/here/run.yaml", "launch=slurm"])
    assert inside.config.launch.name == "slurm"
    assert settle(folder, inside) == "new"
    assert folder.status()["attempt"] == 1


def test_a_refused_job_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sbatch").write_text('#!/bin/sh\necho "sbatch: error: invalid account" >&2\nexit 1\n')
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ConfigError, match="invalid account"):
        slurm.submit(make_request("train", [*WORDS, "launch=sbatch"]))
