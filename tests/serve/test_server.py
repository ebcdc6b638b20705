"""A running server: batches, overload, reload, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import httpx
import psutil
import pytest
from fake_ranker import serving, until

pytestmark = pytest.mark.slow
BODY = {"user_id": "u1", "candidates": ["i2", "i3"]}
SLOW = {"user_id": "u1", "candidates": ["slow"]}


def gone(processes: list[psutil.Process]) -> bool:
    return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)


def test_overload_batches_and_a_request_that_ends_the_inference_process(
    tmp_path: Path,
) -> None:
    """Four may wait or run: of sixteen at once some are told to come again, and the others are answered together.

    One whose request ends the inference process gets 503, and the next process answers.
    """
    with (
        serving(tmp_path, "--max_waiting_requests", 4) as (_, address),
        ThreadPoolExecutor(16) as pool,
    ):
        answers = list(
            pool.map(
                lambda _: httpx.post(f"{address}/v1/rank", json=SLOW, timeout=30), range(16)
            )
        )
        assert set(Counter(a.status_code for a in answers)) == {200, 429}
        refused = next(a for a in answers if a.status_code == 429)
        assert (refused.headers["retry-after"], refused.json()["error_type"]) == (
            "1",
            "overloaded",
        )
        together = httpx.get(f"{address}/metrics").text
        assert 'exitrec_batch_requests_bucket{le="+Inf"} 4.0' in together
        assert 'exitrec_batch_requests_bucket{le="1.0"} 4.0' not in together
        deadly = BODY | {"candidates": [{"item_id": "die", "title": "x"}]}
        assert httpx.post(f"{address}/v1/rank", json=deadly, timeout=60).status_code == 503
        assert httpx.post(f"{address}/v1/rank", json=BODY, timeout=60).status_code == 200


def test_a_message_that_is_longer_than_the_pipes_buffer(tmp_path: Path) -> None:
    """2 MB to the inference process and back: uvloop makes the pipe non-blocking, which ended the process."""
    candidates = [{"title": f"{k} {'x' * 1990}"} for k in range(1000)]
    with serving(tmp_path) as (_, address):
        for _ in range(3):
            body = {"user_id": "u1", "candidates": candidates}
            assert (
                httpx.post(f"{address}/v1/rank", json=body, timeout=60).status_code == 200
            )


def test_reload_drops_nothing(tmp_path: Path) -> None:
    """Under load it switches to the newest run, by HTTP and by SIGHUP; a broken one is not switched to."""
    with serving(tmp_path) as (process, address), ThreadPoolExecutor(4) as pool:
        stop, latest = Event(), tmp_path / "latest"
        answers = list[tuple[int, str]]()  # status, name of the run that answered

        def ask(_: int) -> None:
            with httpx.Client(timeout=30) as client:
                while not stop.is_set():
                    answer = client.post(f"{address}/v1/rank", json=BODY)
                    answers.append((answer.status_code, answer.json().get("model")))

        def switch(name: str, by_signal: bool) -> None:
            (tmp_path / name).mkdir()
            latest.unlink(missing_ok=True)
            latest.symlink_to(name)
            if by_signal:
                process.send_signal(signal.SIGHUP)
            else:
                assert httpx.post(f"{address}/v1/reload").status_code == 202

        asking = [pool.submit(ask, k) for k in range(4)]
        until(lambda: (200, "run") in answers)  # the load is there before the first switch
        for name, by_signal in (("second", False), ("third", True), ("fourth", False)):
            switch(name, by_signal)
            until(lambda: (200, name) in answers)  # noqa: B023
        (tmp_path / "fifth").mkdir()
        (tmp_path / "fifth/broken").touch()
        latest.unlink()
        latest.symlink_to("fifth")
        httpx.post(f"{address}/v1/reload")
        time.sleep(0.5)
        stop.set()
        for a in asking:
            a.result()
        assert {status for status, _ in answers} == {200}
        assert {name for _, name in answers} == {"run", "second", "third", "fourth"}
        assert httpx.get(f"{address}/info").json()["run"] == "fourth"


@pytest.mark.parametrize("to_all", [False, True])
def test_sigterm_finishes_what_is_in_flight(
    to_all: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """To the first process, or to all, as from a terminal or a container's runtime: nothing but JSON is logged."""
    with serving(tmp_path) as (process, address), ThreadPoolExecutor(3) as pool:
        children = psutil.Process(process.pid).children(recursive=True)
        asking = [
            pool.submit(httpx.post, f"{address}/v1/rank", json=SLOW, timeout=30)
            for _ in range(3)
        ]
        until(lambda: "exitrec_queue 3.0" in httpx.get(f"{address}/metrics").text)
        if to_all:
            os.killpg(process.pid, signal.SIGTERM)
        else:
            process.terminate()
        assert [a.result().status_code for a in asking] == [200] * 3
        assert process.wait(30) == 0
        until(lambda: gone(children))
    written = capfd.readouterr()
    assert written.err == ""
    assert [json.loads(line)["level"] for line in written.out.splitlines()]


def test_a_real_run_logs_json_alone(
    served_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Libraries' lines, warnings and progress while it loads are JSON, too, or silent."""
    with serving(tmp_path, run=served_run):
        pass
    written = capfd.readouterr()
    assert written.err == ""
    assert [json.loads(line)["level"] for line in written.out.splitlines()]


def test_nothing_is_left_after_kill(tmp_path: Path) -> None:
    with serving(tmp_path) as (process, _):
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        until(lambda: gone(children))


@pytest.mark.parametrize("how", ["broken", "diverged"])
def test_a_run_that_cannot_be_loaded_or_score(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], how: str
) -> None:
    """The process ends with one sentence."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / how).touch()
    with serving(tmp_path) as (process, _):
        assert process.returncode
    assert "could not be loaded" in capfd.readouterr().err
