"""`fleet doctor`: what is wrong, and how to mend it."""

from __future__ import annotations

import json

import pytest
import rq

from broker import Queue, keys


@pytest.fixture
def checks(run_fleet):
    """`checks(url, code=0)`: the findings by name."""

    def run(url: str, code: int = 0) -> dict[str, dict[str, str]]:
        done = run_fleet("doctor", "--json", "--redis", url)
        assert done.returncode == code, done
        document = json.loads(done.stdout)
        assert document["healthy"] == (code == 0)
        return {check["name"]: check for check in document["checks"]}

    return run


def test_a_good_redis_is_called_good(checks, own_redis):
    found = checks(own_redis().url)
    assert {check["level"] for check in found.values()} == {"ok", "warning"}
    assert [name for name, check in found.items() if check["level"] == "warning"] == ["workers"]
    assert "everysec" in found["persistence"]["found"]


@pytest.mark.parametrize(
    ("options", "name", "level", "word"),
    [
        (["--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru"], "eviction", "error", "allkeys-lru"),
        (["--maxmemory-policy", "volatile-lru"], "eviction", "warning", "volatile-lru"),
        (["--appendonly", "no"], "persistence", "error", "nothing is kept"),
        (["--appendonly", "no", "--save", "60 1"], "persistence", "warning", "last snapshot"),
        (["--appendfsync", "no"], "persistence", "warning", "half minute"),
        (["--appendfsync", "everysec"], "persistence", "ok", "acknowledged in the last second"),
        ([], "failover", "ok", "no replica"),
        ([], "clock", "ok", " ms of Redis"),
        (["--stream-node-max-bytes", "4096"], "memory", "ok", "each result takes 4 KiB"),
        (["--stream-node-max-bytes", "256"], "memory", "ok", "used, no limit"),
        (["--appendfsync", "always"], "persistence", "ok", "loses nothing"),
        (["--replicaof", "127.0.0.1 1"], "role", "error", "replica"),
        (["--rename-command", "CONFIG", ""], "persistence", "ok", "does not tell"),
    ],
)
def test_what_is_wrong_with_redis_is_found(run_fleet, own_redis, options, name, level, word):
    done = run_fleet("doctor", "--json", "--redis", own_redis(*options).url)
    found = {check["name"]: check for check in json.loads(done.stdout)["checks"]}[name]
    assert found["level"] == level
    assert word in found["found"]
    assert done.returncode == (1 if level == "error" else 0)
    assert found["mend"] or level == "ok"


def test_replicas_and_what_a_failover_may_forget_are_told(checks, own_redis, eventually):
    primary = own_redis("--repl-diskless-sync-delay", "0")
    own_redis("--replicaof", f"127.0.0.1 {primary.port}")
    with primary.client() as client:
        eventually(lambda: client.info("replication")["connected_slaves"] == 1)
        assert "min-replicas-to-write 0" in checks(primary.url)["failover"]["found"]
        client.config_set("min-replicas-to-write", 1)
        found = checks(primary.url)["failover"]
    assert (found["level"], "at most the 10 s" in found["found"]) == ("ok", True)


def test_a_redis_that_is_nearly_full_is_told(checks, own_redis):
    server = own_redis()
    with server.client() as client:
        client.config_set("maxmemory", client.info()["used_memory"])
    assert checks(server.url)["memory"]["level"] == "warning"


_ALL = "~fleet:* ~rq:* &rq:* &fleet:* +@all -@dangerous +info"


@pytest.mark.parametrize(
    ("rights", "level", "word"),
    [
        (_ALL, "ok", "all that is needed"),
        (f"{_ALL} -zadd", "error", "ZADD"),
        (f"{_ALL} -eval", "error", "eval"),
        ("~fleet:* &rq:* +@all", "error", "rq:job:*"),
        ("~fleet:* ~rq:* +@all", "error", "PUBLISH"),
        ("~fleet:* +@read +ping", "error", "may not run scripts"),
    ],
)
def test_the_rights_of_the_user_are_tried(run_fleet, own_redis, rights, level, word):
    server = own_redis()
    with server.client() as client:
        client.execute_command("ACL", "SETUSER", "somebody", "on", ">pw", *rights.split())
        before = client.dbsize()
    done = run_fleet("doctor", "--json", "--redis", f"redis://somebody:pw@127.0.0.1:{server.port}")
    found = {check["name"]: check for check in json.loads(done.stdout)["checks"]}["rights"]
    assert found["level"] == level
    assert word in found["found"]
    assert "pw" not in done.stdout.replace("no password", "")
    with server.client() as client:
        assert client.dbsize() == before


def test_a_key_that_somebody_wrote_over_is_named(checks, fleet, fleet_redis_url, redis_client, fault):
    redis_client.sadd(keys.QUEUES, keys.queue("default"))
    redis_client.rpush(keys.PAUSED, "nothing of ours")
    assert "under a key of the fleet" in fault("pause", "default", code=1)["message"]
    redis_client.set(keys.QUEUES, "nothing of ours")
    assert "the key rq:queues" in fault("status", code=1)["message"]
    found = checks(fleet_redis_url, code=1)
    told = "somebody wrote over keys of the fleet: rq:queues is a string, not a set"
    assert found["keys"]["found"].startswith(told)
    assert "fleet:paused is a list, not a set" in found["keys"]["found"]
    assert (found["queues"]["level"], found["queues"]["mend"]) == ("unknown", "See 'keys'.")
    redis_client.delete(keys.QUEUES, keys.PAUSED)
    assert checks(fleet_redis_url)["keys"]["level"] == "ok"


def test_workers_are_looked_at(checks, own_redis):
    server = own_redis()
    with server.client() as client:
        _worker(client, "alive", version="9.9.9")
        client.set(keys.worker_beat("alive"), "x")
        _worker(client, "dead")
        client.set(keys.SUSPENDED, "1")
        client.sadd(keys.QUEUES, "rq:queue:a b")
    found = checks(server.url)
    assert "dead" in found["workers"]["found"]
    assert "9.9.9: alive" in found["versions"]["found"]
    assert "rq suspend" in found["taking jobs"]["found"]
    assert "'a b'" in found["queues"]["found"]
    levels = {found[name]["level"] for name in ("workers", "versions", "taking jobs", "queues")}
    assert levels == {"warning"}


def test_a_sublist_of_which_nobody_knows_what_its_jobs_ask_for_is_an_error(checks, own_redis):
    server = own_redis()
    with server.client() as client:
        Queue("default", connection=client, cpus=1).enqueue("time.time")
        assert checks(server.url)["requirements"]["level"] == "ok"
        rq.Queue("a@b", connection=client).enqueue("time.time")
        plain = checks(server.url, 1)["requirements"]
        rq.Queue("default@abcdefghij", connection=client).enqueue("time.time")
        found = checks(server.url, 1)["requirements"]
    assert plain["level"] == found["level"] == "error"
    assert ("a@b" in plain["found"], "a name without '@'" in plain["mend"]) == (True, True)
    assert "a@b, default@abcdefghij" in found["found"]
    assert "submit them anew" in found["mend"]


def _worker(client, name: str, **fields: object) -> None:
    record = {"name": name, "host": "h", "pid": 1, "queues": ["default"], "version": "0.1.0", **fields}
    client.sadd(keys.FLEET_WORKERS, name)
    client.set(keys.worker_record(name), json.dumps(record))


def test_a_stock_rq_worker_on_our_queues_is_an_error(checks, own_redis):
    server = own_redis()
    with server.client() as client:
        rq.Worker(["elsewhere"], connection=client, name="stock").register_birth()
        _worker(client, "ours")
        assert checks(server.url)["rq workers"]["level"] == "ok"
        rq.Worker(["default"], connection=client, name="clashing").register_birth()
    assert "clashing" in checks(server.url, code=1)["rq workers"]["found"]


def test_the_text_says_how_to_mend(run_fleet, own_redis):
    done = run_fleet("doctor", "--redis", own_redis("--appendonly", "no").url)
    assert done.returncode == 1
    assert "error    persistence" in done.stdout
    assert "-> redis-cli CONFIG SET appendonly yes" in done.stdout


def test_no_redis_is_exit_code_6(run_fleet, free_port):
    done = run_fleet("doctor", "--json", "--redis", f"redis://127.0.0.1:{free_port()}")
    assert done.returncode == 6
    assert json.loads(done.stderr)["error"]["code"] == "redis_unreachable"
