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
local MEND_SECONDS = 60         -- between two looks at whether a queue can take jobs again
local RQ_TIMEOUT = '180'        -- rq.Queue.DEFAULT_TIMEOUT, for jobs whose producer set none
local RQ_FAILURE_TTL = 31536000 -- rq.defaults.DEFAULT_FAILURE_TTL

-- The key of that kind for `a`, or for `a` and `b`.
local function key(kind, a, b)
  local after = AFTER[kind]
  if b then
    return K[kind] .. a .. ':' .. b
  elseif after then
    return K[kind] .. a .. after
  end
  return K[kind] .. a
end

-- What `load` returns, a table of functions, loaded when the first of them is asked for.
local function seldom(load)
  return setmetatable({}, {__index = function(known, name)
    for each, value in pairs(load()) do
      rawset(known, each, value)
    end
    return rawget(known, name)
  end})
end

-- A command on a key of a job or a queue: what somebody put there instead must not stop a script half
-- way. Returns nil where the key is of another type, and raises any other error.
local function try(...)
  local reply = redis.pcall(...)
  if type(reply) ~= 'table' or not reply.err then
    return reply
  elseif not string.find(reply.err, 'WRONGTYPE', 1, true) then
    error(reply.err)
  end
  redis.call('HINCRBY', K.COUNTERS, 'damaged', 1)
  return nil
end

-- Writes to one key on behalf of many jobs are gathered, and made in one call when the script ends or
-- says `flush`: a call costs more than what it does. Nothing may read such a key before that.
local MOST_ARGUMENTS = 4000 -- of one call: Lua's stack holds some 8,000
local gathered, order = {}, {}

local function gather(command, where)
  local calls = gathered[command] or {}
  local call = calls[where]
  if not call or #call > MOST_ARGUMENTS then
    call = {command, where ~= '' and where or nil}
    gathered[command], calls[where] = calls, call
    order[#order + 1] = call
  end
  return call
end

local function later(command, where, a, b)
  local call = gather(command, where)
  local last = #call
  call[last + 1], call[last + 2] = a, b
end

local function delete_later(where)
  local call = gather('DEL', '')
  call[#call + 1] = where
end

-- Tasks of arrays that this script moved, by array and 'FROM TO'; and what sees to it, in _array.lua.
local moved = {}
local settle_arrays

-- An array whose state is to be looked at when the script ends.
local function touch_array(array)
  if not moved[array] then
    moved[array], moved[#moved + 1] = {}, array
  end
end

-- A job has gone from one place of its array to another, if it is a task.
local function task_moves(id, fields, from, to)
  local array = fields.fleet_array_of
  if array then
    touch_array(array)
    local way = from .. ' ' .. to
    local numbers = moved[array][way] or {}
    moved[array][way] = numbers
    numbers[#numbers + 1] = tonumber(string.sub(id, #array + 2)) or -1
  end
end

local function flush()
  if moved[1] then
    settle_arrays()
  end
  for _, call in ipairs(order) do
    local run = string.sub(call[2], 1, 6) == 'fleet:' and redis.call or try
    run(unpack(call))
  end
  gathered, order = {}, {}
end

local clock = redis.call('TIME')
local NOW_MS = clock[1] * 1000 + math.floor(clock[2] / 1000)
local NOW_EXACT_MS = clock[1] * 1000 + clock[2] / 1000 -- for what people read: with microseconds

-- A time as RQ writes it, but for the fraction; days to civil date after H. Hinnant, "chrono-compatible date algorithms".
local function to_the_second(seconds)
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
  return string.format('%04d-%02d-%02dT%02d:%02d:%02d', year, month, day,
    math.floor(rest / 3600), math.floor(rest / 60) % 60, rest % 60)
end

local latest, latest_text, latest_unix -- the times of one call lie close together

-- Milliseconds since 1970 as ISO-8601, and as a decimal number of seconds.
local function iso(ms)
  local seconds = math.floor(ms / 1000)
  if seconds ~= latest then
    latest, latest_text, latest_unix = seconds, to_the_second(seconds), string.format('%d', seconds)
  end
  local micros = string.format('.%06d', math.min(math.floor((ms - seconds * 1000) * 1000 + 0.5), 999999))
  return latest_text .. micros .. 'Z', latest_unix .. micros
end

-- Whole numbers as Redis reads them: it takes far longer to write down one that comes as a number.
local digits = setmetatable({}, {__index = function(known, number)
  known[number] = string.format('%d', number)
  return known[number]
end})

local NOW, NOW_UNIX = iso(NOW_EXACT_MS)
local NOW_SECONDS = string.format('%.3f', NOW_MS / 1000)
local FAR_SECONDS = string.format('%d', (NOW_MS + FAR_MS) / 1000)

-- Fields of a hash that somebody damaged must not stop a script half way: what comes out of these
-- is a whole number that any command takes, or a list of numbers. Not for times in ms: these are more than MOST.
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

-- Fields that only some moves of a job look at, read when the first of them is asked for.
local SELDOM = {
  'worker_name', 'started_at', 'ttl', 'failure_ttl', 'retries_left', 'retry_intervals',
  'number_of_retries', 'enqueue_at_front_on_retry', 'repeat_intervals', 'group_id',
}
local READ_SELDOM = {}

function READ_SELDOM.__index(fields, wanted)
  local values = redis.call('HMGET', key('job', fields.id), unpack(SELDOM))
  for i, name in ipairs(SELDOM) do
    if rawget(fields, name) == nil then
      fields[name] = values[i]
    end
  end
  return rawget(fields, wanted)
end

-- RQ's Job.save() writes the status it knew, and a job under a lease may be painted with an old one.
-- It is true only where a client has put the job, too: in a queue, or in the registry of that name.
local function is_painted(id, status, queue)
  if status == 'queued' then
    return redis.pcall('LPOS', key('queue', queue), id) == false
  end
  local registries = {deferred = true, scheduled = true, canceled = true, finished = true, failed = true}
  return not registries[status] or redis.pcall('ZSCORE', key(status, queue), id) == false
end

-- The fields of a job that moving it needs, false where it has none; or nil: no such job, or something
-- else under its key.
local function job_fields(id)
  local values = redis.pcall('HMGET', key('job', id), 'status', 'fleet_lease', 'origin', 'result_ttl',
    'repeats_left', 'fleet_losses', 'fleet_attempts', 'fleet_stop', 'dependency_ids',
    'fleet_array_of')
  local status, lease, origin = values[1], values[2], values[3]
  if values.err or not (status or origin) then
    return nil
  end
  if lease == '' then
    lease = false
  end
  if lease and status ~= 'started' and is_painted(id, status, origin or '') then
    status = 'started'
    redis.call('HSET', key('job', id), 'status', 'started')
  end
  return setmetatable({
    id = id, status = status, fleet_lease = lease, origin = origin, result_ttl = values[4],
    repeats_left = values[5], fleet_losses = values[6], fleet_attempts = values[7],
    fleet_stop = values[8], dependency_ids = values[9], fleet_array_of = values[10],
  }, READ_SELDOM)
end

-- What broker/history.py reads: counts of each queue, sublists with their base, added up while a script runs and
-- written once, those alone that changed.
local MOST_HISTORIES = 100 -- queues that have a record of their own; the others share one
local OTHER_QUEUES = '(other)' -- no queue's name
local sums_of, counted = {}, {}

local function sums_for(queue)
  local base = string.match(queue or '', '^[^@]+') or OTHER_QUEUES
  local sums = sums_of[base]
  if not sums then
    sums = {}
    sums_of[base], counted[#counted + 1] = sums, base
  end
  sums_of[queue or ''] = sums
  return sums
end

local function tally(queue, what)
  local sums = sums_of[queue] or sums_for(queue)
  sums[what] = (sums[what] or 0) + 1
end

-- One more time that something took, for a histogram: a bucket is named by its upper bound, in ms.
local function observe(queue, what, ms)
  local sums = sums_of[queue] or sums_for(queue)
  local times = sums[what]
  if not times then
    times = {us = 0}
    sums[what] = times
  end
  local bound
  if ms <= 1000 then
    ms = ms > 0 and ms or 0
    bound = ms <= 10 and '10' or ms <= 50 and '50' or ms <= 100 and '100' or ms <= 500 and '500' or '1000'
  else
    bound = ms <= 5000 and '5000' or ms <= 15000 and '15000' or ms <= 60000 and '60000' or
      ms <= 300000 and '300000' or ms <= 1800000 and '1800000' or ms <= 7200000 and '7200000' or
      ms <= 43200000 and '43200000' or 'inf'
  end
  times[bound], times.us = (times[bound] or 0) + 1, times.us + ms * 1000
end

local write_sums

-- Whether that queue has a record of its own; a new one gets it while there are few.
local function has_history(base)
  if redis.pcall('ZSCORE', K.HISTORIES, base) then
    return true
  end
  return redis.call('ZCARD', K.HISTORIES) < MOST_HISTORIES and redis.call('ZADD', K.HISTORIES, NOW_MS, base) == 1
end

-- Returns whether that was not there before.
local function add(record, what, n)
  n = n - n % 1
  local total = redis.pcall('HINCRBY', record, what, digits[n])
  if type(total) == 'table' then -- damaged; ours alone
    redis.call('DEL', record)
    total = redis.call('HINCRBY', record, what, digits[n])
  end
  return total == n
end

function write_sums(base, sums)
  local record, is_new = key('history', base), false
  for what, n in pairs(sums) do
    if type(n) == 'number' then
      is_new = add(record, what, n) or is_new
    else
      for bound, times in pairs(n) do
        is_new = add(record, what .. ':' .. bound, times) or is_new
      end
    end
  end
  if is_new and base ~= OTHER_QUEUES and not has_history(base) then
    redis.call('DEL', record)
    write_sums(OTHER_QUEUES, sums)
  end
end

local function write_history()
  for _, base in ipairs(counted) do
    write_sums(base, sums_of[base])
  end
end

-- Why an attempt failed, as one of the few kinds of broker/history.py.
local function kind_of_failure(status, ended)
  local reason = ended.reason or ''
  local function begins(words)
    return string.sub(reason, 1, #words) == words
  end
  if status == 'stopped' then
    return 'stopped'
  elseif begins('WorkerLost: ') then
    return 'worker_lost'
  elseif begins('OutOfMemory: ') then
    return 'out_of_memory'
  elseif begins('Timeout: ') or string.find(reason, '^[%w_.]*JobTimeoutException') then
    return 'timeout'
  elseif begins('exit code ') then
    return 'exit_code'
  elseif begins('killed by ') or begins('Killed: ') then
    return 'signal'
  elseif not ended.duration or begins('ResultTooLarge: ') or begins('ResultRefused: ') then
    return 'other'
  end
  return 'exception'
end

local as_json = {}

-- A text, or nil, as JSON; for what a call says again and again.
local function json(text)
  text = text or cjson.null
  as_json[text] = as_json[text] or cjson.encode(text)
  return as_json[text]
end

-- One more in `fleet:counters`, of what belongs to no queue.
local function count(what)
  redis.call('HINCRBY', K.COUNTERS, what, 1)
end

-- Put a token where an idle worker of the queue waits. One is enough: who pops it rings again
-- if it leaves jobs behind.
local function ring(queue)
  local bell = key('wake', queue)
  local length = try('LLEN', bell)
  if not length then
    redis.call('DEL', bell) -- ours alone
  end
  if (length or 0) == 0 then
    redis.call('RPUSH', bell, '1')
  end
end

local minutes = {} -- times of one call lie close together

-- A minute as RQ writes it, in milliseconds since 1970, or false. Civil date to days after H. Hinnant.
local function ms_of_minute(text)
  local y, m, d, hour, minute = string.match(text, '^(%d%d%d%d)-(%d%d)-(%d%d)[T ](%d%d):(%d%d)$')
  if not y then
    return false
  end
  y, m = tonumber(y), tonumber(m)
  y = m <= 2 and y - 1 or y
  local era = math.floor(y / 400)
  local yoe = y - era * 400
  local doy = math.floor((153 * (m > 2 and m - 3 or m + 9) + 2) / 5) + d - 1
  local days = era * 146097 + yoe * 365 + math.floor(yoe / 4) - math.floor(yoe / 100) + doy - 719468
  return ((days * 24 + hour) * 60 + minute) * 60000
end

-- A time as RQ writes it, in milliseconds since 1970; nil for anything else.
local function ms_of(text)
  text = text or ''
  local minute, second = string.sub(text, 1, 16), tonumber(string.match(text, '^:([%d.]+)', 17))
  if minutes[minute] == nil then
    minutes[minute] = ms_of_minute(minute)
  end
  return minutes[minute] and second and minutes[minute] + math.floor(second * 1000) or nil
end

-- Since when a job waits, ms; if it does not say, since now.
local function waits_since(id)
  local at = redis.pcall('HGET', key('job', id), 'enqueued_at')
  return type(at) == 'string' and ms_of(at) or NOW_MS
end

local heads_by_queue = {}

-- Where the first job of a sublist `BASE@DIGEST` is noted, and under which name: a list of a key and the
-- digest. false for any other list, and for a sublist of a set that nobody knows.
local function heads_of(queue)
  local found = heads_by_queue[queue]
  if found == nil then
    local base, digest = string.match(queue, '^([^@]*)@(.*)$')
    local set = base and try('HGET', key('sets', base), digest)
    found = set and {key('heads', base, string.match(set, '"priority":(-?%d+)') or '0'), digest} or false
    heads_by_queue[queue] = found
  end
  return found
end

-- `how`: LT: where what is noted is younger, or none is; NX: where none is; CH: in any case.
local function write_head(heads, how, since_ms)
  if not try('ZADD', heads[1], how, since_ms, heads[2]) then
    redis.call('DEL', heads[1]) -- ours alone, and a hint
    redis.call('ZADD', heads[1], since_ms, heads[2])
  end
end

-- A job that waits since then was put at the end, or at the front, of a list.
local function note_head(queue, since_ms, front)
  local heads = heads_of(queue)
  if heads then
    write_head(heads, front and 'LT' or 'NX', since_ms)
  end
end

-- Note which job of a sublist is the first, for it was pushed or taken by somebody who did not.
-- Returns since when that one waits, ms; nil if there is none.
local function look_at_head(queue)
  local heads = heads_of(queue)
  local first = redis.pcall('LINDEX', key('queue', queue), 0)
  local since = type(first) == 'string' and waits_since(first) or nil
  if heads and since then
    write_head(heads, 'CH', since)
  elseif heads then
    try('ZREM', heads[1], heads[2])
  end
  return since
end

-- Jobs were put at the end of a list.
local function announce(queue)
  note_head(queue, NOW_MS, false)
  ring(queue)
end

-- Tell the workers of a set: `canonical` is what it asks for, nil where it is gone. Versions are counted from the
-- time on, so that those after a loss are like none before it.
local function tell_of_set(base, digest, canonical)
  redis.call('SET', K.SETS_VERSION, digits[NOW_MS], 'NX')
  local version = redis.call('INCR', K.SETS_VERSION)
  redis.call('PUBLISH', K.NEWS, cjson.encode({version = version, base = base, digest = digest, set = canonical}))
end

-- What jobs of a sublist ask for; of a set that is new the workers hear at once. Returns whether it is.
local function add_set(base, digest, canonical)
  local is_new = redis.call('HSETNX', key('sets', base), digest, canonical) == 1
  if is_new then
    redis.call('SADD', K.QUEUES, key('queue', base)) -- RQ's tools find workers by the queues they know
    tell_of_set(base, digest, canonical)
  end
  return is_new
end

local function schedule(id, queue, delay_seconds, ttl)
  redis.call('HSET', key('job', id), 'status', 'scheduled')
  try('ZADD', key('scheduled', queue), string.format('%.3f', NOW_MS / 1000 + delay_seconds), id)
  redis.call('SADD', K.QUEUES, key('queue', queue))
  if number(ttl, 0) > 0 then
    redis.call('EXPIRE', key('job', id), number(ttl))
  end
end

-- One that `returns` was given out before, and waits as long as it did.
local function enqueue(id, queue, front, ttl, returns)
  local job, since = key('job', id), nil
  if returns then
    redis.call('HSET', job, 'status', 'queued')
    since = heads_of(queue) and ms_of(redis.call('HGET', job, 'enqueued_at'))
  else
    redis.call('HSET', job, 'status', 'queued', 'enqueued_at', NOW)
  end
  redis.call('HSETNX', job, 'timeout', RQ_TIMEOUT)
  if not try(front and 'LPUSH' or 'RPUSH', key('queue', queue), id) then
    schedule(id, queue, MEND_SECONDS, ttl) -- the queue's key is no list: until somebody has mended it
    return
  end
  redis.call('SADD', K.QUEUES, key('queue', queue))
  if number(ttl, 0) > 0 then
    redis.call('EXPIRE', job, number(ttl))
  end
  note_head(queue, since or NOW_MS, front)
  ring(queue)
end

-- RQ's three records of a running job: written together here, removed together below.
local function mirror(id, queue, execution, worker)
  later('ZADD', key('wip', queue), FAR_SECONDS, id .. ':' .. execution)
  try('HSET', key('execution', id, execution),
    'id', execution, 'created_at', NOW_SECONDS, 'last_heartbeat', NOW_SECONDS, 'worker_name', worker)
  try('ZADD', key('executions', id), FAR_SECONDS, execution)
end

local function unmirror(id, queue, execution)
  later('ZREM', key('wip', queue), id .. ':' .. execution)
  delete_later(key('execution', id, execution))
  try('ZREM', key('executions', id), execution)
end

local function execution_of(lease)
  return string.match(lease, ':(.*)$') or ''
end

-- Take the lease away from whoever holds it; the job's next state is the caller's to write, and with it
-- that its fleet_lease is ''.
local function release(id, fields)
  local execution = execution_of(fields.fleet_lease)
  later('ZREM', K.LEASES, id)
  later('HDEL', key('worker_leases', fields.worker_name or ''), id)
  later('ZREM', key('wip', fields.origin or ''), id .. ':' .. execution)
  delete_later(key('execution', id, execution))
  delete_later(key('executions', id)) -- the only one: nobody runs a job but under its lease
end

-- The job's record of its attempts, with what became of this one.
local function attempts(fields, outcome, reason, started_at)
  local line = string.format('{"fence":"%s","worker":%s,"started_at":%s,"ended_at":"%s","outcome":"%s"%s}',
    string.match(fields.fleet_lease, '^%d*'), json(fields.worker_name), json(started_at), NOW, outcome,
    reason and ',"reason":' .. cjson.encode(reason) or '')
  local text = fields.fleet_attempts and (fields.fleet_attempts .. '\n' .. line) or line
  while #text > ATTEMPTS_BYTES and string.find(text, '\n', 1, true) do
    text = string.sub(text, string.find(text, '\n', 1, true) + 1)
  end
  return text
end

-- When an attempt ended, its callbacks not counted, and when it began, if it did: both as text and as
-- seconds; by Redis's clock and the worker's stopwatch.
local function tell_times(ended)
  if ended.ended_at then
    return
  end
  local ms = NOW_EXACT_MS - (ended.callback or 0) * 1000
  ended.ended_at, ended.ended_unix = NOW, NOW_UNIX
  if ended.callback then
    ended.ended_at, ended.ended_unix = iso(ms)
  end
  ended.began_unix = ended.ended_unix
  if ended.duration then
    ended.began_at, ended.began_unix = iso(ms - ended.duration * 1000)
  end
end

-- What an earlier run let expire may have to stay.
local function keep_results(id, ttl)
  if ttl < 0 then
    redis.call('PERSIST', key('results', id))
  elseif ttl > 0 then
    redis.call('EXPIRE', key('results', id), digits[ttl])
  end
end

local KINDS = {'job', 'output', 'dependencies', 'dependents'}

-- Keep a job that ended for `ttl` seconds; 0: not at all, negative: for ever. `kinds` are the keys it has.
local function keep(id, fields, ttl, kinds)
  if ttl == 0 then
    if fields.group_id and fields.group_id ~= '' then
      try('SREM', key('group', fields.group_id), id)
    end
    redis.call('DEL', key('job', id), key('dependents', id), key('dependencies', id),
      key('results', id), key('output', id), key('executions', id))
  elseif ttl > 0 then
    for _, kind in ipairs(kinds or KINDS) do
      redis.call('EXPIRE', key(kind, id), digits[ttl])
    end
  end
  keep_results(id, ttl)
end

local function add_to(registry, queue, id, ttl)
  if ttl ~= 0 then
    later('ZADD', key(registry, queue), ttl < 0 and '+inf' or digits[math.floor(NOW_MS / 1000 + ttl)], id)
  end
end

-- Jobs that wait for others. Those that only RQ knows wait as RQ has it. One of ours says in its hash what
-- it wants where a job that it waits for ends otherwise: `fleet_on_failed_dependency` fail (it fails, too)
-- or wait, and in `fleet_after_any` which jobs may end as they like. A job that failed so is looked at again
-- whenever one that it waited for is run again, or ends.

local LOOKS = 200 -- dependents that one call looks at; a chore goes on with the others
local GATE = '^gate:' -- what stands for the rest of a submission in parts: broker/submit.py
local ENDED = {finished = true, failed = true, stopped = true, canceled = true}
local ENDS = {failed = ' failed', stopped = ' was stopped', canceled = ' was canceled'}

-- Whether a dependent of RQ's waits for nothing more, now that `parent` ended in `status`.
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

-- The status of a job, or nil: it is gone.
local function status_of(id)
  local status = redis.pcall('HGET', key('job', id), 'status')
  return type(status) == 'string' and status or nil
end

local function words(text)
  local found = {}
  for word in string.gmatch(text or '', '%S+') do
    found[word] = true
  end
  return found
end

-- A client of RQ may have canceled a job that runs: its worker ends it when it hears of that.
local function is_being_ended(id, state)
  return state == 'canceled' and tonumber(redis.call('ZSCORE', K.LEASES, id) or 0) > NOW_MS
end

-- What a job of ours is to do as far as `other` goes, which may have just ended in `status`: 'met', 'wait', or
-- 'fail', with the state of that one, nil: it is gone. What need not be waited for any more is forgotten, for
-- it may be gone tomorrow.
local function judge_one(job, other, status)
  local state = status_of(other)
  if status == 'finished' or not state then
    state = status
  end
  if is_being_ended(other, state) then
    return 'wait'
  elseif state == 'finished' or (job.any[other] and (not state or ENDED[state])) then
    redis.call('SREM', key('dependencies', job.id), other)
    return 'met'
  elseif not state or (ENDED[state] and (job.on_failed == 'fail' or string.find(other, GATE))) then
    return 'fail', state
  end
  return 'wait'
end

-- The same for all that it waits for, with the one to blame: most often it waits for many, and the first look
-- finds one that runs. `parent`, if one is given, just ended in `status`.
local function judge(job, parent, status)
  local waits_for = key('dependencies', job.id)
  if parent and redis.pcall('SISMEMBER', waits_for, parent) == 1 then
    local verdict, how = judge_one(job, parent, status)
    if verdict == 'fail' then
      return verdict, parent, how
    end
    for _, other in ipairs(redis.call('SRANDMEMBER', waits_for, 8)) do
      if not job.has_failed and judge_one(job, other) == 'wait' then
        return 'wait'
      end
    end
  end
  local verdict, culprit, how = 'met', nil, nil
  for _, other in ipairs(redis.pcall('SMEMBERS', waits_for)) do
    local found, state = judge_one(job, other)
    if found == 'fail' and (verdict ~= 'fail' or string.find(other, GATE)) then
      verdict, culprit, how = found, other, state
    elseif found == 'wait' and verdict == 'met' then
      verdict = found
    end
  end
  return verdict, culprit, how
end

-- Have a job wait for `parent`, and that one know of it for as long as it is kept.
local function await(id, parent)
  try('SADD', key('dependencies', id), parent)
  try('SADD', key('dependents', parent), id)
  local ttl = redis.call('TTL', key('job', parent))
  if ttl > 0 then
    redis.call('EXPIRE', key('dependents', parent), digits[ttl])
  end
end

local to_look = {} -- {dependent, parent, status of that}

-- Returns whether there are any.
local function look_at_dependents(parent, status)
  local found = redis.pcall('SMEMBERS', key('dependents', parent))
  for _, id in ipairs(found) do
    to_look[#to_look + 1] = {id, parent, status}
  end
  return #found > 0
end

local function defer(id, queue)
  redis.call('HSET', key('job', id), 'status', 'deferred')
  try('ZADD', key('deferred', queue), NOW_SECONDS, id)
  redis.call('SADD', K.QUEUES, key('queue', queue))
end

local function fail_dependent(id, queue, failure_ttl, culprit, how)
  try('ZREM', key('deferred', queue), id)
  if string.find(culprit, GATE) then
    keep(id, {}, 0) -- as if it had never been; all that wait for it are behind that gate, too
    return
  end
  local reason = 'dependency ' .. culprit .. (ENDS[how] or ' is gone')
  local ttl = number(failure_ttl, RQ_FAILURE_TTL)
  redis.call('HSET', key('job', id), 'status', 'failed', 'ended_at', NOW, 'exc_info', reason,
    'fleet_reason', reason, 'fleet_dependency', culprit)
  tally(queue, 'failed:dependency')
  if ttl ~= 0 then
    try('ZADD', key('failed', queue), ttl < 0 and '+inf' or digits[math.floor(NOW_MS / 1000 + ttl)], id)
  end
  look_at_dependents(id, 'failed')
  keep(id, {}, ttl)
end

-- A job that failed for its parents is as it was before.
local function forgive(id, queue)
  try('ZREM', key('failed', queue), id)
  redis.call('HSET', key('job', id), 'ended_at', '', 'exc_info', '')
  redis.call('HDEL', key('job', id), 'fleet_reason', 'fleet_dependency')
  for _, kind in ipairs({'job', 'dependents', 'dependencies'}) do
    redis.call('PERSIST', key(kind, id))
  end
  look_at_dependents(id, 'deferred')
end

local function unblock(id, queue, front, ttl, parent)
  try('ZREM', key('deferred', queue), id)
  if parent then
    try('SREM', key('dependents', parent), id)
  end
  enqueue(id, queue, front, ttl)
end

local DEPENDENT = {'status', 'origin', 'enqueue_at_front', 'ttl', 'allow_dependency_failures',
  'fleet_on_failed_dependency', 'fleet_after_any', 'fleet_dependency', 'started_at', 'failure_ttl'}

-- Move a job of ours that waits, or failed for its parents, if there is reason to.
local function look_at_ours(job, queue, f, parent, status)
  if job.has_failed and ENDS[status] then
    return -- it is no better off
  end
  local verdict, culprit, how = judge(job, parent, status)
  if verdict == 'fail' then
    if not job.has_failed then
      fail_dependent(job.id, queue, f[10], culprit, how)
    end
    return
  elseif job.has_failed then
    forgive(job.id, queue)
    defer(job.id, queue)
  end
  if verdict == 'met' then
    unblock(job.id, queue, f[3] == '1', f[4], parent)
  end
end

local function look(id, parent, status)
  local f = redis.pcall('HMGET', key('job', id), unpack(DEPENDENT))
  local state, queue, on_failed = f[1], f[2], f[6]
  local has_failed = state == 'failed' and f[8] and f[9] == ''
  if not queue or (state ~= 'deferred' and not has_failed) then
    return
  elseif on_failed then
    local job = {id = id, on_failed = on_failed, any = words(f[7]), has_failed = has_failed}
    look_at_ours(job, queue, f, parent, status)
  elseif is_met(id, parent, status, f[5] == '1') then
    unblock(id, queue, f[3] == '1', f[4], parent)
  end
end

local looks = 0

-- Look at those whose turn it is, and at those that follow from it; what is too much stays for later calls.
local function work_off()
  local at = 1
  while to_look[at] and looks < LOOKS do
    looks = looks + 1
    look(unpack(to_look[at], 1, 3))
    at = at + 1
  end
  for i = at, #to_look do
    later('RPUSH', K.SETTLING, cjson.encode(to_look[i]))
  end
  to_look = {}
end

local without_dependents = {} -- jobs of which that is known

-- Learn of many jobs at once that they have no dependents: of most, and one question is enough.
local function look_for_dependents(ids)
  local names = {}
  for i, id in ipairs(ids) do
    names[i] = key('dependents', id)
  end
  if #names > 0 and #names < MOST_ARGUMENTS and redis.call('EXISTS', unpack(names)) == 0 then
    for _, id in ipairs(ids) do
      without_dependents[id] = true
    end
  end
end

-- A job ended in `status`: those that waited for it are queued, or fail, now. Returns whether there are any.
local function enqueue_dependents(parent, status)
  if without_dependents[parent] or not look_at_dependents(parent, status) then
    return false
  end
  work_off()
  return true
end

local RESULT_TYPES = {finished = '1', failed = '2', stopped = '2', retried = '4', exhausted = '5'}

-- One entry of rq:results:ID, as rq.results.Result reads it. Strings come ready encoded.
local function add_result(id, fields, kind, ended)
  local entry = {'type', RESULT_TYPES[kind], 'worker_name', fields.worker_name or '',
    'execution_id', execution_of(fields.fleet_lease), 'execution_ended_at', ended.ended_unix,
    'execution_started_at', ended.began_unix}
  if ended.return_value or ended.exc_string then
    entry[11] = ended.return_value and 'return_value' or 'exc_string'
    entry[12] = ended.return_value or ended.exc_string
  end
  if fields.fleet_attempts then
    try('XADD', key('results', id), 'MAXLEN', '~', '10', '*', unpack(entry))
  else -- the first
    try('XADD', key('results', id), '*', unpack(entry))
  end
end

-- The keys of a job whose attempt is over, for `keep`: a call for each that it has not would cost as much.
local function kinds_of(fields, ended, has_dependents)
  local kinds = {'job'}
  if ended.stdout_end or ended.stderr_end or fields.fleet_attempts then
    table.insert(kinds, 'output')
  end
  if fields.dependency_ids then
    table.insert(kinds, 'dependencies')
  end
  if has_dependents then
    table.insert(kinds, 'dependents')
  end
  return kinds
end

-- The fields of a job whose attempt is over.
local function stamp(id, fields, ended, status, outcome)
  tell_times(ended)
  local began = ended.began_at or fields.started_at -- or when it was claimed
  if fields.fleet_attempts or fields.fleet_losses or fields.fleet_stop then -- of earlier attempts
    redis.call('HDEL', key('job', id),
      'fleet_losses', 'fleet_stop', 'fleet_reason', 'fleet_exit_code', 'fleet_usage')
  end
  local changes = {'status', status, 'fleet_lease', '', 'ended_at', ended.ended_at,
    'started_at', began or NOW, 'fleet_attempts', attempts(fields, outcome, ended.reason, began)}
  local last = #changes
  if ended.usage and ended.usage ~= '' then
    changes[last + 1], changes[last + 2] = 'fleet_usage', ended.usage
    last = last + 2
  end
  if ended.reason or ended.exit_code then
    changes[last + 1], changes[last + 2] = 'fleet_reason', ended.reason or ''
    changes[last + 3], changes[last + 4] = 'fleet_exit_code', ended.exit_code or ''
  end
  redis.call('HSET', key('job', id), unpack(changes))
end

-- The attempt is over and the job is not.
local function leave(id, fields, outcome, ended)
  tell_times(ended)
  release(id, fields)
  redis.call('HSET', key('job', id), 'fleet_lease', '',
    'fleet_attempts', attempts(fields, outcome, ended.reason, ended.began_at or fields.started_at))
  task_moves(id, fields, 'running', 'waiting')
end

-- Back to a queue, to be run again.
local function give_back(id, fields, outcome, ended, front)
  leave(id, fields, outcome, ended)
  if outcome == 'handed-back' then
    tally(fields.origin, 'handed_back')
  end
  enqueue(id, fields.origin, front, fields.ttl, outcome ~= 'failed')
end

local function repeat_it(id, fields, left)
  local intervals = list(fields.repeat_intervals)
  local delay = intervals[left] or intervals[#intervals] or 0
  redis.call('HSET', key('job', id), 'repeats_left', left - 1)
  if delay > 0 then
    schedule(id, fields.origin, delay, fields.ttl)
  else
    enqueue(id, fields.origin, false, fields.ttl)
  end
end

local function settle_finished(id, fields, ended, default_ttl)
  local ttl = number(fields.result_ttl, default_ttl)
  local repeats = number(fields.repeats_left, 0)
  release(id, fields)
  stamp(id, fields, ended, 'finished', 'finished')
  if ttl ~= 0 then
    add_result(id, fields, 'finished', ended)
  end
  local has_dependents = enqueue_dependents(id, 'finished')
  if repeats > 0 then
    keep_results(id, ttl)
    repeat_it(id, fields, repeats)
  else
    task_moves(id, fields, 'running', 'finished')
    add_to('finished', fields.origin, id, ttl)
    keep(id, fields, ttl, kinds_of(fields, ended, has_dependents))
  end
end

-- For good: `status` is failed or stopped, `kind` what RQ calls the result.
local function settle_failed(id, fields, ended, status, kind, outcome)
  local ttl = number(fields.failure_ttl, RQ_FAILURE_TTL)
  release(id, fields)
  stamp(id, fields, ended, status, outcome or status)
  tally(fields.origin, 'failed:' .. kind_of_failure(status, ended))
  add_result(id, fields, kind, ended)
  task_moves(id, fields, 'running', status == 'failed' and 'failed' or 'canceled')
  add_to('failed', fields.origin, id, ttl)
  keep(id, fields, ttl, kinds_of(fields, ended, enqueue_dependents(id, status)))
end

local function run_again(id, fields, ended, delay, front)
  tally(fields.origin, 'retried:' .. kind_of_failure('failed', ended))
  if delay > 0 then
    leave(id, fields, 'failed', ended)
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
  redis.call('HSETNX', key('job', id), 'fleet_retries', left) -- for an operator's retry, which renews them
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
  tell_times(ended)
  add_result(id, fields, 'retried', ended)
  keep_results(id, number(fields.failure_ttl, RQ_FAILURE_TTL))
  redis.call('HSET', key('job', id), 'number_of_retries', done + 1)
  run_again(id, fields, ended, delay, false)
end

-- The attempt is lost with its worker: once more at once, but not without end.
local function lose(id, fields, ended, limit)
  local losses = number(fields.fleet_losses, 0) + (ended.uncounted and 0 or 1)
  tally(fields.origin, 'lost')
  if losses > limit then
    settle_failed(id, fields, ended, 'failed', 'failed', 'lost')
  else
    observe(fields.origin, 'recovered', NOW_MS - tonumber(redis.call('ZSCORE', K.LEASES, id) or NOW_MS))
    redis.call('HSET', key('job', id), 'fleet_losses', losses)
    give_back(id, fields, 'lost', ended, true)
  end
end
