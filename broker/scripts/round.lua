-- Ends of attempts and the next claim, in one round trip.
--
-- KEYS  1 fleet:worker:W:beat  2 fleet:worker:W:leases  3 fleet:worker:W:drain  4 rq:worker:W
--       5 fleet:worker:W:ended
--       then for each queue, most urgent first: rq:queue:Q, fleet:wake:Q
-- ARGV  1 worker  2 incarnation  3 lease ms  4 result ttl s  5 losses limit
--       6 number of this claim, counted up by the worker  7 jobs wanted now
--       8 jobs wanted ahead of that  9 prefix for execution ids, unique to this call
--       10 finished, 11 failed, 12 seconds worked: this worker's totals before these ends
--       13 1 if it waits for signals and not for tokens, so that it must be woken should it stay idle
--       14 '' if it satisfies no set of requirements, else what it has free: see place.begin
--       15 lists of which it took tokens since its last claim, if it satisfies some
--       16 number of queues, then for each: its name, the sets of it that the worker satisfies: see levels_of
--       then for each end: job, lease, queue, outcome, seconds it took or '' if it never started, return
--       value or text of the exception, '' or JSON of what else there is, and '' or JSON of what it used;
--       if the former has stdout_end, then tail of stdout, tail of stderr
-- Returns {{outcome of each end: 1 accepted, 0 stale},
--          {{flat hash but for what was empty or is changed, then queue, job, lease} of each claim},
--          {fields that all claims changed},
--          1 if this incarnation is registered, 1 if draining, 1 if suspended,
--          1 if more may fit at once, name of the list for whose first job it is to hold room, or ''}
--
-- An end whose lease is not the job's newest changes nothing; one that the worker reports again, since
-- the reply to the last round was lost, is accepted without another change. A claim that finds a queue
-- empty takes its tokens away; one that leaves jobs behind rings for the next worker. A job that was
-- lost before is not claimed ahead: it may be what kills workers, and its neighbours must not suffer. Of those that
-- would fail if they were lost once more a worker has one at a time: the innocent among them outlive the others.
local worker, incarnation = ARGV[1], ARGV[2]
local lease_ms, result_ttl, limit = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local claim_number, wanted, ahead, prefix = ARGV[6], tonumber(ARGV[7]), tonumber(ARGV[8]), ARGV[9]
local finished, failed, worked = tonumber(ARGV[10]), tonumber(ARGV[11]), tonumber(ARGV[12])
local is_deaf, free, popped, queue_count = ARGV[13] == '1', ARGV[14], ARGV[15], tonumber(ARGV[16])
local first_end = 17 + 2 * queue_count

local function save_output(id, f, ended)
  if ended.stdout_end then
    try('HSET', key('output', id), 'lease', ended.lease, 'stdout', ended.stdout, 'stderr', ended.stderr,
      'stdout_end', ended.stdout_end, 'stderr_end', ended.stderr_end)
    redis.call('EXPIRE', key('output', id), result_ttl)
  elseif f.fleet_attempts then
    redis.call('DEL', key('output', id)) -- what an earlier attempt wrote is not this one's
  end
end

local RETURNS = {finished = true, retry = true}

-- The end whose arguments begin at that index, and where the next one's do.
local function read_end(at)
  local more = ARGV[at + 6]
  local ended = { -- made at once: a table that grows is made anew each time
    job = ARGV[at], lease = ARGV[at + 1], queue = ARGV[at + 2], outcome = ARGV[at + 3],
    duration = tonumber(ARGV[at + 4]), usage = ARGV[at + 7],
    ended_at = nil, ended_unix = nil, began_at = nil, began_unix = nil,
  }
  if more ~= '' then
    for name, value in pairs(cjson.decode(more)) do
      ended[name] = value
    end
  end
  if ARGV[at + 5] ~= '' then
    ended[RETURNS[ended.outcome] and 'return_value' or 'exc_string'] = ARGV[at + 5]
  end
  if not ended.stdout_end then
    return ended, at + 8
  end
  ended.stdout, ended.stderr = ARGV[at + 8], ARGV[at + 9]
  return ended, at + 10
end

local SETTLE = {
  finished = function(id, f, e) settle_finished(id, f, e, result_ttl) end,
  stopped = function(id, f, e) setbacks.settle_failed(id, f, e, 'stopped', 'stopped') end,
  retry = function(id, f, e) setbacks.retry_returned(id, f, e) end,
  lost = function(id, f, e) setbacks.lose(id, f, e, limit) end,
  ['handed-back'] = function(id, f, e) setbacks.give_back(id, f, 'handed-back', e, true) end,
  failed = function(id, f, e)
    if number(f.retries_left, 0) > 0 then
      setbacks.retry(id, f, e)
    else
      setbacks.settle_failed(id, f, e, 'failed', 'failed')
    end
  end,
}

-- Where the history has the times of attempts that came to an end of their own.
local TIMES = {finished = 'ran', failed = 'ran_in_vain', stopped = 'ran_in_vain', retry = 'ran_in_vain'}

local settled_before, accepted_leases = nil, {}

-- Whether the last round had this end already: its reply was lost on the way.
local function is_settled(ended)
  settled_before = settled_before or redis.call('GET', KEYS[5]) or ''
  return string.find(settled_before, ended.lease .. ' ', 1, true) ~= nil
end

-- The server may still list the attempt under this worker: it is over, whoever holds the job now.
local function refuse(ended)
  tally(ended.queue, 'stale')
  local held = redis.call('HGET', KEYS[2], ended.job)
  if held and string.sub(held, 1, #ended.lease) == ended.lease then
    redis.call('HDEL', KEYS[2], ended.job)
    unmirror(ended.job, ended.queue, execution_of(ended.lease))
  end
end

local function accept(ended)
  table.insert(accepted_leases, ended.lease .. ' ')
  if ended.outcome == 'finished' then
    finished = finished + 1
  elseif ended.outcome == 'failed' or ended.outcome == 'stopped' or ended.outcome == 'retry' then
    failed = failed + 1 -- a Retry that was returned too: RQ counts it so
  end
  worked = worked + (ended.duration or 0)
end

-- Returns 1 if the end counts, now or before.
local function settle(ended)
  local f = job_fields(ended.job)
  if not f or f.status ~= 'started' or f.fleet_lease ~= ended.lease then
    if is_settled(ended) then
      accept(ended)
      return 1
    end
    refuse(ended)
    return 0
  end
  f.worker_name, f.origin = worker, f.origin or ended.queue -- a late save() may have emptied them
  local times = TIMES[ended.outcome]
  if times and (ended.duration or ended.outcome == 'finished') then
    observe(f.origin, times, (ended.duration or 0) * 1000)
  end
  save_output(ended.job, f, ended)
  SETTLE[ended.outcome](ended.job, f, ended)
  accept(ended)
  return 1
end

local ENDED_OR_ELSEWHERE = {
  finished = true, failed = true, stopped = true, canceled = true, deferred = true, scheduled = true,
}

local function is_id(id)
  -- anything else is no id of RQ's: it cannot name a file, nor be spoken of as text
  return not (string.find(id, '/', 1, true) or string.find(id, '[^ -~]'))
end

-- Fields by which a claim is decided, and those that it writes: the worker knows these, and is not told.
local DECIDING = {status = true, fleet_lease = true, fleet_losses = true, enqueued_at = true, fleet_array = true,
  fleet_array_of = true, fleet_attempts = true, ended_at = true, ttl = true}
local WRITTEN = {status = true, fleet_lease = true, origin = true, worker_name = true, started_at = true,
  last_heartbeat = true}

-- What the hash of an id from a queue has for the worker, how often the job was lost, since when it waits (ms),
-- whether it is an array, or of which, and whether it may have a time to live - one that waits for so long or that has
-- ended before - if it stands for a job that waits; else nil. Not if it was deleted, ended, or is queued twice and
-- already runs; but 'started' without a lease is a job that somebody's late save() painted.
local function look_up(queue, id)
  local flat = is_id(id) and redis.pcall('HGETALL', key('job', id))
  if not flat or flat.err then
    count('damaged')
    if flat then
      add_to(key('failed', queue), id, RQ_FAILURE_TTL)
    end
    return nil
  end
  local status, lease, losses, since, is_array, array
  local may_expire = false
  local size, kept = #flat, 0
  for i = 1, size, 2 do
    local name, value = flat[i], flat[i + 1]
    if DECIDING[name] then
      if name == 'status' then
        status = value
      elseif name == 'enqueued_at' then
        since = value
      elseif name == 'fleet_lease' then
        lease = value
      elseif name == 'fleet_losses' then
        losses = value
      elseif name == 'fleet_array' then
        is_array = true
      elseif name == 'fleet_array_of' then
        array = value
      else
        may_expire = true
      end
    end
    if value ~= '' and not WRITTEN[name] then
      flat[kept + 1], flat[kept + 2] = name, value
      kept = kept + 2
    end
  end
  if size == 0 or ENDED_OR_ELSEWHERE[status] or (status == 'started' and lease and lease ~= '') then
    return nil
  end
  for i = size, kept + 1, -1 do
    flat[i] = nil
  end
  return flat, number(losses, 0), ms_of(since), is_array, array, may_expire
end

local lease_until = digits[NOW_MS + lease_ms]
-- What is true of every job that this call gives out; the worker knows the lease and the queue of each.
local GIVEN = {'status', 'started', 'worker_name', worker, 'started_at', NOW, 'last_heartbeat', NOW}

-- Give a job to this worker; `flat` is what look_up returns. Returns what is told of it.
local function give(queue, id, flat, fence, execution, may_expire)
  local job, lease = key('job', id), digits[fence] .. ':' .. execution
  if may_expire then
    redis.call('PERSIST', job)
  end
  redis.call('HSET', job, 'status', 'started', 'worker_name', worker, 'started_at', NOW,
    'last_heartbeat', NOW, 'fleet_lease', lease, 'origin', queue)
  later('ZADD', K.LEASES, lease_until, id)
  later('HSET', KEYS[2], id, lease .. ' ' .. claim_number)
  mirror(id, queue, execution, worker)
  local size = #flat
  flat[size + 1], flat[size + 2], flat[size + 3] = queue, id, lease
  return flat
end

local fence, last_fence = 0, 0

-- The next fence; they are taken for the whole call at once.
local function next_fence()
  if fence == last_fence then
    last_fence = redis.call('INCRBY', K.FENCE, wanted + ahead)
    fence = last_fence - wanted - ahead
  end
  fence = fence + 1
  return fence
end

-- Claim a job that waits since then, ms; nil: nobody knows.
local function claim(queue, id, flat, since, claims, may_expire)
  observe(queue, 'waited', NOW_EXACT_MS - (since or NOW_EXACT_MS))
  claims[#claims + 1] = give(queue, id, flat, next_fence(), prefix .. string.format('%04x', #claims), may_expire)
end

-- Claim the next tasks of an array; returns whether its entry is off the queue.
local function claim_array(queue, id, flat, since, claims, most)
  local tasks, has_left = arrays.claim_tasks(queue, id, flat, most - #claims)
  for _, task in ipairs(tasks) do
    claim(queue, task[1], task[2], since, claims)
  end
  return has_left
end

-- How far a claim from a list goes stand in `bounds`: until there are `most` claims in all, those after the first
-- `now` ahead of the slots; and no further than jobs that wait since `latest`, ms, if that is given. Then `next`
-- says at last since when the first job that is left waits; false: none is left; nil: that is not known.

local MOST_KEPT = 16 -- that one call passes by
local has_one, gave_one = nil, false -- whether this worker has a job that is at its last, and whether since this call

-- Whether this worker has a job that fails if it is lost once more; asked only where another is met.
local function has_a_last()
  if has_one == nil then
    has_one = false
    for _, id in ipairs(redis.call('HKEYS', KEYS[2])) do
      local losses = number(try('HGET', key('job', id), 'fleet_losses'), 0)
      has_one = has_one or losses > 0 and losses >= limit
    end
  end
  return has_one
end

-- Claim the first of `ids`, as many as are for us; returns how many of them are off the queue. Those that it passes by
-- for another time are among them, and in `bounds.kept`.
local function claim_these(queue, ids, claims, bounds)
  for i, id in ipairs(ids) do
    if #claims >= bounds.most then
      bounds.next = bounds.latest and lists.waits_since(id)
      return i - 1
    end
    local flat, losses, since, is_array, array, may_expire = look_up(queue, id)
    if flat and bounds.latest and (since or NOW_MS) > bounds.latest then
      bounds.next = i > 1 and (since or NOW_MS) or nil -- the first was not the one that had been noted
      return i - 1
    elseif is_array then
      if not claim_array(queue, id, flat, since, claims, bounds.most) then
        return i - 1
      end
    elseif flat and #claims >= bounds.now and losses > 0 then
      return i - 1
    elseif flat and losses > 0 and losses >= limit and has_a_last() then
      if #bounds.kept == MOST_KEPT then
        return i - 1
      end
      bounds.kept[#bounds.kept + 1] = id
    elseif flat and (not array or arrays.may_run_again(id, queue, array)) then
      claim(queue, id, flat, since, claims, may_expire)
      if losses > 0 and losses >= limit then
        has_one, gave_one = true, true
      end
    end
  end
  return #ids
end

-- Returns false where it is no list.
local function claim_within(bounds, queue, jobs, claims)
  local taken, ids = 0, {}
  bounds.kept = {}
  local one_more = bounds.latest and 1 or 0
  while #claims < bounds.most and taken == #ids do
    local count_asked = bounds.most - #claims + one_more
    ids = redis.pcall('LRANGE', jobs, 0, count_asked - 1)
    if ids.err then
      count('damaged') -- nobody's jobs
      return false
    elseif #ids == 0 then
      break
    end
    taken = claim_these(queue, ids, claims, bounds)
    redis.call('LTRIM', jobs, taken, -1)
    if taken == #ids and #ids < count_asked then
      bounds.next = false
      break
    end
  end
  for i = #bounds.kept, 1, -1 do
    redis.call('LPUSH', jobs, bounds.kept[i])
    bounds.next = nil
  end
  return true
end

local function claim_from(index, claims)
  local queue, jobs, bell = ARGV[15 + 2 * index], KEYS[4 + 2 * index], KEYS[5 + 2 * index]
  local bounds = {most = wanted + ahead, now = wanted}
  if not claim_within(bounds, queue, jobs, claims) then
    return
  end
  local length = try('LLEN', jobs)
  if length == 0 then
    redis.call('DEL', bell)
  elseif length and (length > #bounds.kept or gave_one) then -- for those kept the others are rung for once
    ring(queue)
  end
end

-- These are written last: were one of the wrong type, nothing of this round must be done.
for _, reply in ipairs({redis.pcall('ZCARD', K.LEASES), redis.pcall('HLEN', KEYS[2])}) do
  if type(reply) == 'table' then
    return redis.error_reply('DAMAGED ' .. K.LEASES .. ' or ' .. KEYS[2] .. ': ' .. reply.err)
  end
end

local ends, jobs = {}, {}
local at = first_end
while ARGV[at] do
  ends[#ends + 1], at = read_end(at)
  jobs[#jobs + 1] = ends[#ends].job
end
look_for_dependents(jobs)
local outcomes, alive = {}, redis.call('GET', KEYS[1]) == incarnation
for i, ended in ipairs(ends) do
  outcomes[i] = settle(ended)
end
flush()
if #accepted_leases > 0 then
  redis.call('SET', KEYS[5], table.concat(accepted_leases), 'PX', 4 * lease_ms)
end

local claims, more, reserved = {}, 0, ''

-- For place: returns how many jobs were claimed, since when the next waits, as `bounds` have it, and whether all that
-- was met is for others.
local function claim_some(queue, most, now, latest)
  local before = #claims
  local bounds = {most = before + most, now = before + now, latest = latest}
  claim_within(bounds, queue, key('queue', queue), claims)
  return #claims - before, bounds.next, bounds.kept[1] and not gave_one
end

local function claim_all()
  if free ~= '' then
    place.begin(free, worker, wanted, ahead, claim_some)
    place.heed(popped)
  end
  for index = 1, queue_count do
    local queue, sets = ARGV[15 + 2 * index], ARGV[16 + 2 * index]
    if redis.call('SISMEMBER', K.PAUSED, queue) == 1 then
      -- it gives out nothing
    elseif free == '' then
      claim_from(index, claims)
    else
      place.claim_from(queue, sets)
    end
  end
  if free ~= '' then
    more, reserved = place.finish()
  end
end

local draining, suspended = redis.call('EXISTS', KEYS[3]), redis.call('EXISTS', K.SUSPENDED)
if alive and wanted + ahead > 0 and draining == 0 and suspended == 0 then
  claim_all()
end
if is_deaf and #claims < wanted then
  redis.call('RPUSH', key('worker_signals', worker), '{}')
  redis.call('PEXPIRE', key('worker_signals', worker), 2 * lease_ms)
end
-- Whether RQ's tools can read what a job runs. They look for that of a worker's current job, and fail as a whole
-- where they cannot: commands are JSON, which broker/command.py compresses at level 1, as nobody else does.
local function is_function(told)
  for i = 1, #told - 3, 2 do
    if told[i] == 'data' then
      return string.sub(told[i + 1], 1, 2) ~= '\120\1'
    end
  end
end

if alive and (#claims > 0 or #outcomes > 0) then
  local last = claims[#claims]
  try('HSET', KEYS[4], 'successful_job_count', finished, 'failed_job_count', failed,
    'total_working_time', worked, unpack(last and {'state', 'busy', 'current_job', last[#last - 1]} or {}))
  if last and not is_function(last) then
    try('HDEL', KEYS[4], 'current_job')
  elseif not last and redis.call('HLEN', KEYS[2]) == 0 then
    try('HSET', KEYS[4], 'state', 'idle')
    try('HDEL', KEYS[4], 'current_job')
  end
end
return {outcomes, claims, GIVEN, alive and 1 or 0, draining, suspended, more, reserved}
