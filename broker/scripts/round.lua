-- Ends of attempts and the next claim, in one round trip.
--
-- KEYS  1 fleet:worker:W:beat  2 fleet:worker:W:leases  3 fleet:worker:W:drain  4 rq:worker:W
--       then for each queue, most urgent first: rq:queue:Q, fleet:wake:Q
-- ARGV  1 worker  2 incarnation  3 lease ms  4 result ttl s  5 losses limit
--       6 number of this claim, counted up by the worker  7 jobs wanted now
--       8 jobs wanted ahead of that  9 prefix for execution ids, unique to this call
--       10 finished, 11 failed, 12 seconds worked: this worker's totals before these ends
--       13 number of queues, then their names
--       then for each end: JSON {job, lease, queue, outcome, duration, ...}, tail of stdout,
--       tail of stderr (empty: nothing new)
-- Returns {{outcome of each end: 1 accepted, 0 stale}, {{queue, job, lease, flat hash} of each claim},
--          1 if this incarnation is registered, 1 if draining, 1 if suspended}
--
-- An end whose lease is not the job's newest changes nothing. A claim that finds a queue empty
-- takes its tokens away; one that leaves jobs behind rings for the next worker. A job that was lost
-- before is not claimed ahead: it may be what kills workers, and its neighbours must not suffer.
local worker, incarnation = ARGV[1], ARGV[2]
local lease_ms, result_ttl, limit = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local claim_number, wanted, ahead, prefix = ARGV[6], tonumber(ARGV[7]), tonumber(ARGV[8]), ARGV[9]
local finished, failed, worked = tonumber(ARGV[10]), tonumber(ARGV[11]), tonumber(ARGV[12])
local queue_count = tonumber(ARGV[13])
local first_end = 14 + queue_count

local function save_output(id, ended, out, err)
  if ended.stdout_end or ended.stderr_end then
    redis.call('HSET', key('output', id), 'lease', ended.lease, 'stdout', out, 'stderr', err,
      'stdout_end', ended.stdout_end or 0, 'stderr_end', ended.stderr_end or 0)
    redis.call('EXPIRE', key('output', id), result_ttl)
  else
    redis.call('DEL', key('output', id)) -- what an earlier attempt wrote is not this one's
  end
end

local SETTLE = {
  finished = function(id, f, e) settle_finished(id, f, e, result_ttl) end,
  stopped = function(id, f, e) settle_failed(id, f, e, 'stopped', 'stopped') end,
  retry = retry_returned,
  lost = function(id, f, e) lose(id, f, e, limit) end,
  ['handed-back'] = function(id, f, e)
    count('handed_back')
    give_back(id, f, 'handed-back', e, true)
  end,
  failed = function(id, f, e)
    if number(f.retries_left, 0) > 0 then
      retry(id, f, e)
    else
      settle_failed(id, f, e, 'failed', 'failed')
    end
  end,
}

-- The server may still list the attempt under this worker: it is over, whoever holds the job now.
local function refuse(ended)
  count('stale')
  local held = redis.call('HGET', KEYS[2], ended.job)
  if held and string.sub(held, 1, #ended.lease) == ended.lease then
    redis.call('HDEL', KEYS[2], ended.job)
    unmirror(ended.job, ended.queue, execution_of(ended.lease))
  end
end

local function tally(ended)
  if ended.outcome == 'finished' then
    finished = finished + 1
  elseif ended.outcome == 'failed' or ended.outcome == 'stopped' then
    failed = failed + 1
  end
  worked = worked + (ended.duration or 0)
end

local function settle(ended, out, err)
  local f = job_fields(ended.job)
  if not f or f.status ~= 'started' or f.fleet_lease ~= ended.lease then
    refuse(ended)
    return 0
  end
  f.worker_name, f.origin = worker, f.origin or ended.queue -- a late save() may have emptied them
  save_output(ended.job, ended, out, err)
  SETTLE[ended.outcome](ended.job, f, ended)
  return 1
end

local ENDED_OR_ELSEWHERE = {
  finished = true, failed = true, stopped = true, canceled = true, deferred = true, scheduled = true,
}

-- Whether an id from a queue stands for a job that waits. Not if it was deleted, ended, or is queued
-- twice and already runs; but 'started' without a lease is a job that somebody's late save() painted.
local function is_waiting(queue, id, job)
  if string.find(id, '[^ -~]') or string.find(id, '/', 1, true) then
    count('damaged') -- no id of RQ's: it cannot name a file, nor be spoken of as text
    return false
  end
  local f = redis.pcall('HMGET', job, 'status', 'fleet_lease')
  if f.err then
    count('damaged')
    add_to('failed', queue, id, RQ_FAILURE_TTL)
    return false
  end
  if not f[1] then
    return redis.call('EXISTS', job) == 1
  end
  return not ENDED_OR_ELSEWHERE[f[1]] and not (f[1] == 'started' and f[2])
end

-- Give `id` to this worker, if it is there and waiting.
local function claim_one(queue, id, execution)
  local job = key('job', id)
  if not is_waiting(queue, id, job) then
    return nil
  end
  local lease = string.format('%d', redis.call('INCR', K.FENCE)) .. ':' .. execution
  redis.call('HSET', job, 'status', 'started', 'worker_name', worker, 'started_at', NOW,
    'last_heartbeat', NOW, 'fleet_lease', lease, 'origin', queue)
  redis.call('PERSIST', job)
  redis.call('ZADD', K.LEASES, NOW_MS + lease_ms, id)
  redis.call('HSET', KEYS[2], id, lease .. ' ' .. claim_number)
  mirror(id, queue, execution, worker)
  return {queue, id, lease, redis.call('HGETALL', job)}
end

-- The id to look at next, taken from the queue, or nil if there is none or it is not for us.
local function take(jobs, claimed)
  if claimed >= wanted + ahead then
    return nil
  end
  if claimed >= wanted then
    local id = redis.call('LINDEX', jobs, 0)
    local losses = id and redis.pcall('HGET', key('job', id), 'fleet_losses')
    if type(losses) == 'string' and losses ~= '0' then
      return nil
    end
  end
  return redis.call('LPOP', jobs)
end

local function claim_from(index, claims)
  local queue, jobs, bell = ARGV[13 + index], KEYS[3 + 2 * index], KEYS[4 + 2 * index]
  local id = take(jobs, #claims)
  while id do
    local claim = claim_one(queue, id, prefix .. string.format('%04x', #claims))
    if claim then
      table.insert(claims, claim)
    end
    id = take(jobs, #claims)
  end
  if redis.call('LLEN', jobs) == 0 then
    redis.call('DEL', bell)
  else
    ring(queue)
  end
end

local outcomes, alive = {}, redis.call('GET', KEYS[1]) == incarnation
for i = first_end, #ARGV, 3 do
  local ended = cjson.decode(ARGV[i])
  local accepted = settle(ended, ARGV[i + 1], ARGV[i + 2])
  table.insert(outcomes, accepted)
  if accepted == 1 then
    tally(ended)
  end
end

local claims = {}
local draining, suspended = redis.call('EXISTS', KEYS[3]), redis.call('EXISTS', K.SUSPENDED)
if alive and wanted + ahead > 0 and draining == 0 and suspended == 0 then
  for index = 1, queue_count do
    if redis.call('SISMEMBER', K.PAUSED, ARGV[13 + index]) == 0 then
      claim_from(index, claims)
    end
  end
end
if alive and (#claims > 0 or #outcomes > 0) then
  local last = claims[#claims]
  redis.call('HSET', KEYS[4], 'successful_job_count', finished, 'failed_job_count', failed,
    'total_working_time', worked, unpack(last and {'state', 'busy', 'current_job', last[2]} or {}))
  if not last and redis.call('HLEN', KEYS[2]) == 0 then
    redis.call('HSET', KEYS[4], 'state', 'idle')
    redis.call('HDEL', KEYS[4], 'current_job')
  end
end
return {outcomes, claims, alive and 1 or 0, draining, suspended}
