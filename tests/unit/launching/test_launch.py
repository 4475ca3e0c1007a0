"""The run folder and the launcher: states, locks, exit codes; the worker is a small program of the test's own."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from alignlab import heartbeat, processes
from alignlab.cli import main
from alignlab.configuration.frozen import load_frozen
from alignlab.errors import AlignlabError, BusyError, ConfigError, DataError, StorageError
from alignlab.launching import agent, launch, supervise
from alignlab.request import Request, make_request
from alignlab.runfolder import OURS, RunFolder

WORDS = ["objective=dpo", "model=tiny", "data=sums", "run.name=here"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


def request(*tokens: str) -> Request:
    return make_request("train", [*WORDS, *tokens])


def worker(monkeypatch: pytest.MonkeyPatch, work: Any) -> list[str]:
    """Let ``alignlab.worker.main`` be ``work(folder)``; returns the list of folders it was called with."""
    seen: list[str] = []
    module = ModuleType("alignlab.worker")

    def run(folder: str) -> int:
        seen.append(folder)
        return int(work(RunFolder(folder)))

    module.main = run  # type: ignore[attr-defined]
    import alignlab

    monkeypatch.setitem(sys.modules, "alignlab.worker", module)
    monkeypatch.setattr(alignlab, "worker", module, raising=False)
    return seen


def done(folder: RunFolder) -> int:
    folder.write_status(state="done", exit_code=0, step=3)
    return 0


def test_a_run_from_new_to_finished(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen = worker(monkeypatch, done)
    assert launch.launch(request()) == 0
    folder = RunFolder("runs/here")
    assert seen == ["runs/here"]
    assert load_frozen(folder.path).run.name == "here"
    assert folder.status()["state"] == "done"
    assert folder.status()["attempt"] == 1
    assert json.loads(folder.env_json.read_text())["packages"]["torch"]
    assert not folder.owner.exists()
    capsys.readouterr()
    assert launch.launch(request()) == 0
    assert "(finished)" in capsys.readouterr().out
    assert len(seen) == 1


def test_an_unfinished_run_goes_on_and_another_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def preempted(folder: RunFolder) -> int:
        (folder.checkpoints / "checkpoint-2").mkdir(parents=True, exist_ok=True)
        folder.write_status(state="preempted", exit_code=75, step=2)
        return 75

    worker(monkeypatch, preempted)
    assert launch.launch(request()) == 75
    assert launch.launch(request("train.save_steps=1", "engine=local")) == 75
    status = RunFolder("runs/here").status()
    assert (status["attempt"], status["step"]) == (2, 2)
    with pytest.raises(ConfigError, match=r"objective.beta: 0.1 -> 0.2.*overwrite=true"):
        launch.launch(request("objective.beta=0.2"))
    with pytest.raises(ConfigError, match="resume=never"):
        launch.launch(request("resume=never"))
    keep = Path("runs/here/mine.txt")
    keep.write_text("kept")
    worker(monkeypatch, done)
    assert launch.launch(request("objective.beta=0.2", "overwrite=true")) == 0
    assert RunFolder("runs/here").status()["attempt"] == 1
    assert not RunFolder("runs/here").checkpoints.exists()
    assert keep.read_text() == "kept"


def test_changed_contents_are_another_run(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("rows.jsonl").write_text("{}\n")
    worker(monkeypatch, lambda folder: folder.write_status(state="failed", step=5, exit_code=3, error="nan") and 3)
    with pytest.raises(AlignlabError, match="nan") as caught:
        launch.launch(request("data=rows.jsonl"))
    assert caught.value.exit_code == 3
    Path("rows.jsonl").write_text('{"b": 1}\n')
    with pytest.raises(ConfigError, match=r"data.path.*contents changed"):
        launch.launch(request("data=rows.jsonl"))


def test_foreign_folders_are_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    worker(monkeypatch, done)
    Path("runs/here").mkdir(parents=True)
    Path("runs/here/thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="no run"):
        launch.launch(request())
    assert os.listdir("runs/here") == ["thesis.tex"]
    Path("elsewhere").mkdir()
    Path("runs/link").symlink_to(Path("elsewhere").resolve())
    with pytest.raises(ConfigError, match="link"):
        launch.launch(request("run.name=link"))


def test_a_start_that_died_before_it_froze_its_configuration_is_no_stranger(monkeypatch: pytest.MonkeyPatch) -> None:
    worker(monkeypatch, done)
    Path("runs/here/logs").mkdir(parents=True)
    Path("runs/here/.run.yaml.4711.tmp").write_text("model:")
    assert launch.launch(request()) == 0
    assert RunFolder("runs/here").status()["attempt"] == 1


def test_a_start_that_comes_before_the_configuration_is_frozen_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first owner has made its folders and no run.yaml yet: the second is refused as second, not as a stranger."""
    seen = worker(monkeypatch, done)
    folder = RunFolder("runs/here")
    with folder.claim():
        folder.logs.mkdir()
        (folder.path / ".keys.json.4711.tmp").write_text("{}")  # whatever stands there: it is not this start's to judge
        with pytest.raises(BusyError, match=f"process {os.getpid()} on"):
            launch.launch(request())
    assert seen == []


def test_errors_reach_status_and_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def bad_rows(folder: RunFolder) -> int:
        raise DataError("rows.jsonl line 3: no 'chosen'")

    worker(monkeypatch, bad_rows)
    assert main(["train", *WORDS]) == 2
    captured = capsys.readouterr()
    assert captured.err == "alignlab: rows.jsonl line 3: no 'chosen'\n"
    assert RunFolder("runs/here").status()["exit_code"] == 2

    def our_bug(folder: RunFolder) -> int:
        raise KeyError("oops hf_abcdefghijklmnopqrstuvwxyz")

    worker(monkeypatch, our_bug)
    assert main(["train", *WORDS, "--json"]) == 70
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "log.txt" in captured.err
    assert json.loads(captured.out)["exit_code"] == 70
    log = RunFolder("runs/here").log.read_text()
    assert "Traceback" in log
    assert "hf_abc" not in log + captured.err + captured.out + Path("runs/here/status.json").read_text()


def test_a_second_start_is_told_who_is_there() -> None:
    folder = RunFolder("runs/here")
    with folder.claim(), pytest.raises(BusyError, match=f"process {os.getpid()} on"), folder.claim():
        pass
    assert not folder.owner.exists()


def test_a_dead_owner_is_taken_over() -> None:
    script = (
        "import os\nfrom alignlab.runfolder import RunFolder\n"
        "claim = RunFolder('runs/here').claim()\nclaim.__enter__()\nos._exit(9)"
    )
    subprocess.run([sys.executable, "-c", script], check=False)
    folder = RunFolder("runs/here")
    assert folder.owner.exists()
    with folder.claim():
        assert json.loads(folder.owner.read_text())["pid"] == os.getpid()


def test_an_owner_on_another_host_is_judged_by_its_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    from alignlab.data import cache

    monkeypatch.setattr(cache, "STALE_AFTER", 4.0)
    folder = RunFolder("runs/here")
    folder.path.mkdir(parents=True)
    foreign = {"token": "t", "host": "elsewhere", "pids": None, "pid": 1, "started": None, "job": "7", "restart": 0}
    folder.owner.write_text(json.dumps(foreign))
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.2):
            os.utime(folder.owner)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(BusyError, match="process 1 on elsewhere, job 7"), folder.claim():
            pass
    finally:
        ended.set()
        thread.join()


def test_the_same_job_restarted_takes_over_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder("runs/here")
    folder.path.mkdir(parents=True)
    foreign = {"token": "t", "host": "elsewhere", "pids": None, "pid": 1, "started": None, "job": "7", "restart": 0}
    folder.owner.write_text(json.dumps(foreign))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with folder.claim():
        assert folder._owner()["restart"] == 1


def test_one_of_many_wins() -> None:
    won: list[int] = []
    start, held = threading.Barrier(8), threading.Barrier(8)

    def claim() -> None:
        start.wait()
        try:
            with RunFolder("runs/here").claim():
                won.append(1)
                held.wait()
        except BusyError:
            held.wait()

    threads = [threading.Thread(target=claim) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert won == [1]


def test_status_is_whole_or_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)
    folder.write_status(state="running", step=1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        folder.write_status(step=2)
    assert folder.status()["step"] == 1
    assert os.listdir(tmp_path) == ["status.json"]
    folder.status_json.write_text("{")
    with pytest.raises(StorageError, match="cannot be read"):
        folder.status()


def test_clear_removes_only_what_is_ours(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    for name in OURS:
        (folder.path / name).mkdir()
    (folder.path / "model").rmdir()
    (folder.path / "model").symlink_to(outside)
    (folder.path / "notes.md").write_text("x")
    folder.clear()
    assert os.listdir(folder.path) == ["notes.md"]
    assert (outside / "precious").exists()


def test_decisions() -> None:
    assert launch.decide(request().config)[0] in ("inline", "torchrun")
    assert launch.decide(request("launch.nproc=2").config) == ("torchrun", 2)
    assert launch.decide(request("engine=local").config) == ("inline", 1)
    assert launch.decide(request("launch=torchrun", "launch.nproc=1").config) == ("torchrun", 1)
    os.environ.update(TORCHELASTIC_RUN_ID="x", RANK="1", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    try:
        assert launch.decide(request("launch.nproc=2").config) == ("in place", 2)
        with pytest.raises(ConfigError, match="torchrun started several"):
            launch.decide(request("engine=local").config)
    finally:
        for name in ("TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            del os.environ[name]


def test_dry_run_touches_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.launch(request("launch.dry_run=true", "launch.nproc=2")) == 0
    out = capsys.readouterr().out
    assert "--nproc-per-node 2" in out
    assert "--shutdown-timeout" in out
    assert "SIGUSR2" in out
    assert os.listdir(".") == []


CHILD = """
import signal, sys, time
from alignlab.runfolder import RunFolder
folder = RunFolder(sys.argv[1])
def stop(number, frame):
    folder.write_status(state="preempted", exit_code=75)
    sys.exit(1)  # torchrun makes every code 1
signal.signal(signal.SIGUSR2, stop)
(folder.path / "ready").touch()
time.sleep(60)
"""


def test_signals_are_passed_on_and_the_code_comes_from_the_status(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.write_status(state="running")

    def send() -> None:
        while not (folder.path / "ready").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGUSR2)

    thread = threading.Thread(target=send)
    thread.start()
    code = launch.supervise(folder, [sys.executable, "-c", CHILD, str(folder.path)])
    thread.join()
    assert code == 75
    assert launch.finish(request(), folder, code) == 75


def test_workers_that_vanish_are_a_lost_rank(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_status(state="running")
    code = launch.supervise(folder, [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])
    with pytest.raises(AlignlabError, match="SIGKILL") as caught:
        launch.finish(request(), folder, code)
    assert caught.value.exit_code == 5


def test_done_is_done_whatever_the_processes_did_afterwards(tmp_path: Path) -> None:
    """Teardown of a process group can abort after all is written."""
    folder = RunFolder(tmp_path)
    folder.write_status(state="done", exit_code=0, step=7)
    for code in (1, -signal.SIGABRT, 5):
        assert launch.finish(request(), folder, code) == 0
    assert folder.status()["state"] == "done"


def test_a_signal_that_nobody_could_answer_is_a_preemption(tmp_path: Path) -> None:
    """The agent dies of the signal itself while it still imports: no rank has started."""
    folder = RunFolder(tmp_path)
    folder.write_status(state="running")
    code = launch.supervise(folder, [sys.executable, "-c", "import os; os.kill(os.getpid(), 12)"])
    with pytest.raises(AlignlabError, match="before the ranks could save"):
        launch.finish(request(), folder, code)
    assert (folder.status()["state"], folder.status()["exit_code"]) == ("preempted", 75)


def test_a_signal_before_the_start_starts_nothing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with processes.StopFlag().installed():
        os.kill(os.getpid(), signal.SIGTERM)
        assert launch.supervise(folder, ["/no/such/program"]) == 75


@pytest.mark.parametrize(
    ("codes", "how", "rank"),
    [({}, "hung", 1), ({1: -9}, "was killed by SIGKILL", 1), ({0: 3}, "ended with exit code 3", 0)],
)
def test_the_lost_rank_is_named(tmp_path: Path, codes: dict[int, int], how: str, rank: int) -> None:
    folder = RunFolder(tmp_path)
    folder.logs.mkdir()
    folder.write_status(state="running", step=1)
    for number, (phase, beats) in enumerate([("update", 9), ("forward", 7), ("update", 9)]):
        beat = heartbeat.Beat(number, "here", 100 + number, 3, 2, phase, beats, 0.0, ended=number == 2)
        heartbeat.path_of(folder.logs, number).write_text(json.dumps(dataclasses.asdict(beat)))
    if codes:
        agent.write_report(folder.logs, codes)
    with pytest.raises(AlignlabError, match=f"rank {rank} {how} at step 3") as caught:
        launch.finish(request(), folder, 5)
    status = folder.status()
    assert (caught.value.exit_code, status["exit_code"], status["step"]) == (5, 5, 2)
    assert {key: status["lost"][key] for key in ("rank", "step", "how")} == {"rank": rank, "step": 3, "how": how}


OUTLIVES = """
import sys, time
from alignlab.runfolder import RunFolder
RunFolder(sys.argv[1]).write_status(state=sys.argv[2], exit_code=0)
time.sleep(60)
"""


@pytest.mark.parametrize("state", ["done", "failed", "preempted"])
def test_ranks_that_outlive_the_outcome_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str) -> None:
    monkeypatch.setattr(supervise, "GRACE_SECONDS", 0.5)
    folder = RunFolder(tmp_path)
    folder.write_status(state="running")
    begun = time.monotonic()
    assert launch.supervise(folder, [sys.executable, "-c", OUTLIVES, str(tmp_path), state]) == 5
    assert time.monotonic() - begun < 30


DEAD_RANK = """
import os, subprocess, sys, time
from pathlib import Path
from alignlab import heartbeat
if os.fork() == 0:
    heartbeat.start(Path(sys.argv[1]), 1)
    os.kill(os.getpid(), 9)
time.sleep(60)
"""


def test_a_dead_rank_ends_the_job_though_the_others_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "GRACE_SECONDS", 0.5)
    folder = RunFolder(tmp_path)
    folder.write_status(state="running")
    folder.logs.mkdir()
    assert launch.supervise(folder, [sys.executable, "-c", DEAD_RANK, str(folder.logs)]) == 5


def test_a_start_whose_folder_was_taken_over_ends_its_ranks(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with folder.claim():
        folder.write_status(state="running", attempt=2)
        folder.owner.write_text(json.dumps({"token": "another", "pid": 1, "host": "elsewhere"}))
        with pytest.raises(BusyError, match="process 1 on elsewhere"):
            launch.supervise(folder, [sys.executable, "-c", "import time; time.sleep(60)"])
        assert folder.disowned
    assert folder.status()["state"] == "running"


def test_a_start_whose_folder_was_taken_over_writes_no_status() -> None:
    def taken_over() -> None:
        with launch.owned(request()) as (folder, _):
            folder.owner.write_text(json.dumps({"token": "another", "pid": 1, "host": "elsewhere"}))
            raise BusyError("taken over")

    with pytest.raises(BusyError):
        taken_over()
    assert RunFolder("runs/here").status()["state"] == "running"


GROUP = """
import os, sys
from types import ModuleType
import alignlab
module = ModuleType("alignlab.worker")
def work(folder):
    from alignlab.runfolder import RunFolder
    from alignlab.configuration.frozen import load_frozen
    assert load_frozen(RunFolder(folder).path).run.name == "here"
    open(f"{folder}/rank{os.environ['RANK']}", "w").close()
    if os.environ["RANK"] == "0":
        RunFolder(folder).write_status(state="done", exit_code=0)
    return 0
module.main = work
sys.modules["alignlab.worker"] = alignlab.worker = module
from alignlab.cli import main
sys.exit(main(sys.argv[1:]))
"""


def _group(tmp_path: Path, words: dict[int, list[str]]) -> list[subprocess.CompletedProcess[str]]:
    script = tmp_path / "group.py"
    script.write_text(textwrap.dedent(GROUP))
    shared = {
        "TORCHELASTIC_RUN_ID": "t",
        "MASTER_ADDR": "h",
        "MASTER_PORT": "1",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }
    started = [
        subprocess.Popen(
            [sys.executable, str(script), "train", *words[rank]], text=True, stderr=subprocess.PIPE,
            stdout=subprocess.PIPE, env={**os.environ, **shared, "RANK": str(rank)},
        )
        for rank in (1, 0)
    ]  # fmt: skip
    outputs = [(child, *child.communicate(timeout=120)) for child in started]
    return [subprocess.CompletedProcess(c.args, c.returncode, out, err) for c, out, err in outputs][::-1]


def test_ranks_of_a_torchrun_agree_through_the_folder(tmp_path: Path) -> None:
    first, second = _group(tmp_path, {0: WORDS, 1: WORDS})
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert {"rank0", "rank1", "run.yaml"} <= set(os.listdir("runs/here"))


def test_ranks_with_other_numbers_stop(tmp_path: Path) -> None:
    first, second = _group(tmp_path, {0: WORDS, 1: [*WORDS, "seed=5"]})
    assert first.returncode == 0
    assert second.returncode == 2
    assert not Path("runs/here/rank1").exists()


def test_captured_output_catches_prints_and_gives_the_terminal_back(tmp_path: Path, capfd: Any) -> None:
    folder = RunFolder(tmp_path)
    script = (
        "import os, sys\nfrom alignlab.launching.launch import captured_output\n"
        "from alignlab.runfolder import RunFolder\n"
        f"with captured_output(RunFolder({str(tmp_path)!r}), 0) as console:\n"
        "    print('chatter'); os.write(2, b'c code')\n    print('line', file=console)\nprint('after')\n"
    )
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert answer.stdout == "line\nafter\n"
    assert answer.stderr == ""
    assert "chatter" in folder.log.read_text()
    assert "c code" in folder.log.read_text()
