"""Drives a server with locust, in a process of its own, since locust patches sockets: `python -m` with JSON on stdin.

In: address, requests (body of /v1/rank and the probabilities expected), users, seconds, and rate, all users' requests
a second (null: each asks again as soon as it has its response). Nobody asks after `seconds`; who has asked gets a
response. Out: of each response its second and its milliseconds; errors and wrong orders.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import count, pairwise
from typing import Any, TypedDict

PATIENCE = 120.0  # seconds that the last responses may take
# probabilities this near may stand in either order: batches move each by rounding
NEAR = 2e-4


class Sent(TypedDict):
    """A request, and the probabilities that its response must have."""

    body: dict[str, object]
    expected: list[float | None]  # None: is not listed


class Driven(TypedDict):
    """What a server did: of each response its second and its milliseconds, and what was wrong."""

    at: list[float]
    ms: list[float]
    errors: int
    error: str | None  # the last
    wrong: int


def wrong_order(
    items: Sequence[Mapping[str, Any]], expected: Sequence[float | None]
) -> bool:
    """Whether a response lacks an item, has one twice or another, or has a worse one before a better one."""
    order = [item["index"] for item in items]
    listed = {k: chance for k, chance in enumerate(expected) if chance is not None}
    if sorted(order) != [*listed]:
        return True
    return any(listed[after] > listed[k] + NEAR for k, after in pairwise(order))


def drive(
    address: str,
    requests: Sequence[Sent],
    users: int,
    seconds: float,
    rate: float | None = None,
) -> Driven:
    """Have so many users ask for so long; see the file's first lines."""
    import gevent  # type: ignore[import-untyped]
    from locust import FastHttpUser, constant, constant_throughput, task
    from locust.env import Environment

    bodies = [json.dumps(request["body"]) for request in requests]
    found: Driven = {
        "at": [],
        "ms": [],
        "errors": 0,
        "wrong": 0,
        "error": None,
    }
    responses = list[tuple[int, bytes]]()  # number of the request, content
    turn = count()
    start = time.perf_counter()

    class Asker(FastHttpUser):
        host = address
        wait_time = constant(0) if rate is None else constant_throughput(rate / users)

        @task
        def ask(self) -> None:
            k = next(turn) % len(bodies)
            began = time.perf_counter()
            with self.client.post(
                "/v1/rank",
                data=bodies[k],
                headers={"Content-Type": "application/json"},
                catch_response=True,
            ) as response:
                ended = time.perf_counter()
                if response.status_code != 200:
                    found["errors"] += 1
                    found["error"] = (
                        f"{response.status_code} {str(response.error or response.text)[:200]}"
                    )
                    return
                responses.append((k, response.content))
                found["at"].append(ended - start)
                found["ms"].append(1e3 * (ended - began))

    runner = Environment(user_classes=[Asker], stop_timeout=PATIENCE).create_local_runner()
    start = time.perf_counter()
    runner.start(users, spawn_rate=users)
    gevent.sleep(seconds)
    runner.quit()
    for k, content in responses:  # when nobody waits for this process any more
        items, expected = json.loads(content)["items"], requests[k]["expected"]
        found["wrong"] += wrong_order(items, expected)
    return found


if __name__ == "__main__":
    print(json.dumps(drive(**json.load(sys.stdin))))
