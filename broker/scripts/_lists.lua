-- Jobs into queues and their sublists, of which it is noted since when the first job waits; and where a job is listed.

-- RQ's Job.save() writes the status it knew, and a job under a lease may be painted with an old one.
-- It is true only where a client has put the job, too: in a queue, or in the registry of that name.
local function is_painted(id, status, queue)
  if status == 'queued' then
    return redis.pcall('LPOS', key('queue', queue), id) == false
  end
  local registries = {deferred = true, scheduled = true, canceled = true, finished = true, failed = true}
  return not registries[status] or redis.pcall('ZSCORE', key(status, queue), id) == false
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
  local version = redis.pcall('INCR', K.SETS_VERSION)
  if type(version) ~= 'number' then
    redis.call('SET', K.SETS_VERSION, digits[NOW_MS]) -- somebody wrote over it, and it is ours alone
    version = NOW_MS
  end
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

return {
  is_painted = is_painted, waits_since = waits_since, heads_by_queue = heads_by_queue, heads_of = heads_of,
  note_head = note_head, look_at_head = look_at_head, announce = announce, tell_of_set = tell_of_set,
  add_set = add_set, schedule = schedule, enqueue = enqueue,
}
