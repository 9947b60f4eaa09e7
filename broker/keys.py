"""Every key of Redis that this system reads or writes: its type, its TTL, who writes it.

Keys of RQ stay RQ's; ours begin with `fleet:`. Lua scripts get the same templates from
`LUA_TEMPLATES` (see `broker.scripts`), so no key is spelled anywhere else.

    RQ's key                      type    written by
    rq:queues                     set     producers: keys of all queues
    rq:queue:Q                    list    producers push right; claims pop left; lost jobs return left
    rq:job:ID                     hash    producers; our scripts move its state (fields below)
    rq:job:ID:dependents          set     producers of dependents
    rq:job::ID:dependencies       set     producers of dependents; of jobs of ours, what they still wait for
    rq:job:gate:HEX               hash    ours: the state of a submission in parts; its TTL an hour
    rq:results:ID                 stream  the end of an attempt, at most 10
    rq:wip:Q                      zset    JOB:EXECUTION, mirror of our leases for RQ's tools
    rq:execution:JOB:EXECUTION    hash    the same
    rq:executions:JOB             zset    the same
    rq:finished|failed|deferred|scheduled|canceled:Q   zset   jobs of that state
    rq:groups, rq:group:G         set     producers: names of groups, ids of the jobs of each
    rq:workers, rq:workers:Q      set     keys of workers
    rq:worker:NAME                hash    the worker as RQ knows it; TTL as its heartbeat key
    rq:pubsub:NAME                channel RQ's commands to a worker
    rq:suspended                  string  `rq suspend`

    our key                       type    TTL        written by
    fleet:fence                   string  -          claims: the last fence given out
    fleet:leases                  zset    -          claims, beats, ends: job -> expiry, ms of Redis's clock
    fleet:worker:NAME:record      string  week/hour  the worker: JSON of what it is
    fleet:worker:NAME:beat        string  lease      the worker: its incarnation
    fleet:worker:NAME:leases      hash    -          scripts: job -> "LEASE SEQ", what the server holds for it
    fleet:worker:NAME:ended       string  lease x 4  rounds: leases of the ends they accepted last
    fleet:worker:NAME:signals     list    lease      messages that wake it
    fleet:worker:NAME:left        string  5 min      the worker: its incarnation, where it left by itself
    fleet:worker:NAME:drain       string  -/hour     operators: take nothing new; JSON, see broker/control.py
    fleet:worker:NAME:labels      hash    -/hour     operators: labels of it, see broker/control.py
    fleet:workers                 set     -          names of all workers with a record
    fleet:drained                 set     -          operators: the names that have a key `drain`
    fleet:wake:Q                  list    -          producers and claims: tokens, at most one is needed
    fleet:paused                  set     -          operators: queues that give out nothing
    fleet:chores                  string  3 s        the worker that does the chores
    fleet:chores:seen             string  -          who asks for them: ms of Redis's clock, its run id
    fleet:recovery:not-before     string  lease x 4  the same: recovery pauses until then, ms of Redis's clock
    fleet:losses:not-before       string  lease x 4  the same: leases that ran out before count as no loss
    fleet:alive                   string  -          chores: how many workers beat
    fleet:settling                list    -          scripts: dependents to look at: JSON [job, other, end]
    fleet:output:JOB              hash    as result  tails of stdout and stderr and how far they reach
    fleet:counters                hash    -          scripts: totals of no queue: registrations, damaged
    fleet:history:BASE            hash    30 days    scripts: totals of a queue; see broker/history.py. Chores
                                                     let the TTL begin anew with a change
    fleet:histories               zset    -          scripts: queues that have such a record, at most 100, ->
                                                     since when, ms; the others share the record `(other)`
    fleet:series:BASE             list    4 h        chores: every 15 s a line of totals:
                                                     SECONDS CLAIMS FINISHED FAILED RETRIED LOST
    fleet:hosts                   hash    -          operators: hosts kept for `up`, name -> JSON
    fleet:bootstrap               hash    -          `up`: how long its steps took, and which failed; see
                                                     broker/bootstraps.py
    fleet:id                      string  -          workers, `up --tunnel`: a name, wherever its Redis is
    fleet:tunnel:ID               string  30 s       whoever holds that tunnel: JSON, see broker/tunnels.py
    fleet:last                    string  -          submissions: the id of the newest
    fleet:arrays                  zset   -          arrays that have not ended -> ms when they were submitted

    of an array (scripts, see _arrays.lua; TTL 10 min while it is being submitted, later that of its job)
    fleet:array:ID                hash    items (line, json, arguments), total, numbers, max_fails,
                                          max_parallel, started_at; left: how many are in todo; finished:
                                          how many did; stop: why no more are given out; after: whose tasks
                                          its own wait for; held: how many do, on_failed: fail or wait,
                                          unmet: in vain; followed: it has followers
    fleet:array:ID:items          hash    number of a chunk -> 32 items, each length (4 bytes) and text
    fleet:array:ID:todo           list    FIRST-LAST:STEP: tasks that are still to be given out
    fleet:array:ID:dropped        list    the same: tasks that were canceled before
    fleet:array:ID:running, waiting, failed, canceled   set   numbers of tasks that are jobs, where these are
    fleet:array:ID:finished       bitmap  of tasks
    fleet:array:ID:parked         list    ids for the queue once fewer run than max_parallel: tasks, the array
    fleet:array:ID:followers      set     arrays whose tasks wait for those of this one

    Q is `BASE` or, for jobs that ask for something of their worker, `BASE@DIGEST`, a sublist of that queue;
    broker/requirements.py has the digest.
    fleet:sets:BASE               hash    -          producers: digest -> what jobs there ask for, JSON
    fleet:sets:version            string  -          counted up with each set that is new, or removed;
                                                     from the ms of the first on: none is there twice
    fleet:news                    channel            producers: JSON of a new set; see broker/sets.py
    fleet:heads:BASE:PRIORITY     zset    -          scripts: digest -> since when the first job there waits,
                                                     ms; chores add what RQ's own producers pushed
    fleet:served:BASE             hash    -          claims: priority -> when one of it was last given, ms;
                                                     held:DIGEST -> when one was given that room was held for
    fleet:reserved:Q              zset    2 beats    claims: workers that hold room for a job of it -> until
    fleet:sets:idle               hash    -          chores: sublist -> since when it has no job, ms
    fleet:slurm:submissions       hash    -          submitters: name of the job in Slurm -> JSON, see
                                                     broker/slurm.py; fields go a week after it ended
    fleet:slurm:pools             hash    -          operators: name of a pool -> JSON of what it submits
    fleet:slurm:pool:NAME         hash    -          operators and who scales: paused, failures, not_before
    fleet:slurm:lease:WHAT        string  a minute   whoever does that for the fleet now: a random word

    our fields in rq:job:ID
    fleet_lease      FENCE:EXECUTION of the attempt that holds the job; empty when it ended
    fleet_losses     times lost with a worker since it was submitted; gone when it ended
    fleet_stop       an operator's wish to stop it while it runs; gone when it ended
    fleet_retries    how many retries were asked for, known once one is used up; for `fleet retry`
    fleet_attempts   a line for each attempt that ended, the last of them: broker/attempts.py
    fleet_exit_code, fleet_reason   how a command ended; why a job failed
    fleet_usage      JSON of what the last attempt used: broker/usage.py
    fleet_on_failed_dependency   fail or wait: what it does where a job that it waits for does not finish
    fleet_after_any  ids, with blanks between, of what may end in whatever way for it
    fleet_dependency the job for which it failed without being run
    fleet_array      how many tasks it has: the job is an array
    fleet_array_of   the array whose task the job is; its number follows in its id
    fleet_task_line, fleet_task_json, fleet_task_arguments   a task's item
"""

from __future__ import annotations

QUEUES = "rq:queues"
WORKERS = "rq:workers"
GROUPS = "rq:groups"
SUSPENDED = "rq:suspended"

FENCE = "fleet:fence"
LEASES = "fleet:leases"
FLEET_WORKERS = "fleet:workers"
DRAINED = "fleet:drained"
PAUSED = "fleet:paused"
CHORES = "fleet:chores"
CHORES_SEEN = "fleet:chores:seen"
RECOVERY_NOT_BEFORE = "fleet:recovery:not-before"
LOSSES_NOT_BEFORE = "fleet:losses:not-before"
ALIVE = "fleet:alive"
COUNTERS = "fleet:counters"
SETTLING = "fleet:settling"
HOSTS = "fleet:hosts"
BOOTSTRAP = "fleet:bootstrap"
FLEET_ID = "fleet:id"
LAST = "fleet:last"
ARRAYS = "fleet:arrays"
SETS_VERSION = "fleet:sets:version"
SETS_IDLE = "fleet:sets:idle"
SLURM_SUBMISSIONS = "fleet:slurm:submissions"
SLURM_POOLS = "fleet:slurm:pools"
NEWS = "fleet:news"
HISTORIES = "fleet:histories"

#: the type of each key that the whole fleet shares, as TYPE has it
TYPES = {
    **dict.fromkeys((QUEUES, WORKERS, GROUPS, FLEET_WORKERS, DRAINED, PAUSED), "set"),
    **dict.fromkeys((LEASES, ARRAYS, HISTORIES), "zset"),
    **dict.fromkeys((COUNTERS, HOSTS, BOOTSTRAP, SETS_IDLE, SLURM_SUBMISSIONS, SLURM_POOLS), "hash"),
    **dict.fromkeys((FENCE, CHORES, CHORES_SEEN, RECOVERY_NOT_BEFORE, LOSSES_NOT_BEFORE, ALIVE), "string"),
    **dict.fromkeys((FLEET_ID, LAST, SETS_VERSION), "string"),
    SETTLING: "list",
}

#: what Redis may set aside for `rq:results:ID` (stream-node-max-bytes), which mostly has one entry
RESULT_BYTES = 256

#: templates for keys that name something; the same ones build keys in Lua
LUA_TEMPLATES = {
    "queue": "rq:queue:%s",
    "job": "rq:job:%s",
    "dependents": "rq:job:%s:dependents",
    "dependencies": "rq:job::%s:dependencies",
    "results": "rq:results:%s",
    "wip": "rq:wip:%s",
    "execution": "rq:execution:%s:%s",
    "executions": "rq:executions:%s",
    "finished": "rq:finished:%s",
    "failed": "rq:failed:%s",
    "deferred": "rq:deferred:%s",
    "scheduled": "rq:scheduled:%s",
    "canceled": "rq:canceled:%s",
    "group": "rq:group:%s",
    "queue_workers": "rq:workers:%s",
    "rq_worker": "rq:worker:%s",
    "pubsub": "rq:pubsub:%s",
    "worker_record": "fleet:worker:%s:record",
    "worker_beat": "fleet:worker:%s:beat",
    "worker_leases": "fleet:worker:%s:leases",
    "worker_ended": "fleet:worker:%s:ended",
    "worker_signals": "fleet:worker:%s:signals",
    "worker_left": "fleet:worker:%s:left",
    "worker_drain": "fleet:worker:%s:drain",
    "worker_labels": "fleet:worker:%s:labels",
    "wake": "fleet:wake:%s",
    "output": "fleet:output:%s",
    "tunnel": "fleet:tunnel:%s",
    "array": "fleet:array:%s",
    "array_items": "fleet:array:%s:items",
    "array_todo": "fleet:array:%s:todo",
    "array_dropped": "fleet:array:%s:dropped",
    "array_running": "fleet:array:%s:running",
    "array_waiting": "fleet:array:%s:waiting",
    "array_failed": "fleet:array:%s:failed",
    "array_canceled": "fleet:array:%s:canceled",
    "array_finished": "fleet:array:%s:finished",
    "array_parked": "fleet:array:%s:parked",
    "array_followers": "fleet:array:%s:followers",
    "sets": "fleet:sets:%s",
    "heads": "fleet:heads:%s:%s",
    "served": "fleet:served:%s",
    "reserved": "fleet:reserved:%s",
    "history": "fleet:history:%s",
    "series": "fleet:series:%s",
}
_QUEUE_PREFIX = LUA_TEMPLATES["queue"] % ""
_WAKE_PREFIX = LUA_TEMPLATES["wake"] % ""


def of(kind: str, *names: str) -> str:
    """The key of that kind (a name in LUA_TEMPLATES) for `names`."""
    return LUA_TEMPLATES[kind] % names


def queue(name: str) -> str:
    return of("queue", name)


def queue_of(key: str) -> str:
    """The queue's name in a member of QUEUES."""
    return key.removeprefix(_QUEUE_PREFIX)


def job(job_id: str) -> str:
    return of("job", job_id)


def array(array_id: str) -> str:
    return of("array", array_id)


def output(job_id: str) -> str:
    return of("output", job_id)


def wake(queue_name: str) -> str:
    return of("wake", queue_name)


def woken(key: str) -> str:
    """The list to which a token belongs that was found under `key`."""
    return key.removeprefix(_WAKE_PREFIX)


def rq_worker(name: str) -> str:
    return of("rq_worker", name)


def pubsub(name: str) -> str:
    return of("pubsub", name)


def worker_record(name: str) -> str:
    return of("worker_record", name)


def worker_beat(name: str) -> str:
    return of("worker_beat", name)


def worker_leases(name: str) -> str:
    return of("worker_leases", name)


def worker_ended(name: str) -> str:
    return of("worker_ended", name)


def worker_signals(name: str) -> str:
    return of("worker_signals", name)


def worker_left(name: str) -> str:
    return of("worker_left", name)


def worker_drain(name: str) -> str:
    return of("worker_drain", name)


def worker_labels(name: str) -> str:
    return of("worker_labels", name)


def tunnel(tunnel_id: str) -> str:
    return of("tunnel", tunnel_id)


def sets(base: str) -> str:
    return of("sets", base)


def heads(base: str, priority: int) -> str:
    return of("heads", base, str(priority))


def history(base: str) -> str:
    return of("history", base)


def series(base: str) -> str:
    return of("series", base)


def slurm_pool(name: str) -> str:
    return f"fleet:slurm:pool:{name}"


def slurm_lease(what: str) -> str:
    return f"fleet:slurm:lease:{what}"
