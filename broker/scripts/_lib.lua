-- Shared by every script: keys, the clock, and the moves of a job between its states.
--
--      submit, due, dependents met
--                 │
--                 ▼        claim           settle
--              queued ───────────▶ started ───────▶ finished | failed | stopped
--                 ▲                   │
--                 └───────────────────┘  give_back: retry, handed back, lost
--
-- `K` holds the key templates of broker/keys.py. A job is only ever moved by a script that
-- has just read its hash, found it in the state it expects and, where it is started, found
-- the lease that the caller names: whoever comes late changes nothing.

local FAR_MS = 31536000000      -- scores of RQ's mirror: finite, and no cleanup of RQ's reaches them
local ATTEMPTS_BYTES = 4096     -- what fleet_attempts may grow to
local RQ_TIMEOUT = '180'        -- rq.Queue.DEFAULT_TIMEOUT, for jobs whose producer set none
local RQ_FAILURE_TTL = 31536000 -- rq.defaults.DEFAULT_FAILURE_TTL

local function key(kind, a, b)
  return string.format(K[kind], a, b)
end

local clock = redis.call('TIME')
local NOW_MS = clock[1] * 1000 + math.floor(clock[2] / 1000)

-- ISO-8601 as RQ writes it; days to civil date after H. Hinnant, "chrono-compatible date algorithms".
local function iso(ms)
  local seconds = math.floor(ms / 1000)
  local days = math.floor(seconds / 86400)
  local rest = seconds - days * 86400
  local z = days + 719468
  local era = math.floor(z / 146097)
  local doe = z - era * 146097
  local yoe = math.floor(
    (doe - math.floor(doe / 1460) + math.floor(doe / 36524) - math.floor(doe / 146096)) / 365)
  local doy = doe - (365 * yoe + math.floor(yoe / 4) - math.floor(yoe / 100))
  local mp = math.floor((5 * doy + 2) / 153)
  local day = doy - math.floor((153 * mp + 2) / 5) + 1
  local month = mp < 10 and mp + 3 or mp - 9
  local year = yoe + era * 400 + (month <= 2 and 1 or 0)
  return string.format('%04d-%02d-%02dT%02d:%02d:%02d.%06dZ', year, month, day,
    math.floor(rest / 3600), math.floor(rest / 60) % 60, rest % 60, (ms - seconds * 1000) * 1000)
end

local NOW = iso(NOW_MS)

-- Fields of a hash that somebody damaged must not stop a script half way: what comes out of these
-- is a whole number that any command takes, or a list of numbers.
local MOST = 1e12

local function number(text, default)
  local value = tonumber(text or default)
  local fits = value and value >= -MOST and value <= MOST
  return fits and math.floor(value) or default
end

local function list(text)
  local ok, values = pcall(cjson.decode, text or '[]')
  local found = {}
  for i, value in ipairs(ok and type(values) == 'table' and values or {}) do
    found[i] = number(value, 0)
  end
  return found
end

local JOB_FIELDS = {
  'status', 'fleet_lease', 'origin', 'worker_name', 'started_at', 'ttl', 'result_ttl', 'failure_ttl',
  'retries_left', 'retry_intervals', 'number_of_retries', 'enqueue_at_front_on_retry',
  'repeats_left', 'repeat_intervals', 'fleet_losses', 'fleet_attempts', 'fleet_stop', 'group_id',
}

-- RQ's Job.save() writes the status it knew, and a job under a lease may be painted with an old one.
-- It is true only where a client has put the job, too: in a queue, or in the registry of that name.
local function is_painted(id, status, queue)
  if status == 'queued' then
    return redis.pcall('LPOS', key('queue', queue), id) == false
  end
  local registries = {deferred = true, scheduled = true, canceled = true, finished = true, failed = true}
  return not registries[status] or redis.pcall('ZSCORE', key(status, queue), id) == false
end

-- The fields of a job that moving it needs, or nil: no such job, or something else under its key.
local function job_fields(id)
  local values = redis.pcall('HMGET', key('job', id), unpack(JOB_FIELDS))
  if values.err or not (values[1] or values[3]) then
    return nil
  end
  local fields = {}
  for i, name in ipairs(JOB_FIELDS) do
    fields[name] = values[i] or nil
  end
  if fields.fleet_lease and fields.status ~= 'started' and is_painted(id, fields.status, fields.origin or '') then
    fields.status = 'started'
    redis.call('HSET', key('job', id), 'status', 'started')
  end
  return fields
end

local function count(what)
  redis.call('HINCRBY', K.COUNTERS, what, 1)
end

-- Put a token where an idle worker of the queue waits. One is enough: who pops it rings again
-- if it leaves jobs behind.
local function ring(queue)
  local bell = key('wake', queue)
  if redis.call('LLEN', bell) == 0 then
    redis.call('RPUSH', bell, '1')
  end
end

local function enqueue(id, queue, front, ttl)
  redis.call('HSET', key('job', id), 'status', 'queued', 'enqueued_at', NOW)
  redis.call('HSETNX', key('job', id), 'timeout', RQ_TIMEOUT)
  redis.call(front and 'LPUSH' or 'RPUSH', key('queue', queue), id)
  redis.call('SADD', K.QUEUES, key('queue', queue))
  if number(ttl, 0) > 0 then
    redis.call('EXPIRE', key('job', id), number(ttl))
  end
  ring(queue)
end

local function schedule(id, queue, delay_seconds, ttl)
  redis.call('HSET', key('job', id), 'status', 'scheduled')
  redis.call('ZADD', key('scheduled', queue), string.format('%.3f', NOW_MS / 1000 + delay_seconds), id)
  redis.call('SADD', K.QUEUES, key('queue', queue))
  if number(ttl, 0) > 0 then
    redis.call('EXPIRE', key('job', id), number(ttl))
  end
end

-- RQ's three records of a running job: written together here, removed together below.
local function mirror(id, queue, execution, worker)
  local now = string.format('%.3f', NOW_MS / 1000)
  local far = math.floor((NOW_MS + FAR_MS) / 1000)
  redis.call('ZADD', key('wip', queue), far, id .. ':' .. execution)
  redis.call('HSET', key('execution', id, execution),
    'id', execution, 'created_at', now, 'last_heartbeat', now, 'worker_name', worker)
  redis.call('ZADD', key('executions', id), far, execution)
end

local function unmirror(id, queue, execution)
  redis.call('ZREM', key('wip', queue), id .. ':' .. execution)
  redis.call('DEL', key('execution', id, execution))
  redis.call('ZREM', key('executions', id), execution)
end

local function execution_of(lease)
  return string.match(lease, ':(.*)$') or ''
end

-- Take the lease away from whoever holds it; the job's next state is the caller's to write.
local function release(id, fields)
  redis.call('ZREM', K.LEASES, id)
  redis.call('HDEL', key('worker_leases', fields.worker_name or ''), id)
  unmirror(id, fields.origin or '', execution_of(fields.fleet_lease))
  redis.call('HDEL', key('job', id), 'fleet_lease')
end

-- Append what became of an attempt to the job's own record of them.
local function record_attempt(id, fields, outcome, reason, started_at)
  local line = cjson.encode({
    fence = string.match(fields.fleet_lease, '^(%d+)'), worker = fields.worker_name,
    started_at = started_at or fields.started_at, ended_at = NOW, outcome = outcome, reason = reason,
  })
  local text = fields.fleet_attempts and (fields.fleet_attempts .. '\n' .. line) or line
  while #text > ATTEMPTS_BYTES and string.find(text, '\n', 1, true) do
    text = string.sub(text, string.find(text, '\n', 1, true) + 1)
  end
  redis.call('HSET', key('job', id), 'fleet_attempts', text)
end

-- Whether a dependent waits for nothing more, now that `parent` ended in `status`.
local function is_met(dependent, parent, status, allow_failure)
  if status ~= 'finished' and not (status == 'failed' and allow_failure) then
    return false
  end
  for _, id in ipairs(redis.pcall('SMEMBERS', key('dependencies', dependent))) do
    local other = id ~= parent and redis.pcall('HGET', key('job', id), 'status')
    if other and other ~= 'finished' and not (other == 'failed' and allow_failure) then
      return false
    end
  end
  return true
end

local function enqueue_dependents(parent, status)
  local waiting = key('dependents', parent)
  for _, id in ipairs(redis.pcall('SMEMBERS', waiting)) do
    local f = redis.pcall('HMGET', key('job', id),
      'status', 'origin', 'allow_dependency_failures', 'enqueue_at_front', 'ttl')
    if f[1] == 'deferred' and f[2] and is_met(id, parent, status, f[3] == '1') then
      redis.call('ZREM', key('deferred', f[2]), id)
      redis.call('SREM', waiting, id)
      enqueue(id, f[2], f[4] == '1', f[5])
    end
  end
end

-- Keep a job that ended for `ttl` seconds; 0: not at all, negative: for ever.
local function keep(id, fields, ttl)
  if ttl == 0 then
    if fields.group_id and fields.group_id ~= '' then
      redis.call('SREM', key('group', fields.group_id), id)
    end
    redis.call('DEL', key('job', id), key('dependents', id), key('dependencies', id),
      key('results', id), key('output', id), key('executions', id))
  elseif ttl > 0 then
    for _, kind in ipairs({'job', 'dependents', 'dependencies', 'results', 'output'}) do
      redis.call('EXPIRE', key(kind, id), ttl)
    end
  end
end

local function add_to(registry, queue, id, ttl)
  if ttl ~= 0 then
    redis.call('ZADD', key(registry, queue), ttl < 0 and '+inf' or math.floor(NOW_MS / 1000) + ttl, id)
  end
end

local RESULT_TYPES = {finished = '1', failed = '2', stopped = '2', retried = '4', exhausted = '5'}

-- One entry of rq:results:ID, as rq.results.Result reads it. Strings come ready encoded.
local function add_result(id, fields, kind, ended)
  local entry = {'type', RESULT_TYPES[kind], 'worker_name', fields.worker_name or '',
    'execution_id', execution_of(fields.fleet_lease), 'execution_ended_at', string.format('%.6f', NOW_MS / 1000),
    'execution_started_at', string.format('%.6f', NOW_MS / 1000 - (ended.duration or 0))}
  for _, name in ipairs({'return_value', 'exc_string'}) do
    if ended[name] then
      table.insert(entry, name)
      table.insert(entry, ended[name])
    end
  end
  redis.call('XADD', key('results', id), 'MAXLEN', '~', '10', '*', unpack(entry))
end

-- The fields of a job whose attempt is over; `started_at` by Redis's clock and the worker's stopwatch.
local function stamp(id, fields, ended, status)
  redis.call('HSET', key('job', id), 'status', status, 'ended_at', NOW,
    'started_at', ended.duration and iso(NOW_MS - ended.duration * 1000) or fields.started_at or NOW,
    'fleet_reason', ended.reason or '', 'fleet_exit_code', ended.exit_code or '')
  if fields.fleet_losses or fields.fleet_stop then
    redis.call('HDEL', key('job', id), 'fleet_losses', 'fleet_stop')
  end
end

-- Back to a queue, to be run again.
local function give_back(id, fields, outcome, ended, front)
  release(id, fields)
  record_attempt(id, fields, outcome, ended.reason,
    ended.duration and iso(NOW_MS - ended.duration * 1000))
  enqueue(id, fields.origin, front, fields.ttl)
end

local function settle_finished(id, fields, ended, default_ttl)
  local ttl = number(fields.result_ttl, default_ttl)
  local repeats = number(fields.repeats_left, 0)
  release(id, fields)
  record_attempt(id, fields, 'finished', nil, iso(NOW_MS - (ended.duration or 0) * 1000))
  stamp(id, fields, ended, 'finished')
  if ttl ~= 0 then
    add_result(id, fields, 'finished', ended)
  end
  enqueue_dependents(id, 'finished')
  if repeats > 0 then
    local intervals = list(fields.repeat_intervals)
    local delay = intervals[repeats] or intervals[#intervals] or 0
    redis.call('HSET', key('job', id), 'repeats_left', repeats - 1)
    if delay > 0 then
      schedule(id, fields.origin, delay, fields.ttl)
    else
      enqueue(id, fields.origin, false, fields.ttl)
    end
  else
    add_to('finished', fields.origin, id, ttl)
    keep(id, fields, ttl)
  end
end

-- For good: `status` is failed or stopped, `kind` what RQ calls the result.
local function settle_failed(id, fields, ended, status, kind, outcome)
  local ttl = number(fields.failure_ttl, RQ_FAILURE_TTL)
  release(id, fields)
  record_attempt(id, fields, outcome or status, ended.reason,
    ended.duration and iso(NOW_MS - ended.duration * 1000))
  stamp(id, fields, ended, status)
  add_result(id, fields, kind, ended)
  add_to('failed', fields.origin, id, ttl)
  enqueue_dependents(id, status)
  keep(id, fields, ttl)
end

local function run_again(id, fields, ended, delay, front)
  if delay > 0 then
    release(id, fields)
    record_attempt(id, fields, 'failed', ended.reason, iso(NOW_MS - (ended.duration or 0) * 1000))
    schedule(id, fields.origin, delay, fields.ttl)
  else
    give_back(id, fields, 'failed', ended, front)
  end
end

-- A failure with retries left: rq.job.Job.retry.
local function retry(id, fields, ended)
  local left = number(fields.retries_left, 0)
  local intervals = list(fields.retry_intervals)
  local delay = intervals[math.max(#intervals - left, 0) + 1] or 0
  redis.call('HSET', key('job', id), 'retries_left', left - 1)
  run_again(id, fields, ended, delay, fields.enqueue_at_front_on_retry == '1')
end

-- A function returned rq.Retry: rq.worker.BaseWorker.handle_job_retry.
local function retry_returned(id, fields, ended)
  local done = number(fields.number_of_retries, 0)
  if done > 0 and done >= ended.retry_max then
    settle_failed(id, fields, ended, 'failed', 'exhausted')
    return
  end
  local intervals = list(cjson.encode(ended.retry_intervals or {}))
  local delay = intervals[math.min(done + 1, #intervals)] or 0
  add_result(id, fields, 'retried', ended)
  redis.call('EXPIRE', key('results', id), number(fields.failure_ttl, RQ_FAILURE_TTL))
  redis.call('HSET', key('job', id), 'number_of_retries', done + 1)
  run_again(id, fields, ended, delay, false)
end

-- The attempt is lost with its worker: once more at once, but not without end.
local function lose(id, fields, ended, limit)
  local losses = number(fields.fleet_losses, 0) + (ended.uncounted and 0 or 1)
  count('lost')
  if losses > limit then
    settle_failed(id, fields, ended, 'failed', 'failed', 'lost')
  else
    redis.call('HSET', key('job', id), 'fleet_losses', losses)
    give_back(id, fields, 'lost', ended, true)
  end
end
