-- Shared by every script: keys, the clock, and the moves of a job between its states.
--
--      submit, due, dependents met
--                 │
--                 ▼        claim           settle
--              queued ───────────▶ started ───────▶ finished | failed | stopped
--                 ▲                   │
--                 └───────────────────┘  give_back: retry, handed back, lost
--
-- `K` holds the keys of broker/keys.py that are one each, and `key` the others. A job is only ever moved by a script that
-- has just read its hash, found it in the state it expects and, where it is started, found
-- the lease that the caller names: whoever comes late changes nothing.

local FAR_MS = 31536000000      -- scores of RQ's mirror: finite, and no cleanup of RQ's reaches them
local ATTEMPTS_BYTES = 4096     -- what fleet_attempts may grow to
local MEND_SECONDS = 60         -- between two looks at whether a queue can take jobs again
local RQ_TIMEOUT = '180'        -- rq.Queue.DEFAULT_TIMEOUT, for jobs whose producer set none
local RQ_FAILURE_TTL = 31536000 -- rq.defaults.DEFAULT_FAILURE_TTL

local templates

-- The key of that kind for `a`, or for `a` and `b`. Where the kind is written down, this is not called: see
-- broker/scripts/__init__.py.
local function key(kind, a, b)
  templates = templates or key_templates()
  local parts = templates[kind]
  return parts[1] .. a .. (b and ':' .. b or parts[2])
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

-- A new call of that kind.
local function gather(command, where)
  local call = {command, where ~= '' and where or nil, size = where ~= '' and 2 or 1}
  local calls = gathered[command] or {}
  gathered[command], calls[where], order[#order + 1] = calls, call, call
  return call
end

local function later(command, where, a, b)
  local calls = gathered[command]
  local call = calls and calls[where]
  if not call or call.size > MOST_ARGUMENTS then
    call = gather(command, where)
  end
  local size = call.size + 1
  call[size] = a
  if b then
    size = size + 1
    call[size] = b
  end
  call.size = size
end

local function delete_later(where)
  later('DEL', '', where)
end

-- Tasks of arrays that this script moved, by array and 'FROM TO': _arrays.lua sees to it when the script ends.
local moved = {}

-- A job has gone from one place of its array to another, if it is a task.
local function task_moves(id, fields, from, to)
  local array = fields.fleet_array_of
  if array then
    arrays.touch_array(array)
    local way = from .. ' ' .. to
    local numbers = moved[array][way] or {}
    moved[array][way] = numbers
    numbers[#numbers + 1] = tonumber(string.sub(id, #array + 2)) or -1
  end
end

local function flush()
  if moved[1] then
    arrays.settle_arrays()
  end
  for _, call in ipairs(order) do
    local run = string.sub(call[2], 1, 6) == 'fleet:' and redis.call or try
    run(unpack(call, 1, call.size))
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

local READ_SELDOM = {}

-- Fields that only some moves of a job look at, read when the first of them is asked for.
function READ_SELDOM.__index(fields, wanted)
  local names = {
    'worker_name', 'started_at', 'ttl', 'failure_ttl', 'retries_left', 'retry_intervals',
    'number_of_retries', 'enqueue_at_front_on_retry', 'repeat_intervals', 'group_id',
  }
  local values = redis.call('HMGET', key('job', fields.id), unpack(names))
  for i, name in ipairs(names) do
    if rawget(fields, name) == nil then
      fields[name] = values[i]
    end
  end
  return rawget(fields, wanted)
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
  if lease and status ~= 'started' and lists.is_painted(id, status, origin or '') then
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

local minutes = {[string.sub(NOW, 1, 16)] = NOW_MS - NOW_MS % 60000} -- times of one call lie close together

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
  return string.sub(lease, (string.find(lease, ':', 1, true) or #lease) + 1)
end

-- Take the lease away from whoever holds it; the job's next state is the caller's to write, and with it
-- that its fleet_lease is ''.
local function release(id, fields)
  local execution = execution_of(fields.fleet_lease)
  local worker, queue = fields.worker_name or '', fields.origin or ''
  later('ZREM', K.LEASES, id)
  later('HDEL', key('worker_leases', worker), id)
  later('ZREM', key('wip', queue), id .. ':' .. execution)
  delete_later(key('execution', id, execution))
  delete_later(key('executions', id)) -- the only one: nobody runs a job but under its lease
end

-- The job's record of its attempts, with what became of this one; see broker/attempts.py. One that finished takes
-- less than 64 bytes: with a longer value Redis makes the job's hash a table, three times as large.
local function attempts(fields, outcome, ended)
  local fence, line = string.match(fields.fleet_lease, '^%d*'), nil
  if outcome == 'finished' then
    line = fence .. ' ' .. ended.began_unix .. ' ' .. ended.ended_unix .. ' ' .. (fields.worker_name or '')
  else
    line = '{"fence":"' .. fence .. '","worker":' .. json(fields.worker_name) ..
      ',"started_at":' .. json(ended.began_at or fields.started_at) .. ',"ended_at":"' .. NOW ..
      '","outcome":"' .. outcome ..
      (ended.reason and '","reason":' .. cjson.encode(ended.reason) .. '}' or '"}')
  end
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

-- Keep a job that ended for `ttl` seconds; 0: not at all, negative: for ever. If it is known which keys it has,
-- `ended` is given: a call for each that it has not would cost as much.
local function keep(id, fields, ttl, ended, has_dependents)
  if ttl == 0 then
    if fields.group_id and fields.group_id ~= '' then
      try('SREM', key('group', fields.group_id), id)
    end
    redis.call('DEL', key('job', id), key('dependents', id), key('dependencies', id),
      key('results', id), key('output', id), key('executions', id))
  elseif ttl > 0 then
    redis.call('EXPIRE', key('job', id), digits[ttl])
    if not ended or ended.stdout_end or ended.stderr_end or fields.fleet_attempts then
      redis.call('EXPIRE', key('output', id), digits[ttl])
    end
    if not ended or fields.dependency_ids then
      redis.call('EXPIRE', key('dependencies', id), digits[ttl])
    end
    if not ended or has_dependents then
      redis.call('EXPIRE', key('dependents', id), digits[ttl])
    end
  end
  keep_results(id, ttl)
end

local function add_to(registry, id, ttl)
  if ttl ~= 0 then
    later('ZADD', registry, ttl < 0 and '+inf' or digits[math.floor(NOW_MS / 1000 + ttl)], id)
  end
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
  if without_dependents[parent] or not dependents.look_at_dependents(parent, status) then
    return false
  end
  dependents.work_off()
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

-- The fields of a job whose attempt is over.
local function stamp(id, fields, ended, status, outcome)
  tell_times(ended)
  local began = ended.began_at or fields.started_at -- or when it was claimed
  if fields.fleet_attempts or fields.fleet_losses or fields.fleet_stop then -- of earlier attempts
    redis.call('HDEL', key('job', id),
      'fleet_losses', 'fleet_stop', 'fleet_reason', 'fleet_exit_code', 'fleet_usage')
  end
  local changes = {'status', status, 'fleet_lease', '', 'ended_at', ended.ended_at,
    'started_at', began or NOW, 'fleet_attempts', attempts(fields, outcome, ended)}
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
    setbacks.repeat_it(id, fields, repeats)
  else
    task_moves(id, fields, 'running', 'finished')
    add_to(key('finished', fields.origin), id, ttl)
    keep(id, fields, ttl, ended, has_dependents)
  end
end
